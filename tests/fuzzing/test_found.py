"""Inputs that once ended in a traceback, in a library's words or without end, each refused in a sentence."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.commands.gallery import gallery
from mmalign.commands.load_recipe import _parse, load_recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.formats import images, responses
from mmalign.evaluation.annotations import image_id
from mmalign.evaluation.benchmarks import amber, chair, pope
from mmalign.families.loading import model_type, pipeline_class
from mmalign.language.objects import coco_vocabulary
from mmalign.training import checkpoint
from mmalign.training.export import read_run_info
from tests.fuzzing.readers import caches, checkpoints, evaluations, tables
from tests.fuzzing.readers.rows import IMAGES, RESPONSE_ROWS
from tests.fuzzing.rule import write
from tests.helpers.data_files import png, write_jsonl

DEEP = b"[" * 3000
RLHFV = {"image": "a.png", "text": "null"}
SAID: dict[str, Any] = {"image": "a.png", "chosen": RESPONSE_ROWS["trl"][1]["chosen"]}


@pytest.fixture(autouse=True)
def _images(tmp_path: Path) -> None:
    write(tmp_path, IMAGES)


@pytest.mark.parametrize(
    "content", [["a text"], "a text", 3, [3], [None], [["text"]], [{"type": "text", "text": 3}], [{"type": "audio"}]]
)
def test_contents_of_messages(content: object, tmp_path: Path) -> None:
    answers = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": content}]
    path = write_jsonl(tmp_path / "rows.jsonl", {**SAID, "rejected": answers})
    if content in ("a text", ["a text"]):
        responses.open_responses("trl", str(path))
        return
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: rejected holds"):
        responses.open_responses("trl", str(path))


@pytest.mark.parametrize("text", ["null", "3", "[]", '"a"', "[" * 3000, ""])
def test_texts_of_rlhfv(text: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**RLHFV, "text": text})
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: text is"):
        responses.open_responses("rlhfv", str(path))


def test_rlhfv_without_question_and_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {"image": "a.png", "question": None})
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: text is null"):
        responses.open_responses("rlhfv", str(path))


@pytest.mark.parametrize("tagged", ["!!timestamp a", "!!int a", "!!float []", "!!bool maybe", "!!binary é", "!!set 3"])
def test_tags_on_other_values(tagged: str) -> None:
    with pytest.raises(ValueError, match=r"r\.yaml: "):
        _parse(f"a: {tagged}", "r.yaml")


@pytest.mark.parametrize("ranks", [[1, None], [1, "b"], [1, float("nan")], [1, [2]], {"a": 1}])
def test_ranks(ranks: object, tmp_path: Path) -> None:
    row = {"prompt": "a fox", "image_path": ["a.png", "b.png"], "rank": ranks, "": 1}
    path = write_jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1"):
        images.open_pairs("rankings", str(path))


def test_rankings_without_second_prompts(tmp_path: Path) -> None:
    row = {"prompt": "a fox", "image_path": ["a.png", "b.png"], "rank": [1, 2], "": 1}
    path = write_jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match="with a prompt for the rejected image"):
        images.open_pairs("rankings", str(path), prompt_pairs="this method needs them")


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("caption", [{"a": 1}, {"a": 2}], "caption is"),
        ("caption", [1, 2], "caption is 1"),
        ("caption", [["a"], []], "caption is"),
        ("rejected_caption", [1, 2], "rejected_caption is 1"),
        ("has_label", ["no", "maybe"], 'has_label is "maybe"; expected a number'),
        ("label_0", ["a", None], 'label_0 is "a"; expected a number'),
        ("jpg_0", [{"bytes": "text"}, None], "has no image"),
        ("jpg_1", [{"bytes": png(0), "path": 3}] * 2, "is not an image"),
    ],
)
def test_types_of_columns(name: str, values: list[Any], reason: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({**tables.PICK, name: values}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"pairs.parquet: row 0: ") as refused:
        images.open_pairs("pick_a_pic", str(tmp_path / "pairs.parquet"))
    assert reason in str(refused.value)


def test_table_with_damaged_metadata(tmp_path: Path) -> None:
    write(tmp_path, tables.in_parquet(tables.PICK, {b"huggingface": b"{"}))
    with pytest.raises(ValueError, match=r"data.path: .*rows.parquet could not be read as one table"):
        images.open_pairs("pick_a_pic", str(tmp_path / "rows.parquet"))


ODD_IDS = ([1], {"a": 1}, None, True, 1.5)


@pytest.mark.parametrize("odd", ODD_IDS)
def test_ids_of_benchmarks(odd: object, tmp_path: Path) -> None:
    coco = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "dog"}]}
    for place, record in (
        ("categories", {"id": odd, "name": "cat"}),
        ("annotations", {"image_id": odd, "category_id": 1}),
        ("annotations", {"image_id": 1, "category_id": odd}),
    ):
        (tmp_path / "coco.json").write_text(json.dumps({"annotations": [], **coco, place: [record]}))
        with pytest.raises(ValueError, match=f"coco.json: {place} 1"):
            chair.read_coco([tmp_path / "coco.json"], [], coco_vocabulary("refined"))
    question = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"}
    asked = write_jsonl(tmp_path / "questions.jsonl", question)
    said = write_jsonl(tmp_path / "answers.jsonl", {"question_id": odd, "text": "Yes", "response": "Yes"})
    with pytest.raises(ValueError, match=r"answers.jsonl: line 1: question_id is"):
        pope.read_answers(said, pope.read_splits({"pope": asked})["pope"])
    with pytest.raises(ValueError, match=r"answers.jsonl: line 1: id is"):
        amber.read_responses(said)


def test_ids_of_many_digits() -> None:
    assert image_id("0" * 10 + "1" * 5000) == "1" * 5000


@pytest.mark.parametrize("content", [DEEP, b"[]", b'"a"', b"null", b"\xff", b'{"_class_name": [], "model_type": 3}'])
def test_indices_of_models(content: bytes, tmp_path: Path) -> None:
    for name, read in (("model_index.json", pipeline_class), ("config.json", model_type)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"model.path: .*{name}"):
            read(str(tmp_path))


def test_part_of_a_model_without_class(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": [], "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert pipeline_class(str(tmp_path)) == "StableDiffusionPipeline"


def shard_with(header: bytes, folder: Path) -> Path:
    write(folder, caches.CACHE)
    shard = next(folder.rglob("*.safetensors"))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return shard


@pytest.mark.parametrize("header", [b"[]", b'{"a|x": 3}', b'{"a|x": {"data_offsets": [0, 52]}}', DEEP, b"null"])
def test_damaged_header_of_a_shard(header: bytes, tmp_path: Path) -> None:
    shard = shard_with(header, tmp_path)
    assert len(ArrayCache.open(tmp_path, caches.PRINT)) == 0 and not shard.exists()


def test_tensors_that_are_not_of_a_cache(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [14], "data_offsets": [0, 56]}
    shard = shard_with(json.dumps({"a": entry}).encode(), tmp_path)
    with pytest.raises(ValueError, match=f"data.cache: {shard} is not a file of this cache; move it away"):
        ArrayCache.open(tmp_path, caches.PRINT)
    assert shard.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [(None, "a text"), (None, [1]), ("score", 10**400), ("score", "high"), ("step", -1), ("step", 3), ("hashes", {})],
)
def test_about_a_checkpoint(key: str | None, value: object, tmp_path: Path) -> None:
    write(tmp_path, checkpoints.SOUND)
    path = tmp_path / "checkpoint-00000002"
    content = json.loads((path / "checkpoint.json").read_text())
    changed = json.dumps(value if key is None else {**content, key: value})
    (path / "checkpoint.json").write_text(changed)
    assert checkpoint.latest(tmp_path, resumable=True) == path
    checkpoint.best(tmp_path)
    with pytest.raises(checkpoint.DamagedCheckpointError, match="checkpoint-00000002: is damaged"):
        checkpoint.read(path, checkpoints.IDENTITY)


@pytest.mark.parametrize("content", [b"{}", b"[]", b'"a"', DEEP, b'{"step": 1, "seconds": 1, "identity": {}}', b"\xff"])
def test_record_of_a_trained_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trained.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"trained.json: is damaged or of another version .*; train again"):
        read_run_info(tmp_path)


def test_damaged_byte_in_answers(tmp_path: Path) -> None:
    write(tmp_path, caches.ANSWERS)
    (book,) = tmp_path.glob("*.jsonl")
    content = bytearray(book.read_bytes())
    content[-8] = 0xFF
    book.write_bytes(content)
    with pytest.raises(ValueError, match=f"{book}: line 2 is damaged .*; delete it and the lines after it"):
        AnswerCache(tmp_path, caches.JOB)


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the recipe of a folder with a trained model and the evaluation of its images."""
    write(folder, evaluations.image_files(evaluations.SCENE))
    write(folder, {"model/trained.json": checkpoints.TRAINED})
    monkeypatch.setattr("mmalign.commands.gallery.is_evaluated", lambda *_, **__: True)
    return load_recipe({**evaluations.RECIPES["images"], "output": str(folder)})


def test_samples_that_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, file = evaluated(tmp_path, monkeypatch), tmp_path / "evaluation" / "samples.json"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"samples.json: is damaged .*; run `mmalign evaluate`"):
        gallery(recipe)


def test_picture_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, file = evaluated(tmp_path, monkeypatch), tmp_path / "evaluation" / "after" / "00001.png"
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: cannot be read .*; run `mmalign evaluate`"):
        gallery(recipe)


def test_no_room_to_fingerprint_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            raise Exception("File too large (os error 27)")  # as the library tokenizers does

    with pytest.raises(ValueError, match=f"{tempfile.gettempdir()}: .*; free some space, or set TMPDIR"):
        fingerprint.fingerprint_files(Tokenizer())
