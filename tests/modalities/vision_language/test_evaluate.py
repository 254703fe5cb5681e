"""Evaluation and gallery of vision-language recipes, on a tiny model and on files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.commands import evaluate as evaluate_module
from mmalign.commands import gallery, train
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.families.vlm.model import ImageTextToText
from mmalign.modalities.vision_language.evaluate import read_best, read_metrics
from tests.helpers import Folders, data_files, recipes
from tests.helpers.data_files import write_jsonl

Content = dict[str, Any]
DECODING = {"max_new_tokens": 6, "batch_size": 8}
CROWDS = {"benchmark": "crowds", "num_images": 3, "decoding": DECODING}


@pytest.fixture(scope="module")
def content(vlm_folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """A recipe whose model has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    rows = data_files.response_pairs(folder / "rows")
    result = recipes.vlm(vlm_folders("llava"), rows, folder / "out", train={"steps": 4, "lr": 0.1})
    train.train(load_recipe(result))
    return result


@pytest.fixture
def folder(content: Content) -> Path:
    return Path(content["output"]) / "evaluation"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images, their objects, and questions about them."""
    folder = tmp_path / "images"
    folder.mkdir()
    objects = [["dog", "ball"], ["cat"], ["dog", "cat", "ball"], []]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(data_files.png(number))
    records = [{"image": f"{n}.png", "objects": names} for n, names in enumerate(objects)]
    write_jsonl(folder / "objects.jsonl", *records)
    (folder / "words.json").write_text(json.dumps({"dog": ["puppy"], "cat": [], "ball": []}))
    return folder


def of(content: Content, evaluate: Content) -> Recipe:
    return load_recipe({**content, "evaluate": evaluate})


def chair(images: Path, **more: Any) -> Content:
    return {
        "benchmark": "chair",
        "annotations": str(images / "objects.jsonl"),
        "images": str(images),
        "vocabulary": str(images / "words.json"),
        "decoding": DECODING,
        **more,
    }


def lines(file: Path) -> list[Content]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_evaluate_the_bundled_world(content: Content, folder: Path, log_lines: list[str]) -> None:
    result = evaluate_module.evaluate(of(content, CROWDS))
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result.result))
    assert result.result["questions"] == 3 + 3 * 3 * 4
    assert set(result.result["measures"]) == {"CHAIR", "POPE"}
    for compared in result.result["measures"].values():
        for name, difference in compared["difference"].items():
            sides = [compared[side]["measures"][name]["estimate"] for side in ("before", "after")]
            assert difference["estimate"] == pytest.approx(sides[1] - sides[0])
            assert difference["low"] <= difference["estimate"] <= difference["high"]
    assert {"CHAIR_i", "CHAIR_s", "recall", "words per response"} == set(
        result.result["measures"]["CHAIR"]["difference"]
    )
    cut = result.result["cut answers"]
    assert set(cut) == {"before", "after"} and 0 < cut["before"] <= result.result["questions"]
    assert any(line.startswith(f"{cut['before']} answers before alignment are cut at") for line in log_lines)
    assert any(line.startswith("CHAIR_s, %") for line in log_lines)
    assert any("mean: yes rate" in line for line in log_lines)
    assert {file.stem for file in (folder / "before").iterdir()} == {"descriptions", "random", "popular", "adversarial"}


@pytest.mark.slow
def test_gallery_shows_the_answers_of_the_evaluation(content: Content, folder: Path) -> None:
    recipe = load_recipe({**content, "evaluate": CROWDS, "gallery": {"images": 5, "title": "tiny"}})
    page = gallery.gallery(recipe)
    manifest = json.loads((page.parent / "manifest.json").read_text())
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(manifest["entries"]) == 5 and manifest["title"] == "tiny"
    shown = {(e["name"], e["question"], e["before"]["text"], e["after"]["text"]) for e in manifest["entries"]}
    assert shown <= {(s["image"], s["question"], s["before"]["text"], s["after"]["text"]) for s in samples}
    assert manifest["provenance"]["answers"] == "greedy, at most 6 tokens"
    assert [row[0] for row in manifest["summary"]][1:3] == ["CHAIR_s, %", "CHAIR_i, %"]
    with Image.open(page.with_name("gallery.png")) as grid:
        assert grid.width > 500


@pytest.mark.slow
def test_cached_answers_are_not_generated_again(content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_module.evaluate(of(content, CROWDS))
    calls: list[int] = []
    generate = ImageTextToText.generate

    def counted(self: Any, net: Any, prompts: Any, *arguments: Any, **options: Any) -> list[str]:
        calls.append(len(prompts))
        return generate(self, net, prompts, *arguments, **options)

    monkeypatch.setattr(ImageTextToText, "generate", counted)
    assert evaluate_module.evaluate(of(content, CROWDS)).result and not calls
    evaluate_module.evaluate(of(content, {**CROWDS, "decoding": {**DECODING, "batch_size": 3}}))
    assert not calls  # the size of a batch changes no answer
    evaluate_module.evaluate(of(content, {**CROWDS, "num_images": 4}))
    assert 0 < sum(calls) <= 2 * 13  # the fourth picture: a description, and four questions of each split
    calls.clear()
    evaluate_module.evaluate(of(content, {**CROWDS, "decoding": {**DECODING, "max_new_tokens": 5}}))
    assert sum(calls) > 30


def test_chair_on_files(content: Content, folder: Path, images: Path) -> None:
    """The file of annotations names the images, so that nothing else is needed; recall stands beside CHAIR."""
    results = evaluate_module.evaluate(of(content, chair(images))).result
    assert results["questions"] == 4
    assert {"CHAIR_i", "CHAIR_s", "recall", "words per response"} <= set(results["measures"]["CHAIR"]["difference"])
    assert [(r["image"], r["question"]) for r in lines(folder / "after" / "descriptions.jsonl")] == [
        (f"{n}.png", "Describe this image.") for n in range(4)
    ]


def test_pope_from_annotations_and_from_files(content: Content, images: Path) -> None:
    section: Content = {"benchmark": "pope", "images": str(images), "decoding": DECODING}
    more = [{"image": f"{n}.png", "objects": ["dog", "cat", "ball"]} for n in range(4)]
    absent = [{"image": "absent", "objects": ["mat", "hat", "car"]}]  # whose objects are asked for elsewhere
    (images / "absent").write_bytes(data_files.png(9))
    built = {**section, "annotations": str(write_jsonl(images / "all.jsonl", *more, *absent))}
    results = evaluate_module.evaluate(of(content, built)).result
    assert results["questions"] == 3 * 5 * 6
    questions = write_jsonl(
        images / "q.json",
        {"question_id": 1, "image": "0.png", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "1.png", "text": "Is there a dog?", "label": "no"},
    )
    results = evaluate_module.evaluate(of(content, {**section, "questions": {"mine": str(questions)}})).result
    assert set(results["measures"]["POPE"]["difference"]) >= {"mine: accuracy", "mine: yes rate"}


def test_pope_of_a_parquet_file_with_its_images(content: Content, folder: Path, tmp_path: Path) -> None:
    """As lmms-lab writes it: ids and labels as text, splits in one file, each image beside its question."""
    rows = [
        {"question_id": str(n % 4 + 1), "question": f"Is there a thing{n}?", "answer": ("yes", "no")[n % 2]}
        | {"image_source": f"COCO_{n // 2}", "image": {"bytes": data_files.png(n // 2), "path": None}}
        | {"category": ("random", "popular")[n // 4]}
        for n in range(8)
    ]
    file = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=3)
    section = {"benchmark": "pope", "questions": str(file), "suffix": "Yes or no?", "decoding": DECODING}
    results = evaluate_module.evaluate(of(content, section)).result
    assert results["questions"] == 8 and "mean: unclear" in results["measures"]["POPE"]["difference"]
    written = lines(folder / "after" / "random.jsonl")
    assert [(r["question_id"], r["image"], r["question"]) for r in written] == [
        (n + 1, f"COCO_{n // 2}", f"Is there a thing{n}?\nYes or no?") for n in range(4)
    ]
    gallery.gallery(of(content, section))


def test_llava_s_answers_to_its_own_file(content: Content, tmp_path: Path) -> None:
    """One file of answers to two splits, by ids that the release does not have."""
    release = [
        {"question_id": 1, "image": f"{n}.png", "text": "Is there a dog?", "label": ("Yes", "no")[n % 2]}
        for n in range(4)
    ]
    labels = {
        split: write_jsonl(tmp_path / f"{split}.json", *({**row, "question_id": n} for n, row in enumerate(release)))
        for split in ("adversarial", "popular")
    }
    asked = [
        {**row, "question_id": 4 * k + n, "category": split, "text": "Is there a dog?\nAnswer in one word."}
        for k, split in enumerate(labels)
        for n, row in enumerate(release)
    ]
    questions = write_jsonl(
        tmp_path / "llava_pope_test.jsonl", *({k: v for k, v in q.items() if k != "label"} for q in asked)
    )
    answers = write_jsonl(
        tmp_path / "answers.jsonl",
        *({"question_id": q["question_id"], "text": q["label"].title()} for q in reversed(asked)),
    )
    section = {"benchmark": "pope", "questions": str(questions), "labels": {k: str(v) for k, v in labels.items()}}
    result = evaluate_module.evaluate(of(content, {**section, "answers": {"after": str(answers)}})).result
    assert result["measures"]["POPE"]["measures"]["mean: accuracy"]["estimate"] == 1
    assert {"adversarial: F1", "popular: F1"} <= set(result["measures"]["POPE"]["measures"])


def test_answers_name_images_by_path(content: Content, images: Path, tmp_path: Path) -> None:
    names = ["elsewhere/0.png", "1", "2.PNG", "3.png"]
    answers = [{"image": name, "caption": "<think>A cat?</think>A dog."} for name in names]
    section = chair(images, answers={"after": str(write_jsonl(tmp_path / "a.jsonl", *answers))})
    result = evaluate_module.evaluate(of(content, section)).result["measures"]["CHAIR"]
    assert result["counts"]["mentions"] == 4 and result["counts"]["invented mentions"] == 2


def test_amber_on_its_folder(content: Content, images: Path) -> None:
    data = images / "data"
    items = [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    ]
    for name, value in (("annotations", items), ("relation", {"dog": [], "cat": []})):
        (data / "query").mkdir(parents=True, exist_ok=True)
        (data / f"{name}.json").write_text(json.dumps(value))
    (data / "safe_words.txt").write_text("sign")
    asked = [{"id": 1, "image": "0.png", "query": "Describe it."}, {"id": 2, "image": "1.png", "query": "Is it a dog?"}]
    (data / "query" / "query_all.json").write_text(json.dumps(asked))
    section = {"benchmark": "amber", "annotations": str(data), "images": str(images), "decoding": DECODING}
    with pytest.raises(ValueError, match="measure more"):  # one description has no interval
        evaluate_module.evaluate(of(content, section))
    more = [{**items[0], "id": 3}, {**items[1], "id": 4}]
    (data / "annotations.json").write_text(json.dumps([*items, *more]))
    asked += [{**asked[0], "id": 3, "image": "2.png"}, {**asked[1], "id": 4, "image": "3.png"}]
    (data / "query" / "query_all.json").write_text(json.dumps(asked))
    results = evaluate_module.evaluate(of(content, section)).result
    assert list(results["measures"]) == ["AMBER, generative", "AMBER, discriminative", "AMBER"]


@pytest.mark.slow
def test_implicit_accuracy_of_responses(content: Content, tmp_path: Path) -> None:
    """Four updates at a high rate move the log-probabilities of held-out responses, one way or the other."""
    held = {**content, "data": {**content["data"], "validation_fraction": 0.5}, "evaluate": {"benchmark": "implicit"}}
    with pytest.raises(ValueError, match=r"the model was trained on \d of the \d validation pairs"):
        evaluate_module.evaluate(load_recipe(held))
    held["output"] = str(tmp_path / "held")
    train.train(load_recipe(held))
    results = evaluate_module.evaluate(load_recipe(held)).result
    assert 0 < results["pairs"] < 8 and results["draws"] == 1
    assert results["chosen gain"] != 0 and results["rejected gain"] != 0


@pytest.mark.parametrize("benchmark", ["chair", "object_halbench"])
def test_written_answers_score_the_same_from_files(
    benchmark: str, content: Content, folder: Path, images: Path, tmp_path: Path
) -> None:
    asked = evaluate_module.evaluate(of(content, chair(images, benchmark=benchmark))).result
    kept = folder.rename(tmp_path / "kept")
    files = {side: str(kept / side / "descriptions.jsonl") for side in ("before", "after")}
    section = chair(images, benchmark=benchmark, answers=files)
    del section["images"]
    elsewhere = {**content, "output": str(tmp_path / "scored")}  # where nothing was ever trained
    assert evaluate_module.evaluate(of(elsewhere, section)).result["measures"] == asked["measures"]


def test_pope_answers_of_one_model_from_files(content: Content, images: Path, tmp_path: Path) -> None:
    questions = write_jsonl(
        images / "q.json",
        {"question_id": 1, "image": "0.png", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "1.png", "text": "Is there a dog?", "label": "no"},
    )
    answers = write_jsonl(images / "a.jsonl", {"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "Yes"})
    section: Content = {"benchmark": "pope", "questions": {"mine": str(questions)}}
    section["answers"] = {"after": {"mine": str(answers)}}
    result = evaluate_module.evaluate(of({**content, "output": str(tmp_path / "scored")}, section))
    measures = result.result["measures"]["POPE"]["measures"]
    assert measures["mine: accuracy"]["estimate"] == 0.5 and measures["mine: yes rate"]["estimate"] == 1
    assert result.table[0] == ("POPE", "2 responses [95 % interval]")


def test_a_judge_measures_and_another_chooses_the_best_of_n(
    content: Content, folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chooser likes short answers, and two judges vote; the best of four is never longer than the best of two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tastes.py").write_text(
        "calls = []\n"
        "def short(images, prompts, responses):\n"
        "    assert all(len(shown) == 1 for shown in images) and set(prompts) == {'Describe this image.'}\n"
        "    return [-len(text) for text in responses]\n"
        "def long(*given):\n"
        "    calls.append(len(given[2]))\n"
        "    return [-score for score in short(*given)]\n"
    )
    short, long = ({"name": "function", "path": f"tastes:{name}"} for name in ("short", "long"))
    section = chair(
        images,
        reward=[{**short, "weight": 2}, long],
        combine="vote",
        best_of={"n": [4, 2], "reward": short, "temperature": 1.5},
        cache=str(tmp_path / "answers"),
    )
    recipe = of(content, section)
    result = evaluate_module.evaluate(recipe).result
    texts = {
        side: [row["text"] for row in lines(folder / side / "descriptions.jsonl")]
        for side in ("before", "after", "best-of-2", "best-of-4")
    }
    lengths = {side: [len(text) for text in written] for side, written in texts.items()}
    assert all(four <= two for four, two in zip(lengths["best-of-4"], lengths["best-of-2"], strict=True))
    assert sum(lengths["best-of-4"]) < sum(lengths["best-of-2"])
    best = result["best_of"]["4"]
    assert best["kl_bound"] == pytest.approx(0.636294361) and set(best) == {"kl_bound", "CHAIR", "preference"}
    wins = [0.5 + 0.5 * (a < b) - 0.5 * (a > b) for a, b in zip(lengths["best-of-4"], lengths["before"], strict=True)]
    assert best["preference"]["after"]["measures"]["win rate"]["estimate"] == pytest.approx(sum(wins) / 4)
    # A comparison reads the same numbers; another evaluation judges and generates nothing
    read = read_best(recipe)
    for n, measured in read.items():
        numbers = result["best_of"][str(n)]
        assert {x.benchmark: json.loads(json.dumps(x.as_dict())) for x in measured} == {
            name: numbers[name]["after"] for name in ("CHAIR", "preference")
        }
    assert list(read) == [2, 4] and len(read_metrics(recipe)[1]) == 2
    monkeypatch.setattr(ImageTextToText, "generate", lambda *_, **__: pytest.fail("an answer was generated"))
    import tastes  # type: ignore[import-not-found]

    number = len(tastes.calls)
    assert evaluate_module.evaluate(recipe).result == result and number == len(tastes.calls) > 0


def test_judges_need_answers_that_are_generated(content: Content, images: Path) -> None:
    judge = {"name": "function", "path": "m:f"}
    with pytest.raises(ValueError, match="answers are scored without a model; leave reward and best_of out"):
        of(content, chair(images, answers={"after": "a.jsonl"}, reward=judge))
    with pytest.raises(ValueError, match=r"benchmark implicit takes no 'best_of' but"):
        of(content, {"benchmark": "implicit", "best_of": {"reward": judge}})
    with pytest.raises(ValueError, match="combine: vote needs two or more reward models"):
        of(content, {**CROWDS, "reward": judge, "combine": "vote"})
    recipe = of(content, {**CROWDS, "best_of": {"reward": {"path": "models/tiny_clip"}}})
    with pytest.raises(ValueError, match="reward: open_clip judges images; for responses use one of"):
        evaluate_module.evaluate(recipe)


def test_metrics_of_written_answers(content: Content, images: Path, log_lines: list[str]) -> None:
    """As a comparison of several runs does, also where an image was left out."""
    (images / "2.png").write_bytes(b"no picture")
    recipe = of(content, chair(images))
    results = evaluate_module.evaluate(recipe).result
    assert log_lines[2].startswith("1 images are skipped for both models: 2.png: is not a readable image")
    assert results["questions"] == 3 and results["left out"][0].startswith("2.png: ")
    (before,), (after,) = read_metrics(recipe)
    assert json.loads(json.dumps(before.as_dict())) == results["measures"]["CHAIR"]["before"]
    assert json.loads(json.dumps(after.as_dict())) == results["measures"]["CHAIR"]["after"]
    assert len(after.keys) == 3
