"""Benchmarks on the validation split of a recipe's own pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mmalign.config import Recipe
from mmalign.data.data_module import Splits
from mmalign.evaluation.benchmarks import implicit_reward
from mmalign.methods import Requirements, requirements_of
from mmalign.modalities import DataRequest, Measure, Result, modality_of
from mmalign.policy import FrozenCopy, Policy


def implicit_reward_benchmark(
    recipe: Recipe, splits: Splits, scores: Callable[[Any], implicit_reward.Score[Any]], num_noise_samples: int = 1
) -> Measure:
    """Return the measure of the implicit reward accuracy on the validation split, with some draws of (t, noise).

    A pair is right if the trained model prefers the chosen side by more than the base model does.
    """
    seed = recipe.evaluate.seed if recipe.evaluate is not None else 0

    def measure(policy: Policy[Any], *_: object) -> Result:
        # Any model has an implicit reward of pairs: the method's own needs do not count
        batches = validation_batches(recipe, policy, splits, Requirements())
        move_beside_family(policy)
        report = implicit_reward.accuracy(
            policy,
            batches,
            scores(policy.family),
            groups=groups_by_row(splits),
            num_noise_samples=num_noise_samples,
            seed=seed,
        )
        return report.as_dict(), report.table()

    return measure


def move_beside_family(policy: Policy[Any]) -> None:
    """Move the policy's networks to the device of the family's, which `model.offload` moves after a stage."""
    device = next(policy.family.network.parameters()).device
    copies = [policy.reference.model] if isinstance(policy.reference, FrozenCopy) else []
    for net in (policy.unwrapped, *copies):
        net.to(device)


def check_implicit(recipe: Recipe) -> None:
    """Check that the data have sides to compare, if the benchmark compares them.

    Raises:
        ValueError: the method learns from single outputs.
    """
    implicit = recipe.evaluate is not None and recipe.evaluate.benchmark == "implicit"
    if implicit and requirements_of(recipe.method).learns_from == "thumbs":
        raise ValueError(
            f"evaluate.benchmark: implicit compares the sides of a pair, and method.name: {recipe.method.name} learns "
            "from single outputs; use another benchmark. The verdict of a training has the gains of held-out outputs"
        )


def groups_by_row(splits: Splits) -> dict[int, str]:
    """Return the group of each validation pair by the pair's id."""
    return {pair.row: pair.group for pair in splits[1] or ()}


def validation_batches(recipe: Recipe, policy: Policy[Any], splits: Splits, needs: Requirements) -> Iterator[Any]:
    """Yield the encoded batches of the validation split, with the inputs that are needed."""
    from accelerate import Accelerator

    request = DataRequest(recipe, splits, Accelerator(), needs)
    return modality_of(recipe).build_data_module(policy.family, request).validation_batches()
