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

What is kept beforehand is made before the first update, and timed apart. Pairs are read by the process itself,
whatever `data.workers` says: a few batches would measure how workers are started.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmalign import methods
from mmalign.benchmark.against import Peer
from mmalign.benchmark.meters import LiveBytes, Meter, Metered, Operations, metered_batches, now
from mmalign.commands import cache, preflight, train
from mmalign.config import Recipe
from mmalign.console import silent
from mmalign.data.data_module import Feed, Opened
from mmalign.families.step_judge import StepJudge
from mmalign.modalities import loading
from mmalign.modalities.data import open_data
from mmalign.policy import FrozenCopy, Policy
from mmalign.rewards import Judge
from mmalign.rng import Draws
from mmalign.training import loop
from mmalign.training import run as training_run

UPDATES = 4  # whose pairs are read; after them they come again
MOVED = 1e-3  # how far weights are moved before gradients are compared: where policy is reference, errors can hide


@dataclass(frozen=True)
class Run:
    """A recipe in memory, somewhere in its training; or another program's step on it, if there is a `peer`.

    `filling` is what was kept beforehand: seconds of a pair, once, for a training of one epoch.
    """

    recipe: Recipe
    method: Any
    policy: Policy
    feed: Feed
    learner: loop.Learner
    progress: loop.Progress
    peer: Peer | None = None
    filling: float = 0.0

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


def build(recipe: Recipe, folder: Path, accelerator: Any, *, updates: int, peer: Peer | None = None) -> Run:
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
    preflight.check(recipe, training=True)
    options, method = recipe.train, methods.find(recipe.method.name)
    opened = _whole_batches(recipe, method, accelerator.num_processes)
    named = loading.method_judge(recipe)
    family = loading.load_to_train(recipe, accelerator.device)
    judge = loading.judge(named, accelerator.device) if named is not None else None
    feed, filling = _filled(recipe, family, opened, judge, accelerator)
    policy = train.build_policy(family, recipe, kept=cache.replaces_reference(feed))
    policy, learner = training_run.build_learner(policy, options, accelerator)
    if peer is not None:
        peer.prepare(policy)
        own = peer.optimizer(policy.trainable(), options)
        if own is not None:
            accelerator.free_memory()  # where gradients are scaled, it would do so for the optimizer that it forgets
            learner = replace(learner, optimizer=accelerator.prepare_optimizer(own))
    cache.put_away(feed, recipe, family)
    return Run(recipe, method, policy, feed, learner, loop.Progress(), peer, filling)


def shortened(recipe: Recipe, folder: Path, updates: int, processes: int) -> Recipe:
    """The recipe for so many updates on a few of its pairs; its caches and all else go to the folder."""
    options, data = recipe.train, recipe.data
    few = UPDATES * options.batch_size * options.accumulate * processes
    changed: dict[str, Any] = {"hold_out": 0.0, "limit": min(few, data.limit or few), "workers": 0}
    if getattr(data, "cache", "off") != "off":
        changed["cache"] = "auto"
    return recipe.model_copy(
        update={
            "train": options.model_copy(update={"steps": updates, "trackers": []}),
            "data": data.model_copy(update=changed),
            "output": str(folder),
        }
    )


def _whole_batches(recipe: Recipe, method: Any, processes: int) -> Opened:
    """The recipe's pairs, as many of them as fill the batches of updates, or at least of one.

    Raises:
        ValueError: they fill no batch: rows of weight 0 would fill it up, and be measured as pairs.
    """
    options = recipe.train
    opened = open_data(recipe.data, options.seed, method)
    batch, found = options.batch_size * processes, len(opened[0])
    if found < batch:
        raise ValueError(
            f"data.path: {opened[0].source} has {found} pairs, and a batch has {batch}; measure with more, "
            "or with a smaller train.batch_size"
        )
    unit = batch * options.accumulate if found >= batch * options.accumulate else batch
    if rest := found % unit:
        return open_data(recipe.data.model_copy(update={"limit": found - rest}), options.seed, method)
    return opened


