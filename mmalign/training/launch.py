"""Processes of a launch: their accelerator, and refusals of requests that would be ignored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from mmalign.config import Train

if TYPE_CHECKING:
    from accelerate import Accelerator

# Numbers of processes by launcher: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH2, srun
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Options of accelerate's FSDP that `train.sharding` does not have, with the values that it satisfies
FSDP_OPTIONS = {
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),  # accelerate's default has the name of version 1
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap",),
}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}  # accelerate's names, and those of `train.precision`
DISTRIBUTED = ("NO", "MULTI_GPU", "MULTI_CPU")  # accelerate's types of a launch


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def check_launch(options: Train) -> None:
    """Refuse settings of a launcher that would be ignored, or fail with a library's error.

    Raises:
        ValueError: the environment asks for something that the run would not do.
    """
    for name, words in UNSUPPORTED.items():
        if _is_set(name):
            raise ValueError(
                f"train: accelerate is set to {words} ({name}), which is not supported; launch plain processes, and "
                "split large models by train.sharding: fsdp2"
            )
    if _is_set("ACCELERATE_USE_FSDP"):
        _check_fsdp(options)
    _check_accelerate(options)
    _check_processes()


def _check_fsdp(options: Train) -> None:
    """Refuse a launch with FSDP whose run would not be sharded as requested."""
    # Without FSDP_VERSION accelerate means version 1
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"train: accelerate is set to FSDP version {version} (ACCELERATE_USE_FSDP, FSDP_VERSION), which is not "
            "supported; use version 2, as in configs/accelerate/fsdp2.yaml"
        )
    if options.sharding != "fsdp2":
        raise ValueError(
            "train.sharding: the launch asks for FSDP (ACCELERATE_USE_FSDP), and the recipe for none, so every process "
            "would hold the whole model; set train.sharding: fsdp2"
        )
    # Options that the run would ignore
    for name, satisfied in FSDP_OPTIONS.items():
        value = os.environ.get(name, satisfied[0])
        if value.lower() not in satisfied:
            raise ValueError(f"train.sharding: fsdp2 does not do {name}={value}; use {satisfied[0]}, or none")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING") and not options.gradient_checkpointing:
        raise ValueError(
            "train.gradient_checkpointing: the launch asks for it (FSDP_ACTIVATION_CHECKPOINTING), and the recipe does "
            "not; set train.gradient_checkpointing: true"
        )


def _check_accelerate(options: Train) -> None:
    """Refuse accelerate's own precision, compilation and accumulation if the recipe does not agree."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no" and PRECISIONS.get(precision) != options.precision:
        raise ValueError(
            f"train.precision: the launch asks for {precision} (ACCELERATE_MIXED_PRECISION), and the recipe for "
            f"{options.precision}; set train.precision, and leave mixed_precision out of the launch"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no" and not options.compile:
        raise ValueError(
            f"train.compile: the launch asks for compilation by {compiler} (ACCELERATE_DYNAMO_BACKEND), which is not "
            "done; leave it out, and set train.compile: true"
        )
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulated not in ("1", "auto"):  # accelerate would divide every loss by it
        raise ValueError(
            f"train.gradient_accumulation_steps: the launch asks for {accumulated} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); leave it out of the launch, and set it in the recipe"
        )


def _check_processes() -> None:
    """Refuse a launch that asked for more processes than it started, or than there are GPUs."""
    # The environment that `accelerate launch` gives several processes, without their number
    started = any(name in os.environ for name in SIZES)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not started:
        raise ValueError(
            "train: accelerate was asked for several processes and started one (MASTER_ADDR is set, and WORLD_SIZE is "
            "not); on CPUs use ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m mmalign, on GPUs accelerate "
            "launch --multi_gpu, or ask for --num_processes 1"
        )
    # Every process needs a GPU of its own, if there are any
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < here and not _is_set("ACCELERATE_USE_CPU"):
        raise ValueError(
            f"train: {here} processes were launched on this machine, and {gpus} GPUs are visible; launch {gpus}, or "
            "change CUDA_VISIBLE_DEVICES"
        )


def open_accelerator(options: Train, **tracking: Any) -> Accelerator:
    """Return the accelerator, and seed the libraries' random numbers; `tracking` goes to accelerate.

    Raises:
        ValueError: the launched processes do not know of one another, or one process is to be sharded.
    """
    from accelerate.utils import set_seed

    precision = "fp16" if options.precision == "float16" else "no"  # other precisions are the family's own autocast
    accelerator = connect(mixed_precision=precision, **tracking)
    if options.sharding != "none" and accelerator.num_processes == 1:
        raise ValueError(
            f"train.sharding: {options.sharding} splits the model over several processes, and there is one; launch "
            "more (docs/clusters.md), or use train.sharding: none"
        )
    set_seed(options.seed)
    return accelerator


def connect(rank_timeout: float | None = None, **options: Any) -> Accelerator:
    """Return an accelerator of all launched processes.

    Args:
        rank_timeout: minutes for which a process waits for the others; the library's limit by default.
        options: further arguments of the accelerator.

    Raises:
        ValueError: the number of launched processes differs from the number that the accelerator knows, or they run on
            an unsupported kind of device.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, patch_environment

    if rank_timeout is not None:
        options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(minutes=rank_timeout))]
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `mmalign.policy.sharding` does what accelerate's FSDP would
        accelerator = Accelerator(**options)
    # Processes of a launcher that accelerate does not know would each believe to be alone
    launched = int(next((os.environ[name] for name in SIZES if name in os.environ), "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"train: {launched} processes were launched, but accelerate connects {accelerator.num_processes}; they "
            "would all write to one folder; on CPUs set ACCELERATE_USE_CPU=true, under srun start torchrun"
        )
    kind = accelerator.distributed_type.value
    if kind not in DISTRIBUTED:
        raise ValueError(f"train: accelerate is set to {kind}, which is not supported; use GPUs or CPUs")
    return accelerator


GOES_ON = "the same command goes on from the stored pieces"  # how commands resume that store each finished piece

# Words of gloo and NCCL for a process that has ended, or that was waited for in vain
_LOST = ("connection closed by peer", "connection reset by peer", "timed out waiting", "broken pipe", "watchdog caught")


@contextlib.contextmanager
def name_lost_processes(minutes: float, how_to_resume: Callable[[], str]) -> Iterator[None]:
    """Replace the error for a process that ended or stopped answering by one sentence.

    Raises:
        ConnectionError: another process of the launch ended or stopped answering.
    """
    try:
        yield
    except RuntimeError as error:
        lost = process_lost(error, minutes, how_to_resume())
        if lost is None:
            raise
        raise lost from error


def process_lost(error: RuntimeError, minutes: float, saved: str) -> ConnectionError | None:
    """Return the error for a process that ended or stopped answering; None for any other error.

    Args:
        error: the error of a collective operation.
        minutes: the limit of a process's silence.
        saved: how to resume, as the end of a sentence.
    """
    # The libraries have no common type of error for it, so their words count as well
    is_library = isinstance(error, torch.distributed.DistError)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not (is_library or any(x in str(error).lower() for x in _LOST)):
        return None
    rank, size = os.environ.get("RANK", "0"), int(os.environ["WORLD_SIZE"])
    # Of two processes the other one is known
    who = f"process {1 - int(rank)}" if size == 2 else f"another of {size} processes"
    return ConnectionError(
        f"launch: {who} ended or stopped answering (process {rank} waits at most limits.rank_timeout: {minutes:g} "
        f"minutes); {saved}"
    )
