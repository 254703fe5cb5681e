"""Corpora of preference data with one planted instance of each defect, and their clean twins."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.data.pairs import stable_hash
from tests.helpers import recipes

FRACTION = 0.2  # of the groups in the validation split
OBJECTS = ("red cube", "green ball", "wooden chair", "blue lamp", "tall ladder", "small radio", "grey stone")
PLACES = ("by a window", "under a bridge", "near the harbour", "in a barn", "on a shelf")


def drawing(seed: int, side: int = 64) -> Image.Image:
    """Return coloured blocks that no other seed has."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def jpeg(image: Image.Image, quality: int = 80) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def group(number: int, held_out: bool) -> str:
    """Return the name of a group that seed 0 puts into the validation split, or leaves in training."""
    names = (f"group {number} {suffix}" for suffix in range(1000))
    return next(g for g in names if (stable_hash("0", "hold out", g) < FRACTION * 2**63) == held_out)


@dataclass
class Corpus:
    """Rows and image files of a corpus in a folder, and the defects that were planted.

    Attributes:
        folder: the folder of all files.
        rows: the records to write.
        planted: numbers of the rows at which a report should name each defect, from 1.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    planted: dict[str, list[int]] = field(default_factory=dict)
    _images: int = 0

    def image(self, content: bytes | Image.Image | None = None) -> str:
        """Write an image, a new drawing by default, and return its name."""
        self._images += 1
        name = f"{self._images}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (self.folder / name).write_bytes(content)
        else:
            (content or drawing(self._images)).save(self.folder / name)
        return name

    def bytes_of(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def add(self, *defects: str, held_out: bool = False, **row: Any) -> None:
        """Add a row, at which these defects should be found."""
        self.rows.append({**row, "group": group(len(self.rows), held_out)})
        for defect in defects:
            self.planted.setdefault(defect, []).append(len(self.rows))

    def write(self) -> Path:
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, self.rows)), encoding="utf-8")
        return path


# ------------------------------------------------------------------------------------------------------ pairs of images


def image_corpus(folder: Path, model: Path, planted: bool) -> tuple[Corpus, dict[str, Any]]:
    """Write a corpus of rankings, and return it with its recipe."""
    corpus = Corpus(folder)
    for number in range(12):
        prompt = f"a {OBJECTS[number % 7]} {PLACES[number % 5]}"
        _rank(corpus, prompt, corpus.image(), corpus.image(), held_out=number % 4 == 3)
    (folder / "prompts.txt").write_text("a yellow boat\n" + ("A WOODEN CHAIR near the harbour!\n" if planted else ""))
    if planted:
        corpus.planted["shared_prompts"] = [3]  # the prompt above
        _plant_images(corpus)
    data = {"format": "rankings", "resolution": 16, "group_by": "group", "validation_fraction": FRACTION}
    judged = {"reward": {"path": "models/tiny_clip"}, "prompts": str(folder / "prompts.txt")}
    recipe = recipes.diffusion(model, corpus.write(), folder / "out", data=data, evaluate=judged)
    return corpus, {**recipe, "evaluate": {"benchmark": "preference", **judged}}


def _rank(corpus: Corpus, prompt: str, chosen: str, rejected: str, *defects: str, **row: Any) -> None:
    corpus.add(*defects, prompt=prompt, image_path=[chosen, rejected], rank=row.pop("rank", [1, 2]), **row)


def _plant_images(corpus: Corpus) -> None:
    new = corpus.image
    whole = new()
    _rank(corpus, "a torn page", new(corpus.bytes_of(whole)[:-400]), new(), "unreadable")
    _rank(corpus, "a lost page", "lost.png", new(), "missing")
    _rank(corpus, "two twins", whole, new(corpus.bytes_of(whole)), "identical")
    _rank(corpus, "a copy", twin := new(), new(jpeg(Image.open(corpus.folder / twin))), "near_identical")
    # Both labels, and a cycle of three; both are named at their first rows
    _rank(corpus, "a quarrel", first := new(), second := new())
    _rank(corpus, "A quarrel.", second, first)
    corpus.planted["contradictions"] = [len(corpus.rows) - 1]
    a, b, c = new(), new(), new()
    for better, worse in ((a, b), (b, c), (c, a)):
        _rank(corpus, "a circle", better, worse)
    corpus.planted["cycles"] = [len(corpus.rows) - 2]
    _rank(corpus, "a draw", new(), new(), "ties", rank=[1, 1])
    # A prompt and a picture of the validation split
    _rank(corpus, "a shared prompt", new(), new(), held_out=True)
    _rank(corpus, "a shared  prompt", new(), new(), "shared_prompts")
    _rank(corpus, "one scene", shown := new(), new(), held_out=True)
    _rank(corpus, "another scene", new(jpeg(Image.open(corpus.folder / shown).resize((96, 96)))), new(drawing(900, 96)))
    corpus.planted["shared_images"] = [len(corpus.rows)]
    _rank(corpus, "a narrow door", new(), new(drawing(901).crop((0, 0, 64, 48))), "image_sizes")
    _rank(corpus, " ".join(f"word{n}" for n in range(90)), new(), new(), "long_captions")


# --------------------------------------------------------------------------------------------------- pairs of responses


def response_corpus(folder: Path, model: Path, planted: bool) -> tuple[Corpus, dict[str, Any]]:
    """Write a corpus of responses, and return it with its recipe; planted ones also favour long responses."""
    corpus = Corpus(folder)
    for number in range(24):
        texts = [f"There is a {OBJECTS[number % 7]} {PLACES[number % 5]}.", f"I see a {OBJECTS[(number + 2) % 7]}."]
        if not planted and number % 2:
            texts.reverse()
        _answer(corpus, corpus.image(), *texts, held_out=number % 4 == 3)
    evaluated = corpus.image()
    (folder / "objects.json").write_text(json.dumps([{"image": evaluated, "objects": ["dog"]}]))
    if planted:
        corpus.planted["length_bias"] = []
        _plant_responses(corpus, evaluated)
    data = {"group_by": "group", "validation_fraction": FRACTION, "max_length": 100}
    recipe = recipes.vlm(model, corpus.write(), folder / "out", data=data)
    asked = {"benchmark": "chair", "annotations": str(folder / "objects.json"), "images": str(folder)}
    return corpus, {**recipe, "evaluate": asked}


def _answer(corpus: Corpus, image: str, chosen: Any, rejected: Any, *defects: str, **row: Any) -> None:
    corpus.add(
        *defects, image=image, prompt=row.pop("prompt", "What is here?"), chosen=chosen, rejected=rejected, **row
    )


def _plant_responses(corpus: Corpus, evaluated: str) -> None:
    new = corpus.image
    torn = new(corpus.bytes_of(new())[:-400])
    _answer(corpus, torn, "A tree stands in the yard.", "A car.", "unreadable")
    _answer(corpus, "lost.png", "A tree stands in the yard.", "A car.", "missing")
    _answer(corpus, new(), "A tree stands in the yard.", " ", "unusable")
    _answer(corpus, new(), "A tree stands in the yard.", "A tree stands in the yard. ", "identical")
    _answer(corpus, new(), "A tree stands in the yard.", "a tree stnads in the yard", "near_identical")
    # Both labels, and a cycle of three
    image = new()
    _answer(corpus, image, "A tree stands in the yard.", "A car.")
    _answer(corpus, image, "A car.", "A tree stands in the yard.")
    corpus.planted["contradictions"] = [len(corpus.rows) - 1]
    image, texts = new(), ("A tree stands in the yard.", "A bird sits on the roof.", "A dog sleeps on the mat.")
    for n in range(3):
        _answer(corpus, image, texts[n], texts[(n + 1) % 3])
    corpus.planted["cycles"] = [len(corpus.rows) - 2]
    # A picture of the validation split, and one of the benchmark
    _answer(corpus, shown := new(), "A tree stands in the yard.", "A car.", held_out=True)
    again = new(jpeg(Image.open(corpus.folder / shown)))
    _answer(corpus, again, "The yard is empty today.", "A car.", "shared_images", prompt="Is it empty?")
    _answer(corpus, evaluated, "A tree stands in the yard.", "A car.", "shared_images")
    long = "A tree stands in the yard. " * 40
    _answer(corpus, new(), long, "A car.", "over_budget")
    # Two prompts, and a token of the template
    asked = [[{"role": "user", "content": text}] for text in ("What is here?", "Who is here?")]
    said = [[{"role": "assistant", "content": text}] for text in ("A tree stands in the yard.", "A car.")]
    _answer(corpus, new(), asked[0] + said[0], asked[1] + said[1], "template", prompt=None)
    _answer(corpus, new(), "A tree stands </s> in the yard.", "A car.", "template")
