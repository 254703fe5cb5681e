"""State of a training run, with its optimizer and checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.config import MethodConfig, Train
from mmalign.methods import AnyMethod, requirements_of
from mmalign.policy import Policy, shard_policy, sharding
from mmalign.policy.lagging import LaggingCopy, mixed_share
from mmalign.reading.weights import intact
from mmalign.training import checkpoint, loop
from mmalign.training.guard import Guard
from mmalign.training.optim import average_share, build_optimizer, schedule
from mmalign.training.record import Record

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.optimizer import StateDict

MAX_VALIDATION_BATCHES = 16  # of the validation split, to score a checkpoint


@dataclass
class TrainingRun:
    """Method, policy, optimizer, identity, progress and record of a run.

    `reports` is the state of the reporter, with the history of the run's metrics.
    """

    method: AnyMethod
    policy: Policy
    train_state: loop.TrainState
    identity: dict[str, str]
    progress: loop.Progress
    record: Record
    reports: dict[str, object] = field(default_factory=dict)


def build_train_state(
    policy: Policy, method: MethodConfig, options: Train, accelerator: Accelerator
) -> tuple[Policy, loop.TrainState]:
    """Return the policy, prepared by the accelerator or sharded, with its optimizer, schedule, clipping and average.

    It has the method's lagging copies of its trained weights.
    """
    # Sharding replaces the parameters, so it precedes the optimizer
    if options.sharding == "fsdp2":
        policy = shard_policy(policy, accelerator.device)
    parameters = policy.trainable()
    betas = (options.betas[0], options.betas[1])
    # Decay takes an adapter to the reference, and a magnitude of DoRA away from it
    magnitudes = {id(p) for name, p in policy.unwrapped.named_parameters() if ".lora_magnitude_vector." in name}
    optimizer = build_optimizer(
        [p for p in parameters if id(p) not in magnitudes],
        options.optimizer,
        lr=options.lr,
        betas=betas,
        weight_decay=options.weight_decay,
        undecayed=[p for p in parameters if id(p) in magnitudes],
    )
    # A sharded network needs no wrapper; accelerate would make it data-parallel
    if policy.skeleton is None:
        model, optimizer = accelerator.prepare(policy.model, optimizer)
        policy = replace(policy, model=model)
    else:
        optimizer = accelerator.prepare(optimizer)
    # Copies that follow the updates: a moving reference, and a policy that lags behind to generate
    reference, old = (
        LaggingCopy(parameters, partial(mixed_share, **rule.model_dump())) if rule is not None else None
        for rule in (method.reference, requirements_of(method).old)
    )
    policy = replace(policy, total=partial(accelerator.reduce, reduction="sum"), moving=reference, old=old)
    train_state = loop.TrainState(
        accelerator,
        optimizer,
        options.lr,
        schedule(options.schedule, warmup_steps=options.warmup_steps, steps=options.steps),
        options.max_grad_norm,
        LaggingCopy(parameters, partial(average_share, decay=options.ema)) if options.ema else None,
        Guard(**options.guard.model_dump()),
    )
    return policy, train_state


def resume(run: TrainingRun, saved: checkpoint.Checkpoint, output: Path) -> None:
    """Load a checkpoint of the folder `output` into a run; options of the optimizer stay those of the run.

    Raises:
        ValueError: the checkpoint lacks the average, a lagging copy or a weight, or has weights that the model lacks.
    """
    path = output / checkpoint.name(saved.step)
    # All that the recipe asks for now must be in the checkpoint, and nothing else
    ema = run.train_state.ema
    if ema is not None and "average" not in saved.state:
        raise ValueError(f"train.ema: {path} has no moving average; leave it out, or use another output folder")
    for key in run.policy.lagging:
        if key not in saved.state.get("lagging", {}):
            raise ValueError(f"{key}: {path} has no lagging copy; leave it out, or use another output folder")
    needed = trainable_weights(run.policy.unwrapped).keys()
    for problem, names in (
        ("lacks weights of", needed - saved.weights.keys()),
        ("has other weights than", saved.weights.keys() - needed),
    ):
        if names:
            raise ValueError(f"{path}: {problem} the model ({min(names)}, ...); use another output folder")
    # Of a sharded run each process takes its own part
    with intact("train", path, "a checkpoint of this run", "use another output folder"):
        _load(run, saved if run.policy.skeleton is None else _split(run, saved))


def _split(run: TrainingRun, saved: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
    """Return the checkpoint with this process's parts of its tensors."""
    own, state = trainable_weights(run.policy.unwrapped), dict(saved.state)
    # The optimizer's state numbers its parameters in the order of the groups
    parameters = [p for group in run.train_state.optimizer.param_groups for p in group["params"]]
    weights = {name: sharding.split(tensor, own[name]) for name, tensor in saved.weights.items()}
    moments = {i: _split_moments(moments, parameters[i]) for i, moments in state["optimizer"]["state"].items()}
    state["optimizer"] = {**state["optimizer"], "state": moments}

    def split(copied: list[Tensor]) -> list[Tensor]:
        return [sharding.split(*each) for each in zip(copied, run.policy.trainable(), strict=True)]

    if "average" in state:
        state["average"] = split(state["average"])
    state["lagging"] = {key: split(copied) for key, copied in state.get("lagging", {}).items()}
    return replace(saved, weights=weights, state=state)


