"""Measures of sums, and what changed between two models."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mmalign.evaluation.counts import Counts, compare, f1, over_runs, ratio
from mmalign.evaluation.intervals import paired_bootstrap, paired_difference


def counts(invented: list[int], mentions: list[int], words: list[int], keys: list[str], images: list[str]) -> Counts:
    columns = {
        "invented": np.array(invented, dtype=np.float64),
        "mentions": np.array(mentions, dtype=np.float64),
        "words": np.array(words, dtype=np.float64),
    }
    shares = {"rate": lambda sums: ratio(sums["invented"], sums["mentions"])}
    return Counts("toy", tuple(keys), tuple(images), columns, shares, ("words",))


BEFORE = counts([1, 2, 0], [4, 2, 0], [10, 5, 0], ["a", "b", "c"], ["1", "2", "2"])
AFTER = counts([0, 0, 1], [0, 4, 2], [0, 8, 7], ["c", "a", "b"], ["2", "1", "2"])


def test_ratio_and_f1() -> None:
    assert ratio(np.array([1.0, 3.0]), np.array([4.0, 0.0])).tolist() == [0.25, 0.0]
    # precision 3 / 4 and recall 3 / 6: 2 * 0.375 / 1.25 = 0.6
    assert float(f1(np.array(3.0), np.array(4.0), np.array(6.0))) == 0.6


def test_values_are_of_sums_and_not_means_of_ratios() -> None:
    assert BEFORE.values == {"rate": 0.5, "words": 5.0}  # 3 / 6, where the mean of 1/4, 1 and 0 would be 0.42
    assert BEFORE.sums == {"invented": 3, "mentions": 6, "words": 15}


def test_models_are_compared_on_the_same_questions_in_any_order() -> None:
    found = compare(BEFORE, AFTER)
    assert found.differences["rate"].estimate == pytest.approx(1 / 6 - 3 / 6)
    assert found.differences["words"] == paired_difference([10, 5, 0], [8, 7, 0], ["1", "2", "2"])
    theirs, ours = BEFORE.matrix, AFTER.matrix[[1, 2, 0]]
    assert [found.differences["rate"]] == paired_bootstrap(theirs, ours, BEFORE.measure, ["1", "2", "2"])


def test_table_and_dict() -> None:
    found = compare(BEFORE, AFTER)
    header, rate, words = found.table()
    assert header == ("toy", "before", "after", "change [95 % interval]")
    assert rate[0] == "rate, %" and rate[1].startswith("50.0 [") and rate[3].startswith("-33.3 [")
    assert words[0] == "words" and words[2].startswith("5 [")
    assert BEFORE.table()[0] == ("toy", "3 responses [95 % interval]")
    assert {len(row) for row in BEFORE.table()} == {2}
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert record["difference"]["rate"]["estimate"] == pytest.approx(-1 / 3)
    assert record["before"]["counts"] == {"invented": 3, "mentions": 6, "words": 15}
    assert (record["after"]["responses"], record["after"]["groups"]) == (3, 2)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="toy: there is no response to measure"):
        counts([], [], [], [], [])
    with pytest.raises(ValueError, match="toy: a is answered twice"):
        counts([1, 1], [1, 1], [1, 1], ["a", "a"], ["1", "2"])
    other = counts([0, 0], [1, 1], [1, 1], ["a", "d"], ["1", "2"])
    with pytest.raises(
        ValueError, match=r"did not answer the same: 2 only before \(b, ...\) and 1 only after \(d, ...\)"
    ):
        compare(BEFORE, other)
    with pytest.raises(ValueError, match=r"toy \(rate\) before, game \(rate\) after"):
        compare(BEFORE, Counts("game", AFTER.keys, AFTER.groups, AFTER.columns, AFTER.shares, AFTER.means))
    with pytest.raises(ValueError, match="measure more"):
        compare(*[counts([1], [1], [1], ["a"], ["1"])] * 2)


def test_runs_are_averaged_and_set_beside_the_base() -> None:
    """Rates 1/6 and 3/6 beside a base of 3/6; 5 words a response in one run, 5 in the other, 5 in the base."""
    found = over_runs(BEFORE, [AFTER, BEFORE])
    assert found.values == {"rate": (pytest.approx(1 / 6), 0.5), "words": (5.0, 5.0)}
    assert found.means["rate"].estimate == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert found.changes["rate"].estimate == pytest.approx((1 / 6 - 1 / 2) / 2)
    assert found.means["words"].estimate == 5 and found.changes["words"].estimate == 0


def test_one_run_has_the_intervals_of_a_comparison() -> None:
    """One run knows nothing of other seeds, so its shares are those of `compare`."""
    one, both = over_runs(BEFORE, [AFTER]), compare(BEFORE, AFTER)
    assert one.changes["rate"] == both.differences["rate"]
    assert one.means["rate"] == AFTER.intervals["rate"]


def test_runs_of_other_questions_are_refused() -> None:
    other = counts([0, 0], [1, 1], [1, 1], ["a", "d"], ["1", "2"])
    with pytest.raises(ValueError, match="did not answer the same"):
        over_runs(BEFORE, [AFTER, other])
    with pytest.raises(ValueError, match="there is no run"):
        over_runs(BEFORE, [])


def test_a_short_table_has_the_main_measures() -> None:
    main = [replace(one, main=("words",)) for one in (BEFORE, AFTER)]
    assert [row[0] for row in compare(*main).table(short=True)] == ["toy", "words"]
    assert len(compare(*main).table()) == 3
    assert BEFORE.in_short == ("rate", "words")


@pytest.mark.parametrize(
    ("name", "label"), [("mean: accuracy", "toy accuracy"), ("random: F1", "random: F1"), ("recall", "recall")]
)
def test_labels_say_which_benchmark_a_mean_is_of(name: str, label: str) -> None:
    assert BEFORE.label(name) == label
