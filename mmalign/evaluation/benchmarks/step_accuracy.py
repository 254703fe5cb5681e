"""Accuracy of a reward model of noisy images, by timestep; the criterion for SPO's step-aware reward model.

The images of a pair are made as in its training (arXiv:2406.04314). The frozen model predicts them under guidance, from
both images under the same noise at a given timestep. A pair is right if the chosen image has the higher score; an exact
tie is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.flow import Flow
from mmalign.evaluation.metrics import SIDES, Table
from mmalign.evaluation.statistics import Interval, proportion
from mmalign.families.step_judge import StepJudge
from mmalign.methods.text_to_image.step_preference import predict_images
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class StepAccuracy:
    """Numbers of right pairs at each timestep, of `number` held-out pairs, before and after training."""

    times: tuple[int, ...]
    number: int
    right: dict[str, tuple[int, ...]]

    def accuracy(self, side: str, time: int) -> Interval:
        """Return the ratio of right pairs, with Wilson's interval."""
        return proportion(self.right[side][self.times.index(time)], self.number)

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json."""
        return {
            "benchmark": "steps",
            "pairs": self.number,
            **{side: {str(t): self.accuracy(side, t).as_dict() for t in self.times} for side in SIDES},
        }

    def table(self) -> Table:
        """Return a table with a row for each timestep."""
        rows = [(str(t), *(self.accuracy(side, t).points(signed=False) for side in SIDES)) for t in self.times]
        return [(f"timestep ({self.number} pairs)", *SIDES), *rows]


@torch.no_grad()
def accuracy(
    policy: Policy[StepJudge], batches: Iterable[EncodedPairs], times: Sequence[int], *, guidance: float, seed: int
) -> StepAccuracy:
    """Score every pair at every timestep with policy and reference.

    Args:
        policy: the trained reward model, with its initial weights as reference.
        batches: held-out pairs, encoded; rows of weight 0 are padding.
        times: timesteps of the denoiser's schedule; for flow matching, thousandths of sigma.
        guidance: guidance scale of the predictions.
        seed: seed of the noise.

    Raises:
        ValueError: there is no pair, or a timestep is outside the schedule.
    """
    family = policy.family
    last, is_flow = family.denoiser.schedule.num_timesteps - 1, isinstance(family.denoiser.schedule, Flow)
    if not all(0 <= time <= last for time in times):
        raise ValueError(f"evaluate.times: expected timesteps from 0 to {last}, got {list(times)}")
    right = {side: [0] * len(times) for side in SIDES}
    number = 0
    for batch in batches:
        ids, is_pair = family.tokens(batch.prompts), batch.weights > 0
        for index, time in enumerate(times):
            timesteps = torch.full((len(batch.rows),), time)
            # Predicted images of both sides, chosen first [2B, 3, H, W]
            images, t = predict_images(
                family, batch, guidance, KeyedRNG(seed), timesteps / (last + 1) if is_flow else timesteps
            )
            # Right pairs before and after training
            pixels = family.pixels(images)
            before = policy.on_reference(lambda net, p=pixels, w=ids, t=t: family.score(net, p, w, t))  # type: ignore[misc]
            assert before is not None
            for side, scores in zip(SIDES, (before, family.score(policy.unwrapped, pixels, ids, t)), strict=True):
                chosen, rejected = scores.chunk(2)
                right[side][index] += int((chosen > rejected)[is_pair].sum())
        number += int(is_pair.sum())
    if not number:
        raise ValueError(
            "steps: the validation split has no pair to score; raise data.validation_fraction, or give more pairs"
        )
    return StepAccuracy(tuple(times), number, {side: tuple(counts) for side, counts in right.items()})
