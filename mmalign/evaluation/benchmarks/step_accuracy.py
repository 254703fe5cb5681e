"""Accuracy of a reward model of noisy images, by timestep; the criterion for SPO's step-aware reward model.

The images of a pair are made as in its training (arXiv:2406.04314). The frozen model predicts them under guidance, from
both images under the same noise at a given timestep. A pair is right if the chosen image has the higher score. A tie
(`statistics.ties`) is half right, and the ratio of ties is reported beside the accuracy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.flow import Flow
from mmalign.evaluation.metrics import SIDES, Table
from mmalign.evaluation.statistics import Interval, outcomes, paired_difference, proportion
from mmalign.families.step_judge import StepJudge
from mmalign.methods.text_to_image.step_preference import predict_images
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class StepAccuracy:
    """Outcomes of held-out pairs before and after training, at each timestep: 1 right, 0 wrong, 0.5 a tie."""

    times: tuple[int, ...]
    groups: tuple[Hashable, ...]
    outcomes: dict[str, tuple[tuple[float, ...], ...]]

    def accuracy(self, side: str, time: int) -> Interval:
        """Return the ratio of right pairs, a tie half, with an interval clustered by group."""
        return proportion(self.outcomes[side][self.times.index(time)], self.groups)

    def ties(self, side: str, time: int) -> float:
        """Return the ratio of ties."""
        return self.outcomes[side][self.times.index(time)].count(0.5) / len(self.groups)

    def change(self, time: int) -> Interval | None:
        """Return the paired difference after - before, clustered by group; None if there is a single group."""
        before, after = (self.outcomes[side][self.times.index(time)] for side in SIDES)
        return paired_difference(before, after, self.groups) if len(set(self.groups)) > 1 else None

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json."""
        return {
            "benchmark": "steps",
            "pairs": len(self.groups),
            "groups": len(set(self.groups)),
            **{side: {str(t): self.accuracy(side, t).as_dict() for t in self.times} for side in SIDES},
            "ties": {side: {str(t): self.ties(side, t) for t in self.times} for side in SIDES},
            "difference": {str(t): change.as_dict() if (change := self.change(t)) else None for t in self.times},
        }

    def table(self) -> Table:
        """Return a table with a row for each timestep."""
        rows = []
        for t in self.times:
            accuracies = (self.accuracy(side, t).points(signed=False) for side in SIDES)
            shares = " / ".join(f"{100 * self.ties(side, t):.1f}" for side in SIDES)
            change = self.change(t)
            rows.append((str(t), *accuracies, change.points() if change else "one group only", shares))
        return [(f"timestep ({len(self.groups)} pairs)", *SIDES, "change, points", "ties before / after, %"), *rows]


@torch.no_grad()
def accuracy(
    policy: Policy[StepJudge],
    batches: Iterable[EncodedPairs],
    times: Sequence[int],
    *,
    groups: Mapping[int, Hashable],
    guidance: float,
    seed: int,
) -> StepAccuracy:
    """Score every pair at every timestep with policy and reference.

    Args:
        policy: the trained reward model, with its initial weights as reference.
        batches: held-out pairs, encoded; rows of weight 0 are padding.
        times: timesteps of the denoiser's schedule; for flow matching, thousandths of sigma.
        groups: the group of each pair by its id; pairs of a group depend on each other.
        guidance: guidance scale of the predictions.
        seed: seed of the noise.

    Raises:
        ValueError: there is no pair, or a timestep is outside the schedule.
    """
    family = policy.family
    last, is_flow = family.denoiser.schedule.num_timesteps - 1, isinstance(family.denoiser.schedule, Flow)
    if not all(0 <= time <= last for time in times):
        raise ValueError(f"evaluate.times: expected timesteps from 0 to {last}, got {list(times)}")
    is_right: dict[str, list[list[float]]] = {side: [[] for _ in times] for side in SIDES}
    names: list[Hashable] = []
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
                chosen, rejected = (part[is_pair].double().cpu().numpy() for part in scores.chunk(2))
                is_right[side][index] += outcomes(chosen, rejected).tolist()
        names += [groups[row] for row, kept in zip(batch.rows, is_pair.tolist(), strict=True) if kept]
    if not names:
        raise ValueError(
            "steps: the validation split has no pair to score; raise data.validation_fraction, or give more pairs"
        )
    return StepAccuracy(
        tuple(times), tuple(names), {side: tuple(map(tuple, lists)) for side, lists in is_right.items()}
    )
