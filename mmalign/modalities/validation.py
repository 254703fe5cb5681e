"""Benchmarks on the validation split of a recipe's own pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmalign.config import Recipe
from mmalign.data.data_module import DataModule, Splits
from mmalign.evaluation.benchmarks import implicit_reward
from mmalign.modalities import Measure, Result, modality_of
from mmalign.policy import Policy


def implicit_reward_benchmark(
    recipe: Recipe, scores: Callable[[Any], implicit_reward.Score[Any]], num_noise_samples: int = 1
) -> Measure:
    """Return the measure of the implicit reward accuracy; the pairs are opened now.

    A pair is right if the trained model prefers the chosen side by more than the base model does.

    Args:
        recipe: the recipe, with a validation split.
        scores: the scores of a batch, for a family.
        num_noise_samples: draws of (t, noise) for each pair.

    Raises:
        ValueError: the pairs cannot be read.
    """
    splits = modality_of(recipe).open_pairs(recipe.data, recipe.train.seed)
    seed = recipe.evaluate.seed if recipe.evaluate is not None else 0

    def measure(policy: Policy[Any], *_: object) -> Result:
        report = implicit_reward.accuracy(
            policy,
            build_validation_data(recipe, policy, splits).validation_batches(),
            scores(policy.family),
            num_noise_samples=num_noise_samples,
            seed=seed,
        )
        return report.as_dict(), report.table()

    return measure


def build_validation_data(recipe: Recipe, policy: Policy[Any], splits: Splits, method: Any = None) -> DataModule:
    """Return the recipe's pairs, encoded, with the inputs that the method requires; None requires only pairs."""
    from accelerate import Accelerator

    return modality_of(recipe).build_data_module(
        policy.family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accelerator=Accelerator(),
        method=method,
        splits=splits,
    )
