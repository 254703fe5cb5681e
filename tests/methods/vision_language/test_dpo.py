"""DPO and RLHF-V on responses: published values, the laws of a pair loss, and what the reference must be."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmalign.families.base import VisionLanguage
from mmalign.families.types import ImageFeatures
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.methods.vision_language import dpo, rlhfv
from mmalign.methods.vision_language._responses import view_scores
from mmalign.policy import FrozenCopy, Policy
from tests.helpers.golden import golden
from tests.helpers.policies import adapted, gradient, run
from tests.helpers.response_batches import batch, published

GOLDEN = golden("dpo")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GOLDEN["expected"]["sigmoid_per_sample"]),
        ({"loss": {"name": "dpo", "label_smoothing": 0.1}}, GOLDEN["expected"]["cdpo_label_smoothing_0_1_per_sample"]),
    ],
)
def test_dpo_gives_the_published_losses(config: dict[str, Any], expected: list[float]) -> None:
    """Of TRL, POVID's trainer (the same numbers) and ms-swift; float32."""
    step = run(dpo, *published(GOLDEN), dpo.Config(**config))
    torch.testing.assert_close(step.losses.detach(), torch.tensor(expected), rtol=2e-6, atol=1e-6)


def test_dpo_gives_the_published_log_probabilities_and_rewards() -> None:
    metrics, expected = run(dpo, *published(GOLDEN), dpo.Config()).metrics, GOLDEN["expected"]
    for side in ("chosen", "rejected"):
        logps = torch.tensor(expected[f"policy_{side}_logps"])
        torch.testing.assert_close(metrics[f"{side} log-probability"], logps, rtol=1e-6, atol=1e-6)
        rewards = torch.tensor(expected[f"{side}_rewards"])
        torch.testing.assert_close(0.1 * metrics[f"{side} gain"], rewards, rtol=1e-5, atol=1e-6)
        assert metrics[f"{side} tokens"].tolist() == expected[f"n_tokens_{side}"]
    assert metrics["accuracy"].mean().item() == expected["trl_metrics"]["rewards/accuracies"]


@pytest.mark.parametrize(("loss", "sides"), [("hinge", "hinge"), ("ipo", "ipo")])
def test_other_pair_losses_give_the_published_means(loss: str, sides: str) -> None:
    """IPO on means over tokens, as TRL takes them."""
    step = run(dpo, *published(GOLDEN), dpo.Config(loss=loss))
    expected = GOLDEN["expected"]["trl_batch_mean_losses"][sides]["loss"]
    assert step.losses.mean().item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("loss", "value"), [("ipo", 25.0), ("hinge", 1.0), ("robust", math.log(2))])
def test_every_pair_loss_at_equality(llava: VisionLanguage, loss: str, value: float) -> None:
    """(1 / (2 beta))^2 of ipo at beta 0.1."""
    step = run(dpo, adapted(llava), batch(llava), dpo.Config(loss=loss))
    torch.testing.assert_close(step.losses.detach(), torch.full((3,), value))


def test_adapters_off_is_the_frozen_base_model_to_the_last_bit(vlm: VisionLanguage) -> None:
    base = copy.deepcopy(vlm.network)
    policy, given = adapted(vlm, moved=0.1), batch(vlm)
    off = run(dpo, policy, given, dpo.Config())
    copied = run(dpo, Policy(vlm, vlm.network, vlm.network, FrozenCopy(base)), given, dpo.Config())
    for name, values in off.metrics.items():
        assert torch.equal(values, copied.metrics[name]), name
    assert off.metrics["chosen gain"].abs().min() > 1e-3


def test_encoding_once_equals_encoding_for_every_row(vlm: VisionLanguage) -> None:
    """Chosen, rejected and reference share an image's features; with their own copies they say the same.

    To rounding: sides with an image each do not share a row.
    """
    policy, given = adapted(vlm, moved=0.1), batch(vlm)
    again = {f"{key}, again": copy.deepcopy(result) for key, result in given.features.images.items()}
    t, half = given.tokens, len(given.rows)
    keys = tuple(tuple(f"{k}, again" for k in row) if n >= half else row for n, row in enumerate(t.images))
    twice = replace(
        given,
        tokens=Tokens(t.ids, t.starts, t.lengths, keys),
        features=ImageFeatures({**given.features.images, **again}),
    )
    actual, expected = (run(dpo, policy, some, dpo.Config()) for some in (given, twice))
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(policy, actual), gradient(policy, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "insertions", "expected"),
    [
        ([1, 2, 3, 9, 4, 5, 6], [1, 2, 3, 7, 8, 4, 5, 6], True, ([3], [3, 4])),  # a replaced stretch
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 4, 5, 6], True, ([], [3])),  # words that one side adds
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 4, 5, 6], False, ([], [])),  # ... which the release does not count
        ([1, 2, 3, 9, 4, 5], [1, 2, 3, 8, 4, 5], True, ([3, 4, 5], [3, 4, 5])),  # two alike are fewer than three
        ([1, 2, 3], [1, 2, 3], True, ([], [])),
        ([1, 2], [3, 4], False, ([0, 1], [0, 1])),
    ],
)
def test_changed_tokens_by_hand(
    chosen: list[int], rejected: list[int], insertions: bool, expected: tuple[list[int], list[int]]
) -> None:
    assert rlhfv.changed_positions(chosen, rejected, 3, insertions=insertions) == expected


def test_changed_tokens_weigh_gamma_and_padding_0() -> None:
    rows = [TokenizedResponse((5, 1, 2, 3, 9, 4, 6, 7), 1), TokenizedResponse((5, 1, 2, 3, 4, 6, 7), 1)]
    result = rlhfv.token_weights(Tokens.from_rows(rows, 0), 5.0, 3, insertions=True)
    assert result.tolist() == [[1, 1, 1, 5, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]


def test_gamma_1_is_dpo_on_means(llava: VisionLanguage) -> None:
    """Worked out from the token log-probabilities and IPO's scores, which are means."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    dense = run(rlhfv, policy, given, rlhfv.Config(gamma=1.0))
    means = run(dpo, policy, given, dpo.Config(loss="ipo"))
    for name in ("chosen gain", "rejected gain"):
        torch.testing.assert_close(dense.metrics[name], means.metrics[name], rtol=1e-4, atol=1e-6)
    heavy = run(rlhfv, policy, given, rlhfv.Config(gamma=5.0))
    assert (heavy.metrics["rejected gain"] - dense.metrics["rejected gain"]).abs().max() > 1e-4


def test_short_common_beginning_is_unchanged() -> None:
    rows = [TokenizedResponse((1, 2, 3, 4, *response), 4) for response in ((10, 11, 12), (10, 20, 21, 22))]
    weights = rlhfv.token_weights(Tokens.from_rows(rows, 0), 5.0, 3, insertions=True)
    assert weights.tolist() == [[1, 5, 5, 1], [1, 5, 5, 5]]


def test_the_undivided_sum_is_the_release_s() -> None:
    logps, mask, weights = (
        -torch.rand(2, 3),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
        torch.tensor([[1, 5.0, 9], [1, 1, 5]]),
    )
    actual = view_scores(logps, mask, weights=weights)
    torch.testing.assert_close(actual["chosen"], logps[:1, 0] + 5 * logps[:1, 1])
    torch.testing.assert_close(actual["rejected"], (logps[1:] * weights[1:]).sum(1))
