"""Samples of base and policy while a model trains: the page samples.html, its record samples.json, and the trackers."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from mmalign.atomic_io import atomic_write
from mmalign.config import Recipe
from mmalign.data.data_module import Splits
from mmalign.families.base import Family
from mmalign.modalities import Previews, modality_of
from mmalign.pages.samples import SampleHistory, decode_image, encode_output, render_samples
from mmalign.policy import eval_mode
from mmalign.reading import read_as
from mmalign.training.run import TrainingRun
from mmalign.training.trackers import log_samples, without_samples

logger = logging.getLogger(__name__)

PAGE, RECORD = "samples.html", "samples.json"
MAX_UPDATES = 32  # on the page; the trackers keep all


def open_previews(recipe: Recipe, family: Family, splits: Splits) -> Previews | None:
    """Return the inputs of the samples, if the recipe asks for them.

    Raises:
        ValueError: no prompt can be read.
    """
    modality = modality_of(recipe)
    if recipe.train.sample_every is None:
        return None
    assert modality.open_previews is not None, "preflight refuses samples"
    return modality.open_previews(family, recipe, splits)


class Sampler:
    """Generator of the samples of `train.sample_every`, which leaves the training's numbers as they are.

    The main process generates; the processes of a sharded run do so together.
    """

    def __init__(self, recipe: Recipe, run: TrainingRun, previews: Previews) -> None:
        self.recipe, self.run, self.previews = recipe, run, previews
        self.accelerator, self.output = run.train_state.accelerator, Path(recipe.output)
        settings = {"titles": list(previews.titles), "precision": recipe.train.precision, **previews.settings}
        # Through JSON, as the settings of the record that they are compared with
        self.history = SampleHistory(json.loads(json.dumps(settings)))
        self._start(run.progress.step)

    def _start(self, step: int) -> None:
        """Take up the samples of earlier updates, and generate the base model's if there are none."""
        record = self.output / RECORD
        # Samples of an earlier process with the same settings
        if self.accelerator.is_main_process and record.is_file():
            saved = read_as(SampleHistory, record, "delete it, and run the same command again")
            if saved.settings == self.history.settings:
                self.history = saved
        # Later ones will be generated again
        self.history.updates = {number: each for number, each in self.history.updates.items() if number <= step}
        policy = self.run.policy
        # The base model is the reference, or the policy before its first update
        if not self._agreed(bool(self.history.base)):
            if policy.reference is not None:
                self.history.base = policy.against_base().on_reference(self._generate) or []
            elif step == 0:
                self.history.base = self._generate(policy.unwrapped)
            else:
                logger.info("samples: no base model is at hand, since the run began without train.sample_every")
        self._write(is_over=False)
        for name in without_samples(self.accelerator):
            logger.info(f"samples: {name} takes no samples; look at {self.output / PAGE}")
        logger.info(f"samples: {self.output / PAGE}, every {self.recipe.train.sample_every} updates")

    def __call__(self, step: int) -> None:
        """Generate the policy's samples if they are due after `step` updates, and write and log them."""
        options, ema, policy = self.recipe.train, self.run.train_state.ema, self.run.policy
        assert options.sample_every is not None
        if step % options.sample_every and step != options.steps:
            return
        # Of an averaged run the average is shown, which is what it exports
        if ema is not None:
            ema.swap(policy.trainable())
        try:
            outputs = self._generate(policy.unwrapped)
        finally:
            if ema is not None:
                ema.swap(policy.trainable())
        # After a roll-back the record has samples of updates that are repeated
        earlier = [(number, each) for number, each in self.history.updates.items() if number < step]
        self.history.updates = dict([*earlier, (step, outputs)][-MAX_UPDATES:])
        self._write(is_over=step == options.steps)
        if self.accelerator.is_main_process:
            decode = str if self.previews.are_texts else decode_image
            base, new = ([decode(output) for output in each] for each in (self.history.base, outputs))
            log_samples(self.accelerator, self.previews.titles, base, new, step)

    def _generate(self, net: nn.Module) -> list[str]:
        """Return a network's outputs, encoded; none on processes that need not generate."""
        policy, device = self.run.policy, self.accelerator.device
        # Processes of a sharded run gather the weights together
        if policy.skeleton is None and not self.accelerator.is_main_process:
            return []
        # Generation leaves the training's random numbers as they are
        random = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with policy.gathered(net), eval_mode(net), torch.no_grad(), random:
            return [encode_output(output) for output in self.previews.generate(net)]

    def _agreed(self, value: bool) -> bool:
        """Return the main process's value, which alone reads the record."""
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([value])[0])

    def _write(self, *, is_over: bool) -> None:
        """Write the record and the page on the main process."""
        if not self.accelerator.is_main_process:
            return
        with atomic_write(self.output / RECORD) as part:
            part.write_text(json.dumps(asdict(self.history), ensure_ascii=False), encoding="utf-8")
        page = render_samples(
            f"{self.recipe.method.name} on {self.recipe.model.path}",
            self.previews.titles,
            self.previews.images,
            self.history,
            are_texts=self.previews.are_texts,
            steps=self.recipe.train.steps,
            is_over=is_over,
        )
        with atomic_write(self.output / PAGE) as part:
            part.write_text(page, encoding="utf-8")
