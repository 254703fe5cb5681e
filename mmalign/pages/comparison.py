"""Tables, a plot over training time, and side-by-side images for a comparison of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmalign.evaluation.metrics import Metrics, RunStatistics
from mmalign.evaluation.statistics import Interval
from mmalign.pages.grid import INK, Cell, Piece, Section, Text, Tile, render_grid

# Okabe and Ito's colours for colour-blind readers, and markers that distinguish the recipes without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*"


class HeadlineMetric(NamedTuple):
    """A metric of one recipe's runs: the values of the runs, their mean, and the change from the base model."""

    label: str
    is_ratio: bool
    values: tuple[float, ...]
    mean: Interval
    change: Interval

    @property
    def header(self) -> str:
        """The label with its unit."""
        return f"{self.label}, %" if self.is_ratio else self.label

    def format(self, interval: Interval, signed: bool = False) -> str:
        """Format a mean, or a signed change; ratios in percent."""
        return interval.points(signed=signed) if self.is_ratio else str(interval)


@dataclass(frozen=True)
class TableRow:
    """The runs of one recipe at one length; the base model is a row with a single run.

    Attributes:
        name: the recipe's name.
        method: its method; empty for the base model.
        num_pairs: the number of pairs at which all recipes are compared; None at the end of each recipe's own training.
        runs: the number of runs.
        pairs: the number of pairs that each run was trained on, with repetition.
        seconds: the training time until then, averaged over the runs (`loop.Progress`).
        measured: the base model's metrics and the statistics of the runs, for each benchmark.
    """

    name: str
    method: str
    num_pairs: int | None
    runs: int
    pairs: int
    seconds: float
    measured: list[tuple[Metrics, RunStatistics]]

    @property
    def metrics(self) -> list[HeadlineMetric]:
        """The headline metrics of all benchmarks."""
        return [
            HeadlineMetric(
                base.label(name), name in base.ratios, runs.values[name], runs.means[name], runs.changes[name]
            )
            for base, runs in self.measured
            for name in base.headline_names
        ]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for JSON: every headline metric with its runs and its change from the base model."""
        return {
            "name": self.name,
            "method": self.method,
            "at": self.num_pairs,
            "runs": self.runs,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "measures": {
                m.label: {**m.mean.as_dict(), "runs": list(m.values), "change": m.change.as_dict()}
                for m in self.metrics
            },
        }


# ------------------------------------------------------------------------------------------------------------ the table


def as_markdown(rows: Sequence[TableRow], command: str) -> str:
    """Return Markdown tables for each length in the order of `rows`, and the command that made them.

    The first row is the base model.
    """
    base, *others = rows
    lengths = dict.fromkeys(row.num_pairs for row in others)
    lines = []
    for length in lengths:
        if length is not None or len(lengths) > 1:
            lines += ["At the end of each recipe:" if length is None else f"After {length:,} pairs each:", ""]
        lines += _tables(base, [row for row in others if row.num_pairs == length])
    asked = " and ".join(f"{len(metrics.keys):,} of {metrics.benchmark}" for metrics, _ in base.measured)
    return "\n".join(
        [
            *lines,
            f"Means over runs that differ in their seed, with 95 % intervals over questions ({asked}) and runs.",
            "Seconds are those of the updates, without loading and encoding: CPU time, or wall-clock time of a GPU.",
            f"Made by `{command}`.",
            "",
        ]
    )


def _tables(base: TableRow, rows: Sequence[TableRow]) -> list[str]:
    """Return a table of every row's means, and one of the changes, bold if the interval excludes 0."""
    headers = [metric.header for metric in base.metrics]
    values, changes = [[base.name, *[""] * 4, *(metric.format(metric.mean) for metric in base.metrics)]], []
    for row in rows:
        facts = [row.name, row.method, str(row.runs), f"{row.pairs:,}", f"{row.seconds:,.0f}"]
        values.append([*facts, *(metric.format(metric.mean) for metric in row.metrics)])
        cells = [metric.format(metric.change, signed=True) for metric in row.metrics]
        certain = [metric.change.low > 0 or metric.change.high < 0 for metric in row.metrics]
        changes.append([row.name, *(f"**{c}**" if bold else c for c, bold in zip(cells, certain, strict=True))])
    return [
        *_markdown_table(["", "method", "runs", "pairs seen", "seconds", *headers], values),
        "",
        "Change from the base model, paired by question; bold where the interval leaves out 0:",
        "",
        *_markdown_table(["", *headers], changes),
        "",
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


# ------------------------------------------------------------------------------------------------------------ the curve


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short form of each name without common last words: "sft" for "sft_tiny_sd" beside "mapo_tiny_sd"."""
    parts = [name.split("_") for name in names]
    same = 0
    while len(parts) > 1 and all(len(p) > same + 1 for p in parts) and len({p[-1 - same] for p in parts}) == 1:
        same += 1
    return {name: "_".join(part[: len(part) - same]) for name, part in zip(names, parts, strict=True)}


def plot_curve(rows: Sequence[TableRow], file: Path) -> None:
    """Write a PNG plot of the first metric's change from the base model over training seconds, one line per recipe."""
    from matplotlib.figure import Figure

    base, *others = rows
    first = base.metrics[0]
    scale = 100 if first.is_ratio else 1
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#68625b", linewidth=0.8)
    # A line for each recipe, from the base model at 0 seconds
    for index, (name, label) in enumerate(short_names(list(dict.fromkeys(row.name for row in others))).items()):
        changes = [(row.seconds, row.metrics[0].change) for row in others if row.name == name]
        points = sorted((s, scale * c.estimate, scale * c.low, scale * c.high) for s, c in changes)
        seconds, means, lows, highs = np.array([(0.0, 0.0, 0.0, 0.0), *dict.fromkeys(points)]).T
        axes.errorbar(
            seconds,
            means,
            np.abs(np.stack([lows, highs]) - means),
            label=label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            capsize=3,
            elinewidth=0.8,
        )
    # Labels and legend
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"change of {first.label}" + (", points" if first.is_ratio else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, format="png", dpi=110)


# -------------------------------------------------------------------------------------------------- images side by side


@dataclass(frozen=True)
class RatedImage:
    """An image, a short note, and a flag for a good one, which sets the colour of its frame."""

    image: Image.Image
    note: str
    is_good: bool


def render_side_by_side(
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[RatedImage]],
    title: str,
    lines: Sequence[str],
    *,
    side: int = 128,
) -> Image.Image:
    """Return a grid with a row for each of N prompts, and a column of N images of `side` pixels for each model."""

    def text_cell(text: str, size: int, width: int) -> Cell:
        return Cell([Text([Piece(text)], size, num_lines=3)], width=width)

    tiles = [Tile([text_cell("", 16, 230), *(text_cell(name, 16, side) for name in columns)])]
    for prompt, *images in zip(prompts, *columns.values(), strict=True):
        cells = [text_cell(prompt, 17, 230)]
        for image in images:
            ink = INK["gained" if image.is_good else "lost"]
            cells.append(Cell([Text([Piece(image.note, ink)], 15, num_lines=2)], image.image, side, frame=ink))
        tiles.append(Tile(cells))
    return render_grid(title, lines, [Section(tiles)], columns=1)
