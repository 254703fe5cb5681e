"""What a benchmark measured, as JSON keeps it and as people read it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.benchmark.measure import Measured

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDTH = 215  # characters that the tables need

ONE_EPOCH = (
    "One epoch: the time of a training of one epoch against the other's, with what is kept beforehand; the more "
    "epochs, the nearer to what is measured of a step."
)

Cells = list[list[str]]  # the first row is the head


@dataclass(frozen=True)
class Comparison:
    """One entrant's step against another's, by their names, and what follows from what they compute."""

    first: str
    second: str
    why: str

    @property
    def name(self) -> str:
        """What is compared."""
        return f"{self.first} / {self.second}"


@dataclass(frozen=True)
class Report:
    """The machine, what was measured, and the operations a second that a process was seen to reach in a matrix product.

    The keys of `models` say what was run.
    """

    machine: dict[str, str | int]
    models: dict[str, list[Measured]]
    comparisons: list[Comparison]
    peak_rate: float


def read_report(path: Path) -> Report:
    """A report from the JSON that the benchmark wrote."""
    content = json.loads(path.read_text())
    models = {title: [Measured(**row) for row in rows] for title, rows in content["models"].items()}
    comparisons = [Comparison(**one) for one in content["comparisons"]]
    return Report(content["machine"], models, comparisons, content["peak_rate"])


def write_report(report: Report, path: Path) -> None:
    """Everything as JSON: what was measured, and in "summary" what follows from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(report), "summary": summary(report)}, indent=1) + "\n")


def summary(report: Report) -> dict[str, Any]:
    """Of every model: medians of each entrant, and the ratios of each comparison."""
    return {
        title: {"entrants": _entrants(report, rows), "ratios": _ratios(report, rows)}
        for title, rows in report.models.items()
    }


