"""Worked values of the pair losses and of their wrappers, and the laws between them, in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config.methods.vision_language import DPOConfig
from mmalign.losses import pairwise, wrappers
from mmalign.losses.pairwise import Pair, PairLoss
from mmalign.losses.wrappers import Labels
from mmalign.methods._pair_loss import pair_losses
from tests.helpers.golden import golden

VALUES = golden("objectives")
GIVEN = {name: torch.tensor(values, dtype=torch.float64) for name, values in VALUES["inputs"].items()}
SUMS = Pair(GIVEN["pc"], GIVEN["pr"]), Pair(GIVEN["rc"], GIVEN["rr"])
MEANS = tuple(Pair(chosen / GIVEN["nc"], rejected / GIVEN["nr"]) for chosen, rejected in SUMS)
BETA = 0.5
dpo = partial(pairwise.dpo, beta=BETA)


def labels(preference: Any = 1.0, margin: Any = 0.0, weight: Any = 1.0, number: int = 3) -> Labels:
    """Return the labels of `number` pairs."""
    parts = (torch.as_tensor(value, dtype=torch.float64).expand(number) for value in (preference, margin, weight))
    return Labels(*parts)


def free(function: Callable[..., Tensor], **options: float) -> PairLoss:
    return lambda policy, _: function(policy, wrappers.without_reference(policy), **options)


def shaped(loss: PairLoss, shape: Callable[[Tensor], Tensor]) -> PairLoss:
    def of_shaped(policy: Pair, reference: Pair) -> Tensor:
        gains = wrappers.shaped(shape, policy, reference)
        return loss(gains, wrappers.without_reference(gains))

    return of_shaped


LOSSES: dict[str, tuple[PairLoss, Any]] = {
    "dpo": (dpo, SUMS),
    "exo eps=1e-3": (partial(pairwise.exo, beta=BETA, label_smoothing=1e-3), SUMS),
    "nca": (partial(pairwise.nca, beta=BETA), SUMS),
    "bco_pair": (partial(pairwise.bco_pair, beta=BETA), SUMS),
    "sppo_hard": (partial(pairwise.sppo_hard, beta=BETA), SUMS),
    "apo_zero": (partial(pairwise.apo_zero, beta=BETA), SUMS),
    "apo_down": (partial(pairwise.apo_down, beta=BETA), SUMS),
    "discopop tau=.05": (partial(pairwise.discopop, beta=BETA, temperature=0.05), SUMS),
    "dpo on means (sigmoid_norm)": (dpo, MEANS),
    "simpo b=2 ratio=.5": (free(pairwise.simpo, beta=2.0, gamma=1.0), MEANS),
    "orpo lambda=.1": (free(pairwise.orpo, beta=0.1), MEANS),
    "slic delta=1": (free(pairwise.slic, beta=BETA, delta=1.0), SUMS),
    "dpop lambda=5": (partial(pairwise.dpop, beta=BETA, penalty=5.0), SUMS),
    "dpo margin clamp z<=.3": (partial(wrappers.capped, dpo, 0.3, BETA), SUMS),
    "anchor (mDPO) delta=0": (partial(pairwise.anchor, beta=BETA, delta=0.0), SUMS),
    "dpo f=js": (shaped(dpo, wrappers.js), SUMS),
    "dpo f=forward_kl": (shaped(dpo, wrappers.forward_kl), SUMS),
    "dpo f=alpha .5": (shaped(dpo, partial(wrappers.alpha_divergence, coefficient=0.5)), SUMS),
    "labelled soft p": (partial(wrappers.labelled, dpo, labels([0.9, 0.6, 0.75]), BETA), SUMS),
    "labelled margin": (partial(wrappers.labelled, dpo, labels(margin=[0.2, 0.0, -0.1]), BETA), SUMS),
    "odpo alpha=1 gap (2,.5,1)": (
        partial(wrappers.labelled, dpo, labels(margin=torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).log()), BETA),
        SUMS,
    ),
    "modpo w=(.5,.5)": (
        partial(wrappers.labelled, partial(pairwise.dpo, beta=BETA / 0.5), labels(margin=[0.2, 0.6, -0.8]), BETA / 0.5),
        SUMS,
    ),
    "sppo b=.5": (
        partial(pairwise.sppo, beta=BETA, preference=torch.tensor([0.8, 0.7, 0.9], dtype=torch.float64)),
        SUMS,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_its_worked_value(name: str) -> None:
    loss, scores = LOSSES[name]
    assert loss(*scores).tolist() == pytest.approx(VALUES[name], rel=0, abs=1e-9)


def test_inpo_is_ipo_against_scores_of_two_references() -> None:
    """The previous policy's and, with a share of tau / eta, those of the model before training."""
    before = [torch.tensor(x, dtype=torch.float64) for x in ((-10.2, -6.6, -19.5), (-11.2, -6.0, -18.2))]
    share = 0.2 / 0.5
    mixed = Pair(*(share * base + (1 - share) * x for base, x in zip(SUMS[1], before, strict=True)))
    assert pairwise.ipo(SUMS[0], mixed, beta=0.5).tolist() == pytest.approx(VALUES["inpo eta=.5 tau=.2"], abs=1e-9)


