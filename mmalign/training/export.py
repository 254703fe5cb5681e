"""The trained model that a run leaves, and the base model that it was trained from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.atomic_io import atomic_write
from mmalign.data.caches import fingerprint
from mmalign.families.base import Family
from mmalign.training.run import TrainingRun


def export(folder: Path, run: TrainingRun) -> None:
    """Write the trained model (its average, if there is one) the way its library loads it, and what it was made of."""
    if run.train_state.accelerator.is_main_process:
        parameters, ema = run.policy.trainable(), run.train_state.ema
        if ema is not None:
            ema.swap(parameters)
        with atomic_write(folder) as part:
            run.policy.family.save(part, run.policy.unwrapped)
            about = {"step": run.progress.step, "seconds": run.progress.seconds, "identity": run.identity}
            (part / RUN_INFO).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if ema is not None:
            ema.swap(parameters)
    run.train_state.accelerator.wait_for_everyone()


RUN_INFO = "trained.json"  # in a trained model's folder


def read_run_info(folder: Path) -> dict[str, Any]:
    """The updates (`step`), their `seconds` (see `loop.Progress`) and the `identity` of the model that a run has left.

    Raises:
        ValueError: it has left none.
    """
    try:
        about: dict[str, Any] = json.loads((folder / RUN_INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first") from None
    return about


def check_base_model(about: Mapping[str, Any], folder: Path, family: Family) -> None:
    """Refuse to compare a trained model with another base than its own.

    Raises:
        ValueError: the family's weights are not those that the training began with.
    """
    was, now = about["identity"]["model"], fingerprint.fingerprint(family.network)
    if was != now:
        raise ValueError(
            f"{folder}: was trained from another model than {family.name} (fingerprint {was}; this one has {now}); "
            "name the model that it was trained from, or use another output folder"
        )
