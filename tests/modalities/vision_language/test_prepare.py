"""True answers become files of pairs that the readers read, and a stop in the middle changes nothing."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import mmalign
from mmalign.commands import prepare
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import DecodingConfig
from mmalign.data.caches.journal import AppendLog
from mmalign.data.formats.responses import open_responses
from mmalign.data.images import decode
from mmalign.data.pairs import ResponsePair
from mmalign.families.types import GeneratedText
from mmalign.language.objects import coco_vocabulary
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import ResponseSampler
from mmalign.synthesis.rejected_responses import ImageIndex
from tests.commands.test_export import adapted
from tests.helpers import Folders, data_files
from tests.helpers.loading import load_vlm
from tests.helpers.preparation import ANSWERS, FEW, OWN, REALIGN, answers, prepared, refused, text


def test_bdhs_writes_what_dpo_reads(content: Any, tmp_path: Path) -> None:
    rows, responses = prepared(content("bdhs"))
    pairs = open_responses("trl", str(tmp_path / "made.jsonl"))
    assert len(pairs) == len(rows) == len(ANSWERS)
    for pair, true in zip(pairs, ANSWERS, strict=True):
        assert pair.chosen == true != pair.rejected and pair.images[0].read()
        assert pair.turns[0].text == "<image>What is it?"
    assert responses[-1].startswith(f"{tmp_path / 'made.jsonl'}: 7 pairs of 7 answers; taken at try 1: ")
    assert "similarity by trigrams (embedded" in responses[-1]
    assert not list(tmp_path.glob("made*unfinished"))


def test_the_model_s_own_answers_are_those_that_it_gives(content: Any, vlm_folders: Folders, tmp_path: Path) -> None:
    """Rejected is what the model says of picture and question alone, greedily; the true answer is never shown to it."""
    rows, responses = prepared(content("own"))
    assert responses[-1].startswith(f"{tmp_path / 'made.jsonl'}: 7 pairs of 7 answers, in ")
    family = load_vlm(vlm_folders("llava"))
    for row, pair in zip(rows, open_responses("trl", str(tmp_path / "made.jsonl")), strict=True):
        view = family.processor.preprocess_image(decode(pair.images[0]))
        prompt = family.processor.tokenize_prompt(pair.turns, [("it", view)])
        features = family.encode_images({"it": view})
        decoding = DecodingConfig(max_new_tokens=4)
        (own,) = family.generate(family.network, [prompt], features, decoding, rows=[0], rng=KeyedRNG(1))
        assert pair.rejected == own.text.strip() != pair.chosen
        assert row["provenance"]["settings"] == {"max_new_tokens": 4, "temperature": 0.0, "batch_size": 3}


def test_own_answers_are_those_of_the_adapter_to_continue(content: Any, vlm_folders: Folders, tmp_path: Path) -> None:
    first = adapted(load_vlm(vlm_folders("llava")))
    first.export(tmp_path / "adapter", first.network, "peft", None)
    bare, _ = prepared(content("own"))
    continued = content("own")
    del continued["model"]["lora"]  # the adapter has its own rank
    continued["model"] |= {"tune": "lora", "adapter": {"path": str(tmp_path / "adapter"), "use": "continue"}}
    continued["data"]["path"] = str(tmp_path / "continued.jsonl")
    rows, _ = prepared(continued)
    assert [row["rejected"] for row in rows] != [row["rejected"] for row in bare]


def test_answers_that_the_limit_cuts_are_left_out(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without a whole sentence is dropped, and one with some ends after the last of them."""
    rows, lines = prepared(content("own"))
    assert any(line.startswith(f"{len(rows)} of 7 generated responses are cut at max_new_tokens") for line in lines)
    message = refused(content("own", "whole.jsonl", keep_torn=False))
    assert "the completion has no whole sentence, cut at max_new_tokens; raise that" in message
    own, texts = ResponseSampler.sample, iter([" A dog. It sits on the", " It sits", " A cat."] * 3)

    def sample(self: Any, rows: Any, parts: Any, *args: Any, **options: Any) -> Any:
        generated = [GeneratedText(next(texts), index % 3 != 2) for index, _ in enumerate(rows)]
        monkeypatch.setattr(type(self.family), "generate", lambda *_, **__: generated)
        return own(self, rows, parts, *args, **options)

    monkeypatch.setattr(ResponseSampler, "sample", sample)
    whole, lines = prepared(content("own", "parts.jsonl", keep_torn=False, save_every=9))
    assert {text(row["rejected"]) for row in whole} == {"A dog.", "A cat."} and len(whole) == 5
    assert any(line.startswith("5 of 7 generated responses are cut") for line in lines)


