"""Implicit reward accuracy: the ratio of held-out pairs with a larger score margin than the base model's.

As in arXiv:2311.12908, section 5.3, a pair is right if the model's score prefers the chosen image or response by more
than the base model's does. An image has the denoising score, averaged over several draws of time and noise. A response
has its log-probability. Of a list the best and the worst output are the pair. A tie (`statistics.ties`) is half right,
as in the training log, so an unchanged model has accuracy 1/2. The ratio of ties is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmalign.data.loaders.batches import EncodedPairs, EncodedResponses
from mmalign.evaluation.metrics import Table
from mmalign.evaluation.statistics import Interval, outcomes, proportion
from mmalign.families.base import TextToImage, VisionLanguage
from mmalign.losses.pairwise import Pair
from mmalign.methods.text_to_image import _denoising
from mmalign.methods.vision_language import _responses
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

B = TypeVar("B", EncodedPairs, EncodedResponses)
# Takes a batch, random numbers and the index of a draw; returns a function from a network to its scores of both sides.
Score = Callable[[B, KeyedRNG, int], Callable[[nn.Module], Scores]]


@dataclass(frozen=True)
class ImplicitAccuracy:
    """Accuracy over held-out pairs, and both sides' gains over the base (score units, mean over pairs and draws)."""

    outcomes: tuple[float, ...]  # of each pair: 1 right, 0 wrong, 0.5 a tie
    groups: tuple[Hashable, ...]
    chosen_gain: float
    rejected_gain: float
    num_noise_samples: int

    @property
    def accuracy(self) -> Interval:
        """The ratio of right pairs, a tie half, with an interval clustered by group."""
        return proportion(self.outcomes, self.groups)

    @property
    def ties(self) -> float:
        """The ratio of ties."""
        return self.outcomes.count(0.5) / len(self.outcomes)

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json."""
        return {
            "benchmark": "implicit",
            "pairs": len(self.outcomes),
            "groups": len(set(self.groups)),
            "draws": self.num_noise_samples,
            "accuracy": self.accuracy.as_dict(),
            "ties": self.ties,
            "chosen gain": self.chosen_gain,
            "rejected gain": self.rejected_gain,
        }

    def table(self) -> Table:
        """Return a table of the numbers."""
        gains = f"{self.chosen_gain:+.3g}", f"{self.rejected_gain:+.3g}"
        return [
            ("held-out pairs", "implicit accuracy", "ties, %", "chosen gain", "rejected gain"),
            (str(len(self.outcomes)), self.accuracy.points(signed=False), f"{100 * self.ties:.1f}", *gains),
        ]


def image_scores(family: TextToImage) -> Score[EncodedPairs]:
    """Return a function that computes denoising scores; all networks see the same noise, and no caption is dropped."""

    def score(batch: EncodedPairs, rng: KeyedRNG, index: int) -> Callable[[nn.Module], Scores]:
        view = _denoising.noise_pairs(family, batch, 0.0, rng, index)

        def run(net: nn.Module) -> Scores:
            return _sides(_denoising.denoising_scores(family, net, view, ["outputs"])["outputs"], batch)

        return run

    return score


def response_scores(family: VisionLanguage) -> Score[EncodedResponses]:
    """Return a function that computes log-probabilities of whole responses, in nats, without random numbers."""

    def score(batch: EncodedResponses, rng: KeyedRNG, index: int) -> Callable[[nn.Module], Scores]:
        def run(net: nn.Module) -> Scores:
            return _sides(_responses.response_scores(family, net, batch, views=["outputs"])["outputs"], batch)

        return run

    return score


def _sides(scores: Tensor, batch: EncodedPairs | EncodedResponses) -> Scores:
    """Return the scores [B] of both sides of pairs, or of the best and the worst output of lists, from all [KB]."""
    each = scores.reshape(-1, len(batch.rows))
    last = torch.ones_like(batch.weights, dtype=torch.long)
    if batch.scores is not None:
        last = ((~batch.scores.isnan()).sum(1) - 1).clamp(min=1)  # lists come best first
    return {"chosen": each[0], "rejected": each.gather(0, last[None])[0]}


@torch.no_grad()
def accuracy(
    policy: Policy,
    batches: Iterable[B],
    score: Score[B],
    *,
    groups: Mapping[int, Hashable],
    num_noise_samples: int,
    seed: int,
) -> ImplicitAccuracy:
    """Score every held-out pair with policy and reference, as often as `num_noise_samples`; 1 without random numbers.

    `groups` has the group of each pair by its id, such as the prompt; pairs of a group depend on each other.

    Raises:
        ValueError: there is no pair.
    """
    is_right: list[float] = []
    names: list[Hashable] = []
    gains = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        margins, moved, sizes = [], [], []
        for index in range(num_noise_samples):
            run = score(batch, KeyedRNG(seed), index)
            reference_scores, policy_scores = policy.on_reference(run), run(policy.unwrapped)
            assert reference_scores is not None
            # Margins and gains over the reference, each [N]
            reference, trained = (Pair(s["chosen"], s["rejected"]) for s in (reference_scores, policy_scores))
            sizes.append(torch.stack([reference.chosen, reference.rejected]).abs().amax(0))
            margins.append(trained.margin - reference.margin)
            moved.append(torch.stack([trained.chosen - reference.chosen, trained.rejected - reference.rejected]))
        # Means over the draws, without padding
        is_pair = batch.weights > 0
        margin, size = (torch.stack(values).mean(0)[is_pair].double().cpu().numpy() for values in (margins, sizes))
        is_right += outcomes(margin, 0.0, size).tolist()
        names += [groups[row] for row, kept in zip(batch.rows, is_pair.tolist(), strict=True) if kept]
        gains += torch.stack(moved).mean(0)[:, is_pair].sum(1).double().cpu()
    if not names:
        raise ValueError(
            "implicit: the validation split has no pair to score; raise data.validation_fraction, or give more pairs"
        )
    chosen, rejected = (gains / len(names)).tolist()
    return ImplicitAccuracy(tuple(is_right), tuple(names), chosen, rejected, num_noise_samples)
