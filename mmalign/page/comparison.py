"""A comparison of recipes to look at: its table, its curve over the time of training, and prompts side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmalign.evaluation.counts import Metrics, RunStatistics
from mmalign.evaluation.intervals import Interval
from mmalign.page.grid import INK, MUTED, PAGE, TEXT, fit, load_font, wrap, write_line

# Okabe and Ito's colours, which colour-blind people tell apart; the marks do it without any.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKS = "osD^vPX*"


@dataclass(frozen=True)
class Row:
    """What the runs of one recipe came to at one length; the base model is a row with a single run.

    Attributes:
        name: the recipe's.
        method: that it trains by; nothing for the base model.
        at: the number of pairs that all recipes are compared at; None where each is at the end of its own training.
        runs: how many there are.
        pairs: that each of them was trained on, with repetition.
        seconds: of training until there, the mean over the runs: as `loop.Progress` counts them.
        measured: of each set of measures what was counted in the base model's answers, and the runs beside it.
    """

    name: str
    method: str
    at: int | None
    runs: int
    pairs: int
    seconds: float
    measured: list[tuple[Metrics, RunStatistics]]

    def cells(self, of: Callable[[RunStatistics], Mapping[str, Interval]]) -> Iterator[tuple[str, bool, Interval]]:
        """The main measures: label, whether it is a share, and its interval."""
        for base, runs in self.measured:
            for name in base.headline_names:
                yield base.label(name), name in base.ratios, of(runs)[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every main measure with its runs, and its change from the base model."""
        values = [runs.values[name] for base, runs in self.measured for name in base.headline_names]
        means, changes = (list(self.cells(of)) for of in (_means, _changes))
        return {
            "name": self.name,
            "method": self.method,
            "at": self.at,
            "runs": self.runs,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "measures": {
                label: {**mean.as_dict(), "runs": list(each), "change": change.as_dict()}
                for (label, _, mean), (_, _, change), each in zip(means, changes, values, strict=True)
            },
        }


def _means(runs: RunStatistics) -> Mapping[str, Interval]:
    return runs.means


def _changes(runs: RunStatistics) -> Mapping[str, Interval]:
    return runs.changes


# ------------------------------------------------------------------------------------------------------------ the table


def as_markdown(rows: Sequence[Row], command: str) -> str:
    """The base model's row and the recipes' own ends, then the same at each number of pairs; and how it was made."""
    base, *others = rows
    places = dict.fromkeys(row.at for row in others)
    ends = "At the end of each recipe:" if len(places) > 1 else ""
    parts = []
    for at in places:
        heading = ends if at is None else f"After {at:,} pairs each:"
        parts += [heading, ""] if heading else []
        parts += _tables(base, [row for row in others if row.at == at])
    asked = " and ".join(f"{len(counts.keys):,} of {counts.benchmark}" for counts, _ in base.measured)
    return "\n".join(
        [
            *parts,
            f"Means over runs that differ in their seed, with 95 % intervals over questions ({asked}) and runs.",
            "Seconds are those of the updates, without loading and encoding: CPU time, or wall-clock time of a GPU.",
            f"Made by `{command}`.",
            "",
        ]
    )


def _tables(base: Row, rows: Sequence[Row]) -> list[str]:
    """What every row came to, and what changed from the base model, bold where it surely did."""
    labels = [f"{label}, %" if share else label for label, share, _ in base.cells(_means)]
    values = [[base.name, *[""] * 4, *_shown(base, _means)]]
    for row in rows:
        made = [row.name, row.method, str(row.runs), f"{row.pairs:,}", f"{row.seconds:,.0f}"]
        values.append([*made, *_shown(row, _means)])
    changes = [[row.name, *_shown(row, _changes)] for row in rows]
    return [
        *_lines(["", "method", "runs", "pairs seen", "seconds", *labels], values),
        "",
        "Change from the base model, paired by question; bold where the interval leaves out 0:",
        "",
        *_lines(["", *labels], changes),
        "",
    ]


