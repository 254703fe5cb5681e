"""Training loop of all methods, modalities and families.

Every random number follows from its row's position (`KeyedRNG`), so a resumed run repeats an uninterrupted one. A run
cannot resume while contrasts of the last batch are `pending`: the new process would compute them with later weights.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mmalign.config import MethodConfig
from mmalign.methods import AnyMethod, Step, epoch_rng, remember
from mmalign.policy import Policy, sharding
from mmalign.policy.lagging import LaggingCopy
from mmalign.rng import KeyedRNG
from mmalign.training.guard import Guard

if TYPE_CHECKING:
    from accelerate import Accelerator


class Batch(Protocol):
    """Batch of a method, with the ids of its rows."""

    @property
    def rows(self) -> Sequence[int]:
        """The ids."""
        ...


logger = logging.getLogger(__name__)

Batches = Callable[[int, int], Iterator[Batch]]  # (epoch, first batch) -> batches
Metrics = dict[str, Tensor]  # scalars, on the model's device
MAX_EMPTY_BATCHES = 100  # batches in a row without an update, after which a run stops


@dataclass
class Progress:
    """Position of a run.

    Attributes:
        step: updates done.
        epoch: the current epoch.
        batch: batches of this epoch that were begun.
        pending: contrasts of the last batch that are not used yet; 0 where a run can resume.
        seconds: time of the updates, including data and sampling, without saving and evaluation. On a GPU this is
            wall-clock time; on CPUs, which other processes may share, it is CPU time of all threads of this process.
        contrast_seconds: the part of `seconds` that went into contrasts, such as generated images.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    pending: int = 0
    seconds: float = field(default=0.0, compare=False)  # not part of the position
    contrast_seconds: float = field(default=0.0, compare=False)


@dataclass
class TrainState:
    """Accelerator, optimizer, learning rate, clipping, moving average and guard of a run."""

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    lr: float
    lr_factor: Callable[[int], float]
    max_grad_norm: float | None
    ema: LaggingCopy | None = None
    guard: Guard = field(default_factory=Guard)


def train(
    method: AnyMethod,
    config: MethodConfig,
    policy: Policy,
    batches: Batches,
    train_state: TrainState,
    *,
    steps: int,
    gradient_accumulation_steps: int,
    seed: int,
    progress: Progress,
    after_update: Callable[[Progress, Metrics], None],
) -> Progress:
    """Train until `steps` updates are done.

    Args:
        method: a module of mmalign.methods.
        config: its Config.
        policy: the policy, with the `model` that the accelerator prepared.
        batches: the data; the same (epoch, first batch) must always give the same batches.
        train_state: optimizer, schedule, clipping and moving average.
        steps: updates in total, including those that `progress` counts.
        gradient_accumulation_steps: contrasts per update.
        seed: seed of all random numbers.
        progress: position to start from, with nothing pending; changed in place.
        after_update: callback with the progress and the update's metrics; if nothing is pending, a checkpoint that it
            writes resumes exactly.

    Raises:
        BadUpdateError: an update is bad and the guard does not skip it; no weight has changed.
        ValueError: an epoch, or `MAX_EMPTY_BATCHES` batches in a row, had nothing to learn from.
    """
    assert not progress.pending, "pending contrasts cannot be recomputed"
    needs, window = method.requirements(config), _GradientAccumulator(policy, train_state)
    clock = time.process_time if train_state.accelerator.device.type == "cpu" else time.perf_counter
    since, hint = clock(), f": {needs.hint_if_empty}" if needs.hint_if_empty else ""
    while progress.step < steps:
        first = progress.batch
        for batch in batches(progress.epoch, first):
            # Contrasts of the batch, then a backward pass for each and an update for each full window
            rng, begun = KeyedRNG(seed, progress.epoch), clock()
            contrasts = make_contrasts(method, policy, batch, config, epoch_rng(needs.precompute, rng))
            progress.contrast_seconds += clock() - begun
            progress.batch, before = progress.batch + 1, progress.step
            location = BatchLocation(progress.epoch, progress.batch, batch.rows)
            for number, contrast in enumerate(contrasts, start=1):
                last, progress.pending = window.count + 1 == gradient_accumulation_steps, len(contrasts) - number
                rng.seed_globally(batch.rows, "dropout", number)  # of adapters; all else is keyed by row
                with window.sync_context(last):
                    window.add(method.loss(policy, contrast, config), location)
                metrics = window.guarded_update(progress.step) if last else None
                if metrics is not None:
                    remember(needs.memory, policy, metrics)
                    progress.step, progress.seconds = progress.step + 1, progress.seconds + clock() - since
                    after_update(progress, metrics)
                    if progress.step == steps:
                        return progress
                    since = clock()  # the callback's saving and evaluation are not counted
            window.end_batch(progress, hint, updated=progress.step > before)
        window.end_epoch(progress, hint, whole=first == 0)  # a part of an epoch proves nothing
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return progress