def _entrants(report: Report, rows: Sequence[Measured]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        seconds = statistics.median(row.whole)
        rate = sum(row.flops.values()) / seconds
        found[row.variant] = {
            "pairs_per_second": row.batch_size / seconds,
            "milliseconds": {part: 1000 * statistics.median(values) for part, values in row.parts.items()},
            "operations_per_second": rate,
            "share_of_peak": rate / report.peak_rate,
            "peak_bytes": row.peak_bytes,
            "kept_beforehand_milliseconds_a_pair": 1000 * row.filling,
        }
    return found


def _ratios(report: Report, rows: Sequence[Measured]) -> dict[str, Any]:
    found = {}
    for comparison, a, b in _compared(report, rows):
        measured, expected = statistics.median(_times(a, b)), a.operations / b.operations
        found[comparison.name] = {
            "time": measured,
            "by_operations": expected,
            "of_that": measured / expected,
            "one_epoch": statistics.median(_epochs(a, b)),
            "bytes_beyond_weights": a.beyond / b.beyond if b.beyond else None,
            "loss_apart": a.loss_apart,
            "gradient_apart": a.gradient_apart,
        }
    return found


def _compared(report: Report, rows: Sequence[Measured]) -> list[tuple[Comparison, Measured, Measured]]:
    found = {row.variant: row for row in rows}
    there = [one for one in report.comparisons if {one.first, one.second} <= found.keys()]
    return [(one, found[one.first], found[one.second]) for one in there]


def _times(a: Measured, b: Measured) -> list[float]:
    """The time of one as so many times the other's, in every repeat."""
    return [x / y for x, y in zip(a.whole, b.whole, strict=True)]


def _epochs(a: Measured, b: Measured) -> list[float]:
    """Likewise a training of one epoch, with what is kept beforehand, in every repeat."""
    both = zip(a.seconds_of_a_pair, b.seconds_of_a_pair, strict=True)
    return [(x + a.filling) / (y + b.filling) for x, y in both]


def costs(report: Report, rows: Sequence[Measured]) -> Cells:
    """A line an entrant: pairs per second with the range, milliseconds of the parts, operations and memory of a
    process, and milliseconds of what is kept beforehand."""
    names = list(rows[0].parts)
    cells = [["", "pairs/s", *names, "GFLOP", "again", "GFLOP/s", "of peak", "peak MB", "kept beforehand"]]
    for row in rows:
        speed = median([row.batch_size / seconds for seconds in row.whole])
        parts = [f"{1000 * statistics.median(row.parts[name]):.1f}" for name in names]
        flops = sum(row.flops.values())
        rate = flops / statistics.median(row.whole)
        counted = [f"{flops / 1e9:,.1f}", f"{row.repeated / 1e9:,.1f}", f"{rate / 1e9:,.0f}"]
        counted += [f"{rate / report.peak_rate:.0%}", f"{row.peak_bytes / 1e6:,.0f}"]
        once = f"{1000 * row.filling:,.1f} ms a pair, once" if row.filling else ""
        cells.append([row.variant, speed, *parts, *counted, once])
    return cells


def comparisons(report: Report, rows: Sequence[Measured]) -> Cells:
    """A line a comparison: whether they compute the same, and time and memory as they follow from what is computed,
    beside what was measured.

    The ratio of operations is no bound: who computes the same with fewer or other kernels goes beyond it.
    """
    times = ["time: by operations", "measured", "of that", "one epoch"]
    cells = [["", "loss apart", "gradient", *times, "MB expected", "measured", "w/o weights"]]
    for comparison, a, b in _compared(report, rows):
        expected, measured = a.operations / b.operations, _times(a, b)
        # Against the first entrant alone is it known.
        known = b.variant == rows[0].variant
        same = [_tiny(x if known else None) for x in (a.loss_apart, a.gradient_apart)]
        memory = [f"{more / 1e6:+,.1f}" for more in (a.state_bytes - b.state_bytes, a.peak_bytes - b.peak_bytes)]
        share, epoch = f"{statistics.median(measured) / expected:.0%}", f"{statistics.median(_epochs(a, b)):.2f}"
        ratio = f"{a.beyond / b.beyond:.2f}"
        cells.append([comparison.name, *same, f"{expected:.2f}", median(measured), share, epoch, *memory, ratio])
    return cells


def _tiny(number: float | None) -> str:
    return "" if number is None else f"{number:.0e}"


def median(values: Sequence[float]) -> str:
    """The median, with the least and the greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def about(report: Report) -> str:
    """A sentence on the machine and the clock."""
    machine, repeats = report.machine, len(next(iter(report.models.values()))[0].whole)
    gpu = "no GPU" if machine["gpu"] == "none" else machine["gpu"]
    cpu = f"{machine['cpu']}, {_count(machine['threads'], 'thread')} on {_count(machine['cores'], 'core')}"
    rate = f"a matrix product reaches {report.peak_rate / 1e9:,.0f} GFLOP/s"
    taken = f"{machine['date']}; medians of {_count(repeats, 'repeat')}; {rate}"
    clock = f"; {machine['clock']}" if "clock" in machine else ""  # numbers of before it was said
    return f"{cpu}, {gpu}, torch {machine['torch']}, {taken}{clock}."


def _count(number: int | str, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def show(report: Report) -> None:
    """Print everything."""
    terminal = Console(highlight=False)
    console = terminal if terminal.width >= WIDTH else Console(highlight=False, width=WIDTH)
    console.print(about(report))
    if report.comparisons:
        console.print(ONE_EPOCH)
    for title, rows in report.models.items():
        tables = [("milliseconds of an update", costs(report, rows))]
        if report.comparisons:
            tables.append(("time and memory of one against another", comparisons(report, rows)))
        for kind, cells in tables:
            table = Table(title=f"{title}: {kind}")
            for number, name in enumerate(cells[0]):
                table.add_column(name, justify="right" if number else "left", no_wrap=True)
            for line in cells[1:]:
                table.add_row(*line)
            console.print(table)
    for comparison in report.comparisons:
        console.print(f"{comparison.name}: {comparison.why}")


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
    path.write_text(before + begin + "\n" + as_markdown(report) + "\n" + end + after)


def as_markdown(report: Report) -> str:
    """The tables with what is said of them."""
    parts = [about(report)]
    for title, rows in report.models.items():
        parts += [f"### {title} (parts in milliseconds)", _markdown(costs(report, rows))]
        parts += [_markdown(comparisons(report, rows))] if report.comparisons else []
    if report.comparisons:
        parts += [
            ONE_EPOCH,
            "What is expected, and why:",
            "\n".join(f"- {one.name}: {one.why}." for one in report.comparisons),
        ]
    return "\n\n".join(parts)


def _markdown(cells: Cells) -> str:
    lines = [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
