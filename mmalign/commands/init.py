"""The command `init`: write a recipe for a model and preference data.

Settings come from the shipped recipes (`configs/`), which are their one source. Model, layout, sizes and numbers of
pairs are read from the files; comments of the recipe say which value has which origin.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mmalign import methods
from mmalign.atomic_io import atomic_write, prepare_file
from mmalign.commands import preflight
from mmalign.commands._init_settings import Settings, find_settings
from mmalign.commands.load_recipe import dump_value, load_recipe, override
from mmalign.commands.plan import GIB, MARGIN, compute, memory_of_card
from mmalign.config import ImageSize, Recipe
from mmalign.config.methods import find_method, learns_from_thumbs
from mmalign.console import muted
from mmalign.data import shapes
from mmalign.data.formats import conversations, image_layouts, images
from mmalign.data.formats.layouts import AUTO, Layout, recognize
from mmalign.data.formats.sources import open_source
from mmalign.data.pairs import Pairs
from mmalign.families import loading
from mmalign.families.editing import EDITORS
from mmalign.modalities import modality_of
from mmalign.reading import first_line
from mmalign.resources import locate, resolve_model

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, tuple[Sequence[Layout[Any]], Layout[Any]]] = {
    "text_to_image": (image_layouts.LAYOUTS, image_layouts.THUMBS),
    "vision_language": (conversations.LAYOUTS, conversations.THUMBS),
}
SAMPLED = 100  # pairs whose images are measured
MIN_HELD_OUT, MAX_HELD_OUT = 20, 500  # pairs from which on some are held out, and the most that are
FEW = 1_000  # pairs, which one process reads fast enough
EPOCHS = ((FEW, 3), (10_000, 2))  # below so many pairs, so many epochs; else one
MIN_UPDATES = 10  # of an epoch: few pairs have smaller batches than published
UNEQUAL = 0.1  # share of an image that a square may cut, and share of the pairs of which it may cut more


@dataclass
class _Draft:
    """Recipe in the making.

    Attributes:
        tree: its content.
        notes: comments by "section.key".
        known: sentences on model and data, for the head of the recipe.
        unknown: sentences on what could not be known.
    """

    tree: dict[str, Any]
    unknown: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    known: list[str] = field(default_factory=list)


def init(
    model: str,
    data: str,
    overrides: Sequence[str] = (),
    *,
    method: str | None = None,
    output: Path = Path("recipe.yaml"),
    memory: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a recipe that trains a model on preference data, and return its file.

    Args:
        model: a folder or Hub id.
        data: a file, a folder, a glob or a Hub id.
        overrides: assignments such as "data.split=train", which the recipe then has.
        method: the method; None takes the usual one for the model and the data.
        output: the recipe's file.
        memory: memory of the card to train on, in GiB; None is that of this machine's GPU, if any.
        overwrite: true to replace an existing file.

    Raises:
        ValueError: the model, the layout or the method is not supported, there is no pair, or the file is not
            writable.
    """
    prepare_file("--output", output)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already; name another file with --output, or give --overwrite")
    given: Any = override({}, overrides)
    of_model = given.get("model", {})
    folder, revision = _configuration(model, of_model.get("config")), of_model.get("revision")
    modality, kind = loading.recognize(folder, revision)
    several, thumbs = images.layouts(EDITORS[kind].sources) if kind in EDITORS else LAYOUTS[modality]
    of_thumbs = method is not None and learns_from_thumbs(method)
    columns = _recognize_data(data, modality, given.get("data", {}), several, thumbs if of_thumbs else None)
    name = method or _usual_method(modality, str(columns["format"]))
    _check_modality(name, modality, kind)
    settings = find_settings(modality, loading.PIPELINES.get(kind, kind), name)
    draft = _Draft(
        {
            "method": settings.method,
            "model": {"path": model, **settings.model},
            "data": {**columns, **settings.data},
            "train": dict(settings.train),
            "output": f"runs/{output.stem if output.stem != 'recipe' else f'{name}_{Path(data).stem}'}",
        },
        list(settings.unknown),
    )
    # Pairs by the recipe itself, so that a run takes the same ones
    recipe = load_recipe(draft.tree, overrides)
    with muted():
        pairs, _ = modality_of(recipe).open_pairs(recipe, methods.requirements_of(recipe.method))
    if modality == "text_to_image" and columns["format"] != "prompts":
        _fit_images(draft, pairs, loading.default_side(folder, revision))
    _fit_numbers(draft, pairs, recipe)
    draft.known.append(f"Data: {pairs.summary()}")
    _fit_machine(draft)
    _fit_memory(draft, overrides, memory_of_card(memory))
    _write(draft, override(draft.tree, overrides), kind, settings, output)
    return output


