"""What the benchmark of a training step measured, as JSON keeps it and as people read it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDTH = 150  # characters that the tables need


@dataclass(frozen=True)
class Variant:
    """A way to train. `copied`: LoRA with a frozen copy as its reference, which no recipe asks for."""

    name: str
    tune: str
    method: str = "diffusion_dpo"
    cached: bool = True
    copied: bool = False


LORA = Variant("LoRA, adapters off", "lora")
LORA_COPY = Variant("LoRA, frozen copy", "lora", copied=True)
LORA_UNCACHED = Variant("LoRA, adapters off, no caches", "lora", cached=False)
FULL = Variant("full, frozen copy", "full")
FULL_UNCACHED = Variant("full, frozen copy, no caches", "full", cached=False)
MAPO = Variant("full, mapo (no reference)", "full", method="mapo")
VARIANTS = (LORA, LORA_COPY, LORA_UNCACHED, FULL, FULL_UNCACHED, MAPO)

COMPARISONS = (  # one against the other, and what follows from what they compute
    (LORA_COPY, LORA, "the same operations; one network more in memory"),
    (
        LORA_UNCACHED,
        LORA,
        "autoencoder and text encoder run for every batch; their weights are in memory either way, pixels come on top",
    ),
    (FULL_UNCACHED, FULL, "likewise, beside a dearer step"),
    (MAPO, FULL, "one forward pass less, one network less"),
    (FULL, LORA, "gradients of all weights; in memory the copy, these gradients, and Adam's two moments"),
)


@dataclass(frozen=True)
class Measured:
    """A variant's numbers.

    Attributes:
        variant: its name.
        batch_size: pairs of an update.
        whole: seconds of an update in every repeat, without a meter.
        parts: likewise by part, with one.
        flops: operations of an update by part.
        state_bytes: what is known beforehand: every network, and the gradient and two moments of what is trained.
        peak_bytes: measured.
    """

    variant: str
    batch_size: int
    whole: list[float]
    parts: dict[str, list[float]]
    flops: dict[str, int]
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """The machine, and what each model's variants took; keys say what was run."""

    machine: dict[str, str | int]
    models: dict[str, list[Measured]]


def read_report(path: Path) -> Report:
    """A report from the JSON that the benchmark wrote."""
    content = json.loads(path.read_text())
    models = {title: [Measured(**row) for row in rows] for title, rows in content["models"].items()}
    return Report(content["machine"], models)


Cells = list[list[str]]  # the first row is the head


def costs(rows: Sequence[Measured]) -> Cells:
    """A line a variant: pairs per second with the range, milliseconds of the parts, operations and memory."""
    names = list(rows[0].parts)
    cells = [["", "pairs/s", *names, "GFLOP", "peak MB"]]
    for row in rows:
        speed = median([row.batch_size / seconds for seconds in row.whole])
        parts = [f"{1000 * statistics.median(row.parts[name]):.1f}" for name in names]
        cells.append(
            [row.variant, speed, *parts, f"{sum(row.flops.values()) / 1e9:.1f}", f"{row.peak_bytes / 1e6:,.0f}"]
        )
    return cells


def comparisons(rows: Sequence[Measured]) -> Cells:
    """A line a comparison: time and memory as they follow from what is computed, beside what was measured."""
    found = {row.variant: row for row in rows}
    cells = [["", "time expected", "measured", "MB expected", "measured"]]
    for first, second, _ in COMPARISONS:
        a, b = found[first.name], found[second.name]
        time = f"{sum(a.flops.values()) / sum(b.flops.values()):.2f}"
        ratio = median([x / y for x, y in zip(a.whole, b.whole, strict=True)])
        memory = [f"{more / 1e6:+,.1f}" for more in (a.state_bytes - b.state_bytes, a.peak_bytes - b.peak_bytes)]
        cells.append([versus(first, second), time, ratio, *memory])
    return cells


def versus(first: Variant, second: Variant) -> str:
    """What is compared."""
    return f"{first.name} / {second.name}"


def median(values: Sequence[float]) -> str:
    """The median, with the least and the greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def about(machine: dict[str, str | int], repeats: int) -> str:
    """A sentence on the machine."""
    gpu = "no GPU" if machine["gpu"] == "none" else machine["gpu"]
    cpu = f"{machine['cpu']}, {_count(machine['threads'], 'thread')} on {_count(machine['cores'], 'core')}"
    return f"{cpu}, {gpu}, torch {machine['torch']}, {machine['date']}; medians of {_count(repeats, 'repeat')}."


def _count(number: int | str, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _repeats(report: Report) -> int:
    return len(next(iter(report.models.values()))[0].whole)


def show(report: Report) -> None:
    """Print everything."""
    terminal = Console(highlight=False)
    console = terminal if terminal.width >= WIDTH else Console(highlight=False, width=WIDTH)
    console.print(about(report.machine, _repeats(report)))
    for title, rows in report.models.items():
        for kind, cells in (("milliseconds of an update", costs(rows)), ("against each other", comparisons(rows))):
            table = Table(title=f"{title}: {kind}")
            for number, name in enumerate(cells[0]):
                table.add_column(name, justify="right" if number else "left", no_wrap=True)
            for line in cells[1:]:
                table.add_row(*line)
            console.print(table)
    for first, second, why in COMPARISONS:
        console.print(f"{versus(first, second)}: {why}")


def write_markdown(report: Report, path: Path) -> None:
    """Put the tables into a document, in the place of what is between its markers.

    Raises:
        ValueError: the document lacks the markers.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected a line {BEGIN} and below it a line {END}; add them where the tables belong")
    parts = [about(report.machine, _repeats(report))]
    for title, rows in report.models.items():
        parts += [f"### {title} (parts in milliseconds)", _markdown(costs(rows)), _markdown(comparisons(rows))]
    parts += ["What is expected, and why:", "\n".join(f"- {versus(a, b)}: {why}." for a, b, why in COMPARISONS)]
    path.write_text(before + begin + "\n" + "\n\n".join(parts) + "\n" + end + after)


def _markdown(cells: Cells) -> str:
    lines = [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
