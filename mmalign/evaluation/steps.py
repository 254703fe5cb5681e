"""How well a judge of noisy images tells a pair apart, by time: the accuracy that SPO's judge is chosen by.

A pair's images are seen as in its training (arXiv:2406.04314): predicted by the frozen model, under guidance, from both
images under one noise at a given time. It is right if the chosen image has the higher score; an exact tie is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmalign.diffusion.flow import Flow
from mmalign.draws import Draws
from mmalign.encode import EncodedPairs
from mmalign.evaluation.intervals import Interval, proportion
from mmalign.families.step_judge import StepJudge
from mmalign.methods.step_preference import predicted
from mmalign.policy import Policy

SIDES = ("before", "after")


@dataclass(frozen=True)
class StepAccuracy:
    """Of `number` held-out pairs, how many were right at each time, by the judge before its training and after it."""

    times: tuple[int, ...]
    number: int
    right: dict[str, tuple[int, ...]]

    def accuracy(self, side: str, time: int) -> Interval:
        """The share of pairs that are right, with its 95 % interval (Wilson)."""
        return proportion(self.right[side][self.times.index(time)], self.number)

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "benchmark": "steps",
            "pairs": self.number,
            **{side: {str(t): self.accuracy(side, t).as_dict() for t in self.times} for side in SIDES},
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first."""
        rows = [(str(t), *(self.accuracy(side, t).points(signed=False) for side in SIDES)) for t in self.times]
        return [(f"timestep ({self.number} pairs)", *SIDES), *rows]


@torch.no_grad()
def accuracy(
    policy: Policy[StepJudge], batches: Iterable[EncodedPairs], times: Sequence[int], *, guidance: float, seed: int
) -> StepAccuracy:
    """Judge every pair at every time.

    Args:
        policy: the trained judge, with what it began as for reference.
        batches: held-out pairs, encoded; rows of weight 0 do not count.
        times: timesteps, of the denoiser's schedule; of flow matching sigma is so many thousandths.
        guidance: of the predictions.
        seed: of the noise.

    Raises:
        ValueError: no pair counts, or a time is none of the schedule.
    """
    family = policy.family
    last, flows = family.denoiser.schedule.num_timesteps - 1, isinstance(family.denoiser.schedule, Flow)
    if not all(0 <= time <= last for time in times):
        raise ValueError(f"evaluate.times: expected timesteps from 0 to {last}, got {list(times)}")
    right = {side: [0] * len(times) for side in SIDES}
    number = 0
    for batch in batches:
        ids, counted = family.tokens(batch.prompts), batch.weights > 0
        for i, time in enumerate(times):
            at = torch.full((len(batch.rows),), time)
            images, t = predicted(family, batch, guidance, Draws(seed), at / (last + 1) if flows else at)
            pixels = family.pixels(images)
            before = policy.on_reference(lambda net, p=pixels, w=ids, t=t: family.score(net, p, w, t))  # type: ignore[misc]
            assert before is not None
            for side, scores in zip(SIDES, (before, family.score(policy.unwrapped, pixels, ids, t)), strict=True):
                chosen, rejected = scores.chunk(2)
                right[side][i] += int((chosen > rejected)[counted].sum())
        number += int(counted.sum())
    if not number:
        raise ValueError("steps: there is no held-out pair to judge; raise data.hold_out, or give more pairs")
    return StepAccuracy(tuple(times), number, {side: tuple(found) for side, found in right.items()})
