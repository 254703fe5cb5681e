"""Page of training examples: some pairs in the form that the model will see, and numbers of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mmalign.pages.page import image_variables, write_html


class TextSpan(NamedTuple):
    """Part of a text: a token, or a run of tokens; `scored` if a method's loss reads its probability."""

    text: str
    scored: bool


@dataclass(frozen=True)
class ExampleSide:
    """One side of a pair as the model will see it.

    Attributes:
        name: "chosen" or "rejected".
        note: its size in words.
        text: the tokens of prompt and response; empty for an image.
        images: the images after crop, flip and bucket, or before a vision tower's preprocessing, by name.
    """

    name: str
    note: str
    text: Sequence[TextSpan] = ()
    images: Mapping[str, Image.Image] | None = None


@dataclass(frozen=True)
class TrainingExample:
    """Pair as the model will see it, or the reasons why it is skipped.

    Attributes:
        location: where the pair is.
        title: its prompt.
        sides: both sides; none for a prompt without images.
        skipped: the reasons why training skips it.
    """

    location: str
    title: str
    sides: Sequence[ExampleSide] = ()
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class DataView:
    """Report on the pairs of a training: sentences about all of them, and some examples."""

    facts: Sequence[str]
    examples: Sequence[TrainingExample]

    def lines(self) -> Iterable[str]:
        """Yield the view as lines of text; scored tokens stand between bars."""
        yield from self.facts
        for number, example in enumerate(self.examples, start=1):
            yield f"example {number}: {example.location}"
            yield f"  prompt: {_one_line(example.title)}"
            yield from (f"  skipped: {reason}" for reason in example.skipped)
            for side in example.sides:
                yield f"  {side.name}: {side.note}"
                if side.text:
                    yield f"    {_one_line(''.join(span.text for span in side.text if not span.scored))}"
                    yield f"    |{'|'.join(_one_line(span.text) for span in side.text if span.scored)}|"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def write(file: Path, view: DataView, title: str) -> None:
    """Write the view as one HTML file that needs no network.

    Raises:
        CheckpointError: the file cannot be written.
    """
    examples = [
        {
            "location": example.location,
            "title": example.title,
            "skipped": example.skipped,
            "sides": [
                {
                    "name": side.name,
                    "note": side.note,
                    "text": side.text,
                    "images": [image_variables(name, image) for name, image in (side.images or {}).items()],
                }
                for side in example.sides
            ],
        }
        for example in view.examples
    ]
    write_html(file, "examples.html.jinja", title=title, facts=view.facts, examples=examples)
