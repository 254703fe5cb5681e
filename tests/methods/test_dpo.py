"""DPO and RLHF-V on responses: published values, the laws of a pair loss, and what the reference must be."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.data.pairs import Turn
from mmalign.draws import Draws
from mmalign.encode_responses import EncodedResponses
from mmalign.families import ImageFeatures, VisionLanguage
from mmalign.language.tokens import TokenRow, Tokens
from mmalign.methods import Step, dpo, rlhfv
from mmalign.policy import AdaptersOff, FrozenCopy, Policy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dpo.json").read_text())
DRAWS = Draws(seed=1)
PAIRS = [
    ("What is it?", "A red cube.", "A red cube and a dog."),
    ("Is there a dog in the image?", "No, there is no dog.", "Yes."),
    ("Describe it.", "Two cats on a mat near a car.", "Two cats on a blue mat near a car."),
]


def batch(family: Any, pairs: Any = PAIRS) -> EncodedResponses:
    """A picture for every second pair."""
    views, sides = {}, []
    for question, *answers in pairs:
        number = [pair[0] for pair in PAIRS].index(question) // 2
        pixels = np.random.default_rng(number).integers(0, 256, (20 + 8 * number, 30, 3), dtype=np.uint8)
        key = f"image {number}"
        views[key] = family.reader.view(Image.fromarray(pixels))
        sides.append(family.reader.rows([Turn("user", f"<image>{question}")], answers, [(key, views[key])]))
    tokens = family.reader.batch([*(s[0] for s in sides), *(s[1] for s in sides)])
    return EncodedResponses(list(range(len(sides))), tokens, family.encode_images(views), torch.ones(len(sides)))


def swapped(given: EncodedResponses) -> EncodedResponses:
    half, t = len(given.rows), given.tokens
    order = [*range(half, 2 * half), *range(half)]
    tokens = Tokens(t.ids[order], t.starts[order], t.lengths[order], tuple(t.images[i] for i in order))
    return replace(given, tokens=tokens)


def adapted(family: Any, moved: float = 0.0) -> Policy[Any]:
    """LoRA against the model without it; `moved` is the size of random changes of the adapters."""
    family.add_lora(rank=2, alpha=4.0, targets=family.usual_targets, seed=0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in family.network.parameters():
            if p.requires_grad:
                p.add_(moved * torch.randn(p.shape, generator=g))
    return Policy(family, family.network, family.network, AdaptersOff())


def run(method: Any, policy: Policy[Any], given: EncodedResponses, cfg: Any) -> Step:
    with torch.no_grad():
        (contrast,) = method.contrasts(policy, given, cfg, DRAWS)
    step: Step = method.loss(policy, contrast, cfg)
    return step


def gradient(policy: Policy[Any], step: Step) -> Tensor:
    policy.model.zero_grad()
    (step.losses * step.weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])


# ----------------------------------------------------------------------------------------------------- published values


@dataclass(frozen=True)
class Table:
    """A family whose logits are given: `net` is a tensor [2B, L, V] in a module."""

    def token_logps(self, net: Any, tokens: Tokens, features: ImageFeatures) -> Tensor:
        rows = tokens.starts[:, None] - 1 + torch.arange(tokens.response_mask.shape[1])
        logits = net.logits.gather(1, rows.clamp(max=7)[..., None].expand(-1, -1, net.logits.shape[2]))
        return logits.log_softmax(-1).gather(2, tokens.responses[..., None])[..., 0] * tokens.response_mask


class Logits(nn.Module):
    def __init__(self, which: str) -> None:
        super().__init__()
        given = (torch.tensor(GOLDEN["inputs"][f"{which}_{side}_logits"]) for side in ("chosen", "rejected"))
        self.logits = nn.Parameter(torch.cat(list(given)))


def published() -> tuple[Policy[Any], EncodedResponses]:
    """The published rows: -100 before the response is the prompt, after it padding."""
    rows = []
    for side in ("chosen", "rejected"):
        for labels in GOLDEN["inputs"][f"labels_{side}"]:
            start = next(i for i, label in enumerate(labels) if label != -100)
            response = [label for label in labels if label != -100]
            rows.append(TokenRow((*[0] * start, *response), start))
    given = EncodedResponses([0, 1], Tokens.of(rows, 0), ImageFeatures({}), torch.ones(2))
    net = Logits("policy")
    return Policy(Table(), net, net, FrozenCopy(Logits("ref"))), given  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GOLDEN["expected"]["sigmoid_per_sample"]),
        ({"label_smoothing": 0.1}, GOLDEN["expected"]["cdpo_label_smoothing_0_1_per_sample"]),
    ],
)
def test_dpo_gives_the_published_losses(config: dict[str, Any], expected: list[float]) -> None:
    """Of TRL, POVID's trainer (the same numbers) and ms-swift; float32."""
    step = run(dpo, *published(), dpo.Config(**config))
    torch.testing.assert_close(step.losses.detach(), torch.tensor(expected), rtol=2e-6, atol=1e-6)


def test_dpo_gives_the_published_log_probabilities_and_rewards() -> None:
    metrics, expected = run(dpo, *published(), dpo.Config()).metrics, GOLDEN["expected"]
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
    step = run(dpo, *published(), dpo.Config(loss=loss))
    expected = GOLDEN["expected"]["trl_batch_mean_losses"][sides]["loss"]
    assert step.losses.mean().item() == pytest.approx(expected, rel=2e-6)


