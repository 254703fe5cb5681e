"""Labels, f-divergences and a cap of the logit, around any pair loss (`link`).

B is the number of pairs; scores and `beta` are those of `mmalign.losses.pairwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.losses.pairwise import Pair, PairLoss

MAX_EXPONENT = 80.0  # of an f-divergence; float32 ends at 88


class Labels(NamedTuple):
    """Labels of the pairs of a batch.

    Attributes:
        preference: probability that the chosen side is the better one, [B].
        margin: margin that the logit has to exceed, [B].
        weight: factor of the loss, [B].
        annotators: name of each pair's annotator, or "", [B].
    """

    preference: Tensor
    margin: Tensor
    weight: Tensor
    annotators: Sequence[str] = ()

    def to(self, device: torch.device) -> Labels:
        """Return the labels on a device."""
        return Labels(self.preference.to(device), self.margin.to(device), self.weight.to(device), self.annotators)

    def sure(self, pairs: Tensor | None = None) -> Labels:
        """Return the labels with the weight alone for the pairs of a mask [B], or for all.

        They belong to comparisons of other items than the pair's two sides.
        """
        mask = torch.ones_like(self.weight, dtype=torch.bool) if pairs is None else pairs
        return self._replace(
            preference=self.preference.masked_fill(mask, 1.0), margin=self.margin.masked_fill(mask, 0.0)
        )


def labelled(link: PairLoss, labels: Labels, beta: float, policy: Pair, reference: Pair) -> Tensor:
    """Return the losses [B] of labelled pairs: `weight * (p link(pair) + (1 - p) link(swapped pair))`.

    p is the preference; above 1 the loss is unbiased under label noise (`robust`). The margin counts as a gain of the
    reference, so the logit of a pair becomes `z - margin`.
    """
    reference = Pair(reference.chosen + labels.margin / beta, reference.rejected)
    share, losses = labels.preference, link(policy, reference)
    # The loss of the opposite label, in its share
    if (share != 1).any():
        losses = share * losses + (1 - share) * link(swapped(policy), swapped(reference))
    return labels.weight * losses


def swapped(pair: Pair) -> Pair:
    """Return the scores with the sides exchanged."""
    return Pair(pair.rejected, pair.chosen)


def without_reference(policy: Pair) -> Pair:
    """Return zeros in place of the reference's scores."""
    return Pair(*map(torch.zeros_like, policy))


def js(gain: Tensor) -> Tensor:
    """Return the transform of the Jensen-Shannon divergence, `-softplus(-h)` up to a constant."""
    return F.logsigmoid(gain)


def forward_kl(gain: Tensor) -> Tensor:
    """Return the transform of the forward Kullback-Leibler divergence, `-exp(-h)`."""
    return -torch.exp((-gain).clamp(max=MAX_EXPONENT))


def alpha_divergence(gain: Tensor, coefficient: float) -> Tensor:
    """Return the transform of the alpha-divergence, `exp((a - 1) h) / (a - 1)`."""
    return torch.exp(((coefficient - 1) * gain).clamp(max=MAX_EXPONENT)) / (coefficient - 1)


def shaped(shape: Callable[[Tensor], Tensor], policy: Pair, reference: Pair) -> Pair:
    """Return scores for a loss under another f-divergence (arXiv:2309.16240): each side's gain h becomes `shape(h)`.

    They include the reference's, in whose place the loss gets zeros.
    """
    return Pair(shape(policy.chosen - reference.chosen), shape(policy.rejected - reference.rejected))


def capped(link: PairLoss, cap: float, beta: float, policy: Pair, reference: Pair) -> Tensor:
    """Return the losses [B] of a capped logit, `min(z, cap)`: a pair beyond it has no gradient.

    A run whose margins keep growing unlearns both sides; the cap stops the pairs that are learned.
    """
    # Beyond the cap the chosen score is set back to it, and neither side has a gradient
    excess = (policy.margin - reference.margin - cap / beta).detach()
    over = excess > 0
    chosen = torch.where(over, (policy.chosen - excess).detach(), policy.chosen)
    return link(Pair(chosen, torch.where(over, policy.rejected.detach(), policy.rejected)), reference)