def test_own_answers_are_drawn_by_their_rows(content: Any) -> None:
    """A higher temperature draws, another seed draws others, and the size of a batch changes nothing."""
    drawn = {
        (seed, size): [
            text(row["rejected"])
            for row in prepared(
                content("own", f"{seed}-{size}.jsonl", seed=seed, own={**OWN, "temperature": 1.0, "batch_size": size})
            )[0]
        ]
        for seed, size in ((1, 1), (1, 3), (2, 3))
    }
    assert drawn[1, 1] == drawn[1, 3] != drawn[2, 3]


def test_every_row_says_where_it_came_from(content: Any, vlm_folders: Folders) -> None:
    rows, _ = prepared(content("bdhs", seed=5))
    came = rows[3]["provenance"]
    assert came["of"] == "answers.jsonl: line 4" and came["kind"] == "bdhs" and came["seed"] == 5
    assert came["model"] == str(vlm_folders("llava")) and len(came["fingerprint"]) == 32
    assert came["similarity by"] == "trigrams (embedded: cosine of letter trigrams)"
    assert 1 <= came["tries"] <= 5 and (came["similarity"] < 0.97 or came["tries"] == 5)
    assert came["settings"]["rho"] == 0.99 and came["settings"]["max_new_tokens"] == 4


def test_the_source_s_rejected_responses_can_be_kept_beside(content: Any, tmp_path: Path) -> None:
    source = {"path": str(data_files.response_pairs(tmp_path / "pairs")), "format": "trl"}
    rows, _ = prepared(content("bdhs", source=source, bdhs={**FEW, "keep_rejected": True}))
    own = open_responses("trl", source["path"])
    pairs = open_responses("trl", str(tmp_path / "made.jsonl"))
    assert [pair.rejected for pair in pairs] == [pair.rejected for pair in own]
    assert [pair.hallucinated for pair in pairs] == [row["hallucinated"] for row in rows]
    assert all(pair.hallucinated not in ("", pair.chosen) for pair in pairs)


def test_povid_changes_few_words_and_needs_no_model(content: Any, tmp_path: Path) -> None:
    """No weights are read: the model is only looked up."""
    recipe = content("povid", povid={"share": 0.1})
    rows, _ = prepared(recipe)
    vocabulary = coco_vocabulary()
    for row, true in zip(rows, ANSWERS, strict=True):
        said = text(row["rejected"])
        assert said != true and text(row["chosen"]) == true
        assert len(set(said.split()) & set(true.split())) >= len(set(true.split())) - 4
    assert text(rows[2]["rejected"]) == "No."
    invented = [
        {m.object for m in vocabulary.mentions(text(row["rejected"]))} - {m.object for m in vocabulary.mentions(true)}
        for row, true in zip(rows, ANSWERS, strict=True)
    ]
    assert sum(map(len, invented)) >= 2
    assert rows[0]["provenance"]["corruptor"] == "rules"


def test_realign_writes_a_similar_image_and_what_was_said_of_it(content: Any, tmp_path: Path) -> None:
    for completion in ("ask", "continue"):
        name = f"{completion}.jsonl"
        rows, _ = prepared(content("realign", name, realign={**REALIGN, "completion": completion}))
        pairs = open_responses("realign", str(tmp_path / name))
        assert len(rows) == len(pairs) == 6, "one answer names nothing that could be masked"
        for row, pair in zip(rows, pairs, strict=True):
            (image,), (other_image,) = pair.images, pair.other_images
            assert image.key != other_image.key and other_image.read() and "[MASK]" in row["provenance"]["masked"]
            assert "[MASK]" not in pair.rejected and row["provenance"]["similarity"] < 0.95
        if completion == "continue":
            assert pairs[0].rejected.startswith("There is a")


def test_the_most_similar_image_comes_first(tmp_path: Path) -> None:
    """Vectors at angles of 0, 10, 25 and 180 degrees; the copy of an image is no other one."""

    rows = open_responses("answers", str(answers(tmp_path, ["A."] * 5)))
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 180.0, 0.0]))
    (tmp_path / "2.png").write_bytes(b"no picture")
    vectors = torch.stack([angles.cos(), angles.sin()], 1)[[0, 1, 3, 4]]
    index = ImageIndex(rows, lambda images: vectors[: len(images)], candidates=2)
    refs = [row.images[0] for row in rows]
    assert [ref.location for ref in index.similar(refs[0])] == [refs[1].location, refs[3].location]
    assert [ref.location for ref in index.similar(refs[4])] == [refs[1].location, refs[3].location]
    assert index.similar(refs[2]) == [] and "is not a readable image" in index.bad[refs[2].key]


