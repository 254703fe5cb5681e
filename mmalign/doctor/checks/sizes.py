"""Checks of sizes: images of a pair, lengths of its responses."""

from __future__ import annotations

from mmalign.doctor.corpus import Case, Corpus, NotChecked
from mmalign.doctor.findings import Place, place
from mmalign.evaluation.statistics import Interval, paired_difference

_MAX_RATIO = 1.1  # of the sides of two images
_MAX_ASPECT_RATIO = 1.05  # of their aspects
_MIN_EXCESS = 0.05  # share of pairs beyond one half; with very many pairs any excess is significant
_MIN_GROUPS = 10  # fewer have too wide an interval


def image_sizes(corpus: Corpus) -> list[Place]:
    """Return the pairs whose images differ by more than 10 % in width or height, or by more than 5 % in aspect."""
    places = []
    for case in corpus.cases:
        for chosen, rejected in zip(case.chosen.images, case.rejected.images, strict=False):
            first, second = (corpus.pictures[ref.key].size for ref in (chosen, rejected))
            # Unreadable images have no size; another check names them
            if 0 in (*first, *second):
                continue
            ratios = [first[0] / second[0], first[1] / second[1]]
            if _factor(ratios[0] / ratios[1]) > _MAX_ASPECT_RATIO or max(map(_factor, ratios)) > _MAX_RATIO:
                sizes = [f"{width}x{height}" for width, height in (first, second)]
                places.append(place(case, f"the chosen image is {sizes[0]}, the rejected one {sizes[1]}"))
    return places


def length_bias(corpus: Corpus) -> list[Place] | NotChecked:
    """Return one place if the longer or the shorter response is chosen more often than chance explains.

    The 95 % interval of the share of pairs with the longer response chosen must lie outside 45 to 55 %. Groups of pairs
    are independent observations; pairs of equal length count one half. Rows of one response compare nothing.
    """
    cases = [case for case in corpus.cases if case.rejected.text]
    groups = [case.pair.group for case in cases]
    if len(set(groups)) < _MIN_GROUPS:
        return NotChecked(f"{len(set(groups))} groups of pairs are too few; {_MIN_GROUPS} are needed")
    outcomes = [_longer(case) for case in cases]
    # Chance is one half
    excess = paired_difference([0.5] * len(outcomes), outcomes, groups)
    if excess.high >= -_MIN_EXCESS and excess.low <= _MIN_EXCESS:
        return []
    # The share of the side that is chosen more often
    side, sign = ("longer", 1) if excess.estimate > 0 else ("shorter", -1)
    share, *ends = (min(1.0, 0.5 + sign * value) for value in (excess.estimate, excess.low, excess.high))
    interval = Interval(share, *sorted(ends)).points(signed=False)
    chosen, rejected = (sum(lengths) / len(outcomes) for lengths in zip(*map(_lengths, cases), strict=True))
    return [
        Place(
            f"all {len(outcomes):,} pairs",
            f"the {side} response is chosen in {interval} % of them; on average {chosen:.0f} characters are chosen and "
            f"{rejected:.0f} rejected",
        )
    ]


def _factor(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def _lengths(case: Case) -> tuple[int, int]:
    return len(case.chosen.text.strip()), len(case.rejected.text.strip())


def _longer(case: Case) -> float:
    """Return 1 if the chosen response is longer, 0 if it is shorter, and 0.5 if both have one length."""
    chosen, rejected = _lengths(case)
    return 0.5 + 0.5 * ((chosen > rejected) - (chosen < rejected))