def _configuration(model: str, config: str | None) -> str:
    """Return the folder of the model's configuration; `config` names that of a single file.

    Raises:
        ValueError: the model is a single file, and nothing names its configuration.
    """
    if config is None and Path(model).is_file():
        raise ValueError(
            f"model: {model} is a single file; add model.config=MODEL with a pipeline of the same layout, such as "
            "model.config=stabilityai/stable-diffusion-xl-base-1.0"
        )
    return resolve_model(config or model)


def _write(draft: _Draft, tree: dict[str, Any], kind: str, settings: Settings, output: Path) -> None:
    """Check the recipe, write its file, and log what is known and unknown."""
    # As `mmalign train` will check it; what fails here may work on the machine that trains
    checked = load_recipe(tree)
    try:
        with muted():
            preflight.check(checked, "training")
    except ValueError as error:
        draft.unknown.append(f"whether it trains here: {first_line(error)}")
    text = _render(tree, draft, _header(kind, settings, output, draft))
    with atomic_write(output) as part:
        part.write_text(text, encoding="utf-8")
    assert load_recipe(output) == checked, "the text says what the tree says"
    for line in (f"Model: {kind}; settings of {settings.source}", *draft.known):
        logger.info(line)
    for sentence in draft.unknown:
        logger.info(f"Unknown: {sentence}")
    logger.info(f"{output} is written; read it, then: mmalign train {output}")


# ---------------------------------------------------------------------------------------------------------- recognition


def _recognize_data(
    data: str, modality: str, given: Mapping[str, Any], layouts: Sequence[Layout[Any]], thumbs: Layout[Any] | None
) -> dict[str, object]:
    """Return the section `data` for the layout of files: path, format and the names of columns; `given` is set already.

    `layouts` are those that the model can take. A method that learns from single outputs has the layout `thumbs`, and
    cuts pairs if that does not fit.

    Raises:
        ValueError: there are no files, or their columns are of no layout of this modality.
    """
    # What the file's name or the user says
    if modality == "text_to_image" and data.lower().endswith(".txt"):
        return {"format": "prompts", "path": data}
    if given.get("format", AUTO) != AUTO:
        return {"format": given["format"], "path": data}
    place = f"data.path: {data}"
    # Thumbs, or pairs to cut into them
    if thumbs is not None and not given.get("cut_pairs"):
        source = open_source(locate(data), given.get("split"), thumbs=True)
        try:
            return _data_section(data, recognize([thumbs], source.columns, source.sample, place))
        except ValueError:
            pairs = _recognize_data(data, modality, given, layouts, None)
            return {**pairs, "cut_pairs": True}
    # Layouts of the model's modality; for data of the other one the error says so
    source = open_source(locate(data), given.get("split"))
    try:
        layout = recognize(layouts, source.columns, source.sample, place)
    except ValueError as error:
        other = next(name for name in LAYOUTS if name != modality)
        try:
            other_layout = recognize(LAYOUTS[other][0], source.columns, source.sample, place)
        except ValueError:
            raise error from None
        raise ValueError(
            f"{place} has rows of {other_layout.name}, which are {other.replace('_', '-')} data; the model is a "
            f"{modality.replace('_', '-')} model: name a model or data of the other kind"
        ) from None
    return _data_section(data, layout)


def _data_section(data: str, layout: Layout[Any]) -> dict[str, object]:
    columns = {own: column for own, column in layout.names.items() if own != column}
    return {"format": layout.name, "path": data, **({"columns": columns} if columns else {})}


def _usual_method(modality: str, format: str) -> str:
    if modality == "text_to_image":
        return "spo" if format == "prompts" else "diffusion_dpo"
    return "response_sft" if format == "answers" else "dpo"


