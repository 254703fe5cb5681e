"""A recipe's training in memory, that can be let run for some updates: put together as `mmalign train` does.

Every update is made by `loop.train` itself. The loop is handed all it works with, so parts are measured by handing it
the same objects with a meter on five of their calls:

    data        the next batch: read (and decoded), and encoded where there is no cache
    noise       `method.contrasts` but for the reference: draws from position, noising
    reference   `policy.on_reference`
    policy      `method.loss`: the policy's forward pass and the loss
    backward    `accelerator.backward`
    optimizer   from there to the end of the update: scaling, clipping, the optimizer, clearing the gradients
    rest        what is left to the loop itself

A run may be another program's step instead (`mmalign.benchmark.against`), on the same model and the same pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmalign import assemble, caching, loop, methods, training_run
from mmalign.benchmark.meters import LiveBytes, Meter, Metered, Operations, metered_batches
from mmalign.draws import Draws
from mmalign.feed import Feed, open_data
from mmalign.policy import FrozenCopy, Policy
from mmalign.sections import Recipe

UPDATES = 4  # whose pairs are read; after them they come again
MOVED = 1e-3  # how far weights are moved before gradients are compared: where policy is reference, errors can hide


@dataclass(frozen=True)
class Run:
    """A recipe in memory, somewhere in its training; or another program's step on it, if there is a `peer`."""

    recipe: Recipe
    method: Any
    policy: Policy
    feed: Feed
    learner: loop.Learner
    progress: loop.Progress
    peer: Any = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.learner.accelerator.device
        return device

    @property
    def pairs(self) -> int:
        """Pairs of an update, of all processes."""
        options, processes = self.recipe.train, int(self.learner.accelerator.num_processes)
        return options.batch_size * options.accumulate * processes


def build(recipe: Recipe, folder: Path, accelerator: Any, *, updates: int, peer: Any = None) -> Run:
    """The pieces of a run, as `mmalign train` makes them; nothing is written outside of `folder`.

    Args:
        recipe: as a person gave it; of its pairs no more are read than some updates need.
        folder: for the caches.
        accelerator: of all runs.
        updates: that it will be asked for, at most.
        peer: a module of `mmalign.benchmark.against`.

    Raises:
        ValueError: what `mmalign train` would refuse as well.
    """
    recipe = shortened(recipe, folder, updates, accelerator.num_processes)
    assemble.check(recipe, training=True)
    options, method = recipe.train, methods.find(recipe.method.name)
    opened = open_data(recipe.data, options.seed, method)
    needed = options.batch_size * accelerator.num_processes
    if len(opened[0]) < needed:  # rows of weight 0 would fill up the batch, and be measured as pairs
        raise ValueError(
            f"data.path: {opened[0].source} has {len(opened[0])} pairs, and a batch has {needed}; measure with more, "
            "or with a smaller train.batch_size"
        )
    named = assemble.method_judge(recipe)
    family = assemble.load_to_train(recipe, accelerator.device)
    judge = assemble.judge(named, accelerator.device) if named is not None else None
    feed = caching.open_filled(recipe, family, accelerator=accelerator, say=_quiet, opened=opened, judge=judge)
    policy = assemble.build_policy(family, recipe, kept=caching.replaces_reference(feed))
    policy, learner = training_run.build_learner(policy, options, accelerator)
    if peer is not None:
        peer.prepare(policy)
        learner = replace(learner, optimizer=peer.optimizer(policy.trainable(), options) or learner.optimizer)
    caching.put_away(feed, recipe, family)
    return Run(recipe, method, policy, feed, learner, loop.Progress(), peer)


def _quiet(_: str) -> None:
    pass


def shortened(recipe: Recipe, folder: Path, updates: int, processes: int) -> Recipe:
    """The recipe for so many updates on a few of its pairs; its caches and all else go to the folder."""
    options, data = recipe.train, recipe.data
    few = UPDATES * options.batch_size * options.accumulate * processes
    changed: dict[str, Any] = {"hold_out": 0.0, "limit": min(few, data.limit or few)}
    if getattr(data, "cache", "off") != "off":
        changed["cache"] = "auto"
    return recipe.model_copy(
        update={
            "train": options.model_copy(update={"steps": updates, "trackers": []}),
            "data": data.model_copy(update=changed),
            "output": str(folder),
        }
    )


def advance(run: Run, updates: int, meter: Meter | None = None) -> None:
    """Let the loop make some updates, ours or the peer's."""
    if run.peer is not None:
        _advance_peer(run, updates, meter)
        return
    method, learner = run.method, run.learner
    batches: loop.Batches = run.feed.batches
    policy: Any = run.policy
    if meter is not None:
        method = Metered(method, meter, {"contrasts": ("noise", "rest"), "loss": ("policy", "rest")})
        batches = metered_batches(batches, meter)
        gauge: Any = Metered(learner.accelerator, meter, {"backward": ("backward", "optimizer")})
        learner = replace(learner, accelerator=gauge)
        # The reference runs from within `contrasts`.
        policy = Metered(policy, meter, {"on_reference": ("reference", "noise")})
    loop.train(
        method,
        run.recipe.method,
        policy,
        batches,
        learner,
        steps=run.progress.step + updates,
        accumulate=run.recipe.train.accumulate,
        seed=run.recipe.train.seed,
        progress=run.progress,
        after_update=lambda *_: meter.switch("rest") if meter is not None else None,
    )


