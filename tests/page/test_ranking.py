"""What is shown first: the largest changes, gains and losses alike."""

from dataclasses import dataclass

import pytest

from mmalign.page.ranking import change, choose, kind, ranked, spread


@dataclass(frozen=True)
class Scored:
    """An entry that is its scores and nothing else."""

    scores: tuple[float, float]
    title: str = ""
    notes: tuple[str, str] = ("", "")


def scored(*changes: float) -> list[Scored]:
    return [Scored((1.0, 1.0 + change)) for change in changes]


def test_rounding_is_no_change() -> None:
    (entry,) = scored(1e-8)
    assert kind(entry) == "unchanged" and change(entry) == 0
    assert [kind(entry) for entry in scored(1e-3, -1e-3)] == ["gained", "lost"]


def test_ranked_by_the_size_of_the_change() -> None:
    entries = scored(1, -2, 0, 3, -1, 1)
    assert ranked(entries, "gained") == [3, 0, 5]
    assert ranked(entries, "lost") == [1, 4]
    assert choose(entries, 2) == {"gained": [3], "lost": [1]}


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (9, [3, 0, 5, 2, 4, 1]),  # all, the largest gain first
        (4, [3, 0, 1, 4]),  # two best, two worst
        (3, [3, 0, 1]),
        (1, [3]),
    ],
)
def test_spread_takes_both_ends(number: int, shown: list[int]) -> None:
    assert spread([1, -2, 0, 3, -1, 1], number) == shown


def test_spread_prefers_what_came_first_among_equals_and_shows_nothing_twice() -> None:
    assert spread([1, 1, 1, -1, -1, -1], 4) == [0, 1, 3, 4]
    assert sorted(spread([0] * 10, 5)) == [0, 1, 2, 3, 4]
