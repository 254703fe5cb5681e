"""The trained model that a run leaves, and the base model that it was trained from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.atomic_io import written
from mmalign.data.caches import fingerprint
from mmalign.families.base import Family
from mmalign.training.run import Run


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


TRAINED = "trained.json"  # in a trained model's folder


def read_trained(folder: Path) -> dict[str, Any]:
    """The updates (`step`), their `seconds` (see `loop.Progress`) and the `identity` of the model that a run has left.

    Raises:
        ValueError: it has left none.
    """
    try:
        about: dict[str, Any] = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first") from None
    return about


def require_base(about: Mapping[str, Any], folder: Path, family: Family) -> None:
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
