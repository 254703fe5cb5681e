"""`train` a recipe: put the pieces together, go on from a checkpoint, and leave a model and a verdict."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import assemble, checkpoint, loop, methods
from mmalign.data.pairs import listed
from mmalign.draws import Draws
from mmalign.families import Family
from mmalign.feed import Feed, fill_kept, open_data, open_feed
from mmalign.kept import asked
from mmalign.optim import Average, build_optimizer, schedule
from mmalign.output import TRAINED, written
from mmalign.policy import Policy
from mmalign.recipe import dump_recipe
from mmalign.report import Reporter
from mmalign.sections import ImageData, JudgeModel, Recipe

Say = Callable[[str], None]
HELD_OUT_BATCHES = 16  # of the held-out pairs that score a checkpoint


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
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed

    started, options = time.time(), recipe.train
    assemble.check(recipe, training=True)
    output = assemble.make_folder("output", Path(recipe.output))
    method = methods.find(recipe.method.name)
    opened = open_data(recipe.data, options.seed, method)
    precision = "fp16" if options.precision == "float16" else "no"  # other precisions are the family's own autocast
    trackers = options.trackers if options.trackers else None
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers, project_dir=str(output))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"train: {launched} processes were started, and each knows of {accelerator.num_processes}: all would train "
            "alone into one folder; on CPUs set ACCELERATE_USE_CPU=true"
        )
    set_seed(options.seed)
    tell = say if accelerator.is_main_process else _silent
    for line in method.notes(recipe.method) if hasattr(method, "notes") else ():
        tell(line)
    named = assemble.method_judge(recipe)
    judge = assemble.judge(named, accelerator.device) if named is not None else None
    run = _assemble(recipe, accelerator, tell)
    folder = output / "model"
    if run.progress.step == options.steps:
        _export(folder, run)
        accelerator.end_training()
        done = "all updates were done already: nothing was trained"
        tell(f"{folder}: {done}; raise train.steps to go on, or name another output to begin anew")
        return Trained(folder, run.progress.step, time.time() - started, done, [])
    if accelerator.is_main_process:  # not before it is known that the folder is this run's
        with written(output / "recipe.yaml") as part:
            part.write_text(dump_recipe(recipe), encoding="utf-8")
    feed = open_feed(
        run.policy.family,
        recipe.data,
        output=output,
        batch_size=options.batch_size,
        seed=options.seed,
        accelerator=accelerator,
        say=tell,
        method=method,
        opened=opened,
        keep=asked(method, recipe.method, model=run.identity["model"], precision=options.precision),
        judge=judge,
    )
    count = sum(p.numel() for p in run.policy.trainable())
    tell(f"{recipe.method.name}: {count / 1e6:.2f}M trainable parameters of {run.policy.family.name}; {feed.about}")
    planned = {"batches": options.steps * options.accumulate, "held_out": HELD_OUT_BATCHES, "seed": options.seed}
    fill_kept(feed, run.policy, method, recipe.method, accelerator=accelerator, **planned)
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    with Reporter(accelerator, options.steps, options.log_every, first=run.progress.step) as reporter:
        _train(recipe, run, feed, _Hook(recipe, run, feed, reporter))
    _export(folder, run)
    dropped = list({d.where: d for d in gather_object(feed.dropped())}.values())
    accelerator.end_training()  # also ends the processes' group: nothing can wait for the others after it
    if dropped:
        tell(f"{len(dropped)} {_named(recipe)}; their pairs were left out: {listed(dropped)}")
    verdict = reporter.verdict()
    tell(f"{recipe.method.name}: {verdict}")
    return Trained(folder, run.progress.step, time.time() - started, verdict, reporter.history)


def _named(recipe: Recipe) -> str:
    return "images could not be read" if isinstance(recipe.data, ImageData) else "images or prompts could not be used"


def _silent(_: str) -> None:
    pass


@dataclass
class _Run:
    """The pieces of a run, and how far it is."""

    method: Any
    policy: Policy
    learner: loop.Learner
    identity: dict[str, str]
    progress: loop.Progress


def _assemble(recipe: Recipe, accelerator: Any, say: Say) -> _Run:
    """Load the model, make policy and optimizer, and go on from the last checkpoint if there is one."""
    options = recipe.train
    family = assemble.load_model(
        recipe.model,
        options.precision,
        accelerator.device,
        attention=options.attention,
        pack=options.pack,
        say=say,
    )
    identity = _identity(recipe, family)
    policy = assemble.build_policy(
        family, recipe.model, recipe.method.name, seed=options.seed, checkpointing=options.gradient_checkpointing
    )
    parameters = policy.trainable()
    optimizer = build_optimizer(
        parameters,
        options.optimizer,
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        weight_decay=options.weight_decay,
    )
    model, optimizer = accelerator.prepare(policy.model, optimizer)
    learner = loop.Learner(
        accelerator,
        optimizer,
        options.lr,
        schedule(options.schedule, warmup=options.warmup, steps=options.steps),
        options.clip,
        Average(parameters, options.ema) if options.ema else None,
    )
    method = methods.find(recipe.method.name)
    policy = Policy(family, model, policy.unwrapped, policy.reference)
    run = _Run(method, policy, learner, identity, loop.Progress())
    _resume(recipe, run, say)
    return run


def _identity(recipe: Recipe, family: Family) -> dict[str, str]:
    """What a checkpoint belongs to: it can be gone on from only where all of this is the same."""
    lora = recipe.model.lora
    targets = " ".join(family.usual_targets if lora.targets is None else lora.targets)
    adapters = f"lora of rank {lora.rank}, alpha {lora.alpha or lora.rank:g}, on {targets}"
    named = assemble.method_judge(recipe)
    beside = {"judge": named.path} if named is not None else {}
    beside |= {"denoiser": recipe.model.denoiser} if isinstance(recipe.model, JudgeModel) else {}
    return {
        **beside,
        "model": assemble.fingerprint(family.network),
        "method": recipe.method.name,
        "tune": adapters if recipe.model.tune == "lora" else "full",
        "data": recipe.data.path,
        "optimizer": recipe.train.optimizer,
    }


def _resume(recipe: Recipe, run: _Run, say: Say) -> None:
    """Load the latest checkpoint of the run's folder into it, if there is one."""
    path = checkpoint.latest(Path(recipe.output))
    if path is None:
        return
    saved = checkpoint.read(path, run.identity)
    if saved.step > recipe.train.steps:
        raise ValueError(
            f"train.steps: {path} has done {saved.step} updates already, more than the {recipe.train.steps} asked for; "
            "raise train.steps, or use another output folder"
        )
    average, scaler = run.learner.average, run.learner.accelerator.scaler
    if average is not None and "average" not in saved.state:
        raise ValueError(f"train.ema: {path} has no average of the weights; leave it out, or use another output folder")
    missing = run.policy.unwrapped.load_state_dict(saved.weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(
            f"{path}: has weights that the model lacks ({missing.unexpected_keys[0]}, ...); use another output folder"
        )
    run.learner.optimizer.load_state_dict(saved.state["optimizer"])
    if average is not None:
        average.load(saved.state["average"])
    if scaler is not None and "scaler" in saved.state:
        scaler.load_state_dict(saved.state["scaler"])
    torch.set_rng_state(saved.state["generator"])
    run.progress = loop.Progress(**saved.state["progress"])
    say(f"going on from {path.name}")


def _train(recipe: Recipe, run: _Run, feed: Feed, hook: _Hook) -> None:
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
        epoch, batch = run.progress.epoch, run.progress.batch
        places = ", ".join(feed.places(epoch, batch - 1)[:8])
        wider = ", or use train.precision: bfloat16" if options.precision == "float16" else ""
        raise FloatingPointError(
            f"train: the loss is not finite after update {run.progress.step}, in batch {batch} of epoch {epoch} "
            f"({places}); {_last(Path(recipe.output))}: lower train.lr{wider}"
        ) from error


def _last(output: Path) -> str:
    path = checkpoint.latest(output)
    return f"the same command goes on from {path.name}" if path else "nothing has been saved yet"


class _Hook:
    """After every update: report, and save when it is time and nothing is pending."""

    def __init__(self, recipe: Recipe, run: _Run, feed: Feed, reporter: Reporter) -> None:
        self.recipe, self.run, self.feed, self.reporter, self.due = recipe, run, feed, reporter, False

    def __call__(self, progress: loop.Progress, metrics: Mapping[str, Tensor], resting: bool) -> None:
        self.reporter.update(progress.step, metrics)
        self.due |= progress.step % self.recipe.train.save_every == 0 or progress.step == self.recipe.train.steps
        if self.due and resting:
            self.due = False
            score = _mean_loss(self.recipe, self.run, islice(self.feed.held_out(), HELD_OUT_BATCHES))
            if score is not None:
                self.run.learner.accelerator.log({"held-out loss": score}, step=progress.step)
                self.reporter.say(f"update {progress.step}  held-out loss {score:.4g}")
            self._require_finite(progress, score)
            if self.run.learner.accelerator.is_main_process:
                _save(self.recipe, self.run, score)
            self.run.learner.accelerator.wait_for_everyone()

    def _require_finite(self, progress: loop.Progress, score: float | None) -> None:
        """Refuse to save what nobody could go on from: an update can break a model whose last loss was finite."""
        loss = score if score is not None else _mean_loss(self.recipe, self.run, islice(self.feed.batches(0), 1))
        whole = all(torch.isfinite(x).all() for x in trainable_weights(self.run.policy.unwrapped).values())
        if not whole or (loss is not None and not math.isfinite(loss)):
            raise checkpoint.CheckpointError(
                f"train: after update {progress.step} the {'loss is' if whole else 'weights are'} not finite, so that "
                f"update was not saved; {_last(Path(self.recipe.output))}: lower train.lr"
            )


def _save(recipe: Recipe, run: _Run, score: float | None) -> None:
    learner = run.learner
    state: dict[str, Any] = {
        "optimizer": learner.optimizer.state_dict(),
        "progress": asdict(run.progress),
        "generator": torch.get_rng_state(),
    }
    if learner.average is not None:
        state["average"] = learner.average.state()
    if learner.accelerator.scaler is not None:
        state["scaler"] = learner.accelerator.scaler.state_dict()
    weights = trainable_weights(run.policy.unwrapped)
    output = Path(recipe.output)
    checkpoint.write(output, run.progress.step, weights, state, run.identity, keep=recipe.train.keep, score=score)


def trainable_weights(net: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@torch.no_grad()
def _mean_loss(recipe: Recipe, run: _Run, batches: Iterable[Any]) -> float | None:
    """The method's loss on these batches under fixed draws, or None where they have no pair. Lower is better."""
    total, weight = 0.0, 0.0
    bare = Policy(run.policy.family, run.policy.unwrapped, run.policy.unwrapped, run.policy.reference)
    for batch in batches:
        for contrast in loop.make_contrasts(run.method, bare, batch, recipe.method, Draws(recipe.train.seed)):
            step = run.method.loss(bare, contrast, recipe.method)
            total += float((step.losses * step.weights).sum())
            weight += float(step.weights.sum())
    return total / weight if weight else None


def _export(folder: Path, run: _Run) -> None:
    """Write the trained model (its average, if there is one) the way its library loads it, and what it was made of."""
    if run.learner.accelerator.is_main_process:
        parameters, average = run.policy.trainable(), run.learner.average
        if average is not None:
            average.swap(parameters)
        with written(folder) as part:
            run.policy.family.save(part, run.policy.unwrapped)
            about = {"step": run.progress.step, "identity": run.identity}
            (part / TRAINED).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if average is not None:
            average.swap(parameters)
    run.learner.accelerator.wait_for_everyone()
