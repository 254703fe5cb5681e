"""The command `plan`: memory, disk and epochs of a recipe's training, before any weight is downloaded.

Memory is that of tensors, by configurations alone (`_plan_memory`). A card also holds CUDA's own context, buffers of
its kernels and the gaps of its allocator, so a plan fits if it leaves `MARGIN` of the card free.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmalign import methods
from mmalign.atomic_io import prepare_file, write_json
from mmalign.commands._bench_run import build, peak_bytes
from mmalign.commands._plan_memory import Memory, estimate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import describe_updates
from mmalign.config import Recipe
from mmalign.console import muted
from mmalign.data.data_module import Splits
from mmalign.modalities import modality_of
from mmalign.reading import first_line
from mmalign.resources import locate
from mmalign.training.launch import open_accelerator

logger = logging.getLogger(__name__)

GIB = 2**30
MARGIN = 0.1  # share of a card that tensors leave free
BATCHES = (1, 2, 4)
MAX_BATCH = 256


@dataclass(frozen=True)
class Remedy:
    """Setting that saves memory, with all earlier ones switched on.

    Attributes:
        settings: assignments of the recipe's keys.
        peak: the peak with them, in bytes.
    """

    settings: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class Plan:
    """Costs of a recipe's training; sizes are in bytes.

    Attributes:
        training: size by part while it trains, without activations.
        leaving: size of networks that leave the device once their outputs are cached, by name.
        activations: size of activations by pairs in a micro-batch; the recipe's own batch is among them.
        peak: peak of the recipe: the larger one of training and of encoding before it.
        encoding: peak before the first update, while all networks are on the device.
        largest_batch: the largest micro-batch that fits, 0 if none does; None without a memory.
        disk: size by cache, and of all checkpoints.
        about: the size of an example.
        updates: a sentence with pairs, updates and epochs.
        remedies: settings that save memory, in the order to try them, up to the first that fits.
        measured: measured and predicted peak of two updates on this machine; None without a probe.
    """

    training: dict[str, int]
    leaving: dict[str, int]
    activations: dict[int, int]
    peak: int
    encoding: int
    largest_batch: int | None
    disk: dict[str, int]
    about: str
    updates: str
    remedies: list[Remedy]
    measured: tuple[int, int] | None


def plan(recipe: Recipe, *, memory: float | None = None, probe: bool = False, json: Path | None = None) -> Plan:
    """Print and return the costs of a recipe's training, from configurations alone.

    Args:
        recipe: the recipe.
        memory: memory of the card, in GiB; None is that of this machine's GPU, if any.
        probe: also load the model, make two updates, and measure their peak.
        json: a file for the numbers.

    Raises:
        ValueError: the model's configurations are not at hand, or the model cannot be trained as the recipe asks.
    """
    prepare_file("--json", json)
    memory = memory_of_card(memory)
    result = compute(recipe, memory, probe=probe)
    show(result, recipe, memory)
    if json is not None:
        write_json(json, asdict(result))
        logger.info(f"{json}: the numbers")
    return result


def memory_of_card(given: float | None) -> float | None:
    """Return the memory of a card in GiB: the given one, else that of this machine's GPU, if any.

    Raises:
        ValueError: the given one is not above 0.
    """
    if given is not None and given <= 0:
        raise ValueError(f"--memory: got {given:g}; expected the GiB of a card, such as 24")
    if given is None and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return given


def compute(recipe: Recipe, memory: float | None, *, probe: bool = False) -> Plan:
    """Return the costs of a recipe's training; `memory` is that of the card in GiB, None without a card.

    Raises:
        ValueError: the model's configurations are not at hand, or the model cannot be trained as the recipe asks.
    """
    splits, updates = _open_pairs(recipe)
    return make_plan(recipe, splits, updates, memory, probe=probe)


def make_plan(
    recipe: Recipe, splits: Splits | None, updates: str, memory: float | None, *, probe: bool = False
) -> Plan:
    """Return the costs of a recipe's training, as `compute` does, by its pairs if they are at hand.

    `updates` is a sentence with pairs, updates and epochs. With `probe` the model is loaded, to measure the peak of two
    updates.

    Raises:
        ValueError: the model's configurations are not at hand, or the model cannot be trained as the recipe asks.
    """
    on_card = memory is not None
    # Building the model logs what training will log
    with muted():
        estimated = estimate(recipe, splits, on_card=on_card)
        example = estimated.example
        size = recipe.train.batch_size
        peak = _peak(estimated, size, on_card=on_card)
        limit = None if memory is None else int(memory * GIB * (1 - MARGIN))
        return Plan(
            _parts(estimated, on_card=on_card),
            {name: estimated.networks[name] for name in example.leaving} if on_card else {},
            {number: estimated.activations(number) for number in sorted({*BATCHES, size})},
            peak,
            estimated.preparing,
            None if limit is None else _largest_batch(estimated, limit),
            {**example.cache_bytes, "checkpoints": _checkpoints(recipe, estimated)},
            example.about,
            updates,
            [] if limit is None or peak <= limit else list(_remedies(recipe, splits, limit, example.remedies)),
            _probe(recipe) if probe else None,
        )


def _open_pairs(recipe: Recipe) -> tuple[Splits | None, str]:
    """Return the recipe's pairs if they are on this machine, and a sentence about them; nothing is downloaded."""
    path = Path(locate(recipe.data.path))
    reason = "they are not on this machine"
    if path.exists():
        try:
            with muted():
                needs = methods.requirements_of(recipe.method)
                splits = modality_of(recipe).open_pairs(recipe, needs)
            return splits, describe_updates(recipe.train, needs, len(splits[0]), 1)
        except (ValueError, OSError) as error:
            reason = first_line(error)
    # Without the pairs, the recipe's own numbers
    options = recipe.train
    number = options.steps * options.batch_size * options.gradient_accumulation_steps
    return None, (
        f"pairs: unknown ({reason}); {options.steps:,} updates on 1 process take {number:,} pairs. Sizes are those of "
        "a usual pair"
    )


