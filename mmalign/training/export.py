"""Export of trained models, and the check that a trained model belongs to a base model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from mmalign.atomic_io import atomic_write
from mmalign.data.caches import fingerprint
from mmalign.families.base import Family
from mmalign.policy import sharding
from mmalign.reading import read_as
from mmalign.training.record import Record
from mmalign.training.run import TrainingRun

RUN_INFO = "trained.json"  # in a trained model's folder


@dataclass(frozen=True)
class RunInfo:
    """Updates of a trained model, their seconds (see `loop.Progress`), identity, record and verdict of its run."""

    step: int
    seconds: float
    identity: dict[str, str]
    record: Record
    verdict: str = ""

    def __post_init__(self) -> None:
        needed = ("model", "pairs", "pairs of a batch")
        missing = [name for name in needed if name not in self.identity]
        if missing:
            raise ValueError(f"identity has no {missing[0]!r}")
        # A number of rows that is none fails here, not at its first use
        _ = self.rows_per_batch

    @property
    def rows_per_batch(self) -> int:
        """Number of rows of a batch, over all processes."""
        return int(self.identity["pairs of a batch"])


def export(folder: Path, run: TrainingRun) -> None:
    """Write the trained model in its library's format, with its steps, seconds, identity and record.

    The weights are their moving average, if the run has one. All processes call it together; the main one writes.
    """
    policy, ema, accelerator = run.policy, run.train_state.ema, run.train_state.accelerator
    # Shards cannot be saved: they are gathered into the skeleton
    net = policy.unwrapped if policy.skeleton is None else policy.skeleton
    with nullcontext() if ema is None else ema.swapped(policy.trainable()):
        # A collective operation: all processes take part, and the main one keeps the weights
        if policy.skeleton is not None:
            sharding.fill(policy.skeleton, policy.unwrapped, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            with atomic_write(folder, marker=RUN_INFO) as part:
                policy.family.save(part, net)
                verdict, progress = str(run.reports.get("verdict", "")), run.progress
                write_run_info(part, RunInfo(progress.step, progress.seconds, run.identity, run.record, verdict))
    # No process reads the folder before it is complete
    accelerator.wait_for_everyone()


def write_run_info(folder: Path, info: RunInfo) -> None:
    """Write the information on a trained model to its folder."""
    (folder / RUN_INFO).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")


def read_run_info(folder: Path) -> RunInfo:
    """Read the information on a trained model.

    Raises:
        ValueError: the folder has no trained model, or its file is damaged.
    """
    if not (folder / RUN_INFO).exists():
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first")
    return read_as(RunInfo, folder / RUN_INFO, "train again")


def check_base_model(info: RunInfo, folder: Path, family: Family) -> None:
    """Refuse to compare a trained model with a base model other than its own.

    Raises:
        ValueError: the family's weights differ from the initial weights of the training.
    """
    was, now = info.identity["model"], fingerprint.fingerprint_weights(family.network)
    if was != now:
        raise ValueError(
            f"{folder}: was trained from another model than {family.name} (fingerprint {was}; this one has {now}); "
            "name the model that it was trained from, or use another output folder"
        )
