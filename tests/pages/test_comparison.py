"""Comparisons of recipes: paired differences from base, baseline and each other, corrected for their number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mmalign.evaluation.comparison import TableRow, add_differences
from mmalign.evaluation.metrics import Metrics, compare_runs, ratio, summarize_runs
from mmalign.pages.comparison import as_markdown

PROMPTS = 60


def metrics(outcomes: Any) -> Metrics:
    keys = tuple(range(len(outcomes)))
    columns = {"invented": np.asarray(outcomes, dtype=float), "all": np.ones(len(outcomes))}
    return Metrics("CHAIR", keys, keys, columns, {"CHAIR_s": ratio("invented", "all")}, errors=("CHAIR_s",))


def runs(share: float) -> list[Metrics]:
    """Return two runs in which the first prompts of each have an invented object."""
    return [metrics(np.arange(PROMPTS) < share * PROMPTS + seed) for seed in range(2)]


BASE = runs(0.5)[0]
TRAINED = {"weak_sft": ("sft", runs(0.45)), "sft": ("sft", runs(0.3)), "dpo": ("dpo", runs(0.1))}


def table(recipes: Mapping[str, tuple[str, list[Metrics]]]) -> list[TableRow]:
    """Return the rows of the base model and of recipes, given as method and runs."""
    base = TableRow("base", "", None, 1, 0, 0.0, [(BASE, summarize_runs(BASE, [BASE]))])
    others = [
        TableRow(name, method, None, 2, 64, 1.0, [(BASE, summarize_runs(BASE, trained))])
        for name, (method, trained) in recipes.items()
    ]
    of_rows = [[[run] for run in trained] for _, trained in recipes.values()]
    return [base, *add_differences(base, others, of_rows, ("sft", "response_sft"))]


@pytest.fixture(scope="module")
def rows() -> list[TableRow]:
    return table(TRAINED)


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
    assert expected.p is not None and difference.p_holm == pytest.approx(2 * expected.p)  # the second of three
    result = rows[3].as_dict()
    assert result["against"]["sft"]["CHAIR_s"]["p_holm"] == difference.p_holm  # type: ignore[index]
    assert result["against_baseline"]["sft"]["CHAIR_s"]["p"] == expected.p  # type: ignore[index]


def test_tables_name_their_number_of_comparisons(rows: list[TableRow]) -> None:
    text = as_markdown(rows, "mmalign compare")
    assert "from the best baseline, sft; bold where it survives Holm's correction for 2 comparisons" in text
    assert "bold where it survives Holm's correction for 3 comparisons" in text


def test_bold_survives_the_correction() -> None:
    """A change with an interval without 0 is bold alone, and not beside another with the same p-value."""
    single, two = (table({name: ("dpo", runs(0.41)) for name in names}) for names in (["x"], ["x", "y"]))
    assert two[1].changes[0].high < 0 and two[1].changes[0].p_holm == pytest.approx(2 * (single[1].changes[0].p or 0))
    assert ["**-7.5 [" in as_markdown(rows, "mmalign compare") for rows in (single, two)] == [True, False]
