"""Callback of a training run after every update: reports, checkpoints, and the measurements for a verdict."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from mmalign import atomic_io, methods
from mmalign.commands._samples import Sampler
from mmalign.config import Recipe
from mmalign.data.data_module import DataModule
from mmalign.policy import sharding
from mmalign.training import checkpoint, loop, verdict
from mmalign.training.measure import NUM_PAIRS, Values, measure_held_out, measure_training
from mmalign.training.reporter import Reporter
from mmalign.training.run import TrainingRun, last_saved, save
from mmalign.training.stopping import StopRequest
from mmalign.training.trackers import log_curves

logger = logging.getLogger(__name__)


class AfterUpdate:
    """Callback after every update: report, and save if a checkpoint is due and nothing is pending, or at the end.

    A run that was asked to stop ends after the first checkpoint that it can resume from. A method without a reference
    is measured before the first update.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: TrainingRun,
        data_module: DataModule,
        reporter: Reporter,
        stop: StopRequest,
        sampler: Sampler | None,
    ) -> None:
        self.recipe, self.run, self.data_module, self.reporter = recipe, run, data_module, reporter
        self.stop, self.sampler, self.due = stop, sampler, False
        self.needs = methods.requirements_of(recipe.method)
        if run.progress.step == 0:
            options = recipe.train
            # Whole batches of all processes, with at least NUM_PAIRS pairs
            pairs = options.batch_size * run.train_state.accelerator.num_processes
            reporter.num_measured = math.ceil(NUM_PAIRS / pairs)
            if data_module.features is not None or data_module.precompute_cache is not None:  # no others are cached
                read = options.steps * options.gradient_accumulation_steps
                reporter.num_measured = min(reporter.num_measured, read)
            # Without a reference a gain is over the scores before the first update
            reporter.start = {} if self.needs.reference else self._measure(last=True)

    def __call__(self, progress: loop.Progress, metrics: Mapping[str, Tensor]) -> None:
        # A balanced epoch has rows several times; generated images are always new
        is_fresh = (progress.epoch == 0 and self.needs.liked_share is None) or self.needs.generates
        self.reporter.update(progress.step, metrics, is_fresh=is_fresh)
        if verdict.REWARD in metrics:
            self.reporter.add_reward(progress.epoch, progress.batch, metrics[verdict.REWARD])
        if self.sampler is not None:
            self.sampler(progress.step)
        last = progress.step == self.recipe.train.steps
        code = 0 if last else self.stop.exit_code(self.run.train_state.accelerator)
        self.due |= last or code != 0 or progress.step % self.recipe.train.save_every == 0
        if self.due and (last or not progress.pending):
            self.due = False
            values = self._measure(last)
            # Only held-out pairs give a checkpoint its score; training pairs show whether the loss is finite
            loss = fmean(values["loss"]) if values.get("loss") else None
            score = loss if self.data_module.validation_loader is not None else None
            if score is not None:
                accelerator = self.run.train_state.accelerator
                accelerator.log({"held-out loss": score}, step=progress.step)
                means = {name: fmean(each) for name, each in values.items() if each}
                log_curves(accelerator, means, progress.step, "held-out ")
                logger.info(f"update {progress.step}  held-out loss {score:.4g}")
            # Before saving, so that no checkpoint holds a broken model
            self._require_finite(progress, loss)
            self.reporter.verdict = self._verdict(values) if last else ""
            self.save(score)
            if code:
                self.run.train_state.accelerator.end_training()  # else a tracker takes the run for a failed one
                raise self.stop.stopped(code, progress.step, checkpoint.name(progress.step))

    def save(self, score: float | None) -> None:
        """Write a checkpoint of the run as it is, with a score; all processes call it together."""
        self.run.reports = self.reporter.state()
        keep_checkpoints = self.recipe.train.keep_checkpoints
        save(self.run, Path(self.recipe.output), score, keep_checkpoints=keep_checkpoints)
        self.run.train_state.accelerator.wait_for_everyone()

    def _measure(self, last: bool) -> Values:
        """Measure the validation split; without one some training pairs, except for methods that generate their images.

        Between the first and the last update, one batch of training pairs shows whether the loss is finite.
        """
        data_module = self.data_module
        common = (self.run, self.recipe.method, data_module, self.recipe.train.seed)
        if data_module.validation_loader is not None:
            return measure_held_out(*common)
        if self.needs.generates:
            return {}
        return measure_training(*common, self.reporter.num_measured if last else 1)

    def _require_finite(self, progress: loop.Progress, loss: float | None) -> None:
        """Refuse to save a state or a loss that is not finite: an update can break a model after a finite loss."""
        train_state, accelerator = self.run.train_state, self.run.train_state.accelerator
        # All tensors that a checkpoint would hold
        kept = [*self.run.policy.trainable(), *(train_state.ema.weights if train_state.ema is not None else ())]
        kept += [x for copy in self.run.policy.lagging.values() for x in copy.weights]
        kept += [x for state in train_state.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        whole = all(torch.isfinite(x).all() for x in sharding.local(kept))
        # What one process finds stops all of them
        broken = torch.tensor([not whole, loss is not None and not math.isfinite(loss)], dtype=torch.float32)
        weights_broken, loss_broken = accelerator.reduce(broken.to(accelerator.device), reduction="sum").tolist()
        if weights_broken or loss_broken:
            what = "weights are" if weights_broken else "loss is"
            if train_state.guard.action == "rollback":
                location = loop.BatchLocation(progress.epoch, progress.batch, ())
                raise loop.BadUpdateError(f"the {what} not finite", location, progress.step)
            raise atomic_io.CheckpointError(
                f"train: after update {progress.step} the {what} not finite, so that update was "
                f"not saved; {last_saved(Path(self.recipe.output))}: lower train.lr"
            )

    def _verdict(self, values: Values) -> str:
        """Return the verdict, with what the memory says; a resumed run has the same as an uninterrupted one."""
        memory = self.needs.memory.describe(self.run.policy.memory) if self.needs.memory is not None else ""
        return "; ".join(filter(None, (verdict.judge(self._evidence(values)), memory)))

    def _evidence(self, values: Values) -> verdict.Evidence:
        """Return the evidence of a verdict, with the values after the last update.

        Pairs of the training may be known by heart. In the first epoch the loop's own metrics precede a pair's first
        update, so they show what holds for other pairs, unless they or the reference follow the policy.
        """
        needs, fresh, moves = self.needs, self.reporter.fresh(), self.run.policy.moving is not None
        if needs.generates:
            # Against a reference that moves, no other metric compares with the base model
            own = {"loss": fresh["loss"]} if moves and fresh else fresh
            return verdict.Evidence(own, rewards=self.reporter.rewards)
        held_out = self.data_module.validation_loader is not None
        # Fresh values give way to held-out pairs, and count only if they are gains over the base model
        if held_out or moves or needs.measured_by is not None or not needs.reference:
            fresh = {}
        seen = not held_out and (self.run.progress.epoch > 0 or not fresh)
        return verdict.Evidence(values, self.reporter.start, fresh, seen)
