"""Gallery of a text-to-image evaluation, and images of several recipes side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired

from PIL import Image
from typing_extensions import TypedDict

from mmalign.atomic_io import atomic_write, write_json
from mmalign.config import EvaluateImages, Recipe
from mmalign.data.formats.image_layouts import SOURCE
from mmalign.data.images import BadImage, decode_file
from mmalign.evaluation.metrics import SIDES, Metrics
from mmalign.modalities import EVALUATE_AGAIN, SAMPLES, Sample, SamplesFile, read_samples
from mmalign.modalities.text_to_image.evaluate import measure_best, measure_samples
from mmalign.pages.comparison import RatedImage, render_side_by_side, short_names
from mmalign.pages.grid import encode_grid
from mmalign.pages.page import GalleryEntry
from mmalign.pages.pictures import picture_entry
from mmalign.pages.ranking import kind

SHOWN = 8  # prompts in the grid of several recipes


class Side(TypedDict):
    """Measurements of an image; which of the last three there are depends on the evaluation."""

    score: float
    note: str
    judged: NotRequired[float]
    apart: NotRequired[float]
    parts: NotRequired[dict[str, bool]]


class PictureSample(TypedDict):
    """Prompt, seed, the location of a source image, and the measurements of the images before and after alignment."""

    prompt: str
    seed: int
    before: Side
    after: Side
    best_of: NotRequired[dict[str, Side]]
    source: NotRequired[str]


def read(folder: Path) -> SamplesFile[PictureSample]:
    """Read the samples of an evaluation's folder.

    Raises:
        ValueError: the file cannot be read or is damaged, or its samples differ in their measurements.
    """
    content = read_samples(SamplesFile[PictureSample], folder)
    sides = [side for sample in content["samples"] for side in (sample["before"], sample["after"])]
    # The measures of an image; of its parts `correct` alone, since prompts have different ones
    measured = {frozenset(side) | frozenset(side.get("parts", {})) & {"correct"} for side in sides}
    if len(measured) > 1 or any("parts" in some and "correct" not in some for some in measured):
        raise ValueError(f"{folder / SAMPLES}: is damaged (its samples differ in their measures); {EVALUATE_AGAIN}")
    return content


def unavailable_reason(recipe: Recipe) -> str | None:
    """Return the reason why an evaluation has no samples to show, or None."""
    implicit = recipe.evaluate is not None and recipe.evaluate.benchmark == "implicit"
    return "benchmark implicit generates no images" if implicit else None


def gallery_entries(_: Recipe, folder: Path, samples: Sequence[tuple[int, Sample]]) -> list[GalleryEntry]:
    """Return the gallery's entries of an evaluation's samples, given as (index, sample)."""
    entries = []
    for index, sample in samples:
        images = [_read_image(folder, side, index) for side in SIDES]
        before, after = (sample[side] for side in SIDES)
        scores, notes = (before["score"], after["score"]), (before["note"], after["note"])
        source = _read_image(folder, SOURCE, index) if SOURCE in sample else None
        entries.append(picture_entry(sample["prompt"], sample["seed"], images, scores, notes, source))
    return entries


def provenance(recipe: Recipe, num_samples: int) -> dict[str, str]:
    """Return the sampling settings behind a page's entries."""
    assert isinstance(recipe.evaluate, EvaluateImages)
    sampling = recipe.evaluate.sampling
    return {
        "sampler": f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}",
        "samples": f"{num_samples} evaluated; both models start from the same noise",
    }


def read_metrics(recipe: Recipe) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of an evaluated run, before and after alignment."""
    folder = Path(recipe.output) / "evaluation"
    samples = read(folder)["samples"]
    try:
        return measure_samples(samples)
    except ValueError as error:  # a prompt that is not of the bundled world
        raise ValueError(f"{folder / SAMPLES}: is damaged ({error}); {EVALUATE_AGAIN}") from error


def read_best(recipe: Recipe) -> dict[int, list[Metrics]]:
    """Return the metrics of the base model's best of n images in an evaluated run, by n."""
    return measure_best(read(Path(recipe.output) / "evaluation")["samples"])


def write_images(file: Path, recipes: Mapping[str, Recipe]) -> None:
    """Write images of the first prompts, by the base model and by each recipe's run, and their manifest.

    Args:
        file: the table's file, whose name the new files begin with.
        recipes: the evaluated run of each recipe, by the recipe's name.
    """
    # Images of every recipe at the first prompts
    samples = {name: read(Path(recipe.output) / "evaluation")["samples"] for name, recipe in recipes.items()}
    base, recipe = next(iter(samples.values())), next(iter(recipes.values()))
    # The first image of each of the first prompts
    indices = list({sample["prompt"]: i for i, sample in reversed(list(enumerate(base)))}.values())[::-1][:SHOWN]
    first, columns = Path(recipe.output), dict[str, list[RatedImage]]()
    if SOURCE in base[0]:
        sources = [_read_image(first / "evaluation", SOURCE, i) for i in indices]
        columns[SOURCE] = [RatedImage(image, "", is_good=True) for image in sources]
    columns["base"] = [_rated_image(first, base[i], i, "before") for i in indices]
    for name, short_name in short_names(list(samples)).items():
        output = Path(recipes[name].output)
        columns[short_name] = [_rated_image(output, samples[name][i], i, "after") for i in indices]

    # Header, picture and manifest
    below = "its score by the reward model. A green frame: higher than the base model's."
    if any(sample["before"]["note"] for sample in base):
        below = "its errors. A green frame: no errors."
    lines = [
        "The first prompts of the evaluation, not selected; the images of a row start from the same noise (seed 0).",
        f"Below an image: {below}",
    ]
    prompts, title = [base[i]["prompt"] for i in indices], recipe.model.path
    manifest = {
        "picture": {"lines": [title, *lines]},
        "prompts": prompts,
        "notes": {name: [image.note for image in images] for name, images in columns.items()},
    }
    with atomic_write(file.with_name(f"{file.stem}-pictures.png")) as part:
        part.write_bytes(encode_grid(render_side_by_side(prompts, columns, title, lines), [title, *lines]))
    write_json(file.with_name(f"{file.stem}-pictures.json"), manifest)


def _read_image(folder: Path, side: str, index: int) -> Image.Image:
    path = folder / side / f"{index:05d}.png"
    try:
        return decode_file(path, str(path))
    except BadImage as error:
        raise ValueError(f"{error}; {EVALUATE_AGAIN}") from error


def _rated_image(output: Path, sample: Sample, index: int, side: str) -> RatedImage:
    image = _read_image(output / "evaluation", side, index)
    record = sample[side]
    if record["note"]:
        return RatedImage(image, record["note"], record["note"] == "correct")
    return RatedImage(image, f"{record['score']:.3g}", kind((sample["before"]["score"], record["score"])) == "gained")
