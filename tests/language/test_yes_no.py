"""Readings of yes/no answers: a table of answers as people and models write them, and what is taken off before."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from mmalign.language.yes_no import final_answer, parse_strict

ANSWERS = [
    json.loads(line)
    for line in Path(__file__).with_name("yes_no_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
READINGS = {True: "yes", False: "no", None: "unclear"}


@pytest.mark.parametrize("kind", dict.fromkeys(row["kind"] for row in ANSWERS))
def test_answers_are_read_as_a_person_reads_them(kind: str) -> None:
    rows = [row for row in ANSWERS if row["kind"] == kind]
    wrong = [row for row in rows if READINGS[parse_strict(row["answer"])] != row["reading"]]
    assert rows and not wrong


def test_table_has_answers_of_every_reading() -> None:
    """A parser with one reading for all, or one that looks for a word, must fail."""
    readings = Counter(row["reading"] for row in ANSWERS)
    assert len({row["answer"] for row in ANSWERS}) == len(ANSWERS) >= 150
    assert min(readings.values()) > len(ANSWERS) / 5 and set(readings) == set(READINGS.values())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A dog.", "A dog."),
        ("<think>A cat?\n</think>\n\nA dog.", "A dog."),
        ("A cat?</think>A dog.", "A dog."),  # the prompt has begun the thought
        ("<think>A</think>B<think>C</think>D", "D"),
        ("<think>A cat", ""),
        ("A dog.<think>or", "A dog."),
        ("<think>A</think><answer>A dog.</answer>", "A dog."),
        ("<|begin_of_box|>No<|end_of_box|>", "No"),
        ("◁think▷A◁/think▷B", "B"),
    ],
)
def test_final_answer_has_no_thinking(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "part", ["x", "\n", "not ", "because ", "<think>", "</think>", "yes, ", "\\boxed{", "I can see the "]
)
def test_time_is_linear_in_the_length(part: str) -> None:
    """A model that repeats itself to the last token holds nothing up: 20,000 characters took 0.05 s at most."""
    start = time.process_time()
    parse_strict(part * (20_000 // len(part)))
    assert time.process_time() - start < 2
