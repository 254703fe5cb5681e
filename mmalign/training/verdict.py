"""Verdict on a training run: one sentence, from numbers of single pairs before and after.

A *gain* is the trained model's score minus the base model's: the reference's, or the score before the first update for
methods without a reference. Rules come in this order: broken, nothing to compare, unmoved, no difference, learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

Values = Mapping[str, Sequence[float]]  # metric -> a value for each pair, or for each update
SIDES = (("chosen", "rejected"), ("matched", "mismatched"), ("best", "worst"))  # the preferred side first
REWARD = "reward"  # metric of methods that generate what they learn from: its mean over a batch
SCORES = ((" error", -0.5), (" log-probability", 1.0))  # metrics of a side, with the factor that makes them scores

BROKEN_RATIO = 2.0  # error of the preferred side, relative to the base model's
BROKEN_NATS = 3.0  # nats per token that the preferred side lost
BROKEN_STEP_NATS = 0.5  # nats per element between the steps of policy and reference: one standard deviation
MANY = 0.5  # share of pairs
UNMOVED = 0.01  # mean size of a logit
EQUAL = 1e-5  # relative difference of two scores
SIGNIFICANT = 2.0  # standard errors
NUM_GENERATIONS = 32  # the first and the last that are compared, at most


class Mean(NamedTuple):
    """Mean of independent values, with its standard error; infinite for a single value."""

    value: float
    error: float

    @property
    def sign(self) -> int:
        """Return 1 or -1 for a mean that differs from 0 by at least two standard errors; 0 otherwise."""
        return 0 if abs(self.value) < SIGNIFICANT * self.error else (self.value > 0) - (self.value < 0)


@dataclass(frozen=True)
class Evidence:
    """Numbers that a verdict rests on.

    Attributes:
        pairs: values of the same pairs under the same random numbers, after the last update.
        start: values before the first update, for methods without a reference.
        fresh: values of updates whose pairs had not been trained on before.
        seen: the pairs were trained on several times, or nothing is fresh.
        rewards: the mean reward of each generation, for methods that generate what they learn from.
    """

    pairs: Values
    start: Values = field(default_factory=dict)
    fresh: Values = field(default_factory=dict)
    seen: bool = False
    rewards: Sequence[float] = ()


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and its standard error."""
    mean, number = fmean(values), len(values)
    squares = sum((value - mean) ** 2 for value in values)  # not the library's deviation, which fails for infinity
    return Mean(mean, math.sqrt(squares / (number - 1) / number) if number > 1 else math.inf)


def with_gains(values: Values, start: Values) -> dict[str, Sequence[float]]:
    """Return values with gains over those of the start, for errors and log-probabilities without a reference."""
    gains = dict[str, Sequence[float]]()
    for suffix, factor in SCORES:
        for name in values:
            gain = name.removesuffix(suffix) + " gain"
            if name.endswith(suffix) and name in start and gain not in values:
                gains[gain] = [factor * (now - before) for now, before in zip(values[name], start[name], strict=True)]
    return {**values, **gains}


def judge(evidence: Evidence) -> str:
    """Return the verdict on a run."""
    values = with_gains(evidence.pairs, evidence.start)
    if not values or not values["loss"]:
        return "no pair could be measured"
    sides = next((sides for sides in SIDES if f"{sides[1]} gain" in values), None)
    # Methods that generate: their rewards, and what became of the sides if there are two
    if evidence.rewards:
        return "; ".join(
            [_judge_rewards(evidence.rewards), *([_judge_sides(values, sides, evidence)] if sides else [])]
        )
    # Two sides, thumbs, the chosen side alone, a judge's labels, or no more than a loss
    if sides is not None:
        return _judge_sides(values, sides, evidence)
    if "liked" in values:
        return _judge_thumbs(values, evidence)
    if "chosen gain" in values:
        return _judge_side(values, evidence)
    return _judge_labels(values, evidence) if "margin" in values else _judge_loss(values, evidence)


