"""Tables, a plot over training time, and side-by-side images for a comparison of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.evaluation.comparison import HeadlineMetric, TableRow
from mmalign.evaluation.statistics import Interval
from mmalign.pages.grid import INK, Cell, Piece, Section, Text, Tile, render_grid

# Okabe and Ito's colours for colour-blind readers, and markers that distinguish the recipes without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*"
SIDE = 128  # pixels of an image in a grid of several models


# ------------------------------------------------------------------------------------------------------------ the table


def as_markdown(rows: Sequence[TableRow], command: str) -> str:
    """Return Markdown tables for each length in the order of `rows`, and the command that made them.

    The first row is the base model.
    """
    base, *others = rows
    lengths = dict.fromkeys(row.num_pairs for row in others)
    lines = []
    for length in lengths:
        # A single table at the recipes' own ends needs no heading
        if length is not None or len(lengths) > 1:
            lines += ["At the end of each recipe:" if length is None else f"After {length:,} pairs each:", ""]
        lines += _tables(base, [row for row in others if row.num_pairs == length])
    asked = " and ".join(f"{len(metrics.keys):,} of {metrics.benchmark}" for metrics, _ in base.measured)
    return "\n".join(
        [
            *lines,
            f"Means over runs that differ in their seed, with 95 % intervals over questions ({asked}) and runs.",
            "Differences are paired by question and seed. Intervals are those of single comparisons; bold ones survive",
            "Holm's correction for all comparisons of their table, at 5 %.",
            "Seconds are those of the updates, without loading and encoding: CPU time, or wall-clock time of a GPU.",
            f"Made by `{command}`.",
            "",
        ]
    )


def _tables(base: TableRow, rows: Sequence[TableRow]) -> list[str]:
    """Return tables of every row's means, changes, and differences from the best baseline and each other."""
    headers = [metric.header for metric in base.metrics]
    values = [[base.name, *[""] * 4, *(metric.format(metric.mean) for metric in base.metrics)]]
    for row in rows:
        facts = [row.name, row.method, str(row.runs), f"{row.pairs:,}", f"{row.seconds:,.0f}"]
        values.append([*facts, *(metric.format(metric.mean) for metric in row.metrics)])
    # Differences of each row by its name
    changes = {row.name: [metric.change for metric in row.metrics] for row in rows}
    baseline = {row.name: row.baseline[1] for row in rows if row.baseline}
    against = {f"{row.name} - {name}": cells for row in rows for name, cells in row.against.items()}
    lines = [*_markdown_table(["", "method", "runs", "pairs seen", "seconds", *headers], values), ""]
    name = next((row.baseline[0] for row in rows if row.baseline), "")
    for title, differences in (
        ("Change from the base model", changes),
        (f"Difference from the best baseline, {name}", baseline),
        ("Differences of the methods from each other", against),
    ):
        if differences:
            lines += _difference_table(title, headers, base.metrics, differences)
    return lines


def _difference_table(
    title: str, headers: Sequence[str], metrics: Sequence[HeadlineMetric], rows: Mapping[str, Sequence[Interval]]
) -> list[str]:
    """Return a table of differences with its title, bold where they survive the correction."""
    number = len(rows) * len(metrics)
    cells = [
        [name, *(metric.format_difference(cell) for metric, cell in zip(metrics, differences, strict=True))]
        for name, differences in rows.items()
    ]
    heading = f"{title}; bold where it survives Holm's correction for {number} comparisons, at 5 %:"
    return [heading, "", *_markdown_table(["", *headers], cells), ""]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


# ------------------------------------------------------------------------------------------------------------ the curve


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short form of each name without common last words: "sft" for "sft_tiny_sd" beside "mapo_tiny_sd"."""
    parts = [name.split("_") for name in names]
    # Words that all names end in, while each name keeps one of its own
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
    prompts: Sequence[str], columns: Mapping[str, Sequence[RatedImage]], title: str, lines: Sequence[str]
) -> Image.Image:
    """Return a grid with a row for each of N prompts, and a column of N images for each model."""

    def text_cell(text: str, size: int, width: int) -> Cell:
        return Cell([Text([Piece(text)], size, num_lines=3)], width=width)

    # The models' names above their images
    tiles = [Tile([text_cell("", 16, 230), *(text_cell(name, 16, SIDE) for name in columns)])]
    for prompt, *images in zip(prompts, *columns.values(), strict=True):
        cells = [text_cell(prompt, 17, 230)]
        for image in images:
            ink = INK["gained" if image.is_good else "lost"]
            cells.append(Cell([Text([Piece(image.note, ink)], 15, num_lines=2)], image.image, SIDE, frame=ink))
        tiles.append(Tile(cells))
    return render_grid(title, lines, [Section(tiles)], columns=1)