def _filled(recipe: Recipe, family: Any, opened: Opened, judge: Judge | None, accelerator: Any) -> tuple[Feed, float]:
    """The pairs with all that is kept of them, and the seconds of a pair that this took, for a training of one epoch.

    Opening caches takes its time whatever the number of pairs: it is measured alone, when they are full, and left out;
    so are the first calls of the encoders, which make plans.
    """
    device, options = accelerator.device, recipe.train

    def filled(data: dict[str, Any], steps: int) -> tuple[Feed, float]:
        for _, net in (family.denoiser if isinstance(family, StepJudge) else family).encoders():
            net.to(device)  # caches that are full send them away
        one = recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=data),
                "train": options.model_copy(update={"steps": steps}),
            }
        )
        accelerator.wait_for_everyone()
        started = now(device)
        feed = cache.open_filled(one, family, accelerator=accelerator, say=silent, opened=opened, judge=judge)
        return feed, now(device) - started

    bare, _ = filled({"cache": "off"}, 1)
    if recipe.data.cache == "off":
        return bare, 0.0
    next(iter(bare.batches(0)), None)
    pairs = len(opened[0])
    epoch = -(-pairs // (options.batch_size * options.accumulate * accelerator.num_processes))
    _, whole = filled({}, epoch)
    feed, opening = filled({}, epoch)
    if feed.kept is not None and feed.kept.keep.draws > 1:  # later epochs have draws of their own
        feed, _ = filled({}, options.steps)
    return feed, max(0.0, whole - opening) / pairs


class _Enough(Exception):
    """All updates that were asked for are done, and nothing is pending."""


def advance(run: Run, updates: int, meter: Meter | None = None) -> int:
    """Let the loop make some updates, ours or the peer's, and those that are left of a method's last batch (SPO's).

    Returns:
        How many there were.
    """
    first = run.progress.step
    if run.peer is not None:
        _advance_peer(run, updates, meter)
        return updates
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

    def after_update(progress: loop.Progress, _: Any) -> None:
        if meter is not None:
            meter.switch("rest")
        if progress.step >= first + updates and not progress.pending:
            raise _Enough

    with contextlib.suppress(_Enough):
        loop.train(
            method,
            run.recipe.method,
            policy,
            batches,
            learner,
            steps=sys.maxsize,
            accumulate=run.recipe.train.accumulate,
            seed=run.recipe.train.seed,
            progress=run.progress,
            after_update=after_update,
        )
    return run.progress.step - first


def _advance_peer(run: Run, updates: int, meter: Meter | None) -> None:
    """Updates as other programs make them: a loss of a batch, its gradient, clipping, the optimizer."""
    switch = meter.switch if meter is not None else lambda _: None
    options, learner, batches, peer = run.recipe.train, run.learner, _peer_batches(run), run.peer
    assert peer is not None
    accelerator, parameters = learner.accelerator, run.policy.trainable()
    run.policy.model.train()
    for _ in range(updates):
        for number in range(1, options.accumulate + 1):
            switch("data")
            batch, draws = next(batches)
            last = number == options.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(run.policy.model):
                loss = peer.loss(run, batch, draws, switch)
                switch("backward")
                accelerator.backward(loss / options.accumulate)
        switch("optimizer")
        if options.clip is not None:
            accelerator.clip_grad_norm_(parameters, options.clip)
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
    """Bytes of tensors at most, in one update; `before` is what CUDA held when the run was not yet built.

    On a CPU blocks that are compiled run as they are written, since what happens inside of compiled ones is not seen.
    """
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        advance(run, 1)
        return int(torch.cuda.max_memory_allocated(run.device)) - before
    memory = LiveBytes()
    with torch.compiler.set_stance("force_eager"), memory:
        for net in networks(run):
            for tensor in (*net.parameters(), *net.buffers()):
                memory.count(tensor)
        for tensor in tree_leaves(list(run.learner.optimizer.state.values())):
            if isinstance(tensor, Tensor):
                memory.count(tensor)
        advance(run, 1)
    return memory.peak


def count_operations(run: Run) -> tuple[dict[str, int], int]:
    """Operations of one update by part, and those that backward repeats, which belong to none of them.

    Of this process. What is compiled runs as it is written: compiled products are no operators that could be counted.
    """
    with torch.compiler.set_stance("force_eager"), Operations() as counter:
        meter = Meter(counter.get_total_flops)
        updates = advance(run, 1, meter)
        meter.switch("rest")
    return {part: int(number) // updates for part, number in meter.total.items()}, counter.repeated // updates