def make_contrasts(
    method: AnyMethod, policy: Policy, batch: Batch, config: MethodConfig, rng: KeyedRNG
) -> list[object]:
    """Return all contrasts of a batch, made without gradients in eval mode; leave the model in train mode.

    The epoch of `rng` is that of `epoch_rng`.
    """
    policy.model.eval()
    with torch.no_grad():
        contrasts = method.contrasts(policy, batch, config, rng)
    policy.model.train()
    return contrasts


@dataclass(frozen=True)
class BatchLocation:
    """Origin of a contrast: a batch of an epoch, numbered from 1, and its rows."""

    epoch: int
    batch: int
    rows: Sequence[int]


class BadUpdateError(FloatingPointError):
    """Error for an update whose loss or gradient is not finite, or beyond the guard's limits.

    Attributes:
        reason: what is bad, as a clause.
        location: the batch; None if it is another process's.
    """

    def __init__(self, reason: str, location: BatchLocation | None, step: int) -> None:
        self.reason, self.location = reason, location
        super().__init__(f"{reason} after update {step}, {self.origin}")

    @property
    def origin(self) -> str:
        """The batch and its rows, as the end of a sentence."""
        if self.location is None:
            return "on another process"
        rows = ", ".join(str(row) for row in self.location.rows[:8])
        return f"in batch {self.location.batch} of epoch {self.location.epoch} (rows {rows})"


