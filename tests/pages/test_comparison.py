"""Comparisons of recipes: paired differences from base, baseline and each other, corrected for their number."""

from typing import Any

import numpy as np
import pytest

from mmalign.evaluation.metrics import Metrics, compare_runs, ratio, summarize_runs
from mmalign.pages.comparison import TableRow, add_differences, as_markdown

PROMPTS = 60


def metrics(outcomes: Any) -> Metrics:
    keys = tuple(range(len(outcomes)))
    columns = {"invented": np.asarray(outcomes, dtype=float), "all": np.ones(len(outcomes))}
    return Metrics("CHAIR", keys, keys, columns, {"CHAIR_s": ratio("invented", "all")}, errors=("CHAIR_s",))


def runs(share: float) -> list[Metrics]:
    """Two runs in which the first prompts of each have an invented object."""
    return [metrics(np.arange(PROMPTS) < share * PROMPTS + seed) for seed in range(2)]


BASE = runs(0.5)[0]
TRAINED = {"weak_sft": ("sft", runs(0.45)), "sft": ("sft", runs(0.3)), "dpo": ("dpo", runs(0.1))}


@pytest.fixture(scope="module")
def rows() -> list[TableRow]:
    base = TableRow("base", "", None, 1, 0, 0.0, [(BASE, summarize_runs(BASE, [BASE]))])
    others = [
        TableRow(name, method, None, 2, 64, 1.0, [(BASE, summarize_runs(BASE, trained))])
        for name, (method, trained) in TRAINED.items()
    ]
    of_rows = [[[run] for run in trained] for _, trained in TRAINED.values()]
    return [base, *add_differences(base, others, of_rows, ("sft", "response_sft"))]


def test_rows_are_compared_with_the_baseline_of_fewest_errors(rows: list[TableRow]) -> None:
    baselines = {row.name: row.baseline and row.baseline[0] for row in rows}
    assert baselines == {"base": None, "weak_sft": "sft", "sft": None, "dpo": "sft"}
    assert rows[3].baseline is not None
    (difference,) = rows[3].baseline[1]
    assert difference.estimate == pytest.approx(-0.2) and difference.is_certain


def test_methods_are_compared_with_each_other(rows: list[TableRow]) -> None:
    """Pair both runs of two methods by prompt, and correct for the number of pairs."""
    assert [list(row.against) for row in rows] == [[], [], ["weak_sft"], ["weak_sft", "sft"]]
    expected = compare_runs(TRAINED["sft"][1], TRAINED["dpo"][1])["CHAIR_s"]
    (difference,) = rows[3].against["sft"]
    assert (difference.low, difference.high, difference.p) == (expected.low, expected.high, expected.p)
    assert expected.p is not None and difference.p_holm == pytest.approx(max(expected.p, difference.p_holm or 0))
    result = rows[3].as_dict()
    assert result["against"]["sft"]["CHAIR_s"]["p_holm"] == difference.p_holm  # type: ignore[index]
    assert result["against_baseline"]["sft"]["CHAIR_s"]["p"] == expected.p  # type: ignore[index]


def test_bold_survives_the_correction(rows: list[TableRow]) -> None:
    """An interval without 0 is not bold if its p-value is too large for the number of comparisons."""
    text = as_markdown(rows, "mmalign compare")
    assert "from the best baseline, sft; bold where it survives Holm's correction for 2 comparisons" in text
    assert "bold where it survives Holm's correction for 3 comparisons" in text
    weak = next(line for line in text.split("Change from the base model")[1].splitlines() if "weak_sft" in line)
    assert ("**" in weak) == rows[1].changes[0].is_certain
