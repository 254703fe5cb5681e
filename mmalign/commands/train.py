"""The command `train`: build or resume a recipe's run, train it, and export the model."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from mmalign import atomic_io, methods
from mmalign.atomic_io import atomic_write, check_owned
from mmalign.commands import _resume, cache, preflight
from mmalign.commands._after_update import AfterUpdate
from mmalign.commands._samples import Sampler, open_previews
from mmalign.commands.load_recipe import dump_recipe
from mmalign.config import Recipe, Train
from mmalign.data.data_module import DataModule, Splits
from mmalign.data.pairs import format_rows
from mmalign.families.base import Family
from mmalign.families.compile import compile_blocks
from mmalign.families.types import LoraSettings
from mmalign.modalities import loading, modality_of
from mmalign.modalities.loading import F
from mmalign.policy import AdaptersOff, FrozenCopy, Policy, Reference, sharding, trained_outside_adapters
from mmalign.resources import resolve_model
from mmalign.training import checkpoint, loop
from mmalign.training.export import RUN_INFO, export
from mmalign.training.guard import MAX_BAD
from mmalign.training.launch import name_lost_processes, open_accelerator
from mmalign.training.record import Record
from mmalign.training.reporter import Reporter
from mmalign.training.run import TrainingRun, build_train_state, last_saved, resume
from mmalign.training.stopping import StopRequest
from mmalign.training.trackers import init_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MANY_EPOCHS = 20  # beyond which a run repeats few pairs


@dataclass(frozen=True)
class Trained:
    """Result of `train`.

    Attributes:
        folder: folder of the trained model, in the format of diffusers, or of transformers and peft.
        steps: updates done in total.
        seconds: duration of this call.
        verdict: a sentence on the run's outcome.
        history: the mean metrics of every report of the run, also of calls before a resume.
    """

    folder: Path
    steps: int
    seconds: float
    verdict: str
    history: list[dict[str, float]]


@overload
def train(recipe: Recipe, *, dry_run: Literal[False] = False) -> Trained: ...
@overload
def train(recipe: Recipe, *, dry_run: Literal[True]) -> None: ...
def train(recipe: Recipe, *, dry_run: bool = False) -> Trained | None:
    """Train by a recipe, or resume from its last checkpoint with the same numbers as an uninterrupted run.

    The recipe's output receives checkpoints, the tracker's logs, `recipe.yaml` and at the end `model/`.

    Args:
        recipe: the recipe.
        dry_run: true to check everything before the first update, show the plan, write nothing and return None.

    Raises:
        ValueError: the recipe, the data or a checkpoint does not fit.
        FloatingPointError: a loss is not finite; the last checkpoint stays.
        CheckpointError: a checkpoint could not be written; earlier ones stay.
        ConnectionError: another process of the launch ended or stopped answering.
    """
    if dry_run:
        from mmalign.commands import _dry_run  # it imports this module

        _dry_run.dry_run(recipe)
        return None
    preflight.check(recipe, "training")
    output = atomic_io.make_folder("output", Path(recipe.output))
    lost = name_lost_processes(recipe.limits.rank_timeout, lambda: last_saved(output))
    with atomic_io.folder_lock(output), lost:
        return _train_locked(recipe, output)


def _train_locked(recipe: Recipe, output: Path) -> Trained:
    """Train in the locked folder `output`."""
    started, options = time.time(), recipe.train
    needs = methods.requirements_of(recipe.method)
    splits, accelerator = _open_data(recipe, needs, output)
    recipe = modality_of(recipe).name_annotators(recipe, splits[0])

    # Models and the last checkpoint
    device = accelerator.device
    reward_model = loading.build_method_judge(recipe, device)
    family = loading.load_for_training(recipe, device)
    identity = _resume.identify(recipe, family, splits[0], accelerator.num_processes)
    saved, folder = _resume.last_checkpoint(recipe, identity), output / "model"
    reporter = Reporter(
        accelerator,
        options.steps,
        options.log_every,
        pairs_per_update=pairs_per_update(options, needs, accelerator.num_processes),
        first=saved.step if saved is not None else 0,
    )
    if saved is not None and saved.step == options.steps:
        # No reference, since nothing is trained
        run = start_run(recipe, family, identity, saved, accelerator, reference_cached=True)
        export(folder, run)
        accelerator.end_training()
        reporter.load(run.reports)
        done = "all updates were done already: nothing was trained"
        logger.info(f"{folder}: {done}; raise train.steps to continue, or name another output to begin anew")
        return _result(recipe, run, reporter, started)
    if accelerator.is_main_process:  # only now is the folder known to be this run's
        with atomic_write(output / "recipe.yaml") as part:
            part.write_text(dump_recipe(recipe), encoding="utf-8")

    # Caches, policy and optimizer
    data_module = cache.build_filled_data_module(
        recipe, family, accelerator=accelerator, splits=splits, reward_model=reward_model
    )
    previews = open_previews(recipe, family, splits)
    run = start_run(
        recipe, family, identity, saved, accelerator, reference_cached=cache.replaces_reference(data_module)
    )
    del saved  # the optimizer's state in it is as large as the optimizer's own
    cache.offload_encoders(data_module, recipe, family)
    number = _count_trainable(run.policy)
    logger.info(f"{recipe.method.name}: {number} trainable parameters of {run.policy.family.name}; {data_module.about}")

    # Training, export and verdict
    init_trackers(accelerator, output.resolve().name, recipe.model_dump())
    reporter.load(run.reports)
    sampler = Sampler(recipe, run, previews) if previews is not None else None
    with reporter, StopRequest(recipe.limits.hours) as stop:
        hook = AfterUpdate(recipe, run, data_module, reporter, stop, sampler)
        _train(recipe, run, data_module, hook)
    export(folder, run)
    _end(data_module, accelerator)
    if run.train_state.guard.left_out:
        logger.warning(f"train.guard: {run.train_state.guard.left_out} bad updates were left out")
    return _result(recipe, run, reporter, started)


def _open_data(recipe: Recipe, needs: methods.Requirements, output: Path) -> tuple[Splits, Accelerator]:
    """Check the folder, open data and processes, and log the updates; no model is loaded for that."""
    options = recipe.train
    check_owned(output / "model", RUN_INFO)
    splits = modality_of(recipe).open_pairs(recipe, needs)
    preflight.check_annotators(needs, splits[0])
    trackers = options.trackers if options.trackers else None
    accelerator = open_accelerator(
        options, log_with=trackers, project_dir=recipe.output, rank_timeout=recipe.limits.rank_timeout
    )
    for line in needs.check():
        logger.info(line)
    logger.info(describe_updates(options, needs, len(splits[0]), accelerator.num_processes))
    return splits, accelerator


def _result(recipe: Recipe, run: TrainingRun, reporter: Reporter, started: float) -> Trained:
    """Log the verdict, where the weights are, how other programs load them and the next command; return the result."""
    folder, progress = Path(recipe.output) / "model", run.progress
    logger.info(f"{recipe.method.name}: {reporter.verdict}")
    if methods.requirements_of(recipe.method).generates and progress.seconds > 0:
        share = progress.contrast_seconds / progress.seconds
        logger.info(f"generation and rewards: {share:.0%} of the {progress.seconds:.0f} s of the updates")
    hint = modality_of(recipe).loading_hint(recipe.model.tune, folder, "")
    logger.info(f"{folder}: the trained model; load it with {hint}")
    if recipe.evaluate is not None:
        logger.info(f"next: mmalign evaluate {shlex.quote(str(folder.with_name('recipe.yaml')))}")
    return Trained(folder, run.progress.step, time.time() - started, reporter.verdict, reporter.history)


def pairs_per_update(options: Train, needs: methods.Requirements, num_processes: int = 1) -> int:
    """Return the number of pairs of an update, over all processes and contrasts; two generated outputs are a pair."""
    return num_processes * needs.contrasts(options.batch_size).pairs * options.gradient_accumulation_steps


def describe_updates(options: Train, needs: methods.Requirements, num_pairs: int, num_processes: int) -> str:
    """Return a sentence with the pairs of an update, and the updates of an epoch and of the run.

    Args:
        options: the settings of the training.
        needs: the method's needs; a method that generates its images learns several times from a batch of prompts.
        num_pairs: pairs, or prompts, of the training split.
        num_processes: number of processes.
    """
    num_batches = max(1, num_pairs // (options.batch_size * num_processes))  # a partial batch alone counts
    per_batch, accumulated = needs.contrasts(options.batch_size).number, options.gradient_accumulation_steps
    per_epoch = num_batches * per_batch / accumulated
    number, epochs = pairs_per_update(options, needs, num_processes), options.steps / per_epoch
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    steps = f"an epoch has {per_epoch:g} updates, and {options.steps:,} updates are {_rounded(epochs)} epochs"
    if needs.generates:
        batch = f"a batch of {options.batch_size} gives up to {per_batch} contrasts"
        return f"{num_pairs:,} prompts; {batch}; update: {processes} x {accumulated} contrasts; {steps}"
    few = ": few pairs" if epochs > MANY_EPOCHS else ""
    return (
        f"{num_pairs:,} pairs; update: {processes} x {options.batch_size} pairs x {accumulated} batches = {number} "
        f"pairs; {steps}{few}"
    )


def _count_trainable(policy: Policy) -> str:
    """Return the number of trainable parameters, in millions if they are many."""
    count = sum(p.numel() for p in policy.trainable())
    return f"{count / 1e6:.2f}M" if count >= 10_000 else f"{count:,}"


def _rounded(number: float) -> str:
    """Return a number with two digits behind the point if it is below 10, else as an integer."""
    return f"{number:.3g}" if number < 10 else f"{number:,.0f}"


def _end(data_module: DataModule, accelerator: Accelerator) -> None:
    """Close the trackers and the process group, and log the rows that no process could use."""
    from accelerate.utils import gather_object

    dropped = list({d.location: d for d in gather_object(data_module.skipped())}.values())
    accelerator.end_training()  # also ends the process group: no process can wait for others after it
    if dropped:
        reason = "images or pairs could not be used; their pairs were left out"
        logger.warning(f"{len(dropped)} {reason}: {format_rows(dropped)}")


def _train(recipe: Recipe, run: TrainingRun, data_module: DataModule, hook: AfterUpdate) -> None:
    """Run the loop; roll back bad updates if the guard says so, and name their pairs in the error if not."""
    options, output, targets = recipe.train, Path(recipe.output), list[str]()
    if options.guard.action == "rollback" and run.progress.step == 0:
        hook.save(None)  # a first bad update goes back to the start
    while True:
        try:
            loop.train(
                run.method,
                recipe.method,
                run.policy,
                data_module.batches,
                run.train_state,
                steps=options.steps,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                seed=options.seed,
                progress=run.progress,
                after_update=hook,
            )
            return
        except loop.BadUpdateError as error:
            epoch, batch, pairs = _failed_batch(error, data_module)
            what = f"{error.reason} after update {run.progress.step}, in batch {batch} of epoch {epoch}"
            what += f" ({', '.join(pairs[:8])})"
            # Back to a checkpoint, but not forever to the same one
            target = _rollback_target(output, options.save_every) if options.guard.action == "rollback" else None
            if target is None or targets.count(target.name) >= MAX_BAD:
                wider = ", or use train.precision: bfloat16" if options.precision == "float16" else ""
                raise FloatingPointError(f"train: {what}; {last_saved(output)}: lower train.lr{wider}") from error
            targets.append(target.name)
            logger.warning(f"{what}: back to {target.name}, and on with the next batch")
            _roll_back(run, checkpoint.read(target, run.identity), output)
            hook.reporter.load(run.reports)


def _rollback_target(output: Path, save_every: int) -> Path | None:
    """Return the last checkpoint at a multiple of `save_every`, else the last: a stop in between changes nothing."""
    paths = checkpoint.complete(output)
    regular = [path for path in paths if int(path.name.rpartition("-")[2]) % save_every == 0]
    return (regular or paths)[-1] if paths else None


def _roll_back(run: TrainingRun, saved: checkpoint.Checkpoint, output: Path) -> None:
    """Load a checkpoint, and keep the position in the data, so that random numbers and pairs go on."""
    position, left_out = run.progress, run.train_state.guard.left_out + 1
    run.train_state.optimizer.zero_grad()
    resume(run, saved, output)
    # The time that was spent, too; the number of updates is the checkpoint's
    run.progress = replace(position, step=run.progress.step, pending=run.progress.pending)
    run.train_state.guard.left_out = left_out


def _failed_batch(error: loop.BadUpdateError, data_module: DataModule) -> tuple[int, int, list[str]]:
    """Return the epoch, the batch and the locations of the pairs that failed, on whichever process."""
    from accelerate.utils import gather_object

    location, failed = error.location, list[tuple[int, int, list[str]]]()
    if location is not None:
        failed = [(location.epoch, location.batch, data_module.batch_locations(location.epoch, location.batch - 1))]
    # All processes raise the error in the same update
    gathered: list[tuple[int, int, list[str]]] = gather_object(failed)
    return gathered[0]


def start_run(
    recipe: Recipe,
    family: Family,
    identity: dict[str, str],
    saved: checkpoint.Checkpoint | None,
    accelerator: Accelerator,
    reference_cached: bool = False,
) -> TrainingRun:
    """Build policy and optimizer, and resume from a checkpoint, if there is one.

    Raises:
        ValueError: the model cannot be trained as requested, or the checkpoint does not fit it.
    """
    policy, train_state = build_train_state(
        build_policy(family, recipe, reference_cached=reference_cached), recipe.method, recipe.train, accelerator
    )
    method = methods.find(recipe.method.name)
    run = TrainingRun(method, policy, train_state, identity, loop.Progress(), Record(recipe.model_dump()))
    if saved is not None:
        resume(run, saved, Path(recipe.output))
        logger.info(f"resuming from {checkpoint.name(saved.step)}")
        # Options that changed while the run was stopped
        run.record = saved.record.resumed(recipe.model_dump(), saved.step + 1)
        for change in run.record.changes[len(saved.record.changes) :]:
            logger.warning(str(change))
    return run


def build_policy(
    family: F, recipe: Recipe, *, reference_cached: bool = False, with_reference: bool = False
) -> Policy[F]:
    """Return the policy to train, with its reference.

    With LoRA the reference is the network with its adapters off; with full fine-tuning, or heads beside the adapters,
    it is a frozen copy. There is no reference if the method needs none, unless `with_reference`, and no copy of a fully
    trained network if its scores are `reference_cached`.
    """
    model, options, needs = recipe.model, recipe.train, methods.requirements_of(recipe.method)
    modality_of(recipe).add_heads(family, recipe)
    needed = with_reference or needs.reference
    reference: Reference = None
    if model.tune == "lora":
        lora, adapter = model.lora, model.adapter
        targets = loading.lora_targets(family, lora)
        if adapter is not None and adapter.use == "continue":
            family.continue_adapter(resolve_model(adapter.path))
        else:
            family.add_lora(
                LoraSettings(lora.rank, lora.scaled_alpha, targets, options.seed, dropout=lora.dropout, dora=lora.dora)
            )
        # Trained weights outside the adapters stay on without them: only a copy is a fixed reference then
        beside = trained_outside_adapters(family.network)
        reference = (FrozenCopy(family.frozen_copy()) if beside else AdaptersOff()) if needed else None
    else:
        if options.sharding != "none":  # a device need not hold the whole policy and the whole reference
            sharding.move_to_host(family.network, family.shard_plan(family.network))
        if needed and not reference_cached:
            reference = FrozenCopy(family.frozen_copy())
        family.unfreeze()
    if options.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    if options.compile and isinstance(reference, FrozenCopy):  # a copy is not compiled with its original
        compile_blocks(family.blocks(reference.model))
    memory = dict(needs.memory.start) if needs.memory is not None else {}
    return Policy(family, family.network, family.network, reference, memory=memory)
