"""Training run in memory, with meters on the parts of an update.

A run is built as by `mmalign train`, and `loop.train` makes every update. A meter on the calls of the loop measures
the parts:

    data        the next batch: reading (and decoding), and encoding without a cache
    noise       `method.contrasts` without the reference: random numbers and noising
    reference   `policy.on_reference`
    policy      `method.loss`: the policy's forward pass and the loss
    backward    `accelerator.backward`
    optimizer   from `backward` to the end of the update: scaling, clipping, the optimizer, clearing the gradients
    rest        the loop itself

Caches are filled before the first update. The process reads the pairs without workers, whatever `data.num_workers`
says: in a few batches the workers' start would dominate.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmalign import methods
from mmalign.commands import cache, preflight, train
from mmalign.commands._bench_meters import LiveBytes, Meter, Metered, Operations
from mmalign.config import Recipe
from mmalign.console import muted
from mmalign.data.data_module import DataModule
from mmalign.families.step_judge import StepJudge
from mmalign.modalities import loading, modality_of
from mmalign.policy import FrozenCopy, Policy
from mmalign.training import loop
from mmalign.training import run as training_run

DISTINCT_UPDATES = 4  # updates with different pairs; later updates repeat the pairs


@dataclass(frozen=True)
class Run:
    """Recipe in memory, at some point of its training.

    `updates` makes some updates and returns their number. It is the training loop, or another program instead.
    """

    recipe: Recipe
    method: Any
    policy: Policy[Any]
    data_module: DataModule
    train_state: loop.TrainState
    updates: Callable[[Run, int, Meter | None], int]
    progress: loop.Progress = field(default_factory=loop.Progress)

    @property
    def device(self) -> torch.device:
        """The device of the run."""
        device: torch.device = self.train_state.accelerator.device
        return device


def build(
    recipe: Recipe,
    accelerator: Any,
    folder: Path,
    updates: int,
    *,
    fill: Callable[..., DataModule] = cache.build_filled_data_module,
) -> Run:
    """Build a run as `mmalign train` does, of at most so many updates, without writing outside of `folder`.

    Only the pairs that the updates need are read; `fill` opens them and fills all caches.

    Raises:
        ValueError: `mmalign train` would refuse the recipe, or its pairs do not fill a batch.
    """
    recipe = shorten(recipe, folder, updates, accelerator.num_processes)
    # The steps of `mmalign train`, in its order
    preflight.check(recipe, "training")
    method = methods.find(recipe.method.name)
    reward_model = loading.build_method_judge(recipe, accelerator.device)
    with muted():
        family = loading.load_for_training(recipe, accelerator.device)
        splits = modality_of(recipe).open_pairs(recipe, methods.requirements_of(recipe.method))
        recipe = modality_of(recipe).name_annotators(recipe, splits[0])
        data_module = fill(recipe, family, accelerator=accelerator, splits=splits, reward_model=reward_model)
    policy = train.build_policy(family, recipe, reference_cached=cache.replaces_reference(data_module))
    policy, train_state = training_run.build_train_state(policy, recipe.method, recipe.train, accelerator)
    cache.offload_encoders(data_module, recipe, family)
    return Run(recipe, method, policy, data_module, train_state, train_updates)


def shorten(recipe: Recipe, folder: Path, updates: int, num_processes: int) -> Recipe:
    """Return the recipe for some updates, limited to pairs that fill whole updates, or at least whole batches.

    Caches and all other output go to the folder.

    Raises:
        ValueError: the pairs do not fill a batch; rows of weight 0 would complete it and be measured as pairs.
    """
    options, data = recipe.train, recipe.data
    batch = options.batch_size * num_processes
    update = batch * options.gradient_accumulation_steps
    limit = min(DISTINCT_UPDATES * update, data.limit or sys.maxsize)
    # Distinct pairs for a few updates, all of them for training
    changes: dict[str, Any] = {"validation_fraction": 0.0, "limit": limit, "num_workers": 0}
    changes |= {"cache": "auto"} if data.cache != "off" else {}
    data = data.model_copy(update=changes)
    needs = methods.requirements_of(recipe.method)
    pairs, _ = modality_of(recipe).open_pairs(recipe.model_copy(update={"data": data}), needs)
    if len(pairs) < batch:
        raise ValueError(
            f"data.path: {pairs.source} has {len(pairs)} pairs, and a batch has {batch}; measure with more, "
            "or with a smaller train.batch_size"
        )
    # Whole updates, so that no update has fewer pairs
    whole = update if len(pairs) >= update else batch
    return recipe.model_copy(
        update={
            "train": options.model_copy(update={"steps": updates, "trackers": []}),
            "data": data.model_copy(update={"limit": len(pairs) - len(pairs) % whole}),
            "output": str(folder),
        }
    )


class _EnoughUpdates(Exception):
    """Signal that all requested updates are done and no contrast is pending."""


def train_updates(run: Run, updates: int, meter: Meter | None) -> int:
    """Make some updates with the training loop, and the remaining ones of the last batch (for SPO).

    Returns:
        The number of updates.
    """
    first = run.progress.step
    method, train_state, policy = run.method, run.train_state, run.policy
    batches: loop.Batches = run.data_module.batches

    def metered_batches(epoch: int, start: int) -> Iterator[Any]:
        assert meter is not None
        meter.switch("data")
        for batch in run.data_module.batches(epoch, start):
            meter.switch("rest")
            yield batch
            meter.switch("data")
        meter.switch("rest")

    # The loop calls wrappers, which charge each call to its part
    if meter is not None:
        batches = metered_batches
        method = Metered(method, meter, {"contrasts": ("noise", "rest"), "loss": ("policy", "rest")})
        accelerator: Any = Metered(train_state.accelerator, meter, {"backward": ("backward", "optimizer")})
        train_state = replace(train_state, accelerator=accelerator)
        # The reference runs inside `contrasts`.
        policy = Metered(policy, meter, {"on_reference": ("reference", "noise")})  # type: ignore[assignment]

    def after_update(progress: loop.Progress, _: Any) -> None:
        if meter is not None:
            meter.switch("rest")
        if progress.step >= first + updates and not progress.pending:
            raise _EnoughUpdates

    # The loop would go on forever: the callback ends it between two batches
    with contextlib.suppress(_EnoughUpdates):
        loop.train(
            method,
            run.recipe.method,
            policy,
            batches,
            train_state,
            steps=sys.maxsize,
            gradient_accumulation_steps=run.recipe.train.gradient_accumulation_steps,
            seed=run.recipe.train.seed,
            progress=run.progress,
            after_update=after_update,
        )
    return run.progress.step - first


def weights(run: Run) -> list[Tensor]:
    """Return all parameters and buffers of the run, each once."""
    family, reference = run.policy.family, run.policy.reference
    nets = [run.policy.unwrapped, *([reference.model] if isinstance(reference, FrozenCopy) else [])]
    nets += [] if isinstance(family, StepJudge) else [net for _, net in family.encoders()]
    # By identity: tied weights count once
    return list({id(x): x for net in nets for x in (*net.parameters(), *net.buffers())}.values())


def peak_bytes(run: Run, before: int) -> int:
    """Return the maximum bytes of tensors in one update.

    On a CPU compiled blocks run eagerly, since the counter does not see their tensors.
    """
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        run.updates(run, 1, None)
        return int(torch.cuda.max_memory_allocated(run.device)) - before
    memory, state = LiveBytes(), run.train_state
    copies = [*run.policy.lagging.values(), *([state.ema] if state.ema is not None else [])]
    moments = tree_leaves(list(state.optimizer.state.values()))
    with torch.compiler.set_stance("force_eager"), memory:
        # What lived before the counter began
        for tensor in (*weights(run), *moments, *(x for copy in copies for x in copy.weights)):
            if isinstance(tensor, Tensor):
                memory.count(tensor)
        run.updates(run, 1, None)
    return memory.peak


def count_operations(run: Run) -> tuple[dict[str, int], int]:
    """Return this process's operations of one update by part, and those that backward repeats, which no part includes.

    Compiled blocks run eagerly, since the counter does not see compiled products.
    """
    with torch.compiler.set_stance("force_eager"), Operations() as counter:
        meter = Meter(counter.get_total_flops)
        updates = run.updates(run, 1, meter)
        meter.switch("rest")
    return {part: int(number) // updates for part, number in meter.totals.items()}, counter.repeated // updates
