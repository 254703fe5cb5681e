"""Ranking: the largest changes first, gains and losses alike."""

import pytest

from mmalign.pages.ranking import Scores, change, choose, format_scores, kind, ranked, spread


def scored(*changes: float) -> list[Scores]:
    return [(1.0, 1.0 + change) for change in changes]


def test_rounding_is_no_change() -> None:
    assert kind((1.0, 1.0 + 1e-8)) == "unchanged" and change((1.0, 1.0 + 1e-8)) == 0
    assert [kind(scores) for scores in scored(1e-3, -1e-3)] == ["gained", "lost"]


def test_ranked_by_the_size_of_the_change() -> None:
    measured = scored(1, -2, 0, 3, -1, 1)
    assert ranked(measured, "gained") == [3, 0, 5]
    assert ranked(measured, "lost") == [1, 4]


def test_choose_takes_half_losses() -> None:
    gains, losses = scored(*range(1, 31)), scored(*range(-1, -31, -1))
    assert choose([*gains, *losses], 24) == {"gained": [*range(29, 17, -1)], "lost": [*range(59, 47, -1)]}
    assert choose([*gains, *losses[:3]], 24)["lost"] == [32, 31, 30]  # the rest is room for gains
    assert len(choose([*gains[:2], *losses], 24)["lost"]) == 22
    assert choose(gains, 1) == {"gained": [29], "lost": []}
    assert choose(scored(0, 0, 0), 2) == {"unchanged": [0, 1]}


@pytest.mark.parametrize(
    ("number", "indices"),
    [
        (9, [3, 0, 5, 2, 4, 1]),  # all, the largest gain first
        (4, [3, 0, 1, 4]),  # two best, two worst
        (3, [3, 0, 1]),
        (1, [3]),
    ],
)
def test_spread_takes_both_ends(number: int, indices: list[int]) -> None:
    assert spread([1, -2, 0, 3, -1, 1], number) == indices


@pytest.mark.parametrize(
    ("scores", "texts"),
    [((0.5, 0.75), ("0.5", "0.75")), ((2.6000, 2.60282), ("2.6", "2.603")), ((1.0, 1.0 + 1e-9), ("1", "1"))],
)
def test_scores_that_differ_show_it(scores: Scores, texts: tuple[str, str]) -> None:
    assert format_scores(scores) == texts


def test_spread_keeps_the_order_of_equals_and_repeats_nothing() -> None:
    assert spread([1, 1, 1, -1, -1, -1], 4) == [0, 1, 3, 4]
    assert sorted(spread([0] * 10, 5)) == [0, 1, 2, 3, 4]
