"""`train` a recipe: its data and its run through the loop, to a model and a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import assemble, caching, checkpoint, loop, methods
from mmalign.data.pairs import listed
from mmalign.draws import Draws
from mmalign.feed import Feed, open_data
from mmalign.output import written
from mmalign.policy import Policy
from mmalign.recipe import dump_recipe
from mmalign.report import Reporter, silent
from mmalign.sections import ImageData, Recipe, Train
from mmalign.training_run import (
    HELD_OUT_BATCHES,
    Run,
    Say,
    begin,
    export,
    identify,
    last_checkpoint,
    last_saved,
    require_all,
    save,
    trainable_weights,
)


@dataclass(frozen=True)
class Trained:
    """What `train` leaves.

    Attributes:
        folder: the trained model, as its library loads it: diffusers, or transformers and peft.
        steps: updates done in all.
        seconds: of this call.
        verdict: what the run did, in plain words.
        history: the mean metrics of every report of this call.
    """

    folder: Path
    steps: int
    seconds: float
    verdict: str
    history: list[dict[str, float]]


def train(recipe: Recipe, say: Say = print) -> Trained:
    """Train by a recipe; the same call again goes on from the last checkpoint, with the same numbers as without a stop.

    Writes checkpoints, the tracker's logs, `recipe.yaml` and at the end `model/` to the recipe's output.

    Raises:
        ValueError: something in the recipe, the data or a checkpoint does not fit.
        FloatingPointError: a loss is not finite; the last checkpoint is kept.
        CheckpointError: a checkpoint could not be written; the ones before it are kept.
    """
    started, options = time.time(), recipe.train
    assemble.check(recipe, training=True)
    output = assemble.make_folder("output", Path(recipe.output))
    method = methods.find(recipe.method.name)
    opened = open_data(recipe.data, options.seed, method)
    trackers = options.trackers if options.trackers else None
    accelerator = open_accelerator(options, log_with=trackers, project_dir=recipe.output)
    tell = say if accelerator.is_main_process else silent
    for line in method.notes(recipe.method) if hasattr(method, "notes") else ():
        tell(line)
    named = assemble.method_judge(recipe)
    judge = assemble.judge(named, accelerator.device) if named is not None else None
    family = assemble.load_to_train(recipe, accelerator.device, tell)
    identity = identify(recipe, family)
    saved, folder = last_checkpoint(recipe, identity, tell), output / "model"
    if saved is not None and saved.step == options.steps:
        run = begin(recipe, family, identity, saved, accelerator, tell, kept=True)  # no reference: nothing learns
        export(folder, run)
        accelerator.end_training()
        done = "all updates were done already: nothing was trained"
        tell(f"{folder}: {done}; raise train.steps to go on, or name another output to begin anew")
        return Trained(folder, run.progress.step, time.time() - started, done, [])
    if accelerator.is_main_process:  # not before it is known that the folder is this run's
        with written(output / "recipe.yaml") as part:
            part.write_text(dump_recipe(recipe), encoding="utf-8")
    feed = caching.open_filled(recipe, family, accelerator=accelerator, say=tell, opened=opened, judge=judge)
    run = begin(recipe, family, identity, saved, accelerator, tell, kept=caching.replaces_reference(feed))
    del saved  # the optimizer's state in it is as large as the optimizer's own
    caching.put_away(feed, recipe, family)
    count = sum(p.numel() for p in run.policy.trainable())
    tell(f"{recipe.method.name}: {count / 1e6:.2f}M trainable parameters of {run.policy.family.name}; {feed.about}")
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    with Reporter(accelerator, options.steps, options.log_every, first=run.progress.step) as reporter:
        _train(recipe, run, feed, _Hook(recipe, run, feed, reporter))
    export(folder, run)
    _end(recipe, feed, accelerator, tell)
    verdict = reporter.verdict()
    tell(f"{recipe.method.name}: {verdict}")
    return Trained(folder, run.progress.step, time.time() - started, verdict, reporter.history)


def open_accelerator(options: Train, **logging: Any) -> Any:
    """What knows of devices and of the other processes; `logging` is as accelerate takes it.

    Raises:
        ValueError: the processes do not know of one another.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    precision = "fp16" if options.precision == "float16" else "no"  # other precisions are the family's own autocast
    accelerator = Accelerator(mixed_precision=precision, **logging)
    require_all(accelerator)
    set_seed(options.seed)
    return accelerator


def _end(recipe: Recipe, feed: Feed, accelerator: Any, tell: Say) -> None:
    """Close the trackers and the processes' group, and name what no process could use."""
    from accelerate.utils import gather_object

    dropped = list({d.where: d for d in gather_object(feed.dropped())}.values())
    accelerator.end_training()  # also ends the processes' group: nothing can wait for the others after it
    if dropped:
        tell(f"{len(dropped)} {_named(recipe)}; their pairs were left out: {listed(dropped)}")


