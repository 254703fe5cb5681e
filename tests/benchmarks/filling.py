"""The time that filling a recipe's caches takes."""

from __future__ import annotations

from typing import Any

from mmalign.commands import cache
from mmalign.commands._bench_meters import now
from mmalign.config import Recipe
from mmalign.data.data_module import DataModule, Splits
from mmalign.families.step_judge import StepJudge


class TimedFilling:
    """Cache filling that records its seconds per pair, measured once in a training of one epoch.

    The measurement excludes two costs that do not depend on the number of pairs. The time of opening full caches is
    subtracted. The encoders' first calls, which choose kernels, come before it.
    """

    seconds = 0.0

    def __call__(self, recipe: Recipe, family: Any, *, splits: Splits, accelerator: Any, **options: Any) -> DataModule:
        """Return the pairs with all caches filled."""
        train, device, num_pairs = recipe.train, accelerator.device, len(splits[0])

        def fill(data: dict[str, Any], steps: int) -> tuple[DataModule, float]:
            for _, net in (family.denoiser if isinstance(family, StepJudge) else family).encoders():
                net.to(device)  # full caches move encoders off the device
            changes: dict[str, Any] = {"train": train.model_copy(update={"steps": steps})}
            changes["data"] = recipe.data.model_copy(update=data)
            changed = recipe.model_copy(update=changes)
            accelerator.wait_for_everyone()
            started = now(device)
            data_module = cache.build_filled_data_module(
                changed, family, splits=splits, accelerator=accelerator, **options
            )
            return data_module, now(device) - started

        uncached, _ = fill({"cache": "off"}, 1)
        if recipe.data.cache == "off":
            return uncached
        next(iter(uncached.batches(0)), None)
        epoch = -(-num_pairs // (train.batch_size * train.gradient_accumulation_steps * accelerator.num_processes))
        _, filling = fill({}, epoch)
        data_module, opening = fill({}, epoch)
        self.seconds = max(0.0, filling - opening) / num_pairs
        if (
            data_module.precompute_cache is not None and data_module.precompute_cache.spec.num_draws > 1
        ):  # later epochs have other random numbers
            data_module, _ = fill({}, train.steps)
        return data_module
