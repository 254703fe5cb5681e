"""Audit of a judge on held-out preferences: accuracy, calibration, agreement, and properties that it rewards.

A judge's probability that the first of two images is preferred is sigma(s_1 - s_2). Its *confidence* is the probability
of the side with the higher score, 1/2 to 1. A judge is calibrated if that side wins as often. Neither these numbers nor
a verdict depend on the order of the sides, since each image has a score of its own.

N comparisons of two images. Those of a group, such as a prompt, depend on one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from mmalign.data.pairs import ImagePair
from mmalign.evaluation.judged_rows import JudgedRow
from mmalign.evaluation.metrics import SIDES, Metrics, Ratio, Table, compare, divide, ratio
from mmalign.evaluation.statistics import Interval, Values, cluster_jackknife, outcomes, proportion

Mask = NDArray[np.bool_]

OTHER = "other"  # name of the judge to compare with
LABELS = "labels"
MANY = 12  # annotators with an accuracy of their own
CERTAINTIES = (0.75, 0.9, 1.0)  # upper ends of ranges of a label's preference for its side


@dataclass(frozen=True)
class Comparisons:
    """Every two images of rows that a label orders, or calls a tie.

    Attributes:
        keys: the row and the numbers of both images [N].
        groups: the groups [N].
        share: the label's preference for the first image [N].
        scores: the scores [N, 2] by judge.
        properties: the values [N, 2] by property.
        strata: masks [N] of the comparisons with a common feature, by its name.
    """

    keys: tuple[tuple[int, int, int], ...]
    groups: tuple[Hashable, ...]
    share: Values
    scores: Mapping[str, Values]
    properties: Mapping[str, Values]
    strata: Mapping[str, Mask]

    def margins(self, judge: str) -> Values:
        """Return the score of the first image minus that of the second [N]."""
        return self.scores[judge][:, 0] - self.scores[judge][:, 1]

    def verdicts(self, judge: str) -> Values:
        """Return 1 where a judge, or the labels, prefer the first image, 0 for the second, 0.5 for a tie [N]."""
        return np.sign(self.share - 0.5) / 2 + 0.5 if judge == LABELS else outcomes(*self.scores[judge].T)


def compare_images(pairs: Sequence[ImagePair], rows: Sequence[JudgedRow]) -> Comparisons:
    """Return the comparisons of judged rows of a data set.

    Raises:
        ValueError: they are of fewer than two groups.
    """
    keys, share, features = list[tuple[int, int, int]](), list[float](), list[list[str]]()
    scores, properties = defaultdict[str, list[list[float]]](list), defaultdict[str, list[list[float]]](list)
    words = np.median([len(pairs[row.number].prompt.split()) for row in rows]) if rows else 0
    for row in rows:
        pair = pairs[row.number]
        # Every two images, unless the scores of a list call them equal
        for i, j in combinations(range(len(pair.outputs)), 2):
            if pair.scores and pair.scores[i] == pair.scores[j]:
                continue
            keys.append((row.number, i, j))
            share.append(float(pair.scores[i] > pair.scores[j]) if pair.scores else pair.label.preference)
            features.append(_features(pair, share[-1], float(words)))
            for table, values in ((scores, row.scores), (properties, row.properties)):
                for name, of_images in values.items():
                    table[name].append([of_images[i], of_images[j]])
    if len({pairs[number].group for number, _, _ in keys}) < 2:
        raise ValueError(
            f"judge: the validation split has {len(keys)} pairs, of fewer than two groups (prompts), which an interval "
            "needs; raise data.validation_fraction, or give more pairs"
        )
    # Strata are about accuracy, and a tie has no right side
    ordered = np.array(share) != 0.5
    names = sorted({name for own in features for name in own})
    masks = {name: np.array([name in own for own in features]) & ordered for name in names}
    groups = tuple(pairs[number].group for number, _, _ in keys)
    return Comparisons(
        tuple(keys),
        groups,
        np.array(share),
        {name: np.array(values) for name, values in scores.items()},
        {name: np.array(values) for name, values in properties.items()},
        _strata(masks, ordered, groups),
    )


def _features(pair: ImagePair, share: float, words: float) -> list[str]:
    """Return the features of a comparison: certainty of the label, annotator, length of the prompt."""
    top = next(end for end in CERTAINTIES if max(share, 1 - share) <= end)
    length = "up to" if len(pair.prompt.split()) <= words else "over"
    features = [f"labels up to {100 * top:.0f} % sure", f"prompts of {length} {words:g} words"]
    return [*features, *([f"annotator {pair.label.annotator}"] if pair.label.annotator else [])]


def _strata(masks: Mapping[str, Mask], ordered: Mask, groups: Sequence[Hashable]) -> dict[str, Mask]:
    """Return the strata of two groups or more that are a part of the ordered comparisons; of annotators the largest."""
    several = {
        name: mask
        for name, mask in masks.items()
        if mask.sum() < ordered.sum() and len({group for group, own in zip(groups, mask, strict=True) if own}) > 1
    }
    annotators = sorted((name for name in several if name.startswith("annotator ")), key=lambda x: -several[x].sum())
    return {name: mask for name, mask in several.items() if name not in annotators[MANY:]}


def measure(comparisons: Comparisons, side: str) -> Metrics:
    """Return a judge's metrics: accuracy, also by stratum, log loss, and preferred properties.

    A tie of the labels counts in the log loss alone; a tie of the judge is half right.
    """
    share, verdicts = comparisons.share, comparisons.verdicts(side)
    # 1 where judge and label prefer the same image, 1/2 for a tie of the judge
    right, columns, ratios = np.where(share > 0.5, verdicts, 1 - verdicts), dict[str, Values](), dict[str, Ratio]()
    # Each metric is a share of hits among the comparisons of a part
    parts = {"accuracy": share != 0.5, **{f"accuracy, {name}": mask for name, mask in comparisons.strata.items()}}
    hits = dict.fromkeys(parts, right)
    # Whatever the label says, the judge may choose the image with more of a property
    for name, differs, larger in _larger(comparisons):
        parts[f"choice of more {name}"] = differs
        hits[f"choice of more {name}"] = np.where(larger, verdicts, 1 - verdicts)
    for name, mask in parts.items():
        columns |= {f"{name}: hits": hits[name] * mask, f"{name}: pairs": mask.astype(np.float64)}
        ratios[name] = ratio(f"{name}: hits", f"{name}: pairs")
    # Cross-entropy of the label's share
    margin = comparisons.margins(side)
    columns["log loss"] = -share * special.log_expit(margin) - (1 - share) * special.log_expit(-margin)
    return Metrics("judge", comparisons.keys, comparisons.groups, columns, ratios, ("log loss",), errors=("log loss",))


def _confidence(comparisons: Comparisons, side: str, bins: int) -> tuple[Values, Values, Values]:
    """Return the judge's confidence [N], the labels' share for the side with the higher score [N], and bins [N]."""
    confidence = special.expit(abs(comparisons.margins(side)))
    verdicts, share = comparisons.verdicts(side), comparisons.share
    number = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(np.int64)
    return confidence, verdicts * share + (1 - verdicts) * (1 - share), number


def calibration_errors(comparisons: Comparisons, bins: int) -> list[Interval]:
    """Return the expected calibration error before and after training, and its change.

    It is the mean difference of confidence and share won, over bins by their sizes (arXiv:1706.04599).
    """
    columns = list[Values]()
    for side in SIDES:
        confidence, won, number = _confidence(comparisons, side, bins)
        # Summed over a bin: confidence less share won
        columns += [(confidence - won) * (number == place) for place in range(bins)]

    def errors(sums: Values) -> Values:
        before, after = (abs(part).sum(-1) / sums[..., -1] for part in np.split(sums[..., :-1], 2, axis=-1))
        return np.stack([before, after, after - before])

    counts = np.stack([*columns, np.ones_like(comparisons.share)], axis=-1)
    *both, change = cluster_jackknife([counts], errors, comparisons.groups, bounds=[(-1.0, 1.0)] * 3)
    # An error cannot be negative, so that 0 is no hypothesis about it
    return [*(replace(error, low=max(0.0, error.low), p=None) for error in both), change]


def _larger(comparisons: Comparisons) -> list[tuple[str, Mask, Mask]]:
    """Return properties in which images of at least two groups differ, where they do [N], where the first has more."""
    result = []
    for name, values in comparisons.properties.items():
        differs = values[:, 0] != values[:, 1]
        if len({group for group, own in zip(comparisons.groups, differs, strict=True) if own}) > 1:
            result.append((name, differs, values[:, 0] > values[:, 1]))
    return result


def agreement(comparisons: Comparisons, first: str, second: str) -> tuple[Interval, Interval]:
    """Return the share of equal verdicts of two judges, or of a judge and the labels, and Cohen's kappa.

    Each comparison counts in both orders of its sides. So both sides are preferred equally often, and kappa, with ties
    as a third verdict, does not depend on the order.
    """
    verdicts, other_verdicts = comparisons.verdicts(first), comparisons.verdicts(second)
    # Equal verdicts, ties of the first, ties of the second, and all
    counts = np.stack(
        [verdicts == other_verdicts, verdicts == 0.5, other_verdicts == 0.5, np.ones_like(verdicts)], axis=-1
    ).astype(np.float64)

    def kappa(sums: Values) -> Values:
        equal, tie_one, tie_two = (sums[..., number] / sums[..., 3] for number in range(3))
        # By chance two judges prefer the same side in half of the cases without a tie, and ties meet as well
        chance = (1 - tie_one) * (1 - tie_two) / 2 + tie_one * tie_two
        return divide(equal - chance, 1 - chance)[None]

    (interval,) = cluster_jackknife([counts], kappa, comparisons.groups, bounds=[(-1.0, 1.0)])
    return proportion(counts[:, 0], comparisons.groups), interval


def rank_correlation(values: Values, scores: Values, groups: Sequence[Hashable]) -> Interval:
    """Return Spearman's rank correlation of two columns [N], with a jackknife over groups; ranks are those of all."""
    # Centred ranks: the sums of their products stay small
    x, y = stats.rankdata(values) - len(values) / 2, stats.rankdata(scores) - len(scores) / 2

    def correlation(sums: Values) -> Values:
        n, x1, y1, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spread = np.sqrt(np.maximum((n * xx - x1**2) * (n * yy - y1**2), 0))
        result: Values = np.divide(n * xy - x1 * y1, spread, out=np.zeros_like(spread), where=spread > 0)[None]
        return result

    counts = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)
    (interval,) = cluster_jackknife([counts], correlation, groups, bounds=[(-1.0, 1.0)])
    return interval