def _named(recipe: Recipe) -> str:
    return "images could not be read" if isinstance(recipe.data, ImageData) else "images or prompts could not be used"


def _train(recipe: Recipe, run: Run, feed: Feed, hook: _Hook) -> None:
    """Run the loop; where a loss is not finite, say which pairs it came from."""
    options = recipe.train
    try:
        loop.train(
            run.method,
            recipe.method,
            run.policy,
            feed.batches,
            run.learner,
            steps=options.steps,
            accumulate=options.accumulate,
            seed=options.seed,
            progress=run.progress,
            after_update=hook,
        )
    except FloatingPointError as error:
        epoch, batch, pairs = _met(error, run, feed)
        places = ", ".join(pairs[:8])
        wider = ", or use train.precision: bfloat16" if options.precision == "float16" else ""
        raise FloatingPointError(
            f"train: the loss is not finite after update {run.progress.step}, in batch {batch} of epoch {epoch} "
            f"({places}); {last_saved(Path(recipe.output))}: lower train.lr{wider}"
        ) from error


def _met(error: FloatingPointError, run: Run, feed: Feed) -> tuple[int, int, list[str]]:
    """Where the numbers went wrong: epoch, batch, and the places of its pairs, on whichever process it was."""
    if not isinstance(error, loop.NotFinite):
        epoch, batch = run.progress.epoch, run.progress.batch
        return epoch, batch, feed.places(epoch, batch - 1)
    from accelerate.utils import gather_object

    place, mine = error.place, list[tuple[int, int, list[str]]]()
    if place is not None:
        mine = [(place.epoch, place.batch, feed.places(place.epoch, place.batch - 1))]
    found: list[tuple[int, int, list[str]]] = gather_object(mine)  # all processes raise it, in the same update
    return found[0]


class _Hook:
    """After every update: report, and save when it is time and nothing is pending; the last one always."""

    def __init__(self, recipe: Recipe, run: Run, feed: Feed, reporter: Reporter) -> None:
        self.recipe, self.run, self.feed, self.reporter, self.due = recipe, run, feed, reporter, False

    def __call__(self, progress: loop.Progress, metrics: Mapping[str, Tensor]) -> None:
        self.reporter.update(progress.step, metrics)
        last = progress.step == self.recipe.train.steps
        self.due |= last or progress.step % self.recipe.train.save_every == 0
        if self.due and (last or not progress.pending):
            self.due = False
            score = _mean_loss(self.recipe, self.run, islice(self.feed.held_out(), HELD_OUT_BATCHES))
            if score is not None:
                self.run.learner.accelerator.log({"held-out loss": score}, step=progress.step)
                self.reporter.say(f"update {progress.step}  held-out loss {score:.4g}")
            self._require_finite(progress, score)
            if self.run.learner.accelerator.is_main_process:
                save(self.recipe, self.run, score)
            self.run.learner.accelerator.wait_for_everyone()

    def _require_finite(self, progress: loop.Progress, score: float | None) -> None:
        """Refuse to save what nobody could go on from: an update can break a model whose last loss was finite.

        Its loss is looked at, too, but for a method that would have to draw a batch of images for it.
        """
        loss, draws = score, getattr(self.run.method, "learns_from", "pairs") == "prompts"
        if loss is None and not draws:
            loss = _mean_loss(self.recipe, self.run, islice(self.feed.batches(0), 1))
        whole = all(torch.isfinite(x).all() for x in trainable_weights(self.run.policy.unwrapped).values())
        if not whole or (loss is not None and not math.isfinite(loss)):
            raise checkpoint.CheckpointError(
                f"train: after update {progress.step} the {'loss is' if whole else 'weights are'} not finite, so that "
                f"update was not saved; {last_saved(Path(self.recipe.output))}: lower train.lr"
            )


@torch.no_grad()
def _mean_loss(recipe: Recipe, run: Run, batches: Iterable[Any]) -> float | None:
    """The method's loss on these batches under fixed draws, or None where they have no pair. Lower is better."""
    total, weight = 0.0, 0.0
    bare = Policy(run.policy.family, run.policy.unwrapped, run.policy.unwrapped, run.policy.reference)
    for batch in batches:
        for contrast in loop.make_contrasts(run.method, bare, batch, recipe.method, Draws(recipe.train.seed)):
            step = run.method.loss(bare, contrast, recipe.method)
            total += float((step.losses * step.weights).sum())
            weight += float(step.weights.sum())
    return total / weight if weight else None
