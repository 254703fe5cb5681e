"""Implicit reward accuracy: how often a model finds the chosen side of a held-out pair likelier, against its base.

As in arXiv:2311.12908, section 5.3: a pair is right if the model's score prefers the chosen image or response by more
than the base model's does. The score of an image is the denoising score, averaged over several draws of time and noise;
that of a response is its log-probability. An exact tie is wrong: a model that never moved scores 0, not one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mmalign.draws import Draws
from mmalign.evaluation.intervals import Interval, proportion
from mmalign.families import TextToImage, VisionLanguage
from mmalign.losses import Pair
from mmalign.methods import diffusion_dpo, dpo
from mmalign.policy import Policy, Scores

# From a batch, the draws and the number of a draw to what gives a network's scores of both sides.
Score = Callable[[Any, Draws, int], Callable[[nn.Module], Scores]]


@dataclass(frozen=True)
class ImplicitAccuracy:
    """The accuracy over held-out pairs, and how both sides moved (score units, mean over pairs and draws)."""

    right: int
    number: int
    chosen_gain: float
    rejected_gain: float
    draws: int

    @property
    def accuracy(self) -> Interval:
        """The share of pairs that are right, with its 95 % interval (Wilson)."""
        return proportion(self.right, self.number)

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "benchmark": "implicit",
            "pairs": self.number,
            "draws": self.draws,
            "accuracy": self.accuracy.as_dict(),
            "chosen gain": self.chosen_gain,
            "rejected gain": self.rejected_gain,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first."""
        return [
            ("held-out pairs", "implicit accuracy", "chosen gain", "rejected gain"),
            (
                str(self.number),
                self.accuracy.points(signed=False),
                f"{self.chosen_gain:+.3g}",
                f"{self.rejected_gain:+.3g}",
            ),
        ]


def image_scores(family: TextToImage) -> Score:
    """Denoising scores, for policy and reference on the same noise, without dropped captions."""

    def score(batch: Any, draws: Draws, index: int) -> Callable[[nn.Module], Scores]:
        return partial(
            diffusion_dpo.denoising_scores, family, view=diffusion_dpo.noised(family, batch, 0.0, draws, index)
        )

    return score


def response_scores(family: VisionLanguage) -> Score:
    """Log-probabilities of whole responses, in nats; nothing is drawn."""
    return lambda batch, draws, index: partial(dpo.response_scores, family, batch=batch)


@torch.no_grad()
def accuracy(policy: Policy, batches: Iterable[Any], score: Score, *, draws: int, seed: int) -> ImplicitAccuracy:
    """Score every pair `draws` times by policy and reference.

    Args:
        policy: the trained model, with its base as reference.
        batches: held-out pairs, encoded; rows of weight 0 do not count.
        score: `image_scores` or `response_scores` of the family.
        draws: how often a pair is scored; once is enough where nothing is drawn.
        seed: of the draws.

    Raises:
        ValueError: no pair counts.
    """
    right, number, gains = 0, 0, torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        margins, moved = [], []
        for index in range(draws):
            run = score(batch, Draws(seed), index)
            scores = policy.on_reference(run)
            assert scores is not None
            theirs, ours = (Pair(some["chosen"], some["rejected"]) for some in (scores, run(policy.unwrapped)))
            margins.append(ours.margin - theirs.margin)
            moved.append(torch.stack([ours.chosen - theirs.chosen, ours.rejected - theirs.rejected]))
        counted = batch.weights > 0
        right += int((torch.stack(margins).mean(0) > 0)[counted].sum())
        number += int(counted.sum())
        gains += torch.stack(moved).mean(0)[:, counted].sum(1).double().cpu()
    if not number:
        raise ValueError("implicit: there is no held-out pair to score; raise data.hold_out, or give more pairs")
    chosen, rejected = (gains / number).tolist()
    return ImplicitAccuracy(right, number, chosen, rejected, draws)