def audit(comparisons: Comparisons, bins: int) -> tuple[dict[str, object], Table]:
    """Return the content of result.json, and a table of it; the parts after the first are about the trained judge."""
    comparison = compare(*(measure(comparisons, side) for side in SIDES))
    *errors, change = calibration_errors(comparisons, bins)
    result, table = comparison.as_dict(), comparison.table()
    result["calibration error"] = dict(
        zip((*SIDES, "difference"), (x.as_dict() for x in (*errors, change)), strict=True)
    )
    table.append(("calibration error, %", *(error.points(signed=False) for error in errors), change.points()))
    # Parts about the trained judge; an empty table has its header alone
    for name, part, rows in (
        ("reliability", *_reliability(comparisons, bins)),
        ("agreement", *_agreements(comparisons)),
        ("properties", *_properties(comparisons)),
    ):
        result[name] = part
        table += rows if len(rows) > 1 else []
    return {"pairs": len(comparisons.keys), "groups": len(set(comparisons.groups)), **result}, table


def _reliability(comparisons: Comparisons, bins: int) -> tuple[list[dict[str, object]], Table]:
    confidence, won, number = _confidence(comparisons, SIDES[1], bins)
    part, table = list[dict[str, object]](), Table([("confidence after", "pairs", "mean confidence, %", "won, %")])
    for bin_number in np.unique(number).tolist():
        inside = np.flatnonzero(number == bin_number)
        # Confidence is from 1/2 to 1
        low, high = (0.5 + (bin_number + end) / bins / 2 for end in (0, 1))
        mean, share = float(confidence[inside].mean()), proportion(won[inside], [comparisons.groups[i] for i in inside])
        part.append({"from": low, "to": high, "pairs": len(inside), "confidence": mean, "won": share.as_dict()})
        name = f"{100 * low:.0f} to {100 * high:.0f} %"
        table.append((name, str(len(inside)), f"{100 * mean:.1f}", share.points(signed=False)))
    return part, table


