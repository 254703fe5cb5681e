"""True answers for `prepare`, and runs of the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.commands import prepare
from mmalign.commands.load_recipe import load_recipe
from tests.helpers import data_files
from tests.helpers.logged import recorded_lines

ANSWERS = [
    "There is a dog. It sits on a red mat.",
    "Two cats are next to a car.",
    "Yes.",
    "A person stands behind a green bench. The bench is near a truck!",
    "No, there is no dog.",
    "A bird.",
    "A cup on a table. Two forks. A knife?",
]
FEW = {"max_new_tokens": 4, "similarity": "trigrams"}
OWN = {"max_new_tokens": 4, "batch_size": 3}
REALIGN = {"retriever": "models/tiny_clip", **FEW}


def answers(folder: Path, texts: list[str] = ANSWERS) -> Path:
    """Write rows of an image, a question and its true answer."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n, text in enumerate(texts):
        (folder / f"{n}.png").write_bytes(data_files.png(n, 16 + 8 * (n % 3)))
        rows.append({"image": f"{n}.png", "prompt": "What is it?", "answer": text})
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def prepared(content: dict[str, Any], **callables: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows and the log lines of `prepare`."""
    with recorded_lines() as lines:
        path = prepare.prepare(load_recipe(content), **callables)
    return [json.loads(line) for line in path.read_text().splitlines()], lines


def refused(content: dict[str, Any], *overrides: str, **callables: Any) -> str:
    with pytest.raises(ValueError) as raised:
        prepare.prepare(load_recipe(content, overrides), **callables)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def text(message: Any) -> str:
    """Return the text of a list of one message."""
    (part,) = message
    return str(part["content"])