def _advance_peer(run: Run, updates: int, meter: Meter | None) -> None:
    """Updates as other programs make them: a loss of a batch, its gradient, clipping, the optimizer."""
    switch = meter.switch if meter is not None else lambda _: None
    options, learner, batches = run.recipe.train, run.learner, _peer_batches(run)
    parameters = run.policy.trainable()
    run.policy.model.train()
    for _ in range(updates):
        for _ in range(options.accumulate):
            switch("data")
            batch, draws = next(batches)
            loss = run.peer.loss(run, batch, draws, switch)
            switch("backward")
            learner.accelerator.backward(loss / options.accumulate)
        switch("optimizer")
        if options.clip is not None:
            learner.accelerator.clip_grad_norm_(parameters, options.clip)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        run.progress.step += 1
        switch("rest")


def _peer_batches(run: Run) -> Iterator[tuple[Any, Draws]]:
    """Batches as the loader reads them, with the draws of their epoch, for ever."""
    while True:
        first = run.progress.batch
        for batch in run.feed.train.batches(run.progress.epoch, first):
            run.progress.batch += 1
            yield batch, Draws(run.recipe.train.seed, run.progress.epoch)
        if run.progress.batch == 0:
            raise ValueError(f"data: an epoch has no batch; there are fewer than {run.pairs} pairs")
        run.progress.epoch, run.progress.batch = run.progress.epoch + 1, 0


@dataclass(frozen=True)
class First:
    """The mean loss of a run's first batch, and its gradient by parameter, in float32 on the CPU."""

    loss: float
    gradients: list[Tensor]

    def beside(self, other: First) -> tuple[float, float] | None:
        """How far this is from another: the losses' difference, and the gradients', as a share of the other's norm.

        None where something else learns.
        """
        if [x.shape for x in self.gradients] != [x.shape for x in other.gradients]:
            return None
        apart = sum(
            float((a - b).double().square().sum()) for a, b in zip(self.gradients, other.gradients, strict=True)
        )
        norm = sum(float(b.double().square().sum()) for b in other.gradients)
        return abs(self.loss - other.loss), (apart / norm) ** 0.5 if norm else float(apart > 0)


def first_gradient(run: Run) -> First:
    """Loss and gradient of the first batch, after moving every weight a little off its reference, always alike."""
    parameters, seed = run.policy.trainable(), run.recipe.train.seed
    generator = torch.Generator(run.device).manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(MOVED * torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype))
    # The bare network: a distributed wrapper would wait for a backward pass.
    bare = replace(run.policy, model=run.policy.unwrapped)
    draws = Draws(seed, 0)
    if run.peer is not None:
        bare.model.train()
        loss = run.peer.loss(replace(run, policy=bare), next(_peer_batches(run))[0], draws, lambda _: None)
        run.progress.batch = 0
    else:
        batch = next(run.feed.batches(0), None)
        if batch is None:
            raise ValueError(f"data: an epoch has no batch; there are fewer than {run.recipe.train.batch_size} pairs")
        contrasts = loop.make_contrasts(run.method, bare, batch, run.recipe.method, draws)
        steps = [run.method.loss(bare, contrast, run.recipe.method) for contrast in contrasts]
        if not steps:
            raise ValueError("data: the method makes nothing of the first batch, so that nothing can be measured")
        weights = torch.cat([step.weights for step in steps])
        loss = (torch.cat([step.losses for step in steps]) * weights).sum() / weights.sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = (torch.zeros(p.shape) if g is None else g.float().cpu() for g, p in zip(found, parameters, strict=True))
    return First(float(loss.detach()), list(zeros))


def networks(run: Run) -> list[nn.Module]:
    """Everything with weights that the run holds."""
    family = run.policy.family
    copies = [run.policy.reference.model] if isinstance(run.policy.reference, FrozenCopy) else []
    encoders = [net for _, net in family.encoders()] if hasattr(family, "encoders") else []
    return [run.policy.unwrapped, *copies, *encoders]


def weight_bytes(run: Run) -> int:
    """Bytes of all weights where the run computes; parts that networks share count once."""
    tensors = {id(t): t for net in networks(run) for t in (*net.parameters(), *net.buffers())}
    return sum(t.nbytes for t in tensors.values() if t.device.type == run.device.type)


def state_bytes(run: Run) -> int:
    """Bytes that a step needs whatever it computes: all weights, and of what learns the gradient and two moments."""
    return weight_bytes(run) + 3 * sum(p.nbytes for p in run.policy.trainable())


def peak_bytes(run: Run, before: int) -> int:
    """Bytes of tensors at most, in one update; `before` is what CUDA held when the run was not yet built."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        advance(run, 1)
        return int(torch.cuda.max_memory_allocated(run.device)) - before
    memory = LiveBytes()
    with memory:
        for net in networks(run):
            for tensor in (*net.parameters(), *net.buffers()):
                memory.count(tensor)
        for tensor in tree_leaves(list(run.learner.optimizer.state.values())):
            if isinstance(tensor, Tensor):
                memory.count(tensor)
        advance(run, 1)
    return memory.peak


def count_operations(run: Run) -> tuple[dict[str, int], int]:
    """Operations of one update by part, and those that backward repeats, which belong to none of them."""
    with Operations() as counter:
        meter = Meter(counter.get_total_flops)
        advance(run, 1, meter)
        meter.switch("rest")
    return {part: int(number) for part, number in meter.total.items()}, counter.repeated
