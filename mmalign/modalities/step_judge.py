"""Data of step judges: the image pairs of text-to-image models, encoded by the judge's denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.config import ImageData
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.data.data_module import DataModule, Splits
from mmalign.families.step_judge import StepJudge
from mmalign.modalities.text_to_image import data as text_to_image
from mmalign.modalities.text_to_image.data import open_pairs as open_pairs
from mmalign.rewards import RewardModel


def build_data_module(
    family: StepJudge,
    data: ImageData,
    *,
    output: Path,
    batch_size: int,
    seed: int,
    accelerator: Any,
    method: Any = None,
    splits: Splits | None = None,
    spec: PrecomputeSpec | None = None,
    reward_model: RewardModel | None = None,
) -> DataModule:
    """Return the loaders and filled caches of a recipe's image pairs, encoded by the judge's denoiser."""
    return text_to_image.build_data_module(
        family.denoiser,
        data,
        output=output,
        batch_size=batch_size,
        seed=seed,
        accelerator=accelerator,
        method=method,
        splits=splits,
        spec=spec,
        reward_model=reward_model,
    )
