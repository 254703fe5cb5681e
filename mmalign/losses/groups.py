"""Losses of lists: pure functions of the scores of K outputs of a prompt, one number per list.

B is the number of lists. `h = policy - reference` is the gain of an output. Lists may have different lengths: `present`
masks their outputs. Outputs of equal reward are not compared with each other. At K = 2 each loss is a pair loss, which
its docstring names; z is the pair's logit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(NamedTuple):
    """Scores and rewards [B, K] of lists, float; higher is better.

    Attributes:
        policy: the policy's scores.
        reference: the reference's scores; those of the policy's zero for losses without a reference.
        rewards: the judge's numbers; finite where no output is, too.
        present: whether there is an output.
        lengths: number of tokens of each response; ones for images.
    """

    policy: Tensor
    reference: Tensor
    rewards: Tensor
    present: Tensor
    lengths: Tensor

    @property
    def gains(self) -> Tensor:
        """Scores of the policy minus those of the reference."""
        return self.policy - self.reference

    @property
    def better(self) -> Tensor:
        """Mask [B, K, K]: whether output i has a larger reward than output j."""
        larger = self.rewards[:, :, None] > self.rewards[:, None, :]
        return larger & self.present[:, :, None] & self.present[:, None, :]

    @property
    def best(self) -> Tensor:
        """Number [B] of the first output with the largest reward."""
        return self.rewards.masked_fill(~self.present, -torch.inf).argmax(1)

    @property
    def worst(self) -> Tensor:
        """Number [B] of the last output with the smallest reward."""
        flipped = self.rewards.masked_fill(~self.present, torch.inf).flip(1)
        return self.rewards.shape[1] - 1 - flipped.argmin(1)


def pick(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the value [B] of one output of each list, from values [B, K] and the outputs' numbers [B]."""
    return values.gather(1, numbers[:, None])[:, 0]


def between(values: Tensor) -> Tensor:
    """Return value i minus value j [B, K, K]."""
    return values[:, :, None] - values[:, None, :]


def order_accuracy(group: Group) -> Tensor:
    """Return the share [B] of the outputs of different rewards whose gains have the same order; 1/2 without any."""
    differences = between(group.gains)
    right = ((differences > 0) + 0.5 * (differences == 0)) * group.better
    number = group.better.sum((1, 2))
    return torch.where(number > 0, right.sum((1, 2)) / number.clamp(min=1), 0.5)


def plackett_luce(group: Group, *, beta: float) -> Tensor:
    """Return the likelihood loss of the ranking (Diffusion-LPO, arXiv:2510.01540; DPO, appendix A.3).

    `sum_i log(1 + sum_j exp(beta (h_j - h_i)))` over all j of smaller reward. At K = 2: `dpo`.
    """
    return _log1p_sum_exp(-beta * between(group.gains), group.better).sum(1)


def lambda_rank(
    group: Group, *, beta: float, ranks: Literal["policy", "reward"] = "policy", scaled: bool = True
) -> Tensor:
    """Return pair losses weighted by their effect on the ranking (LiPO, arXiv:2402.01878; RankDPO, arXiv:2410.18013).

    `sum_ij |2^R_i - 2^R_j| |1/ln(1 + rank_i) - 1/ln(1 + rank_j)| softplus(-beta (h_i - h_j))` over R_i > R_j. At K = 2,
    with rewards 1 and 0: 0.532455814 `dpo`.

    Args:
        group: the lists.
        beta: as in DPO.
        ranks: the order by the policy's present gains, of equal gains by the reward; or by the rewards.
        scaled: map the rewards of each list linearly to 0..3 first.
    """
    rewards = _scaled(group) if scaled else group.rewards
    gains = group.gains
    # Equal gains, as at the start of training, are ranked by the reward
    by_reward = _ranks(group.rewards, group.present)
    rank = by_reward if ranks == "reward" else _ranks(gains.detach(), group.present, by_reward)
    discount = 1 / torch.log1p(rank.to(gains.dtype))
    # What the discounted gain changes if i and j change places [B, K, K]
    weights = between(torch.exp2(rewards)).abs() * between(discount).abs()
    return torch.where(group.better, weights * F.softplus(-beta * between(gains)), 0).sum((1, 2))