# ----------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("method", [dpo, rlhfv])
def test_a_policy_that_equals_its_reference_has_ln_2_and_a_gradient(vlm: VisionLanguage, method: Any) -> None:
    policy = adapted(vlm)
    step = run(method, policy, batch(vlm), method.Config())
    assert torch.equal(step.losses.detach(), torch.full((3,), math.log(2)))
    assert (step.metrics["chosen gain"] == 0).all() and (step.metrics["accuracy"] == 0.5).all()
    assert gradient(policy, step).norm() > 1e-3


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


@pytest.mark.parametrize("method", [dpo, rlhfv])
def test_a_row_s_numbers_are_its_own_whatever_its_company(vlm: VisionLanguage, method: Any) -> None:
    """Alone or beside longer ones: padding does not leak. Rounding alone differs."""
    policy = adapted(vlm, moved=0.1)
    whole = run(method, policy, batch(vlm), method.Config())
    for at, pair in enumerate(PAIRS):
        alone = run(method, policy, batch(vlm, [pair]), method.Config())
        for name, values in alone.metrics.items():
            torch.testing.assert_close(values[0], whole.metrics[name][at], rtol=1e-4, atol=1e-4)


def test_swapping_the_sides_negates_the_logit(llava: VisionLanguage) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava)
    one, other = (run(dpo, policy, some, dpo.Config()).metrics for some in (given, swapped(given)))
    assert one["logit"].abs().min() > 1e-3
    torch.testing.assert_close(one["logit"], -other["logit"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["chosen gain"], other["rejected gain"], rtol=1e-4, atol=1e-5)


def test_encoding_once_equals_encoding_for_every_row(vlm: VisionLanguage) -> None:
    """Chosen, rejected and reference share an image's features; with their own copies they say the same."""
    policy, given = adapted(vlm, moved=0.1), batch(vlm)
    again = {f"{key}, again": copy.deepcopy(found) for key, found in given.features.images.items()}
    t, half = given.tokens, len(given.rows)
    keys = tuple(tuple(f"{k}, again" for k in row) if n >= half else row for n, row in enumerate(t.images))
    twice = replace(
        given,
        tokens=Tokens(t.ids, t.starts, t.lengths, keys),
        features=ImageFeatures({**given.features.images, **again}),
    )
    one, other = (run(dpo, policy, some, dpo.Config()) for some in (given, twice))
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(gradient(policy, one), gradient(policy, other))


def test_a_step_against_the_gradient_prefers_the_chosen_responses(vlm: VisionLanguage) -> None:
    policy, given, cfg = adapted(vlm, moved=0.05), batch(vlm), dpo.Config()
    before = run(dpo, policy, given, cfg)
    gradient(policy, before)
    torch.optim.SGD(policy.trainable(), lr=1e-3).step()
    assert run(dpo, policy, given, cfg).losses.mean() < before.losses.mean()


@pytest.mark.parametrize("method", [dpo, rlhfv])
def test_a_pair_of_weight_zero_gives_no_gradient(llava: VisionLanguage, method: Any) -> None:
    policy, cfg = adapted(llava, moved=0.1), method.Config()
    padded = replace(batch(llava), weights=torch.tensor([1.0, 0.0, 0.0]))
    of_three, of_one = (gradient(policy, run(method, policy, some, cfg)) for some in (padded, batch(llava, PAIRS[:1])))
    assert of_one.norm() > 0 and (of_three - of_one).norm() < 1e-4 * of_one.norm()


@pytest.mark.parametrize("method", [dpo, rlhfv])
def test_contrasts_keep_no_graph(llava: VisionLanguage, method: Any) -> None:
    (contrast,) = method.contrasts(adapted(llava), batch(llava), method.Config(), DRAWS)
    assert not any(scores.requires_grad for scores in contrast.reference.values())
    assert all(scores.dtype == torch.float32 for scores in contrast.reference.values())


# ---------------------------------------------------------------------------------------------------------------- rlhfv


@pytest.mark.parametrize(
    ("ours", "theirs", "insertions", "expected"),
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
    ours: list[int], theirs: list[int], insertions: bool, expected: tuple[list[int], list[int]]
) -> None:
    assert rlhfv.changed(ours, theirs, 3, insertions=insertions) == expected


def test_weights_are_gamma_at_the_changed_tokens_and_padding_is_no_token() -> None:
    rows = [TokenRow((5, 1, 2, 3, 9, 4, 6, 7), 1), TokenRow((5, 1, 2, 3, 4, 6, 7), 1)]
    found = rlhfv.token_weights(Tokens.of(rows, 0), 5.0, 3, insertions=True)
    assert found.tolist() == [[1, 1, 1, 5, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]


def test_gamma_1_is_dpo_on_means(llava: VisionLanguage) -> None:
    """Worked out from the token log-probabilities and IPO's scores, which are means."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    dense = run(rlhfv, policy, given, rlhfv.Config(gamma=1.0))
    means = run(dpo, policy, given, dpo.Config(loss="ipo"))
    for name in ("chosen gain", "rejected gain"):
        torch.testing.assert_close(dense.metrics[name], means.metrics[name], rtol=1e-4, atol=1e-6)
    heavy = run(rlhfv, policy, given, rlhfv.Config(gamma=5.0))
    assert (heavy.metrics["rejected gain"] - dense.metrics["rejected gain"]).abs().max() > 1e-4


def test_the_paper_s_defaults() -> None:
    assert (dpo.Config().beta, dpo.Config().loss) == (0.1, "dpo")
    assert (rlhfv.Config().beta, rlhfv.Config().gamma, rlhfv.Config().min_block) == (0.5, 5.0, 3)
