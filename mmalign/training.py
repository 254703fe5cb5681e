"""`train` a recipe: put the pieces together, go on from a checkpoint, and leave a model and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import assemble, checkpoint, loop, methods
from mmalign.data.pairs import listed
from mmalign.draws import Draws
from mmalign.feed import Feed, open_feed
from mmalign.optim import Average, build_optimizer, schedule
from mmalign.policy import Policy
from mmalign.recipe import Recipe, dump_recipe
from mmalign.report import Reporter

Say = Callable[[str], None]
HELD_OUT_BATCHES = 16  # of the held-out pairs that score a checkpoint


@dataclass(frozen=True)
class Trained:
    """What `train` leaves.

    Attributes:
        folder: the trained model, as diffusers loads it.
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
    from accelerate.utils import set_seed

    started, options = time.time(), recipe.train
    assemble.check(recipe)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    precision = "fp16" if options.precision == "float16" else "no"  # other precisions are the family's own autocast
    trackers = options.trackers if options.trackers else None
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers, project_dir=str(output))
    set_seed(options.seed)
    if accelerator.is_main_process:
        (output / "recipe.yaml").write_text(dump_recipe(recipe))
    run = _assemble(recipe, accelerator, say if accelerator.is_main_process else lambda _: None)
    accelerator.init_trackers("logs", config={"recipe": dump_recipe(recipe)})
    with Reporter(accelerator, options.steps, options.log_every, first=run.progress.step) as reporter:
        loop.train(
            run.method,
            recipe.method,
            run.policy,
            run.feed.batches,
            run.learner,
            steps=options.steps,
            accumulate=options.accumulate,
            seed=options.seed,
            progress=run.progress,
            after_update=_Hook(recipe, run, reporter),
        )
    accelerator.end_training()
    folder = _export(output / "model", run)
    dropped = run.feed.dropped()
    if dropped:
        say(f"{len(dropped)} images could not be read; their pairs were left out: {listed(dropped)}")
    verdict = reporter.verdict()
    say(f"{recipe.method.name}: {verdict}")
    return Trained(folder, run.progress.step, time.time() - started, verdict, reporter.history)


@dataclass
class _Run:
    """The pieces of a run, and how far it is."""

    method: Any
    policy: Policy
    learner: loop.Learner
    feed: Feed
    identity: dict[str, str]
    progress: loop.Progress


def _assemble(recipe: Recipe, accelerator: Any, say: Say) -> _Run:
    options = recipe.train
    family = assemble.load_model(recipe.model, options.precision, accelerator.device)
    identity = {
        "model": assemble.fingerprint(family.denoiser),
        "method": recipe.method.name,
        "tune": recipe.model.tune,
        "data": recipe.data.path,
    }
    feed = open_feed(
        family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=options.batch_size,
        seed=options.seed,
        accelerator=accelerator,
        say=say,
    )
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
    run = _Run(
        method, Policy(family, model, policy.unwrapped, policy.reference), learner, feed, identity, loop.Progress()
    )
    _resume(Path(recipe.output), run, say)
    count = sum(p.numel() for p in parameters)
    say(f"{recipe.method.name}: {count / 1e6:.2f}M trainable parameters of {family.name}; {feed.about}")
    return run


def _resume(output: Path, run: _Run, say: Say) -> None:
    """Load the latest checkpoint of the run's folder into it, if there is one."""
    path = checkpoint.latest(output)
    if path is None:
        return
    saved = checkpoint.read(path, run.identity)
    missing = run.policy.unwrapped.load_state_dict(saved.weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(
            f"{path}: has weights that the model lacks ({missing.unexpected_keys[0]}, ...); use another output folder"
        )
    run.learner.optimizer.load_state_dict(saved.state["optimizer"])
    if run.learner.average is not None:
        run.learner.average.load(saved.state["average"])
    if run.learner.accelerator.scaler is not None:
        run.learner.accelerator.scaler.load_state_dict(saved.state["scaler"])
    torch.set_rng_state(saved.state["generator"])
    run.progress = loop.Progress(**saved.state["progress"])
    say(f"going on from {path.name}")


class _Hook:
    """After every update: report, and save when it is time and nothing is pending."""

    def __init__(self, recipe: Recipe, run: _Run, reporter: Reporter) -> None:
        self.recipe, self.run, self.reporter, self.due = recipe, run, reporter, False

    def __call__(self, progress: loop.Progress, metrics: Mapping[str, Tensor], resting: bool) -> None:
        self.reporter.update(progress.step, metrics)
        self.due |= progress.step % self.recipe.train.save_every == 0 or progress.step == self.recipe.train.steps
        if self.due and resting:
            self.due = False
            score = _held_out_loss(self.recipe, self.run)
            if score is not None:
                self.run.learner.accelerator.log({"held-out loss": score}, step=progress.step)
                self.reporter.say(f"update {progress.step}  held-out loss {score:.4g}")
            if self.run.learner.accelerator.is_main_process:
                _save(self.recipe, self.run, score)
            self.run.learner.accelerator.wait_for_everyone()


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
def _held_out_loss(recipe: Recipe, run: _Run) -> float | None:
    """The method's loss on held-out pairs under fixed draws, or None where no pairs are held out. Lower is better."""
    total, weight = 0.0, 0.0
    bare = Policy(run.policy.family, run.policy.unwrapped, run.policy.unwrapped, run.policy.reference)
    for number, batch in enumerate(run.feed.held_out()):
        if number == HELD_OUT_BATCHES:
            break
        for contrast in loop.make_contrasts(run.method, bare, batch, recipe.method, Draws(recipe.train.seed)):
            step = run.method.loss(bare, contrast, recipe.method)
            total += float((step.losses * step.weights).sum())
            weight += float(step.weights.sum())
    return total / weight if weight else None


def _export(folder: Path, run: _Run) -> Path:
    """Write the trained model (its average, if there is one) the way diffusers loads it."""
    accelerator, net = run.learner.accelerator, run.policy.unwrapped
    if accelerator.is_main_process:
        parameters = run.policy.trainable()
        if run.learner.average is not None:
            run.learner.average.swap(parameters)
        try:
            run.policy.family.save(folder, net)
        except OSError as error:
            raise checkpoint.CheckpointError(
                f"{folder}: could not be written ({error}); "
                "the last checkpoint is intact: make room and run the same command again"
            ) from error
        if run.learner.average is not None:
            run.learner.average.swap(parameters)
    accelerator.wait_for_everyone()
    return folder