def test_a_table_keeps_its_images_and_is_read_again(content: Any, tmp_path: Path) -> None:
    for kind, layout in (("povid", "trl"), ("realign", "realign")):
        prepare.prepare(load_recipe(content(kind, f"{kind}.parquet")))
        pairs = open_responses(layout, str(tmp_path / f"{kind}.parquet"))
        assert all(pair.images[0].read().startswith(b"\x89PNG") for pair in pairs)
        assert all(pair.other_images[0].read() != pair.images[0].read() for pair in pairs if layout == "realign")
        came = json.loads(pq.read_table(tmp_path / f"{kind}.parquet")["provenance"][0].as_py())
        assert came["kind"] == kind
    again = content("povid", "again.parquet", source={"path": str(tmp_path / "povid.parquet"), "format": "trl"})
    prepare.prepare(load_recipe(again))
    assert len(open_responses("trl", str(tmp_path / "again.parquet"))) == 7


def test_image_paths_are_relative_to_data_images(content: Any, source: Path, tmp_path: Path) -> None:
    recipe = content("povid", "deep/er/made.jsonl")
    assert "data.images: " in refused(recipe) and not (tmp_path / "deep" / "er" / "made.jsonl").exists()
    recipe["data"] = {**recipe["data"], "path": str(tmp_path / "other.jsonl"), "images": str(source.parent)}
    rows, _ = prepared(recipe)
    assert rows[0]["images"] == ["0.png"]


def test_a_prepared_file_trains(content: Any) -> None:
    recipe = content("bdhs")
    prepared(recipe)
    trained = mmalign.train(load_recipe(recipe, ["train.steps=2", "train.save_every=2"]))
    assert trained.steps == 2


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bdhs", "realign", "own"])
def test_going_on_after_a_stop_gives_the_same_file(
    kind: str, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, stopped after the second of four pieces, with a line cut short in what was written so far."""
    prepared(content(kind, "whole.jsonl"))
    recipe, calls = content(kind, "made.jsonl"), list[int]()
    append = AppendLog.append

    def stop(self: AppendLog, piece: list[Any]) -> None:
        calls.append(len(piece))
        if len(calls) == 3:
            raise Stopped
        append(self, piece)

    monkeypatch.setattr(AppendLog, "append", stop)
    with pytest.raises(Stopped):
        prepared(recipe)
    unfinished = tmp_path / "made.jsonl.unfinished"
    with (unfinished / "rows.jsonl").open("ab") as file:
        file.write(b'[{"text": "There is')
    _, responses = prepared(recipe)
    assert calls == [2, 2, 2, 2, 1] and "resuming after 4 of 7 rows" in responses
    assert (tmp_path / "made.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not unfinished.exists()


def test_unfinished_work_of_other_settings_is_refused(content: Any, tmp_path: Path) -> None:
    def fail(pair: ResponsePair) -> str:
        raise Stopped

    with pytest.raises(Stopped):
        prepared(content("povid"), writer=fail)
    message = refused(content("povid", seed=9), writer=fail)
    assert message.startswith(
        f"{tmp_path / 'made.jsonl.unfinished' / 'rows.jsonl'}: was started with other settings (seed differ; seed was 1"
    )
    assert "corruptor differ" in refused(content("povid"))
    (tmp_path / "made.jsonl.unfinished" / "rows.jsonl").unlink()
    assert len(prepared(content("povid"))[0]) == 7


def test_functions_of_one_s_own_mask_and_corrupt(content: Any) -> None:
    rows, _ = prepared(
        content("povid", "a.jsonl"), writer=lambda pair: pair.chosen.upper() if "dog" in pair.chosen else None
    )
    assert [text(row["rejected"]) for row in rows] == [ANSWERS[0].upper(), ANSWERS[4].upper()]
    assert "test_functions_of_one_s_own" in rows[0]["provenance"]["corruptor"]
    mask = lambda pair: pair.chosen.replace("dog", "[MASK]")  # noqa: E731
    rows, responses = prepared(content("realign", "b.jsonl"), writer=mask)
    assert [row["provenance"]["of"] for row in rows] == ["answers.jsonl: line 1", "answers.jsonl: line 5"]
    assert "5 left out (answers.jsonl: line 2: nothing of the answer is masked; " in responses[-1]


def test_a_function_that_gives_no_text_is_named(content: Any) -> None:
    assert "gives a int; expected text, or nothing" in refused(content("povid"), writer=lambda pair: 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rule", "prepare.povid.corruptor: 'rule' is not a function; expected module:function"),
        ("no_such:f", "prepare.povid.corruptor: no_such:f cannot be imported (No module named 'no_such')"),
        ("json:no", "prepare.povid.corruptor: json:no cannot be imported (module 'json' has no attribute 'no')"),
        ("json:__name__", "prepare.povid.corruptor: json:__name__ is not a function but str"),
    ],
)
def test_a_function_that_is_not_there_is_asked_for(name: str, sentence: str, content: Any) -> None:
    assert sentence in refused(content("povid", povid={"corruptor": name}))
