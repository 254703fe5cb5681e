"""Several judges as one, of images or of responses.

J judges, N outputs. Outputs of one prompt are compared with one another, responses if their images are the same too;
all combinations but `sum`, and constraints, depend on a call's outputs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmalign.losses.advantages import constrained, decoupled
from mmalign.rewards import ResponseJudge, RewardModel, Shown, Truths

LEAST_SHARE = 0.01  # of votes; keeps the log-odds of a unanimous vote finite

Keys = Sequence[Hashable]  # outputs of one key are compared


@dataclass(frozen=True)
class Combination:
    """Combination of the scores of J judges.

    Attributes:
        kind: a name of `COMBINATIONS`.
        weights: the judges' weights [J].
        at_least: the least score of each judge that is a constraint, None for the terms of the combination.
    """

    kind: str
    weights: Tensor
    at_least: Sequence[float | None]

    def __call__(self, scores: Sequence[Tensor], keys: Keys) -> Tensor:
        """Return the combination [N], float32, of the scores [N] of the judges.

        An output that breaks a constraint gets the least value of its key.
        """
        stacked = torch.stack([each.cpu().double() for each in scores])
        # Judges without a limit make the value; those with one only rule outputs out
        terms = [number for number, limit in enumerate(self.at_least) if limit is None]
        values = COMBINATIONS[self.kind](stacked[terms], self.weights[terms].double(), keys)
        if len(terms) < len(self.at_least):
            limits = torch.tensor([-torch.inf if limit is None else limit for limit in self.at_least])
            kept = (stacked >= limits[:, None]).all(0)
            # Outputs that break a limit fall to the least value of their own prompt
            for rows in groups_of(keys):
                values[rows] = constrained(values[rows][None], kept[rows][None])[0]
        return values.float()


def combined(judges: Sequence[RewardModel], combination: Combination) -> RewardModel:
    """Return the judge of images whose scores, on the CPU, combine those of judges."""

    def call(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return combination([judge(images, prompts, t) for judge in judges], prompts)

    return call


def combined_responses(judges: Sequence[ResponseJudge], combination: Combination) -> ResponseJudge:
    """Return the judge of responses whose scores combine those of judges."""

    def call(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        scores = [judge(images, prompts, responses, truths) for judge in judges]
        return combination(scores, question_keys(images, prompts))

    return call


def weighted_sum(scores: Tensor, weights: Tensor, keys: Keys) -> Tensor:
    """Return the weighted sum [N] of scores [J, N]."""
    return weights @ scores


def standard_scores(scores: Tensor, weights: Tensor, keys: Keys) -> Tensor:
    """Return the weighted sum [N] of each judge's scores [J, N], centred and in units of its standard deviation.

    The deviation is the pooled one of outputs of one prompt, since only these are compared. A judge that tells none of
    them apart adds 0.
    """
    groups = groups_of(keys)
    squares = sum(
        ((scores[:, rows] - scores[:, rows].mean(1, keepdim=True)) ** 2).sum(1) for rows in groups
    ) + torch.zeros(len(scores), dtype=scores.dtype)
    deviation = (squares / max(len(keys) - len(groups), 1)).sqrt()
    scale = torch.where(deviation > 0, weights / deviation, 0.0)
    return scale @ (scores - scores.mean(1, keepdim=True))


def group_standard_scores(scores: Tensor, weights: Tensor, keys: Keys) -> Tensor:
    """Return the weighted sum [N] of each judge's scores [J, N], in units of the deviation within their own key (GDPO).

    A judge that tells none of a key's outputs apart adds 0 to them.
    """
    result = torch.zeros(len(keys), dtype=scores.dtype)
    for rows in groups_of(keys):
        result[rows] = decoupled(scores[:, None, rows], weights)[0]
    return result


def votes(scores: Tensor, weights: Tensor, keys: Keys) -> Tensor:
    """Return half the log-odds [N] of an output's mean share of votes against the other outputs of its prompt.

    Each judge votes for the output with the higher score, and half for each of two equal ones. Between two outputs the
    difference of scores is the log-odds of the share of votes, which counts as at least 1 %, at most 99 %. An output
    alone has the score 0.
    """
    result = torch.zeros(len(keys), dtype=scores.dtype)
    for rows in groups_of(keys):
        if len(rows) > 1:
            own = scores[:, rows]
            wins = ((own[:, :, None] - own[:, None]).sign() + 1) / 2  # [J, K, K]
            share = (weights[:, None] * (wins.sum(2) - 0.5)).sum(0) / (weights.sum() * (len(rows) - 1))
            result[rows] = share.clamp(LEAST_SHARE, 1 - LEAST_SHARE).logit() / 2
    return result


def groups_of(keys: Keys) -> list[list[int]]:
    """Return the rows of each key."""
    rows = defaultdict[Hashable, list[int]](list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return list(rows.values())


def question_keys(images: Shown, prompts: Sequence[str]) -> list[str]:
    """Return the key [N] of each prompt with its images."""
    known = {id(image): image_key(image) for shown in images for image in shown}
    keys = ([*(known[id(image)] for image in shown), prompt] for shown, prompt in zip(images, prompts, strict=True))
    return ["\0".join(key) for key in keys]


def image_key(image: Image.Image) -> str:
    """Return 32 hex digits of an image's mode, size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


COMBINATIONS: dict[str, Callable[[Tensor, Tensor, Keys], Tensor]] = {
    "sum": weighted_sum,
    "zscore": standard_scores,
    "group_zscore": group_standard_scores,
    "vote": votes,
}