def _shown(row: Row, of: Callable[[RunStatistics], Mapping[str, Interval]]) -> Iterator[str]:
    """A row's cells: shares in percent; of changes those in bold whose interval leaves out 0."""
    signed = of is _changes
    for _, share, interval in row.cells(of):
        text = interval.points(signed=signed) if share else str(interval)
        yield f"**{text}**" if signed and (interval.low > 0 or interval.high < 0) else text


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


# ------------------------------------------------------------------------------------------------------------ the curve


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the last words that all of them have: "sft" and "mapo" for "sft_tiny_sd" and "mapo_tiny_sd"."""
    parts = [name.split("_") for name in names]
    same = 0
    while len(parts) > 1 and all(len(p) > same + 1 for p in parts) and len({p[-1 - same] for p in parts}) == 1:
        same += 1
    return {name: "_".join(part[: len(part) - same]) for name, part in zip(names, parts, strict=True)}


def draw_curve(rows: Sequence[Row], file: Path) -> None:
    """The first measure's change from the base model over the seconds of training, a line for each recipe; PNG."""
    from matplotlib.figure import Figure

    base, *others = rows
    label, share, _ = next(base.cells(_means))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#68625b", linewidth=0.8)
    for k, (name, label_of) in enumerate(short_names(list(dict.fromkeys(row.name for row in others))).items()):
        points = sorted((row.seconds, *_point(row)) for row in others if row.name == name)
        seconds, means, lows, highs = np.array([(0.0, 0.0, 0.0, 0.0), *dict.fromkeys(points)]).T
        sides = np.abs(np.stack([lows, highs]) - means)
        colour, mark = COLOURS[k % len(COLOURS)], MARKS[k % len(MARKS)]
        axes.errorbar(
            seconds, means, sides, label=label_of, color=colour, marker=mark, markersize=5, capsize=3, elinewidth=0.8
        )
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"change of {label}" + (", points" if share else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, format="png", dpi=110)


def _point(row: Row) -> tuple[float, float, float]:
    """The first measure's change with its ends; shares in points."""
    _, share, change = next(row.cells(_changes))
    scale = 100 if share else 1
    return scale * change.estimate, scale * change.low, scale * change.high


# ------------------------------------------------------------------------------------------------- prompts side by side


@dataclass(frozen=True)
class Drawn:
    """A picture, and what is said of it in a word or two."""

    image: Image.Image
    note: str
    good: bool


def draw_side_by_side(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Drawn]], title: str, lines: Sequence[str], *, side: int = 128
) -> Image.Image:
    """A row for each prompt and a column for each model.

    Args:
        prompts: N texts.
        columns: from a model's name to its N pictures.
        title: above all.
        lines: below the title.
        side: of a picture, in pixels.
    """
    left, gap, margin, small = 250, 14, 40, 15
    top, high = margin + 50 + 26 * len(lines) + 40, side + 30
    width = 2 * margin + left + len(columns) * (side + gap)
    canvas = Image.new("RGB", (width, top + len(prompts) * high + margin), PAGE)
    brush = ImageDraw.Draw(canvas)
    write_line(brush, (margin, margin), title, 30, TEXT, width - 2 * margin)
    for k, line in enumerate(lines):
        write_line(brush, (margin, margin + 48 + 26 * k), line, 18, MUTED, width - 2 * margin)
    for j, name in enumerate(columns):
        write_line(brush, (margin + left + j * (side + gap), top - 28), name, small + 1, TEXT, side + gap)
    for i, prompt in enumerate(prompts):
        y = top + i * high
        for k, line in enumerate(wrap(prompt, load_font(small + 2), left - 20)):
            write_line(brush, (margin, y + side // 2 - 22 + 24 * k), line, small + 2, TEXT, left - 20)
        for j, drawn in enumerate(columns.values()):
            x = margin + left + j * (side + gap)
            canvas.paste(fit(drawn[i].image, side), (x, y))
            ink = INK["gained" if drawn[i].good else "lost"][0]
            brush.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=ink, width=2)
            write_line(brush, (x, y + side + 4), drawn[i].note, small, ink, side)
    return canvas
