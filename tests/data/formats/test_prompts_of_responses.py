"""Prompts with images, for methods that generate responses: from any layout, each once, with their true answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.response_pairs import ResponsePairReader
from mmalign.data.pairs import Pairs, ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.language.chat import IMAGE, Turn
from tests.helpers import data_files


def opened(folder: Path, *rows: dict[str, Any], format: str = "auto", truths: bool = False) -> Pairs[ResponsePair]:
    """Return the prompts of rows, whose images are three files."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        (folder / name).write_bytes(data_files.png(number))
    path = data_files.write_jsonl(folder / "rows.jsonl", *rows)
    return open_responses(format, str(path), learning="prompts", truths=truths)


def test_a_file_of_images_and_questions_is_enough(tmp_path: Path) -> None:
    pairs = opened(tmp_path, {"image": "a.png", "question": "What is it?"}, {"image": "b.png", "question": "And this?"})
    assert [pair.turns for pair in pairs] == [(Turn("user", f"{IMAGE}{t}"),) for t in ("What is it?", "And this?")]
    assert all(pair.responses == () and pair.truth == () for pair in pairs) and len({pair.row for pair in pairs}) == 2


@pytest.mark.parametrize(
    ("column", "value", "truth"),
    [
        ("answer", "A dog.", ("A dog.",)),
        ("truth", "Yes", ("Yes",)),
        ("objects", ["dog", "cat"], ("dog", "cat")),
        ("objects", json.dumps(["dog", "cat"]), ("dog", "cat")),
        ("solution", "4", ("4",)),
        ("answer", "", ()),
    ],
)
def test_true_answers_are_read_for_judges(column: str, value: object, truth: tuple[str, ...], tmp_path: Path) -> None:
    (pair,) = opened(tmp_path, {"images": ["a.png"], "prompt": "What?", column: value})
    assert pair.truth == truth and pair.chosen == ""


def test_a_column_of_truth_precedes_the_answer(tmp_path: Path) -> None:
    (pair,) = opened(tmp_path, {"image": "a.png", "prompt": "What?", "answer": "A dog.", "truth": "dog"})
    assert pair.truth == ("dog",)


def test_prompts_of_pairs_come_once_and_their_sides_are_not_read(tmp_path: Path) -> None:
    """Two rejected responses of a row, and a row with another chosen one, are one prompt."""
    row = {"images": ["a.png"], "prompt": "What?", "chosen": "A dog.", "rejected": ["A cat.", "A car."]}
    other = {**row, "chosen": "Dogs."}
    pairs = opened(tmp_path, row, other, {**row, "images": ["b.png"]})
    assert len(pairs) == 2 and not pairs.skipped
    assert [pair.truth for pair in pairs] == [(), ()]


def test_a_bad_truth_drops_its_row(tmp_path: Path) -> None:
    good = {"image": "a.png", "prompt": "What?", "truth": "yes"}
    pairs = opened(tmp_path, good, {**good, "image": "b.png", "truth": 7})
    assert len(pairs) == 1 and "truth" in pairs.skipped[0].reason


@pytest.mark.parametrize("nothing", [{}, {"objects": []}, {"answer": " "}])
def test_judges_of_true_answers_get_no_row_without_one(nothing: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"image": f"{name}.png", "prompt": "What?", "objects": ["dog"]} for name in "ab"]
    rows.append({"image": "c.png", "prompt": "What?", **nothing})
    pairs = opened(tmp_path, *rows, truths=True)
    assert [pair.truth for pair in pairs] == [("dog",), ("dog",)]
    assert "has no true answer" in pairs.skipped[0].reason
    assert len(opened(tmp_path, *rows)) == 3


def test_batches_of_prompts_have_empty_responses(llava: VisionLanguage, tmp_path: Path) -> None:
    pairs = opened(
        tmp_path, {"image": "a.png", "prompt": "What?"}, {"image": "b.png", "prompt": "What is in it, please?"}
    )
    reader = ResponsePairReader(llava.processor, 64, decoded_images=True)
    (batch,) = Loader(pairs, reader, batch_size=2, seed=0).batches(0)
    assert batch.tokens.num_tokens.tolist() == [0, 0] and len(batch.decoded_images) == 2
    for row, pair in zip(batch.tokens.rows, batch.pairs, strict=True):
        views = [(ref.key, batch.views[ref.key]) for ref in pair.images]
        assert row == llava.processor.tokenize_prompt(pair.turns, views)
    (skipped,) = ResponsePairReader(llava.processor, 4).read(pairs[0], 0)  # type: ignore[misc]
    assert "the prompt with its images has" in skipped.reason  # type: ignore[union-attr]