def test_cpo_is_a_loss_without_reference_and_the_chosen_side_s_own() -> None:
    values = free(pairwise.cpo, beta=BETA)(*SUMS) - MEANS[0].chosen
    assert values.tolist() == pytest.approx(VALUES["cpo b=.5 alpha=1"], rel=0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- laws

G = torch.Generator().manual_seed(0)
RANDOM = tuple(Pair(*torch.randn(2, 64, generator=G, dtype=torch.float64)) for _ in range(2))
Z = BETA * (RANDOM[0].margin - RANDOM[1].margin)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((first - second).abs().max() < tolerance)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "nca", "bco_pair", "apo_zero", "apo_down", "sppo_hard"])
def test_labels_of_sure_pairs_and_no_shape_change_nothing(name: str) -> None:
    loss = partial(getattr(pairwise, name), beta=BETA)
    for wrapped in (
        partial(wrappers.labelled, loss, labels(number=64), BETA),
        shaped(loss, lambda gain: gain),
        partial(wrappers.capped, loss, 1e3, BETA),
    ):
        assert close(wrapped(*RANDOM), loss(*RANDOM))
    half = partial(wrappers.labelled, loss, labels(0.5, number=64), BETA)
    swapped = tuple(Pair(*pair[::-1]) for pair in RANDOM)
    assert close(half(*RANDOM), half(*swapped))
    assert close(wrappers.labelled(loss, labels(weight=3.0, number=64), BETA, *RANDOM), 3 * loss(*RANDOM))


def test_a_preference_is_label_smoothing_and_beyond_one_robust_dpo() -> None:
    for rate in (0.05, 0.2, 0.4):
        smoothed = wrappers.labelled(dpo, labels(1 - rate, number=64), BETA, *RANDOM)
        assert close(smoothed, dpo(*RANDOM, label_smoothing=rate))
        unbiased = wrappers.labelled(dpo, labels((1 - rate) / (1 - 2 * rate), number=64), BETA, *RANDOM)
        assert close(unbiased, pairwise.robust(*RANDOM, beta=BETA, flip_rate=rate))


def test_a_margin_shifts_the_logit_and_the_target_of_ipo() -> None:
    margin = torch.randn(64, generator=G, dtype=torch.float64)
    shifted = wrappers.labelled(dpo, labels(margin=margin, number=64), BETA, *RANDOM)
    assert close(shifted, torch.nn.functional.softplus(margin - Z))
    moved = partial(wrappers.labelled, partial(pairwise.ipo, beta=BETA), labels(margin=margin, number=64), BETA)(
        *RANDOM
    )
    assert close(moved, (Z / BETA - 1 / (2 * BETA) - margin / BETA) ** 2)


