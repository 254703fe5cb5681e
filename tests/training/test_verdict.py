"""Rules of the verdict, from numbers of single pairs."""

import math
from typing import Any

import pytest

from mmalign.training.verdict import Evidence, Values, judge, mean_of

SPREAD = (-1.0, 1.0, -1.0, 1.0)  # four pairs: the standard error of a mean is 0.58 times the spread


def sides(chosen: float, rejected: float, *, spread: float = 0.01, error: float = 0.2, **more: Any) -> Values:
    """Return four image pairs with these mean gains, and a base error of `error`."""
    gains = [chosen + spread * s for s in SPREAD], [rejected] * 4
    values: dict[str, list[float]] = {
        "loss": [0.5] * 4,
        "chosen gain": gains[0],
        "rejected gain": gains[1],
        "chosen error": [error - 2 * gain for gain in gains[0]],
        "rejected error": [1.5 * error - 2 * gain for gain in gains[1]],
        "logit": [5.0] * 4,
        "logit size": [5.0] * 4,
        "saturated": [0.0] * 4,
    }
    return {**values, **more}


def verdict(values: Values, **more: Any) -> str:
    return judge(Evidence(values, **more))


@pytest.mark.parametrize(
    ("values", "start"),
    [
        (sides(0.05, -0.02), "chosen images improved and rejected ones got worse (chosen +0.05, rejected -0.02 "),
        (sides(0.05, 0.02), "both sides improved, the chosen one more"),
        (sides(-0.02, -0.05), "both sides got worse, the rejected one more (likelihood displacement"),
        (sides(0.001, -0.05), "chosen images did not change and rejected ones got worse"),
        (sides(-0.05, -0.02), "the preference was not learned"),
        (sides(0.005, 0.002), "no difference between the sides"),
        (sides(0.05, -0.02, spread=0.2), "no difference between the sides"),  # 0.07 +- 0.12
        # Broken, whatever the differences say
        (sides(-0.11, -0.3), "the model is broken, its error is 2.1 times"),
        (sides(-0.09, -0.3), "both sides got worse"),
        (sides(-20.0, -20.0), "the model is broken"),
        (sides(math.nan, math.nan), "the model is broken"),
        # Nothing to learn, or nothing learned
        (sides(1e-7, 0.0, **{"logit size": [1e-4] * 4}), "nothing moved"),
        (sides(0.0, 0.0, **{"rejected error": [0.2] * 4}), "nothing to prefer: both sides of 100% of the pairs"),
        (sides(0.0, 0.0, **{"rejected error": [0.2, 0.2, 0.2, 0.3]}), "nothing to prefer: both sides of 75% of"),
        ({}, "no pair could be measured"),
    ],
)
def test_image_pairs_are_judged(values: Values, start: str) -> None:
    assert verdict(values).startswith(start)


def test_saturation_is_named() -> None:
    half = {"saturated": [1.0, 1.0, 0.0, 0.0], "logit size": [240.0] * 4}
    for values in (sides(0.05, -0.02, **half), sides(0.001, 0.0, **half)):
        assert verdict(values).endswith(": lower method.beta or train.lr") and "50% saturated" in verdict(values)
    assert verdict(sides(0.05, -0.02)).endswith(")")


def test_matched_prompts_are_judged_by_their_names() -> None:
    values = {
        name.replace("chosen", "matched").replace("rejected", "mismatched"): x for name, x in sides(1, -1).items()
    }
    assert verdict(values).startswith(
        "matched images improved and mismatched ones got worse (matched +1, mismatched -1"
    )


def responses(nats: float, saturated: float = 0.0) -> Values:
    """Return responses of ten tokens that lost this many nats per token on the chosen side, 10 on the rejected."""
    return {
        "loss": [1.0] * 4,
        "chosen gain": [-10 * nats + s for s in SPREAD],
        "rejected gain": [-100.0] * 4,
        "chosen log-probability": [-20.0 - 10 * nats] * 4,
        "rejected log-probability": [-130.0] * 4,
        "chosen token gain": [-nats] * 4,
        "logit size": [9.0] * 4,
        "saturated": [saturated] * 4,
    }


