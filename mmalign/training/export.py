"""Export of trained models, and the check that a trained model belongs to a base model."""

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
    """Write the trained model in its library's format, with its steps, seconds and identity.

    The weights are their moving average, if the run has one.
    """
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
    """Return the `step` of a trained model, the `seconds` of its updates (see `loop.Progress`) and its `identity`.

    Raises:
        ValueError: the folder has no trained model.
    """
    try:
        about: dict[str, Any] = json.loads((folder / RUN_INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first") from None
    return about


def check_base_model(about: Mapping[str, Any], folder: Path, family: Family) -> None:
    """Refuse to compare a trained model with a base model other than its own.

    Raises:
        ValueError: the family's weights differ from the initial weights of the training.
    """
    was, now = about["identity"]["model"], fingerprint.fingerprint(family.network)
    if was != now:
        raise ValueError(
            f"{folder}: was trained from another model than {family.name} (fingerprint {was}; this one has {now}); "
            "name the model that it was trained from, or use another output folder"
        )