def _agreements(comparisons: Comparisons) -> tuple[dict[str, object], Table]:
    part, table = dict[str, object](), Table([("agreement", "pairs", "equal verdicts, %", "kappa")])
    pairs = [(SIDES[1], LABELS)]
    pairs += [(SIDES[1], OTHER), (OTHER, LABELS)] if OTHER in comparisons.scores else []
    for first, second in pairs:
        equal, kappa = agreement(comparisons, first, second)
        part[f"{first}, {second}"] = {"equal": equal.as_dict(), "kappa": kappa.as_dict()}
        names = (f"{'trained' if x == SIDES[1] else x}{' judge' if x != LABELS else ''}" for x in (first, second))
        table.append((" and ".join(names), str(len(comparisons.keys)), equal.points(signed=False), str(kappa)))
    return part, table


def _properties(comparisons: Comparisons) -> tuple[dict[str, object], Table]:
    part = dict[str, object]()
    table = Table([("property", "pairs that differ", "labels choose more, %", "rank correlation with score")])
    # Each comparison has two images
    scores, twice = comparisons.scores[SIDES[1]].ravel(), [group for group in comparisons.groups for _ in (0, 1)]
    for name, differs, larger in _larger(comparisons):
        where = np.flatnonzero(differs)
        wins = np.where(larger, comparisons.share, 1 - comparisons.share)[where]
        chosen = proportion(wins, [comparisons.groups[i] for i in where])
        correlation = rank_correlation(comparisons.properties[name].ravel(), scores, twice)
        numbers = {"labels": chosen.as_dict(), "correlation": correlation.as_dict()}
        part[name] = {"pairs": len(where), **numbers}
        table.append((name, str(len(where)), chosen.points(signed=False), str(correlation)))
    return part, table
