"""Metrics of sums, their comparison between two models, and their statistics over runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmalign.evaluation.metrics import Metrics, as_columns, compare, divide, f1, ratio, summarize_runs
from mmalign.evaluation.statistics import cluster_jackknife, paired, paired_difference


def metrics(*rows: tuple[int, int, int, str, str], benchmark: str = "toy") -> Metrics:
    """Metrics of rows (invented, mentions, words, key, image)."""
    columns = as_columns([dict(zip(("invented", "mentions", "words"), row[:3], strict=True)) for row in rows])
    ratios = {"rate": ratio("invented", "mentions")}
    keys, images = (tuple(row[index] for row in rows) for index in (3, 4))
    return Metrics(benchmark, keys, images, columns, ratios, ("words",))


AFTER_ROWS = ((0, 0, 0, "c", "2"), (0, 4, 8, "a", "1"), (1, 2, 7, "b", "2"))
BEFORE = metrics((1, 4, 10, "a", "1"), (2, 2, 5, "b", "2"), (0, 0, 0, "c", "2"))
AFTER = metrics(*AFTER_ROWS)
OTHER = metrics((0, 1, 1, "a", "1"), (0, 1, 1, "d", "2"))  # another question


def test_divide_and_f1() -> None:
    assert divide(np.array([1.0, 3.0]), np.array([4.0, 0.0])).tolist() == [0.25, 0.0]
    # precision 3 / 4 and recall 3 / 6: 2 * 0.375 / 1.25 = 0.6
    assert float(f1(np.array(3.0), np.array(4.0), np.array(6.0))) == 0.6


def test_metrics_are_of_sums_and_not_means_of_ratios() -> None:
    assert BEFORE.values == {"rate": 0.5, "words": 5.0}  # 3 / 6, where the mean of 1/4, 1 and 0 would be 0.42


def test_compare_matches_questions_in_any_order() -> None:
    differences = compare(BEFORE, AFTER).differences
    assert differences["rate"].estimate == pytest.approx(1 / 6 - 3 / 6)
    assert differences["words"] == paired_difference([10, 5, 0], [8, 7, 0], ["1", "2", "2"])
    both = np.concatenate([BEFORE.matrix, AFTER.matrix[[1, 2, 0]]], axis=-1)
    (expected,) = cluster_jackknife([both], paired(BEFORE.measure), ["1", "2", "2"], bounds=[(-1, 1)])
    assert differences["rate"] == expected


def test_comparison_table_and_json() -> None:
    comparison = compare(BEFORE, AFTER)
    header, rate, words = comparison.table()
    assert header == ("toy", "before", "after", "change [95 % interval]")
    assert rate[0] == "rate, %" and rate[1].startswith("50.0 [") and rate[3].startswith("-33.3 [")
    assert words[0] == "words" and words[2].startswith("5 [")
    assert BEFORE.table()[0] == ("toy", "3 responses [95 % interval]")
    assert {len(row) for row in BEFORE.table()} == {2}
    record = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert record["difference"]["rate"]["estimate"] == pytest.approx(-1 / 3)
    assert record["before"]["counts"] == {"invented": 3, "mentions": 6, "words": 15}
    assert (record["after"]["responses"], record["after"]["groups"]) == (3, 2)


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        (lambda: metrics(), "toy: no responses"),
        (lambda: metrics((1, 1, 1, "a", "1"), (1, 1, 1, "a", "2")), "toy: a is answered twice"),
        (lambda: compare(BEFORE, OTHER), r"2 only before \(b, ...\) and 1 only after \(d, ...\)"),
        (lambda: compare(BEFORE, metrics(*AFTER_ROWS, benchmark="game")), r"toy \(rate\) before, game \(rate\) after"),
        (lambda: compare(*[metrics((1, 1, 1, "a", "1"))] * 2), "measure more"),
        (lambda: summarize_runs(BEFORE, [AFTER, OTHER]), "answered different questions"),
        (lambda: summarize_runs(BEFORE, []), "there is no run"),
    ],
)
def test_metrics_refuse(attempt: Callable[[], Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        attempt()


def test_runs_are_averaged_and_set_beside_the_base() -> None:
    """Rates 1/6 and 3/6 beside a base of 3/6; 5 words a response in one run, 5 in the other, 5 in the base."""
    statistics = summarize_runs(BEFORE, [AFTER, BEFORE])
    assert statistics.values == {"rate": (pytest.approx(1 / 6), 0.5), "words": (5.0, 5.0)}
    assert statistics.means["rate"].estimate == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert statistics.changes["rate"].estimate == pytest.approx((1 / 6 - 1 / 2) / 2)
    assert statistics.means["words"].estimate == 5 and statistics.changes["words"].estimate == 0


def test_one_run_has_the_intervals_of_a_comparison() -> None:
    """One run knows nothing of other seeds, so its ratios are those of `compare`."""
    statistics = summarize_runs(BEFORE, [AFTER])
    assert statistics.changes["rate"] == compare(BEFORE, AFTER).differences["rate"]
    assert statistics.means["rate"] == AFTER.intervals["rate"]


def test_mean_of_negative_scores_lies_in_its_interval() -> None:
    """Four scores each of -2.1, -2 and -1.9 have the mean -2 and the error sqrt(0.08 / 132), with t_11 = 2.200985."""
    keys, columns = tuple(range(12)), {"score": np.array([-2.1, -2.0, -1.9] * 4), "all": np.ones(12)}
    toy = Metrics("toy", keys, keys, columns, {"rate": ratio("all", "all")}, ("score",))
    mean, reach = summarize_runs(toy, [toy]).means["score"], 2.200985 * (0.08 / 132) ** 0.5
    assert (mean.estimate, mean.low, mean.high) == pytest.approx((-2, -2 - reach, -2 + reach))


def test_runs_without_any_word_have_a_mean() -> None:
    silent = replace(BEFORE, columns={**BEFORE.columns, "words": np.zeros(3)})
    assert summarize_runs(BEFORE, [silent, silent]).means["words"].as_dict() == {"estimate": 0, "low": 0, "high": 0}


def test_short_table_has_the_headline_metrics() -> None:
    before, after = (replace(side, headline=("words",)) for side in (BEFORE, AFTER))
    assert [row[0] for row in compare(before, after).table(short=True)] == ["toy", "words"]
    assert len(compare(before, after).table()) == 3
    assert BEFORE.headline_names == ("rate", "words")


@pytest.mark.parametrize(
    ("name", "label"), [("mean: accuracy", "toy accuracy"), ("random: F1", "random: F1"), ("recall", "recall")]
)
def test_label_names_the_benchmark_of_a_mean(name: str, label: str) -> None:
    assert BEFORE.label(name) == label


def test_responses_about_one_image_have_no_interval() -> None:
    with pytest.raises(ValueError, match=r"^toy: all 2 responses are about 1; an interval needs two images or prompts"):
        metrics((1, 4, 10, "a", "1"), (2, 2, 5, "b", "1")).as_dict()
