"""Preference losses: pure functions of scores, one number per pair, [B].

B is the number of pairs. A *score* [B] is higher for what the model finds likelier; an *error* [B] is lower when
better. The unit of `beta` is one over the unit of the scores.

* The denoising score is `-0.5 * mean(error ** 2)` over channels and pixels. It takes the `beta` of the Diffusion-DPO
  release (2000 to 5000) unchanged. The beta of diffusers' Stable Diffusion script is half of it. For summed errors it
  is `beta / D`, with D elements in a latent.
* Token scores are log-probabilities in nats: sums with the usual `beta` of 0.1, or means for `ipo`, `simpo` and `orpo`.

The logit is `z = beta * (policy.margin - reference.margin)`. A loss without a reference gets zeros in its place, and
a label's margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Callable[["Pair", "Pair"], Tensor]


class Pair(NamedTuple):
    """The scores [B] of the chosen and of the rejected side, float32; higher is better."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """Score of the chosen side minus score of the rejected side, [B]."""
        return self.chosen - self.rejected


def dpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of direct preference optimization, `-log sigma(z)` (arXiv:2305.18290 eq. 7).

    On denoising scores it is Diffusion-DPO (arXiv:2311.12908). `label_smoothing` is the assumed share of swapped labels
    (conservative DPO). The loss is ln 2 where policy and reference agree.
    """
    z = beta * (policy.margin - reference.margin)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def ipo(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the loss of identity preference optimization (arXiv:2310.12036 eq. 17), with target margin `1 / (2 beta)`.

    The target is in the unit of the scores, so a `beta` for one kind of score does not suit another.
    """
    return (policy.margin - reference.margin - 1 / (2 * beta)) ** 2


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the hinge loss of SLiC-HF and RSO (arXiv:2309.06657, eq. 10), without gradient once `z` exceeds one.

    It is 1 where policy and reference agree.
    """
    return F.relu(1 - beta * (policy.margin - reference.margin))


def robust(policy: Pair, reference: Pair, *, beta: float, flip_rate: float) -> Tensor:
    """Return the loss of robust DPO (arXiv:2403.00409 eq. 12), unbiased if a share `flip_rate` of labels is swapped.

    Unlike label smoothing, the loss is unbounded below.

    Raises:
        ValueError: `flip_rate` is not in [0, 0.5).
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"robust: flip_rate is {flip_rate}; expected at least 0 and less than 0.5")
    z = beta * (policy.margin - reference.margin)
    return (-(1 - flip_rate) * F.logsigmoid(z) + flip_rate * F.logsigmoid(-z)) / (1 - 2 * flip_rate)


def exo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Tensor:
    """Return the loss of efficient exact optimization (arXiv:2402.00856 eq. 16), a reverse KL to the smoothed label.

    With `q = sigma(z)` and the smoothing e it is `q ln(q / (1 - e)) + (1 - q) ln((1 - q) / e)`. TRL calls it exo_pair.
    The loss is at least 0.
    """
    z = beta * (policy.margin - reference.margin)
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


def nca(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the pair loss of noise contrastive alignment (arXiv:2402.05369), which keeps the chosen side likely.

    With each side's own `z = beta * (policy - reference)` it is
    `softplus(-z_chosen) + (softplus(z_chosen) + softplus(z_rejected)) / 2`. TRL calls it nca_pair. The loss is 2 ln 2
    where policy and reference agree.
    """
    chosen, rejected = _sides(policy, reference, beta)
    return F.softplus(-chosen) + 0.5 * (F.softplus(chosen) + F.softplus(rejected))


def bco_pair(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the pair loss of binary classifier optimization (arXiv:2404.04656) without its shift.

    It is `softplus(-z_chosen) + softplus(z_rejected)` with each side's own z, so one side alone can lower it. The loss
    is 2 ln 2 where policy and reference agree.
    """
    chosen, rejected = _sides(policy, reference, beta)
    return F.softplus(-chosen) + F.softplus(rejected)


def apo_zero(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the APO-zero loss (arXiv:2408.06266): the chosen side gains and the rejected side loses.

    It is `sigma(-z_chosen) + sigma(z_rejected)` with each side's own z. It suits chosen sides that are better than what
    the model generates. The loss is 1 where policy and reference agree.
    """
    chosen, rejected = _sides(policy, reference, beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the APO-down loss (arXiv:2408.06266): both sides lose, the rejected one more.

    It is `sigma(z_chosen) + sigma(-z)` with the chosen side's own z. It suits chosen sides that are worse than what the
    model generates. The loss is 1 where policy and reference agree.
    """
    chosen, rejected = _sides(policy, reference, beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def sppo(policy: Pair, reference: Pair, *, beta: float, preference: Tensor | float = 1.0) -> Tensor:
    """Return the loss of self-play preference optimization (arXiv:2405.00675), a regression on win rates.

    With each side's gain h = policy - reference it is
    `((h_chosen - (P - 1/2) / beta) ** 2 + (h_rejected + (P - 1/2) / beta) ** 2) / 2`.

    Args:
        policy: the policy's scores.
        reference: the scores of the previous round's policy.
        beta: one over the paper's eta (0.001 in the release).
        preference: P, the chosen side's win rate against the rejected one, [B] or a number.
    """
    target = (preference - 0.5) / beta
    chosen, rejected = _sides(policy, reference, 1.0)
    return 0.5 * ((chosen - target) ** 2 + (rejected + target) ** 2)


def sppo_hard(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the loss of SPPO with win rates of 1 and 0, twice `sppo`'s, as in TRL and the release."""
    return 2 * sppo(policy, reference, beta=beta)


def discopop(policy: Pair, reference: Pair, *, beta: float, temperature: float) -> Tensor:
    """Return the discovered loss LRML (arXiv:2406.08414): logistic for small logits, exponential for large ones.

    With `k = sigma(z / temperature)` it is `softplus(-z) (1 - k) + exp(-z) k`. At low temperatures it rises with z
    around 0, and thus holds pairs at a small negative z.
    """
    z = beta * (policy.margin - reference.margin)
    gate = z / temperature
    return F.softplus(-z) * torch.sigmoid(-gate) + torch.exp(F.logsigmoid(gate) - z)


def dpop(policy: Pair, reference: Pair, *, beta: float, penalty: float) -> Tensor:
    """Return the loss of DPO-Positive (arXiv:2402.13228), which punishes a chosen side below the reference.

    It is `softplus(-(z - penalty * max(0, -z_chosen)))` with the chosen side's own z, and ln 2 where policy and
    reference agree.
    """
    chosen, rejected = _sides(policy, reference, beta)
    return F.softplus(rejected - chosen + penalty * F.relu(-chosen))


def anchor(policy: Pair, reference: Pair, *, beta: float, delta: float) -> Tensor:
    """Return mDPO's anchor (arXiv:2406.11839): the chosen side's gain, times `beta`, has to exceed `delta`.

    It is `softplus(-(z_chosen - delta))` with the chosen side's own z, and is meant as a part of a sum. The loss is
    ln 2 where policy and reference agree and `delta` is 0.
    """
    return F.softplus(delta - beta * (policy.chosen - reference.chosen))


def slic(policy: Pair, reference: Pair, *, beta: float, delta: float) -> Tensor:
    """Return the ranking loss of SLiC-HF (arXiv:2305.10425): `max(0, delta - margin)`, without a reference.

    Margin and `delta`, beyond which a pair has no gradient, are in the unit of the scores; `beta` is not used.
    """
    return F.relu(delta - (policy.margin - reference.margin))


def simpo(policy: Pair, reference: Pair, *, beta: float, gamma: float) -> Tensor:
    """Return the loss of SimPO (arXiv:2405.14734): DPO on mean scores with a target margin, without a reference.

    It is `softplus(-(beta * margin - gamma))`, with a beta of 2 to 10 in the paper. The release's `gamma_beta_ratio` is
    gamma / beta.
    """
    return F.softplus(gamma - beta * (policy.margin - reference.margin))


def cpo(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the preference term of CPO (arXiv:2401.08417): DPO against a reference that scores all alike.

    The paper adds the chosen side's negative log-likelihood, which the methods do by the loss's option `alpha`.
    """
    return dpo(policy, reference, beta=beta)


def orpo(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the loss of ORPO (arXiv:2403.07691): likelihood of the chosen response, plus a ratio of odds.

    With mean log-probabilities m it is `-m_chosen + beta * softplus(-r)`, where
    `r = m_chosen - m_rejected - (ln(1 - e^m_chosen) - ln(1 - e^m_rejected))`. Scores that are no log-probabilities,
    such as denoising scores, have no odds. `beta` is the paper's lambda.
    """
    odds = policy.margin - _log1mexp(policy.chosen) + _log1mexp(policy.rejected)
    return -policy.chosen + beta * F.softplus(beta * reference.margin - odds)


def clipped_dpo(policy: Pair, reference: Pair, *, beta: float, clip: float) -> Tensor:
    """Return the loss of step-by-step preference optimization (arXiv:2406.04314), DPO on clipped likelihood ratios.

    The loss is `-log sigma(z)` with `z = beta * (r_chosen - r_rejected)`. r is the log-ratio of policy to reference,
    clipped to `[log(1 - clip), log(1 + clip)]` for each side separately. A side outside this range has no gradient.

    Args:
        policy: log-probabilities of the steps, as means over a latent's elements; `beta` and `clip` refer to means.
        reference: likewise, of the reference.
        beta: 10 in the release.
        clip: the largest distance of a ratio from 1 (0.1 in the release).

    Returns:
        The loss [B]; ln 2 where policy and reference agree.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    chosen = (policy.chosen - reference.chosen).clamp(low, high)
    rejected = (policy.rejected - reference.rejected).clamp(low, high)
    return -F.logsigmoid(beta * (chosen - rejected))


def soft_preference(scores: Pair, share: Tensor) -> Tensor:
    """Return the cross-entropy of a reward model's preference with a soft label, as in PickScore and SPO's step judge.

    The loss is `-share log sigma(d) - (1 - share) log sigma(-d)` with `d = scores.margin`. For a `share` of 1/2 the
    entropy of a tie is subtracted, so a tie with equal scores costs nothing.

    Args:
        scores: the reward model's logits [B] of the two images.
        share: the preference for the first side [B]: 1 or 0, or 1/2 for a tie.

    Returns:
        The loss [B]; ln 2 where a preferred image and the other one have equal scores.
    """
    d = scores.margin
    entropy = torch.where(share == 0.5, math.log(2), 0.0)
    return -share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d) - entropy


def mapo(
    chosen_error: Tensor, rejected_error: Tensor, *, beta: float, snr: float = 0.5, num_timesteps: int = 1000
) -> Tensor:
    """Return the loss of margin-aware preference optimization (arXiv:2406.06424), without a reference model.

    The loss is `chosen_error + beta * softplus(-num_timesteps * (s(snr * chosen_error) - s(snr * rejected_error)))`
    with the bounded score `s(x) = x / (e^x - 1)`. The published `exp(x) - 1` cancels in float32 for small errors and
    has a nan gradient for large ones. This form is numerically stable.

    Args:
        chosen_error: mean squared denoising errors [B], float32, at least 0.
        rejected_error: likewise, of the rejected side.
        beta: the weight of the margin relative to the chosen side's error (0.1 in the release).
        snr: the factor inside `s`, a constant despite the release's name.
        num_timesteps: the factor of the margin: the length of the noise schedule.
    """
    z = num_timesteps * (_bounded(snr * chosen_error) - _bounded(snr * rejected_error))
    return chosen_error + beta * F.softplus(-z)


def cca(policy: Pair, reference: Pair, same_condition: Tensor, *, beta: float, weight: float) -> Tensor:
    """Return the loss of condition contrastive alignment (arXiv:2410.09347), which contrasts two conditions of an item.

    The loss is `(softplus(-z_own) + weight * softplus(z_other)) / max(weight, 1)`. Each side has its own
    `z = beta * (policy - reference)`, so gains that both sides share also affect the loss. If both conditions are the
    same there is nothing to unlearn, and the second term is `softplus(-z_other)` with weight 1. The division is the
    release's; it prevents updates from growing with `weight`.

    Args:
        policy: scores; `chosen` under the own condition, `rejected` under the other one.
        reference: likewise, of the reference.
        same_condition: a mask of equal conditions [B], bool; true also where both are dropped.
        beta: one over the unit of the scores (0.02 for log-probabilities of an image's tokens in the release).
        weight: the weight of unlearning the other condition, the paper's lambda (50 to 1000 for a thousand classes).

    Returns:
        The loss [B]; `(1 + weight) / max(weight, 1) * ln 2` where policy and reference agree, 2 ln 2 at weight 1.
    """
    own, other = (beta * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True))
    second = torch.where(same_condition, F.softplus(-other), weight * F.softplus(other))
    return (F.softplus(-own) + second) / max(weight, 1.0)


def _sides(policy: Pair, reference: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """Return `beta` times the gain [B] of the chosen and of the rejected side."""
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def _log1mexp(m: Tensor) -> Tensor:
    """Return `ln(1 - e^m)` for m <= 0; a probability of exactly 1 counts as the largest below it."""
    m = m.clamp(max=-torch.finfo(m.dtype).eps)
    # Each form is exact on its own side of -ln 2
    near, far = m.clamp(min=-math.log(2)), m.clamp(max=-math.log(2))
    return torch.where(m > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _bounded(x: Tensor) -> Tensor:
    """Return `x / (e^x - 1)` for x >= 0, falling from 1 at x = 0 to 0, with exact values and gradients."""
    # Below 0.3 the series is exact to 1e-13, while the quotient's gradient is a difference of two large numbers.
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240 - x**8 / 1209600
    large = x.clamp(min=0.3)
    return torch.where(x < 0.3, series, large * torch.exp(-large) / -torch.expm1(-large))