def _check_modality(name: str, modality: str, kind: str) -> None:
    if (own := find_method(name)[0]) != modality:
        raise ValueError(
            f"--method: {name} trains {own.replace('_', '-')} models, and the model is a {kind}; see `mmalign list`"
        )


# ------------------------------------------------------------------------------------------------------ sizes and pairs


def _fit_images(draft: _Draft, pairs: Pairs[Any], own: int | None) -> None:
    """Set resolution and buckets by the sizes of the first pairs' images."""
    sample = pairs[:SAMPLED]
    sizes = shapes.measure(sample)
    if not sizes:
        draft.unknown.append("sizes: none of the first images can be read; see `mmalign doctor`")
        return
    # Sides of squares with the images' areas
    sides = sorted((size.width * size.height) ** 0.5 for size in sizes.values())
    typical, data = median(sides), draft.tree["data"]
    published = data.get("resolution")
    # The smaller one of the model's own side and the published side, unless it would enlarge the images
    known = [side for side in (own, published) if isinstance(side, int)]
    target = min(known, default=max(64, int(typical) // 64 * 64))
    note = f"the shipped recipe's; the model's own is {own or 'unknown'}" if target == published else "the model's own"
    if typical < 0.8 * target:
        step = max(8, target // 16)
        target, note = max(step, int(typical) // step * step), f"by the images; {target} would enlarge them"
    data["resolution"] = target
    draft.notes["data.resolution"] = (
        f"{note}. Sides of the images: {sides[0]:.0f} to {sides[-1]:.0f}, median {typical:.0f}"
    )
    # Buckets of shapes, if squares would cut too much
    square = ImageSize(target, target)
    cut = [
        max(shapes.lost_area(sizes[ref.key], square) for ref in pair.images if ref.key in sizes)
        for pair in sample
        if any(ref.key in sizes for ref in pair.images)
    ]
    share = sum(lost > UNEQUAL for lost in cut) / len(cut)
    if share > UNEQUAL:
        data["fit"] = "buckets"
        draft.notes["data.fit"] = (
            f"a square would cut more than {UNEQUAL:.0%} of the images in {share:.0%} of the pairs"
        )


def _fit_numbers(draft: _Draft, pairs: Pairs[Any], recipe: Recipe) -> None:
    """Set updates, batches and the validation split by the number of pairs."""
    data, train, notes = draft.tree["data"], draft.tree["train"], draft.notes
    needs, number = methods.requirements_of(recipe.method), len(pairs)
    # Validation split and reading
    if number >= MIN_HELD_OUT and len(set(pairs.groups())) > 1 and not needs.generates and needs.rejected:
        data["validation_fraction"] = round(min(0.1, MAX_HELD_OUT / number), 4)
        notes["data.validation_fraction"] = f"about {round(number * data['validation_fraction']):,} rows are held out"
        if needs.learns_from == "thumbs":
            draft.unknown.append("gain: the verdict measures the rows held out; for outputs add an `evaluate` section")
        else:
            draft.tree["evaluate"] = {"benchmark": "implicit"}
            notes["evaluate"] = "on the pairs held out; docs/your_data.md has the other benchmarks"
    else:
        draft.unknown.append("gain: no pairs are held out; add an `evaluate` section (docs/your_data.md)")
    if number < FEW:
        data.pop("num_workers", None)
    elif "num_workers" in data:
        data["num_workers"] = min(data["num_workers"], os.cpu_count() or 1)
    # Batch
    most = train.get("batch_size", 1)
    published = most * train.get("gradient_accumulation_steps", 1)
    batch = max(needs.min_pairs, min(published, number // MIN_UPDATES), 1)
    most = max(most, needs.min_pairs)
    train["batch_size"] = next(size for size in range(min(most, batch), 0, -1) if batch % size == 0)
    train["gradient_accumulation_steps"] = batch // train["batch_size"]
    what = "published" if batch == published else f"{published} are published; few pairs need updates more"
    notes["train.gradient_accumulation_steps"] = f"{batch} pairs an update: {what}"
    # Updates
    epochs = next((epochs for below, epochs in EPOCHS if number < below), 1)
    train["steps"] = steps = min(train["steps"], -(-epochs * number // batch))
    notes["train.steps"] = f"{steps * batch / number:.2g} epochs of {number:,} pairs"
    if "warmup_steps" in train:
        train["warmup_steps"] = min(train["warmup_steps"], steps // 10)
    train["save_every"] = max(1, min(train.get("save_every", 500), steps // 4))


def _fit_machine(draft: _Draft) -> None:
    """Replace settings that need a GPU, or a package for it, if they are not here."""
    train, on_card = draft.tree["train"], torch.cuda.is_available()
    if train.get("optimizer") == "adamw_8bit" and not (on_card and find_spec("bitsandbytes")):
        train["optimizer"] = "adamw"
        draft.notes["train.optimizer"] = "adamw_8bit, as shipped, needs a GPU and bitsandbytes"
    if train.get("precision") == "float16" and not on_card:
        train["precision"] = "bfloat16"
        draft.notes["train.precision"] = "float16, as shipped, needs a GPU"


def _fit_memory(draft: _Draft, overrides: Sequence[str], memory: float | None) -> None:
    """Switch on what saves memory, in the order of `mmalign plan`, until the training fits."""
    if memory is None:
        draft.unknown.append("memory: there is no GPU here; `mmalign plan RECIPE --memory 24` says what fits")
        return
    try:
        cost = compute(load_recipe(draft.tree, overrides), memory)
    except ValueError as error:
        draft.unknown.append(f"memory: {first_line(error)}")
        return
    # All that were tried, up to the first that fits; what the user has given stays
    given = [assignment.partition("=")[0].strip() for assignment in overrides]
    refused = [
        remedy
        for remedy in cost.remedies
        if any(f"{setting.partition('=')[0]}.".startswith(f"{key}.") for setting in remedy.settings for key in given)
    ]
    settings = [setting for remedy in cost.remedies if remedy not in refused for setting in remedy.settings]
    draft.tree = override(draft.tree, settings)
    draft.notes |= {setting.partition("=")[0]: f"to fit {memory:g} GiB" for setting in settings}
    if refused:
        kept = ", ".join(" ".join(remedy.settings) for remedy in refused)
        draft.unknown.append(f"memory: to fit {memory:g} GiB `mmalign plan` would set {kept}, and you have set others")
        return
    peak = cost.remedies[-1].peak if cost.remedies else cost.peak
    draft.known.append(f"Memory: {peak / GIB:.1f} of {memory:g} GiB at the peak, by `mmalign plan`.")
    if peak > memory * GIB * (1 - MARGIN):
        draft.unknown.append("a setting that fits: the last line on memory is too much; take a smaller model or card")


# -------------------------------------------------------------------------------------------------------------- writing


def _header(kind: str, settings: Settings, output: Path, draft: _Draft) -> list[str]:
    return [
        f"{settings.name} on a {kind}, by `mmalign init`; `mmalign explain KEY` says what a key means.",
        f"Run: mmalign train {output}, then mmalign evaluate {output} and mmalign export {output} --to FORM.",
        f"Settings of {settings.source}, where no comment says otherwise.",
        *settings.reasons,
        *draft.known,
        *(f"Unknown: {sentence}" for sentence in draft.unknown),
    ]


def _render(tree: dict[str, Any], draft: _Draft, header: Sequence[str]) -> str:
    """Return the recipe as text: comments, then a line for each section or key."""
    lines = [f"# {' '.join(line.split())}" for line in header]
    for section, value in tree.items():
        noted = any(note.startswith(f"{section}.") for note in draft.notes)
        if isinstance(value, dict) and (noted or len(value) > 2):
            lines.append(f"{section}:")
            lines += [
                f"  {key}: {dump_value(inner)}{_comment(draft, f'{section}.{key}')}" for key, inner in value.items()
            ]
        else:
            lines.append(f"{section}: {dump_value(value)}{_comment(draft, section)}")
    return "\n".join(lines) + "\n"


def _comment(draft: _Draft, key: str) -> str:
    return f"  # {' '.join(draft.notes[key].split())}" if key in draft.notes else ""
