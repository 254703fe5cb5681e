"""A run in training: its pieces put together, gone on from a checkpoint, saved, and left as a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import assemble, checkpoint, loop, methods
from mmalign.families import Family
from mmalign.optim import Average, build_optimizer, schedule
from mmalign.output import TRAINED, written
from mmalign.policy import Policy
from mmalign.sections import JudgeModel, Recipe, Train

Say = Callable[[str], None]
HELD_OUT_BATCHES = 16  # of the held-out pairs that score a checkpoint


@dataclass
class Run:
    """The pieces of a run, and how far it is."""

    method: Any
    policy: Policy
    learner: loop.Learner
    identity: dict[str, str]
    progress: loop.Progress


def require_all(accelerator: Any) -> None:
    """Refuse processes that do not know of one another.

    Raises:
        ValueError: more were started than each knows of.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"train: {launched} processes were started, and each knows of {accelerator.num_processes}: all would work "
            "alone on one folder; on CPUs set ACCELERATE_USE_CPU=true"
        )


def begin(
    recipe: Recipe,
    family: Family,
    identity: dict[str, str],
    saved: checkpoint.Checkpoint | None,
    accelerator: Any,
    say: Say,
    kept: bool = False,
) -> Run:
    """Make policy and optimizer, without a reference if its scores are `kept`, and go on from a checkpoint, if any.

    Raises:
        ValueError: the model cannot be trained so, or the checkpoint does not fit it.
    """
    policy, learner = build_learner(assemble.build_policy(family, recipe, kept=kept), recipe.train, accelerator)
    method = methods.find(recipe.method.name)
    run = Run(method, policy, learner, identity, loop.Progress())
    if saved is not None:
        _resume(recipe, run, saved)
        say(f"going on from checkpoint-{saved.step:08d}")
    return run


def build_learner(policy: Policy, options: Train, accelerator: Any) -> tuple[Policy, loop.Learner]:
    """The policy as the accelerator has prepared it, and what changes it: optimizer, schedule, clipping, average."""
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
    return Policy(policy.family, model, policy.unwrapped, policy.reference), learner


def identify(recipe: Recipe, family: Family) -> dict[str, str]:
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


def last_checkpoint(recipe: Recipe, identity: dict[str, str], say: Say) -> checkpoint.Checkpoint | None:
    """The checkpoint of the run's folder to go on from: the latest, if there is one.

    One that was written inside a batch is where a run has ended, and is taken only where nothing is left to do.

    Raises:
        ValueError: it is another run's, is damaged, or has done more updates than the recipe asks for.
    """
    output, steps = Path(recipe.output), recipe.train.steps
    path = checkpoint.latest(output)
    if path is None:
        return None
    saved = checkpoint.read(path, identity)
    if saved.step > steps:
        raise ValueError(
            f"train.steps: {path} has done {saved.step} updates already, more than the {steps} asked for; "
            "raise train.steps, or use another output folder"
        )
    if saved.step < steps and saved.state["progress"].get("pending"):
        resting = checkpoint.latest(output, resting=True)
        where = f"what comes after {resting.name}" if resting is not None else "it"
        say(f"{path.name} is where a run ended inside a batch, and no other can go on from: {where} is done again")
        return checkpoint.read(resting, identity) if resting is not None else None
    return saved


def _resume(recipe: Recipe, run: Run, saved: checkpoint.Checkpoint) -> None:
    """Load a checkpoint into a run."""
    path = Path(recipe.output) / f"checkpoint-{saved.step:08d}"
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


def save(recipe: Recipe, run: Run, score: float | None) -> None:
    """Write a checkpoint with the run's score, lower is better, if it has one.

    Raises:
        CheckpointError: it could not be written.
    """
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
    checkpoint.write(
        output,
        run.progress.step,
        weights,
        state,
        run.identity,
        keep=recipe.train.keep,
        score=score,
        resting=not run.progress.pending,
    )


def trainable_weights(net: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def last_saved(output: Path) -> str:
    """What a person can go on from, as the end of a sentence."""
    path = checkpoint.latest(output, resting=True)
    return f"the same command goes on from {path.name}" if path else "nothing has been saved yet"


def export(folder: Path, run: Run) -> None:
    """Write the trained model (its average, if there is one) the way its library loads it, and what it was made of."""
    if run.learner.accelerator.is_main_process:
        parameters, average = run.policy.trainable(), run.learner.average
        if average is not None:
            average.swap(parameters)
        with written(folder) as part:
            run.policy.family.save(part, run.policy.unwrapped)
            about = {"step": run.progress.step, "seconds": run.progress.seconds, "identity": run.identity}
            (part / TRAINED).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if average is not None:
            average.swap(parameters)
    run.learner.accelerator.wait_for_everyone()
