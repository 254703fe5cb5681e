"""Implicit reward accuracy: the ratio of held-out pairs with a larger score margin than the base model's.

As in arXiv:2311.12908, section 5.3, a pair is right if the model's score prefers the chosen image or response by more
than the base model's does. An image has the denoising score, averaged over several draws of time and noise. A response
has its log-probability. An exact tie is wrong: an unchanged model has accuracy 0, not one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmalign.data.loaders.batches import EncodedPairs, EncodedResponses
from mmalign.evaluation.metrics import Table
from mmalign.evaluation.statistics import Interval, proportion
from mmalign.families.base import TextToImage, VisionLanguage
from mmalign.losses.pairwise import Pair
from mmalign.methods.text_to_image import _denoising
from mmalign.methods.vision_language import _responses
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG


class Weighted(Protocol):
    """Batch with a weight for each pair; 0 for padding."""

    @property
    def weights(self) -> Tensor:
        """The weights [B]."""
        ...


B = TypeVar("B", bound=Weighted)
# Takes a batch, random numbers and the index of a draw; returns a function from a network to its scores of both sides.
Score = Callable[[B, KeyedRNG, int], Callable[[nn.Module], Scores]]


@dataclass(frozen=True)
class ImplicitAccuracy:
    """Accuracy over held-out pairs, and both sides' gains over the base (score units, mean over pairs and draws)."""

    right: int
    number: int
    chosen_gain: float
    rejected_gain: float
    num_noise_samples: int

    @property
    def accuracy(self) -> Interval:
        """The ratio of right pairs, with Wilson's interval."""
        return proportion(self.right, self.number)

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json."""
        return {
            "benchmark": "implicit",
            "pairs": self.number,
            "draws": self.num_noise_samples,
            "accuracy": self.accuracy.as_dict(),
            "chosen gain": self.chosen_gain,
            "rejected gain": self.rejected_gain,
        }

    def table(self) -> Table:
        """Return a table of the numbers."""
        gains = f"{self.chosen_gain:+.3g}", f"{self.rejected_gain:+.3g}"
        return [
            ("held-out pairs", "implicit accuracy", "chosen gain", "rejected gain"),
            (str(self.number), self.accuracy.points(signed=False), *gains),
        ]


def image_scores(family: TextToImage) -> Score[EncodedPairs]:
    """Return a function that computes denoising scores; all networks see the same noise, and no caption is dropped."""

    def score(batch: EncodedPairs, rng: KeyedRNG, index: int) -> Callable[[nn.Module], Scores]:
        view = _denoising.noise_pairs(family, batch, 0.0, rng, index)
        return partial(_denoising.denoising_scores, family, view=view)

    return score


def response_scores(family: VisionLanguage) -> Score[EncodedResponses]:
    """Return a function that computes log-probabilities of whole responses, in nats, without random numbers."""
    return lambda batch, rng, index: partial(_responses.response_scores, family, batch=batch)


@torch.no_grad()
def accuracy(
    policy: Policy, batches: Iterable[B], score: Score[B], *, num_noise_samples: int, seed: int
) -> ImplicitAccuracy:
    """Score every held-out pair with policy and reference, as often as `num_noise_samples`; 1 without random numbers.

    Raises:
        ValueError: there is no pair.
    """
    right, number, gains = 0, 0, torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        margins, moved = [], []
        for index in range(num_noise_samples):
            run = score(batch, KeyedRNG(seed), index)
            reference_scores, policy_scores = policy.on_reference(run), run(policy.unwrapped)
            assert reference_scores is not None
            # Margins and gains over the reference, each [N]
            reference, trained = (Pair(s["chosen"], s["rejected"]) for s in (reference_scores, policy_scores))
            margins.append(trained.margin - reference.margin)
            moved.append(torch.stack([trained.chosen - reference.chosen, trained.rejected - reference.rejected]))
        # Means over the draws, without padding
        is_pair = batch.weights > 0
        right += int((torch.stack(margins).mean(0) > 0)[is_pair].sum())
        number += int(is_pair.sum())
        gains += torch.stack(moved).mean(0)[:, is_pair].sum(1).double().cpu()
    if not number:
        raise ValueError(
            "implicit: the validation split has no pair to score; raise data.validation_fraction, or give more pairs"
        )
    chosen, rejected = (gains / number).tolist()
    return ImplicitAccuracy(right, number, chosen, rejected, num_noise_samples)
