"""Rows of true answers alone, and second rejected responses beside the first."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.formats.responses import open_responses
from mmalign.language.chat import Turn
from tests.helpers import data_files


def opened(folder: Path, row: dict[str, Any], layout: str = "answers") -> Any:
    (folder / "a.png").write_bytes(data_files.png(0))
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return open_responses(layout, str(folder / "rows.jsonl"))


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "prompt": "What?", "answer": "A dog."},
        {"images": ["a.png"], "prompt": [{"role": "user", "content": "<image>What?"}], "answer": "A dog."},
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "A dog."},
                {"from": "human", "value": "Thanks."},
            ],
        },
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}],
        },
    ],
)
def test_answers_alone(row: dict[str, Any], tmp_path: Path) -> None:
    (pair,) = opened(tmp_path, row)
    assert pair.turns == (Turn("user", "<image>What?"),) and pair.chosen == "A dog." and pair.rejected == ""
    assert [ref.path for ref in pair.images] == [str(tmp_path / "a.png")]


def test_of_several_answers_the_last_is_meant(tmp_path: Path) -> None:
    responses = [("human", "<image>What?"), ("gpt", "A dog."), ("human", "Where?"), ("gpt", "On a mat.")]
    messages = [{"from": role, "value": text} for role, text in responses]
    (pair,) = opened(tmp_path, {"image": "a.png", "conversations": messages})
    assert pair.chosen == "On a mat." and [turn.text for turn in pair.turns] == ["<image>What?", "A dog.", "Where?"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What?", "answer": ""}, "the chosen response is empty"),
        ({"prompt": "What?"}, "the chosen response is empty"),
        ({"conversations": [{"from": "human", "value": "What?"}]}, "no message is the assistant's answer to another"),
    ],
)
def test_a_row_without_an_answer_is_left_out(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"line 1: {reason}"):
        opened(tmp_path, {"image": "a.png", **row})


def test_a_second_rejected_response(tmp_path: Path) -> None:
    row = {"image": "a.png", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    (plain,), (pair,) = opened(tmp_path, row, "trl"), opened(tmp_path, {**row, "hallucinated": "A car."}, "trl")
    assert plain.hallucinated == "" and pair.hallucinated == "A car." and pair.row == plain.row
    responses = [{"role": "user", "content": "What?"}]
    chosen, rejected = ([*responses, {"role": "assistant", "content": text}] for text in ("A dog.", "A cat."))
    messages = {"chosen": chosen, "rejected": rejected, "hallucinated": [{"role": "assistant", "content": "A car."}]}
    (pair,) = opened(tmp_path, {"image": "a.png", **messages}, "trl")
    assert pair.hallucinated == "A car."


@pytest.mark.parametrize(
    ("hallucinated", "reason"),
    [
        (" A dog. ", "the chosen and the hallucinated response are the same"),
        (" ", "the hallucinated response is empty"),
        ("<image>", "the hallucinated response holds <image>"),
    ],
)
def test_a_second_rejected_response_that_cannot_be_one(hallucinated: str, reason: str, tmp_path: Path) -> None:
    row = {"image": "a.png", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    with pytest.raises(ValueError, match=f"line 1: {reason}"):
        opened(tmp_path, {**row, "hallucinated": hallucinated}, "trl")
