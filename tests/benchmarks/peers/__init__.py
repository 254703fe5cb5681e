"""Training steps of other programs (baselines), one file each, on our run's model, pairs and loader.

Each file implements `Peer`. Its loss must be that of our method on the same pairs under the same random numbers.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmalign.commands._bench_meters import Meter
from mmalign.commands._bench_run import Run
from mmalign.config import Recipe, Train
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

NAMES = ("diffusers", "trl")


class Peer(Protocol):
    """The interface of a file in this folder; a module satisfies it."""

    @property
    def about(self) -> str:
        """One sentence on the program's step."""

    @property
    def own(self) -> Sequence[str]:
        """Assignments for the baseline's recipe alone, which make it run as that program does."""

    def available(self) -> None:
        """Check that the packages are installed.

        Raises:
            ValueError: a package is missing; the message has the command to install it.
        """

    def check(self, recipe: Recipe, num_processes: int) -> None:
        """Check that the program has a step for the recipe.

        Raises:
            ValueError: it has none, or not for this number of processes.
        """

    def alike(self, recipe: Recipe) -> Sequence[str]:
        """Return assignments for both recipes, without which the two would compute different things."""

    def prepare(self, policy: Policy) -> None:
        """Change the networks before the first step."""

    def optimizer(self, parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
        """Return the program's optimizer, or None for the recipe's."""

    def loss(self, run: Run, batch: Any, rng: KeyedRNG, switch: Callable[[str], None]) -> Tensor:
        """Return the mean loss of a loader's batch; call `switch` with each part of the step as it begins."""


def load(name: str) -> Peer:
    """Return the module of a program's step, whether or not its packages are installed."""
    return cast(Peer, importlib.import_module(f"{__name__}.{name}"))


def find(name: str) -> Peer:
    """Return the module of a program's step.

    Raises:
        ValueError: a package is missing.
    """
    peer = load(name)
    peer.available()
    return peer


def use_peer(run: Run, peer: Peer) -> Run:
    """Return the run with a baseline's networks, optimizer and updates."""
    train_state, accelerator = run.train_state, run.train_state.accelerator
    peer.prepare(run.policy)
    optimizer = peer.optimizer(run.policy.trainable(), run.recipe.train)
    if optimizer is not None:
        accelerator.free_memory()  # else a gradient scaler would act on the previous optimizer
        train_state = replace(train_state, optimizer=accelerator.prepare_optimizer(optimizer))
    return replace(run, train_state=train_state, updates=partial(_make_updates, peer))


def _make_updates(peer: Peer, run: Run, updates: int, meter: Meter | None) -> int:
    """Run updates as other programs do: a batch's loss, its gradient, clipping, the optimizer."""
    switch = meter.switch if meter is not None else lambda _: None
    options, train_state, batches = run.recipe.train, run.train_state, loader_batches(run)
    accelerator, parameters = train_state.accelerator, run.policy.trainable()
    run.policy.model.train()
    for _ in range(updates):
        for number in range(1, options.gradient_accumulation_steps + 1):
            switch("data")
            batch, rng = next(batches)
            is_last = number == options.gradient_accumulation_steps
            with contextlib.nullcontext() if is_last else accelerator.no_sync(run.policy.model):
                loss = peer.loss(run, batch, rng, switch)
                switch("backward")
                accelerator.backward(loss / options.gradient_accumulation_steps)
        switch("optimizer")
        if options.max_grad_norm is not None:
            accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
        train_state.optimizer.step()
        train_state.optimizer.zero_grad()
        run.progress.step += 1
        switch("rest")
    return updates


def loader_batches(run: Run) -> Iterator[tuple[Any, KeyedRNG]]:
    """Yield the loader's batches without end, with the random numbers of their epoch."""
    while True:
        for batch in run.data_module.train_loader.batches(run.progress.epoch, run.progress.batch):
            run.progress.batch += 1
            yield batch, KeyedRNG(run.recipe.train.seed, run.progress.epoch)
        assert run.progress.batch, "an epoch has a batch"
        run.progress.epoch, run.progress.batch = run.progress.epoch + 1, 0