def _load(run: TrainingRun, saved: checkpoint.Checkpoint) -> None:
    """Load a checkpoint's weights and state.

    Raises:
        Exception: the state is of another optimizer or version, or the weights have other shapes.
    """
    state, ema, scaler = saved.state, run.train_state.ema, run.train_state.accelerator.scaler
    progress = loop.Progress(**state["progress"])
    if progress.step != saved.step:
        raise ValueError(f"state.pt is of update {progress.step}")
    # Not strict: a checkpoint holds the trained weights alone
    run.policy.unwrapped.load_state_dict(saved.weights, strict=False)
    _load_optimizer(run.train_state.optimizer, state["optimizer"])
    if ema is not None:
        ema.load(state["average"])
    for key, copy in run.policy.lagging.items():
        copy.load(state["lagging"][key])
    # Only float16 has a scaler of gradients
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["generator"])
    run.train_state.guard.load(state["guard"])
    run.policy.memory.update(state["memory"])
    run.progress, run.reports = progress, state["reports"]


def _load_optimizer(optimizer: torch.optim.Optimizer, state: StateDict) -> None:
    """Load the moments of an optimizer, and keep its options: a recipe may have changed them."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        group.update(kept)


def _split_moments(moments: StateDict, parameter: Tensor) -> StateDict:
    """Return this process's part of the optimizer's tensors for one parameter; other tensors are counts of updates."""
    alike = {name for name, value in moments.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
    return {name: sharding.split(x, parameter) if name in alike else x for name, x in moments.items()}


def save(run: TrainingRun, output: Path, score: float | None, *, keep_checkpoints: int) -> None:
    """Write a checkpoint to the folder `output`, with the run's score (lower is better), if it has one.

    All processes call it together; the main one writes. A sharded run's checkpoint is that of one that is not sharded.

    Raises:
        CheckpointError: the checkpoint could not be written.
    """
    train_state = run.train_state
    state: StateDict = {
        "optimizer": train_state.optimizer.state_dict(),
        "progress": asdict(run.progress),
        "generator": torch.get_rng_state(),
        "reports": run.reports,
        "guard": train_state.guard.state(),
        "memory": run.policy.memory,
        "lagging": {key: copy.weights for key, copy in run.policy.lagging.items()},
    }
    if train_state.ema is not None:
        state["average"] = train_state.ema.weights
    if train_state.accelerator.scaler is not None:
        state["scaler"] = train_state.accelerator.scaler.state_dict()
    weights, is_main = trainable_weights(run.policy.unwrapped), train_state.accelerator.is_main_process
    # Gathered by all processes together, and kept by the main one
    if run.policy.skeleton is not None:
        weights, state = (sharding.whole(tree, keep=is_main) for tree in (weights, state))
    if not is_main:
        return
    checkpoint.write(
        output,
        run.progress.step,
        weights,
        state,
        run.identity,
        keep_checkpoints=keep_checkpoints,
        score=score,
        resumable=not run.progress.pending,
        record=run.record,
    )


def trainable_weights(net: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def last_saved(output: Path) -> str:
    """Return the checkpoint to resume from, as the end of a sentence."""
    path = checkpoint.latest(output, resumable=True)
    return f"the same command resumes from {path.name}" if path else "nothing has been saved yet"