def test_responses_are_broken_beyond_three_nats_per_token() -> None:
    assert verdict(responses(3.1)).startswith("the model is broken, it lost 3.1 nats per token")
    assert verdict(responses(2.9)).startswith("both sides got worse")
    assert verdict(responses(-0.5)).startswith("chosen responses improved and rejected ones got worse")


def test_steps_of_generated_images_are_broken_beyond_a_standard_deviation() -> None:
    """Half a nat per element is one standard deviation between the means of both steps."""
    steps = {"clipped": [1.0] * 4, "loss": [0.7] * 4, "logit size": [1.0] * 4, "saturated": [0.0] * 4}
    near, far = (
        {**steps, "chosen gain": [x + 0.01 * s for s in SPREAD], "rejected gain": [x / 2] * 4} for x in (0.4, 0.6)
    )
    assert verdict(near).startswith("both sides improved") and verdict(far).startswith("the model is broken")


def test_pairs_known_by_heart_are_no_success() -> None:
    """Training pairs show a difference under any labels; those of the first epoch, before their update, do not."""
    learned, coin = sides(0.05, -0.02), sides(0.001, 0.0)
    assert verdict(learned, fresh=coin).startswith("no difference between the sides")
    assert verdict(learned, fresh=coin, seen=True).startswith("the training pairs were learned, perhaps by heart")
    assert verdict(learned, seen=True).startswith("the training pairs were learned, perhaps by heart")
    assert verdict(learned, fresh=learned, seen=True).startswith("chosen images improved")
    assert verdict(sides(-0.11, -0.11), fresh=learned).startswith("the model is broken")  # it broke at the end


def test_one_value_decides_nothing() -> None:
    assert mean_of([3.0]).sign == 0 and mean_of([3.0, 3.1]).sign == 1
    first = {name: values[:1] for name, values in sides(0.05, -0.02).items()}
    assert verdict(first).startswith("no difference")


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ([0.1, 0.3, 0.2, 0.2], "no difference (chosen error 0.2 before the first update, 0.2 now"),
        ([0.1, 0.1, 0.1, 0.12], "chosen images improved (chosen error 0.2 before the first update, 0.105 now"),
        ([0.3, 0.3, 0.3, 0.32], "chosen images got worse"),
        ([0.5, 0.5, 0.5, 0.52], "the model is broken, its error is 2.52 times the base model's"),
        ([0.2] * 4, "nothing moved"),
    ],
)
def test_fine_tuning_is_compared_with_the_true_start(now: list[float], expected: str) -> None:
    start = {"loss": [0.2] * 4, "chosen error": [0.2] * 4}
    assert verdict({"loss": now, "chosen error": now}, start=start).startswith(expected)


@pytest.mark.parametrize(
    ("nats", "expected"), [(5.5, "the model is broken, it lost 3.5 nats per token"), (1.0, "chosen responses improved")]
)
def test_responses_without_a_reference_are_compared_with_the_true_start(nats: float, expected: str) -> None:
    def at(nats: float, spread: float = 0.0) -> Values:
        total = [-10 * nats + spread * s for s in SPREAD]
        return {"loss": [nats] * 4, "chosen log-probability": total, "chosen token log-probability": [-nats] * 4}

    assert verdict(at(nats, 0.1), start=at(2.0)).startswith(expected)


def test_two_sides_without_a_reference_are_compared_with_the_true_start() -> None:
    start = {"loss": [0.3] * 4, "chosen error": [0.2] * 4, "rejected error": [0.3] * 4}
    now = {"loss": [0.2] * 4, "chosen error": [0.1, 0.11, 0.1, 0.11], "rejected error": [0.4, 0.41, 0.42, 0.4]}
    assert verdict(now, start=start).startswith("chosen images improved and rejected ones got worse")
    assert verdict({**now, "rejected error": [0.205, 0.207, 0.206, 0.204]}, start=start).startswith("no difference")
    equal = {**start, "rejected error": start["chosen error"]}
    assert verdict({**now, "rejected error": now["chosen error"]}, start=equal).startswith("nothing to prefer")