def test_sppo_s_gradient_is_that_of_a_mixture_of_hard_labels() -> None:
    share = torch.rand(64, generator=G, dtype=torch.float64)
    chosen = RANDOM[0].chosen.clone().requires_grad_()
    policy = Pair(chosen, RANDOM[0].rejected)
    mixed = partial(wrappers.labelled, partial(pairwise.sppo, beta=BETA), labels(share, number=64), BETA)
    slopes = [
        torch.autograd.grad(loss(policy, RANDOM[1]).sum(), chosen)[0]
        for loss in (mixed, partial(pairwise.sppo, beta=BETA, preference=share))
    ]
    assert close(*slopes)
    assert close(partial(pairwise.sppo_hard, beta=BETA)(*RANDOM), 2 * pairwise.sppo(*RANDOM, beta=BETA))


def test_bco_pair_is_cca_of_weight_1() -> None:
    different = torch.zeros(64, dtype=torch.bool)
    cca = pairwise.cca(*RANDOM, different, beta=BETA, weight=1.0)
    assert close(pairwise.bco_pair(*RANDOM, beta=BETA), cca)


def test_a_sum_is_linear_in_its_weights() -> None:
    both = pair_losses(DPOConfig(beta=BETA, loss={"dpo": 0.8, "bco_pair": 0.2}), None, *RANDOM)
    assert close(both, 0.8 * dpo(*RANDOM) + 0.2 * pairwise.bco_pair(*RANDOM, beta=BETA))


def test_a_capped_pair_has_no_gradient() -> None:
    sides = Pair(*(side.clone().requires_grad_() for side in RANDOM[0]))
    wrappers.capped(dpo, 0.3, BETA, sides, RANDOM[1]).sum().backward()
    assert ((sides.chosen.grad == 0) == (Z > 0.3)).all() and ((sides.rejected.grad == 0) == (Z > 0.3)).all()
    assert 0 < (Z > 0.3).sum() < 64


def test_penalties_of_zero_and_margins_of_zero_leave_dpo() -> None:
    assert close(pairwise.dpop(*RANDOM, beta=BETA, penalty=0.0), dpo(*RANDOM))
    without = free(pairwise.dpo, beta=BETA)(*RANDOM)
    assert close(free(pairwise.simpo, beta=BETA, gamma=0.0)(*RANDOM), without)
    assert close(free(pairwise.cpo, beta=BETA)(*RANDOM), without)


def test_orpo_s_odds_are_exact_near_certainty_and_far_from_it() -> None:
    """ln(1 - e^m) against closed forms: m = -1e-9 gives ln(1e-9), m = -50 gives -e^-50."""
    m = torch.tensor([-1e-9, -0.5, -50.0, 0.0], dtype=torch.float64, requires_grad=True)
    values = pairwise._log1mexp(m)
    expected = [math.log(1e-9), math.log(1 - math.exp(-0.5)), -math.exp(-50)]
    assert values[:3].tolist() == pytest.approx(expected, rel=1e-8)
    values.sum().backward()
    assert m.grad is not None and torch.isfinite(m.grad).all()


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_losses_and_gradients_stay_finite_at_huge_logits(size: float) -> None:
    exact = {"exo": {"label_smoothing": 1e-3}, "discopop": {"temperature": 0.05}, "dpop": {"penalty": 50.0}}
    for name in ("nca", "bco_pair", "apo_zero", "apo_down", "exo", "discopop", "dpop"):
        sides = Pair(*(torch.tensor(values, requires_grad=True) for values in ([size, -size], [-size, size])))
        zeros = Pair(torch.zeros(2), torch.zeros(2))
        for shape in (lambda gain: gain, wrappers.js, wrappers.forward_kl):
            loss = shaped(partial(getattr(pairwise, name), beta=BETA, **exact.get(name, {})), shape)
            loss(sides, zeros).sum().backward()
            assert all(torch.isfinite(side.grad).all() for side in sides), (name, shape)