def info_nca(group: Group, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return the cross-entropy to the softmax of the rewards (InfoNCA, arXiv:2402.05369).

    `-sum_i softmax(R / alpha)_i log softmax(beta h)_i`. At K = 2: `dpo` with the softmax as soft preference.
    """
    logs = torch.log_softmax((beta * group.gains).masked_fill(~group.present, -torch.inf), 1)
    return -(_targets(group, alpha) * logs.masked_fill(~group.present, 0)).sum(1)


def nca(group: Group, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return the noise contrastive loss of rewards (NCA, arXiv:2402.05369).

    `-sum_i [softmax(R / alpha)_i log sigma(beta h_i) + log sigma(-beta h_i) / K]`. At K = 2 and alpha -> 0: pair `nca`.
    """
    logits, number = beta * group.gains, group.present.sum(1, keepdim=True)
    terms = _targets(group, alpha) * F.softplus(-logits) + F.softplus(logits) / number
    return terms.masked_fill(~group.present, 0).sum(1)


def copg(group: Group, *, beta: float) -> Tensor:
    """Return the regression of centred gains to centred rewards (CoPG, arXiv:2406.19185).

    `sum_i (beta (h_i - mean h) - (R_i - mean R))^2`. At K = 2: `(z - (R_1 - R_2))^2 / 2`.
    """
    errors = (beta * group.gains - group.rewards).masked_fill(~group.present, 0)
    mean = errors.sum(1, keepdim=True) / group.present.sum(1, keepdim=True)
    return (errors - mean).square().masked_fill(~group.present, 0).sum(1)


def d2o(group: Group, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return the loss of the worst output against the mean of the others (D2O, arXiv:2403.03419).

    `softplus(-beta (mean_k h_k - alpha h_worst))`. At K = 2 and alpha = 1: `dpo`. A list of equal rewards costs 0.
    """
    gains = group.gains.masked_fill(~group.present, 0)
    worst = pick(gains, group.worst)
    mean = (gains.sum(1) - worst) / (group.present.sum(1) - 1).clamp(min=1)
    return torch.where(group.better.flatten(1).any(1), F.softplus(-beta * (mean - alpha * worst)), 0)


def pro(group: Group, *, beta: float, nll: float = 0.05) -> Tensor:
    """Return the loss of preference ranking optimization (PRO, arXiv:2306.17492), on mean scores m, no reference.

    `sum_k log(1 + sum_j exp(beta (m_j (R_k - R_j) - m_k T_k)))` over all j of smaller reward, with T_k the largest
    `R_k - R_j`; plus `nll (K - 1)^2` times the best response's `-log p`. At K = 2, nll = 0: `simpo` with gamma 0 and
    beta (R_1 - R_2).
    """
    gaps = between(group.rewards).masked_fill(~group.better, 0)
    exponents = gaps * group.policy[:, None, :] - (gaps.amax(2) * group.policy)[:, :, None]
    total = pick(group.policy * group.lengths, group.best)
    ranking = _log1p_sum_exp(beta * exponents, group.better).sum(1)
    return ranking - nll * (group.present.sum(1) - 1).square() * total


def rrhf(group: Group, *, beta: float, nll: float = 1.0) -> Tensor:
    """Return the hinge of every two outputs in the wrong order (RRHF, arXiv:2304.05302), on mean scores m.

    `beta sum_ij relu(m_j - m_i)` over R_i > R_j, plus `nll` times the best response's `-log p` per token. No reference.
    At K = 2, nll = 0, beta = 1: `slic` with delta 0.
    """
    hinges = torch.where(group.better, F.relu(-between(group.policy)), 0).sum((1, 2))
    return beta * hinges - nll * pick(group.policy, group.best)


def _log1p_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """Return `log(1 + sum_j exp(values_ij))` [B, K] over the masked j."""
    masked = values.masked_fill(~mask, -torch.inf)
    return torch.cat([torch.zeros_like(masked[:, :, :1]), masked], 2).logsumexp(2)


def _targets(group: Group, alpha: float) -> Tensor:
    """Return the softmax [B, K] of the rewards."""
    return torch.softmax((group.rewards / alpha).masked_fill(~group.present, -torch.inf), 1)


def _scaled(group: Group) -> Tensor:
    """Return the rewards of each list mapped linearly to 0..3; equal rewards are 0."""
    low = group.rewards.masked_fill(~group.present, torch.inf).amin(1, keepdim=True)
    high = group.rewards.masked_fill(~group.present, -torch.inf).amax(1, keepdim=True)
    return (3 * (group.rewards - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0, 3)


def _ranks(values: Tensor, present: Tensor, ties: Tensor | None = None) -> Tensor:
    """Return the ranks [B, K] from 1 for the largest value; equal values are in the order of `ties`, or of place."""
    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    order = places if ties is None else ties.argsort(dim=1)
    masked = values.masked_fill(~present, -torch.inf).gather(1, order)
    order = order.gather(1, masked.argsort(dim=1, descending=True, stable=True))
    return order.argsort(dim=1) + 1
