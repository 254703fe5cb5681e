"""The time that filling a recipe's caches takes."""

from __future__ import annotations

from typing import Any

from mmalign.commands import cache
from mmalign.commands._bench_meters import now
from mmalign.config import Recipe
from mmalign.data.data_module import Feed, Opened
from mmalign.families.step_judge import StepJudge


class TimedFilling:
    """The filling of caches, with its seconds per pair: once, in a training of one epoch.

    Two things do not depend on the number of pairs and are left out. Opening full caches is timed by itself. The
    encoders' first calls, which choose kernels, come before.
    """

    seconds = 0.0

    def __call__(self, recipe: Recipe, family: Any, *, opened: Opened, accelerator: Any, **options: Any) -> Feed:
        """Return the pairs with all caches filled; see `caching.open_filled`."""
        train, device, num_pairs = recipe.train, accelerator.device, len(opened[0])

        def fill(data: dict[str, Any], steps: int) -> tuple[Feed, float]:
            for _, net in (family.denoiser if isinstance(family, StepJudge) else family).encoders():
                net.to(device)  # full caches send them away
            changes: dict[str, Any] = {"train": train.model_copy(update={"steps": steps})}
            changes["data"] = recipe.data.model_copy(update=data)
            changed = recipe.model_copy(update=changes)
            accelerator.wait_for_everyone()
            started = now(device)
            feed = cache.open_filled(changed, family, opened=opened, accelerator=accelerator, **options)
            return feed, now(device) - started

        uncached, _ = fill({"cache": "off"}, 1)
        if recipe.data.cache == "off":
            return uncached
        next(iter(uncached.batches(0)), None)
        epoch = -(-num_pairs // (train.batch_size * train.accumulate * accelerator.num_processes))
        _, filling = fill({}, epoch)
        feed, opening = fill({}, epoch)
        self.seconds = max(0.0, filling - opening) / num_pairs
        if feed.kept is not None and feed.kept.keep.draws > 1:  # later epochs have random numbers of their own
            feed, _ = fill({}, train.steps)
        return feed