class _GradientAccumulator:
    """Gradients and metrics of one update.

    Attributes:
        count: contrasts so far.
        used: true after an update in this epoch.
        empty: batches since the last batch with an update.
        summaries: sum and number of each summary since the last update, also of contrasts without weight.
    """

    def __init__(self, policy: Policy, train_state: TrainState) -> None:
        self.model, self.train_state = policy.model, train_state
        self.copies = [*policy.lagging.values(), *([train_state.ema] if train_state.ema is not None else [])]
        self.parameters: list[nn.Parameter] = policy.trainable()  # a list: an exhausted iterator would never be clipped
        self.used, self.empty = False, 0
        self.summaries = dict[str, Tensor]()
        self._clear()

    def _clear(self) -> None:
        self.count, self.sums = 0, dict[str, Tensor]()
        self.weight: Tensor | int = 0
        self.locations = list[tuple[BatchLocation, Tensor]]()

    def end_batch(self, progress: Progress, hint: str, *, updated: bool) -> None:
        """Count the batches in a row that gave no update.

        Raises:
            ValueError: there are `MAX_EMPTY_BATCHES`, and nothing is accumulated; the message ends with the hint.
        """
        self.empty = 0 if updated else self.empty + 1
        if self.empty >= MAX_EMPTY_BATCHES and not self.count:
            raise ValueError(
                f"train: {self.empty} batches in a row, up to batch {progress.batch} of epoch {progress.epoch}, "
                f"had nothing to learn from (the limit is {MAX_EMPTY_BATCHES}){hint}"
            )

    def end_epoch(self, progress: Progress, hint: str, *, whole: bool) -> None:
        """Begin to watch the next epoch.

        Raises:
            ValueError: all of a `whole` epoch gave nothing to learn from; the message ends with the hint.
        """
        if whole and not self.used and not self.count:
            raise ValueError(
                f"train: epoch {progress.epoch} has nothing to learn from, in {progress.batch} batches; there are "
                f"fewer pairs than one batch needs on every process, or the method uses none of them{hint}"
            )
        self.used = False

    def sync_context(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Skip the gradient all-reduce except for the last contrast (DDP `no_sync`); must also wrap the forward."""
        if is_last:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.train_state.accelerator.no_sync(self.model)
        return context

    def add(self, step: Step, location: BatchLocation) -> None:
        """Add a contrast's gradient and metrics; `update` divides them by the sum of all weights.

        Nothing here waits for a GPU: `update` checks once that all losses were finite.
        """
        self.train_state.accelerator.backward((step.losses * step.weights).sum())
        self.count += 1
        self.weight = self.weight + step.weights.sum()
        # Rows of weight 0, such as padding, have no say in whether the loss is finite
        self.locations.append((location, torch.isfinite(step.losses.detach().where(step.weights > 0, 0)).all()))
        for name, values in step.metrics.items():
            self.sums[name] = self.sums.get(name, 0) + (values * step.weights).sum()
        for name, values in step.summary.items():
            of_rows = torch.stack([values.sum(), values.new_full((), len(values))])
            self.summaries[name] = self.summaries.get(name, 0) + of_rows

    def guarded_update(self, step: int) -> Metrics | None:
        """Update, or leave a bad update out if the guard skips it: log it, drop its gradients, and return None.

        Raises:
            BadUpdateError: the update is bad and not skipped, or one of too many in a row.
        """
        guard = self.train_state.guard
        try:
            metrics = self.update(step)
        except BadUpdateError as error:
            if guard.action != "skip" or not guard.leave_out():
                raise
            logger.warning(f"update {step + 1} was left out: {error.reason}, {error.origin}; {guard.left_out} so far")
            self.train_state.optimizer.zero_grad()
            self._clear()
            self.used, self.empty = True, -1  # the batch was not empty
            return None
        guard.in_a_row = 0
        return metrics

    def update(self, step: int) -> Metrics | None:
        """Divide by the global weight, clip and step; return the update's mean metrics over all processes.

        If no row of any process has weight, return None without a step, which would follow momentum alone. What the
        rows' summaries say is then in the metrics of the next update.

        Raises:
            BadUpdateError: a loss of any process, or the gradient, is not finite or beyond the guard's limits.
        """
        train_state, accelerator = self.train_state, self.train_state.accelerator
        # Flag for non-finite losses, weight and sums of metrics, reduced in one call
        names, summaries = sorted(self.sums), sorted(self.summaries)
        assert isinstance(self.weight, Tensor), "a window has a contrast"
        bad = torch.stack([~finite for _, finite in self.locations]).any().to(self.weight.dtype)
        packed_share = torch.stack(
            [bad, self.weight, *(self.sums[n] for n in names), *(x for n in summaries for x in self.summaries[n])]
        )
        packed = accelerator.reduce(packed_share, reduction="sum")
        broken, weight = packed[:2].tolist()
        if broken:
            location = next((location for location, finite in self.locations if not finite), None)
            raise BadUpdateError("the loss is not finite", location, step)
        if not weight:
            train_state.optimizer.zero_grad()
            self._clear()
            return None

        # Weighted mean of the gradients: accelerate averages them over processes, the weights are summed.
        total = packed[1]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(sharding.local(gradients), accelerator.num_processes / total)
        limit = train_state.max_grad_norm if train_state.max_grad_norm is not None else float("inf")
        norm = sharding.whole(accelerator.clip_grad_norm_(self.parameters, limit)).to(total.device)
        reason = ""
        if accelerator.scaler is None and not torch.isfinite(norm):  # a scaler skips such an update
            reason = "the gradient is not finite"
        elif train_state.guard.is_active and torch.isfinite(norm):
            # The same numbers on every process: losses and gradients are reduced
            reason = train_state.guard.problem(float(packed[2 + names.index("loss")] / total), float(norm))
        if reason:
            if accelerator.scaler is not None:
                accelerator.scaler.update()  # it has unscaled these gradients
            raise BadUpdateError(reason, self.locations[-1][0], step)

        # Optimizer, moving average and lagging copies
        rate = train_state.lr * train_state.lr_factor(step)
        for group in train_state.optimizer.param_groups:
            group["lr"] = rate
        train_state.optimizer.step()
        train_state.optimizer.zero_grad()
        for copy in self.copies:
            copy.update(self.parameters, step + 1)
        self._clear()
        self.used, self.summaries = True, {}
        # Metrics: weighted means over all contrasts, and plain means of the summaries over their rows
        sums, of_rows = packed[2 : 2 + len(names)] / total, packed[2 + len(names) :].view(-1, 2)
        metrics = dict(zip([*names, *summaries], [*sums, *(of_rows[:, 0] / of_rows[:, 1])], strict=True))
        return metrics | {"gradient norm": norm, "lr": torch.tensor(rate)}