@pytest.mark.parametrize(
    ("losses", "margins", "expected"),
    [
        ([0.4, 0.5, 0.4, 0.5], [1.0] * 4, "the judge learned the labels"),
        ([0.8, 0.9, 0.8, 0.9], [1.0] * 4, "the judge got worse"),
        ([0.5, 0.9, 0.6, 0.8], [1.0] * 4, "no difference"),
        ([40.0, 0.0, 30.0, 0.0], [9.0] * 4, "the model is broken"),
        ([0.69] * 4, [0.0] * 4, "nothing to prefer"),
    ],
)
def test_a_judge_is_judged_by_its_loss(losses: list[float], margins: list[float], expected: str) -> None:
    values = {"loss": losses, "accuracy": [0.5] * 4, "margin": margins}
    start = {"loss": [0.69] * 4, "accuracy": [0.5] * 4, "margin": margins}
    assert verdict(values, start=start).startswith(expected)


def thumbs(liked: float, disliked: float) -> Values:
    """Return four liked and four disliked images with these mean gains."""
    gains = [mean + 0.01 * s for mean in (liked, disliked) for s in SPREAD]
    return {
        "loss": [0.5] * 8,
        "liked": [1.0] * 4 + [0.0] * 4,
        "output gain": gains,
        "output error": [0.2 - 2 * gain for gain in gains],
        "logit size": [1.0] * 8,
        "saturated": [0.0] * 8,
    }


def test_thumbs_are_judged_by_the_gains_of_each_label() -> None:
    assert verdict(thumbs(0.05, -0.02)).startswith("liked images improved and disliked ones got worse")
    assert verdict(thumbs(0.01, 0.06)).startswith("the labels were not learned, disliked outputs gained more")
    assert verdict(thumbs(0.02, 0.02)).startswith("no difference between liked and disliked outputs")
    for trained in ({"seen": True}, {"fresh": thumbs(0.05, -0.02)}):
        by_heart = "the training labels were learned, perhaps by heart"
        assert verdict(thumbs(0.05, -0.02), **trained).startswith(by_heart)
    assert verdict({**thumbs(0.05, -0.02), "saturated": [1.0] * 8}).endswith(": lower method.beta or train.lr")
    assert verdict(thumbs(-0.2, -0.4)).startswith("the model is broken, its error is")


def test_thumbs_of_one_label_are_judged_by_their_gain() -> None:
    values = thumbs(0.05, -0.02)
    liked, disliked = ({name: column[part] for name, column in values.items()} for part in (slice(4), slice(4, 8)))
    assert verdict(liked).startswith("liked images improved (liked +0.05 ± ")
    assert verdict(liked, seen=True).endswith(
        "; none of those measured is disliked: add disliked ones to tell the labels"
    )
    assert verdict(disliked).startswith("disliked images got worse (disliked -0.02 ± ")
    worse = {name: column[:4] for name, column in thumbs(-0.2, 0.0).items()}
    assert verdict(worse).startswith("the model is broken, its error is")


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([2.1, 1.9, 2.0, 3.5, 4.9, 5.0, 5.1], "rose from 2 in the first 3 of 7 generations to 5 in the last 3 (+3 "),
        ([2.1, 1.9, 1.0, 1.1], "fell from 2 in the first 2 of 4 generations to 1.05 in the last 2 (-0.95 "),
        ([2.1, 1.9, 2.5, 1.0], "shows no change from 2 in the first 2 of 4 generations to 1.75 in the last 2"),
        ([2.0, 2.0, 2.0, 2.0], "shows no change from 2 "),  # equal means are generations of their own
        ([2.0, 7.0, 9.0], "went from 2 in the first of 3 generations to 9 in the last: too few to tell a change"),
        ([2.0], "was 2, and one generation shows no change"),
        ([0.0, 0.1] * 16 + [9.0] * 30 + [5.0, 5.1] * 16, "rose from 0.05 in the first 32 of 94 generations "),
    ],
    ids=["rose", "fell", "unchanged", "equal", "three generations", "one generation", "many"],
)
def test_generated_outputs_are_judged_by_their_rewards(rewards: list[float], expected: str) -> None:
    """The first and the last generations do not overlap; sides are judged after them."""
    expected = f"the reward of generated outputs {expected}"
    assert verdict({"loss": [0.0]}, rewards=rewards).startswith(expected)
    both = verdict(sides(0.05, -0.02), rewards=rewards)
    assert both.startswith(expected) and "; chosen images improved and rejected ones got worse" in both