def _parts(memory: Memory, *, on_card: bool) -> dict[str, int]:
    """Return the bytes by part during training, without activations and without networks that leave the device."""
    leaving = memory.example.leaving if on_card else ()
    staying = {name: size for name, size in memory.networks.items() if name not in leaving}
    parts = {f"weights: {name}": size for name, size in staying.items()}
    parts |= {
        "weights: frozen reference": memory.reference,
        "weights: lagging copies": memory.lagging,
        "gradients": memory.gradients,
        "optimizer and average": memory.optimizer,
    }
    return {name: size for name, size in parts.items() if size}


def _peak(memory: Memory, size: int, *, on_card: bool) -> int:
    return max(memory.preparing, memory.training(size, all_stay=not on_card))


def _largest_batch(memory: Memory, limit: int) -> int:
    """Return the largest micro-batch within the limit; beyond `BATCHES` activations grow by a straight line."""
    fitting = [size for size in BATCHES if _peak(memory, size, on_card=True) <= limit]
    # Less than the largest measured size: of those between, 3 is left to try
    if not fitting or fitting[-1] < BATCHES[-1]:
        last = fitting[-1] if fitting else 0
        return last + 1 if last == 2 and _peak(memory, 3, on_card=True) <= limit else last
    # Activations of one more pair, from two measured sizes
    slope = (memory.activations(4) - memory.activations(2)) // 2
    return min(MAX_BATCH, 4 + (limit - memory.training(4)) // max(1, slope))


def _checkpoints(recipe: Recipe, memory: Memory) -> int:
    """Return the bytes of all checkpoints that a run keeps: the recent ones, and the best one of a validation split."""
    number = recipe.train.keep_checkpoints + (1 if recipe.data.validation_fraction else 0)
    return memory.checkpoint * number


def _remedies(recipe: Recipe, splits: Splits | None, limit: int, others: Sequence[str]) -> Iterator[Remedy]:
    """Yield settings that save memory, each on top of the earlier ones, up to the first that fits."""
    for settings in (*_settings(recipe), *((other,) for other in others)):
        recipe = load_recipe(recipe.model_dump(), settings)
        memory = estimate(recipe, splits, on_card=True)
        peak = _peak(memory, recipe.train.batch_size, on_card=True)
        yield Remedy(settings, peak)
        if peak <= limit:
            return


def _settings(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Yield the settings that the recipe does not have yet, in the order to try them."""
    options, least = recipe.train, methods.requirements_of(recipe.method).min_pairs
    if not options.gradient_checkpointing:
        yield ("train.gradient_checkpointing=true",)
    if options.batch_size > least:
        steps = options.gradient_accumulation_steps * options.batch_size // least
        yield f"train.batch_size={least}", f"train.gradient_accumulation_steps={steps}"
    if recipe.model.tune == "full":
        yield ("model.tune=lora",)
    if options.optimizer == "adamw":
        yield ("train.optimizer=adamw_8bit",)
    if recipe.model.quantize is None:
        yield ("model.quantize=nf4",)
    if recipe.data.cache == "off":
        yield ("data.cache=auto",)


def _probe(recipe: Recipe) -> tuple[int, int]:
    """Return the measured and the predicted peak of two updates on this machine, with the pairs of one update.

    On a CPU the bytes of live tensors are counted (`LiveBytes`), on CUDA the allocator counts them.
    """
    options = recipe.train
    pairs = options.batch_size * options.gradient_accumulation_steps
    # Pairs of one update, all for training
    data = recipe.data.model_copy(update={"limit": pairs, "validation_fraction": 0.0})
    recipe = recipe.model_copy(update={"data": data})
    accelerator = open_accelerator(options, rank_timeout=recipe.limits.rank_timeout)
    on_card = accelerator.device.type == "cuda"
    splits = modality_of(recipe).open_pairs(recipe, methods.requirements_of(recipe.method))
    predicted = estimate(recipe, splits, on_card=on_card).training(options.batch_size, all_stay=not on_card)
    before = torch.cuda.memory_allocated() if on_card else 0
    with tempfile.TemporaryDirectory() as folder:
        run = build(recipe, accelerator, Path(folder), 2)
        run.updates(run, 1, None)  # the first update makes the optimizer's state
        return peak_bytes(run, before), predicted


def show(result: Plan, recipe: Recipe, memory: float | None) -> None:
    """Print a plan as tables and sentences."""
    console, options = Console(highlight=False), recipe.train
    where = "a CPU" if memory is None else f"a card of {memory:g} GiB"
    table = Table("part", "GB", title=f"{recipe.method.name}, {recipe.model.tune}, {options.precision}, on {where}")
    table.columns[1].justify = "right"
    for name, size in result.training.items():
        table.add_row(name, _gb(size))
    for number, size in result.activations.items():
        table.add_row(f"activations, {number} pair{'s' if number > 1 else ''}", _gb(size))
    for name, size in result.leaving.items():
        table.add_row(f"before training only: {name}", _gb(size))
    table.add_section()
    table.add_row(f"peak before training ({result.about})", _gb(result.encoding))
    table.add_row(f"peak with {options.batch_size} pairs", _gb(result.peak))
    for name, size in result.disk.items():
        table.add_row(f"disk: {name}", _gb(size))
    console.print(table)
    console.print(result.updates, soft_wrap=True, markup=False)
    for line in _conclusions(result, recipe, memory):
        console.print(line, soft_wrap=True, markup=False)


def _conclusions(result: Plan, recipe: Recipe, memory: float | None) -> Iterator[str]:
    """Yield the sentences below the table."""
    if result.largest_batch is not None and memory is not None:
        fits = "fits" if not result.remedies and result.largest_batch >= recipe.train.batch_size else "does not fit"
        yield (
            f"{fits}: {memory:g} GiB with {MARGIN:.0%} left free; largest micro-batch: {result.largest_batch or 'none'}"
        )
    for number, remedy in enumerate(result.remedies, start=1):
        yield f"{number}. {' '.join(remedy.settings)}: peak {_gb(remedy.peak)} GB"
    if methods.requirements_of(recipe.method).reward is not None:
        yield "the reward model is not counted"
    if result.measured is not None:
        measured, predicted = result.measured
        yield (
            f"probe, two updates here: measured {_gb(measured)} GB, predicted {_gb(predicted)} GB "
            f"({predicted / measured - 1:+.1%})"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3f}" if size < 1e9 else f"{size / 1e9:,.1f}"