def broken(values: Values, side: str) -> str:
    """Return what is broken about the preferred `side`; empty for a working model.

    Args:
        values: metrics with gains.
        side: name of the preferred side.
    """
    # Comparisons are negated, since NaN fails all of them and is broken as well
    gain = fmean(values[f"{side} gain"])
    if f"{side} error" in values:
        ratio = _error_ratio(values, side)
        return f"its error is {ratio:.3g} times the base model's" if not ratio <= BROKEN_RATIO else ""
    if f"{side} token gain" in values:
        lost = -fmean(values[f"{side} token gain"])
        return f"it lost {lost:.3g} nats per token" if not lost <= BROKEN_NATS else ""
    # Steps leave the base model in either direction
    if "clipped" in values and not abs(gain) <= BROKEN_STEP_NATS:
        return f"its steps are {gain:.3g} nats per element from the base model's"
    return ""


def _error_ratio(values: Values, side: str) -> float:
    """Return the mean error of a side, relative to the base model's."""
    error = fmean(values[f"{side} error"])
    base = error + 2 * fmean(values[f"{side} gain"])  # gains are differences of -1/2 error
    return error / base if base > 0 else math.inf


def _judge_sides(values: Values, sides: tuple[str, str], evidence: Evidence) -> str:
    """Judge a method with two sides."""
    better, worse = sides
    gains = [mean_of(values[f"{side} gain"]) for side in sides]
    # Pairs seen once are judged by fresh values; else these only tell whether the pairs are known by heart
    fresh = _difference(evidence.fresh, sides) if evidence.fresh else None
    difference = _difference(values, sides) if fresh is None or evidence.seen else fresh
    numbers = _numbers(values, sides, gains, difference)

    # Broken, empty and unmoved models
    if problem := broken(values, better):
        return f"the model is broken, {problem} {numbers}: lower train.lr"
    equal = _equal_share(values, sides)
    if equal >= MANY:
        return f"nothing to prefer: both sides of {equal:.0%} of the pairs are equal {numbers}: look at the data"
    if _unmoved(values, better):
        return f"nothing moved {numbers}: train longer, or raise the learning rate"

    # Difference of the sides
    if not difference.sign:
        advice = "train longer, on more pairs, or look at the labels"
        return f"no difference between the sides {numbers}: {_saturation(values) or advice}"
    if difference.sign < 0:
        return f"the preference was not learned, the {worse} side gained more {numbers}"
    learned = f"{_describe_learned(sides, gains, _noun(values, better))} {numbers}"
    return _learned(learned, values, "pairs", evidence.seen and (fresh is None or fresh.sign <= 0))


def _judge_rewards(rewards: Sequence[float]) -> str:
    """Judge a method that generates what it learns from, by the mean rewards of the first and the last generations."""
    if len(rewards) == 1:
        return f"the reward of generated outputs was {rewards[0]:.4g}, and one generation shows no change: train longer"
    # As many from either end, without overlap
    number = min(NUM_GENERATIONS, len(rewards) // 2)
    before, after = mean_of(rewards[:number]), mean_of(rewards[-number:])
    change = Mean(after.value - before.value, math.hypot(before.error, after.error))
    many = f" {number}" if number > 1 else ""
    numbers = f"from {before.value:.4g} in the first{many} of {len(rewards)} generations "
    numbers += f"to {after.value:.4g} in the last"
    if number == 1:
        return f"the reward of generated outputs went {numbers}: too few to tell a change, train longer"
    numbers += f"{many} ({change.value:+.2g} ± {change.error:.1g})"
    match change.sign:
        case 1:
            return f"the reward of generated outputs rose {numbers}"
        case -1:
            return f"the reward of generated outputs fell {numbers}: lower train.lr"
    return (
        f"the reward of generated outputs shows no change {numbers}: generations have different prompts, which hides "
        "small ones; run mmalign evaluate, and train longer if held-out prompts show none either"
    )


def _judge_thumbs(values: Values, evidence: Evidence) -> str:
    """Judge a method that learns from single outputs, by the gains of liked and of disliked ones."""
    sides = ("liked", "disliked")
    # The outputs of each label, whose metrics get its name; the verdict needs both labels
    parts = {side: _of_label(values, side) for side in sides}
    present = [side for side in sides if parts[side]["loss"]]
    if len(present) == 1:
        return _judge_label({**values, **parts[present[0]]}, present[0])
    gains = [mean_of(parts[side][f"{side} gain"]) for side in sides]
    error = math.hypot(gains[0].error, gains[1].error)
    difference = Mean(gains[0].value - gains[1].value, error)
    # The liked side under the names that `broken` and `_numbers` read
    liked = {**values, **parts["liked"]}
    numbers = _numbers(liked, sides, gains, difference)
    if problem := broken(liked, "liked"):
        return f"the model is broken, {problem} {numbers}: lower train.lr"
    if fmean(abs(gain) for gain in values["output gain"]) == 0:
        return f"nothing moved {numbers}: train longer, or raise the learning rate"
    if not difference.sign:
        advice = "train longer, on more outputs, or look at the labels"
        return f"no difference between liked and disliked outputs {numbers}: {_saturation(values) or advice}"
    if difference.sign < 0:
        return f"the labels were not learned, disliked outputs gained more {numbers}"
    learned = f"{_describe_learned(sides, gains, _noun(liked, 'liked'))} {numbers}"
    # Fresh values are means of updates, over both labels: they do not tell how the labels differ
    return _learned(learned, values, "labels", evidence.seen or bool(evidence.fresh))


def _judge_label(values: Values, side: str) -> str:
    """Judge a method that learns from single outputs, all of which have the label `side`."""
    gain, noun = mean_of(values[f"{side} gain"]), _noun(values, side)
    numbers = f"({side} {gain.value:+.2g} ± {gain.error:.1g} against base)"
    problem = broken(values, side)
    if problem and side == "liked":
        return f"the model is broken, {problem} {numbers}: lower train.lr"
    change = {1: "improved", 0: "did not change", -1: "got worse"}[gain.sign]
    other = "disliked" if side == "liked" else "liked"
    return f"{side} {noun} {change} {numbers}; none of those measured is {other}: add {other} ones to tell the labels"


def _of_label(values: Values, side: str) -> dict[str, Sequence[float]]:
    """Return the values of the liked or of the disliked outputs, with the names of a side's metrics."""
    rows = [number for number, liked in enumerate(values["liked"]) if (liked > 0) == (side == "liked")]
    named = {name.replace("output", side): column for name, column in values.items() if name.startswith("output ")}
    return {name: [column[row] for row in rows] for name, column in {**named, "loss": values["loss"]}.items()}


def _saturation(values: Values) -> str:
    """Return advice for logits so large, in either direction, that most pairs teach nothing more; empty for others."""
    return "lower method.beta or train.lr" if fmean(values.get("saturated", [0.0])) >= MANY else ""


def _difference(values: Values, sides: tuple[str, str]) -> Mean:
    """Return by how much more the first side gained."""
    return mean_of([a - b for a, b in zip(*(values[f"{side} gain"] for side in sides), strict=True)])


def _describe_learned(sides: tuple[str, str], gains: Sequence[Mean], noun: str) -> str:
    """Describe a run in which the preferred side gained more."""
    better, worse = sides
    match gains[0].sign, gains[1].sign:
        case -1, _:
            return f"both sides got worse, the {worse} one more (likelihood displacement: look at the {noun})"
        case 1, 1:
            return f"both sides improved, the {better} one more"
        case first, second:
            changes = {1: "improved", 0: "did not change", -1: "got worse"}
            return f"{better} {noun} {changes[first]} and {worse} ones {changes[second]}"


def _learned(text: str, values: Values, what: str, by_heart: bool) -> str:
    """Return the verdict `text` on a run that learned, with advice, and with doubt if it may be known by heart."""
    doubt = f"the training {what} were learned, perhaps by heart (data.validation_fraction measures others)"
    return ": ".join(filter(None, (doubt if by_heart else "", text, _saturation(values))))


def _noun(values: Values, side: str) -> str:
    return "images" if f"{side} error" in values or "clipped" in values else "responses"


def _judge_side(values: Values, evidence: Evidence) -> str:
    """Judge fine-tuning on the chosen side alone."""
    name = next(name for name in ("chosen error", "chosen log-probability") if name in values)
    # An error falls and a log-probability rises where the gain is positive
    gain, before, after = mean_of(values["chosen gain"]), fmean(evidence.start[name]), fmean(values[name])
    trained = "training" if evidence.seen else "held-out"
    numbers = f"({name} {before:.4g} before the first update, {after:.4g} now, on {len(values[name])} {trained} pairs)"
    if problem := broken(values, "chosen"):
        return f"the model is broken, {problem} {numbers}: lower train.lr"
    if _unmoved(values, "chosen"):
        return f"nothing moved {numbers}: train longer, or raise the learning rate"
    if not gain.sign:
        return f"no difference {numbers}: train longer, or on more pairs"
    if gain.sign < 0:
        return f"chosen {_noun(values, 'chosen')} got worse {numbers}: lower train.lr"
    return f"chosen {_noun(values, 'chosen')} improved {numbers}"


def _judge_loss(values: Values, evidence: Evidence) -> str:
    """Judge a method that reports nothing about chosen and rejected sides by its loss."""
    before, change = fmean(evidence.start["loss"]), _loss_change(values, evidence)
    trend = "did not change" if not change.sign else "fell" if change.sign < 0 else "rose"
    trained = "training" if evidence.seen else "held-out"
    return (
        f"the loss {trend} (from {before:.4g} before the first update to {fmean(values['loss']):.4g}, on "
        f"{len(values['loss'])} {trained} pairs): compare the outputs"
    )


def _loss_change(values: Values, evidence: Evidence) -> Mean:
    return mean_of([a - b for a, b in zip(values["loss"], evidence.start["loss"], strict=True)])


def _judge_labels(values: Values, evidence: Evidence) -> str:
    """Judge a reward model by its cross-entropy, which is ln 2 for equal scores."""
    before, after = fmean(evidence.start["loss"]), fmean(values["loss"])
    change = _loss_change(values, evidence)
    accuracy, trained = fmean(values["accuracy"]), "training" if evidence.seen else "held-out"
    numbers = (
        f"(loss {before:.4g} before the first update, {after:.4g} now, accuracy {accuracy:.2g}, on "
        f"{len(values['loss'])} {trained} pairs)"
    )
    # Guessing costs ln 2
    if not after <= BROKEN_RATIO * max(before, math.log(2)):
        return f"the model is broken {numbers}: lower train.lr"
    if fmean(abs(margin) < EQUAL for margin in values["margin"]) >= MANY:
        return f"nothing to prefer: both sides have equal scores {numbers}: look at the data"
    if not change.sign:
        return f"no difference {numbers}: train longer, on more pairs, or look at the labels"
    return f"the judge {'learned the labels' if change.sign < 0 else 'got worse'} {numbers}"


def _equal_share(values: Values, sides: tuple[str, str]) -> float:
    """Return the share of pairs whose sides have the same score under the base model; 0 if it is not known."""
    for suffix, factor in SCORES:
        if sides[1] + suffix in values:
            # Scores under the base model: the policy's, less its gain
            first, second = (
                [factor * x - gain for x, gain in zip(values[side + suffix], values[f"{side} gain"], strict=True)]
                for side in sides
            )
            return fmean(abs(a - b) <= EQUAL * abs(a) for a, b in zip(first, second, strict=True))
    return 0.0


def _unmoved(values: Values, side: str) -> bool:
    """Return whether the policy still equals its base model."""
    if "logit size" in values:
        return fmean(values["logit size"]) < UNMOVED
    # Without logits: gains within the rounding of the scores
    size = fmean(abs(gain) for gain in values[f"{side} gain"])
    name = next(name for name in (f"{side} error", f"{side} log-probability") if name in values)
    return size <= EQUAL * abs(fmean(values[name]))


def _numbers(values: Values, sides: tuple[str, str], gains: Sequence[Mean], difference: Mean) -> str:
    """Return the numbers of a verdict, in brackets."""
    parts = [", ".join(f"{side} {gain.value:+.2g}" for side, gain in zip(sides, gains, strict=True)) + " against base"]
    parts += [f"difference {difference.value:+.2g} ± {difference.error:.1g}"]
    if "logit size" in values:
        size, saturated = fmean(values["logit size"]), fmean(values["saturated"])
        parts += [f"mean |logit| {size:.2g}, {saturated:.0%} saturated"]
    if f"{sides[0]} error" in values:
        parts += [f"error {_error_ratio(values, sides[0]):.3g} of the base model's"]
    return f"({'; '.join(parts)})"
