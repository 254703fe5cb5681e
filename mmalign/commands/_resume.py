"""Identity of a recipe's run, and the checkpoint that it resumes from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mmalign import methods
from mmalign.config import Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.pairs import Row, fingerprint_pairs
from mmalign.families.base import Family
from mmalign.modalities import loading, modality_of
from mmalign.resources import resolve_model
from mmalign.training import checkpoint

logger = logging.getLogger(__name__)

# Options of `data` that shape no batch; the fingerprint of the pairs stands for the files that they were read from.
_SOURCES = {"path", "format", "split", "columns", "images", "num_workers", "cache", "max_bad"}


def identify(recipe: Recipe, family: Family, pairs: Sequence[Row], num_processes: int) -> dict[str, str]:
    """Return the identity of a run on these training pairs; a checkpoint resumes only a run of the same identity."""
    lora, options = recipe.model.lora, recipe.train
    targets = " ".join(loading.lora_targets(family, lora))
    adapter = recipe.model.adapter
    # Of the adapters all that shapes their weights
    adapters = f"lora of rank {lora.rank}, alpha {lora.scaled_alpha:g}, on {targets}"
    adapters += f", dropout {lora.dropout:g}" if lora.dropout else ""
    adapters += ", with DoRA" if lora.dora else ""
    needs = methods.requirements_of(recipe.method)
    # Of the data all that shapes the batches
    data = {f"data.{key}": str(value) for key, value in recipe.data.model_dump().items() if key not in _SOURCES}
    return {
        **({"reward": loading.describe_rewards(needs.reward)} if needs.reward is not None else {}),
        **({"liked_share": str(needs.liked_share)} if needs.liked_share is not None else {}),
        "model": fingerprint.fingerprint_weights(family.network),
        **modality_of(recipe).model_dependencies(recipe.model, family),
        "method": recipe.method.name,
        "tune": adapters if recipe.model.tune == "lora" else recipe.model.tune,
        **({"adapter": fingerprint.fingerprint_folder(resolve_model(adapter.path))} if adapter is not None else {}),
        **data,
        "pairs": fingerprint_pairs(pairs),
        "seed": str(options.seed),
        "pairs of a batch": str(options.batch_size * num_processes),
        "batches of an update": str(options.gradient_accumulation_steps),
        "precision": options.precision,
        "optimizer": options.optimizer,
    }


def last_checkpoint(recipe: Recipe, identity: dict[str, str]) -> checkpoint.Checkpoint | None:
    """Return the latest sound checkpoint of the run's folder that can be resumed, or None.

    A run may end inside a batch; its last checkpoint is returned only if no update is left. Damaged checkpoints are
    named in the log, and the one before is used.

    Raises:
        ValueError: a checkpoint is another run's or has more updates than the recipe asks for, or all are damaged.
    """
    steps, damaged = recipe.train.steps, list[checkpoint.DamagedCheckpointError]()
    # The newest first: the run goes on from the first sound one
    for path in reversed(checkpoint.complete(Path(recipe.output))):
        try:
            saved = checkpoint.read(path, identity)
        except checkpoint.DamagedCheckpointError as error:
            damaged.append(error)
            logger.warning(f"{error}; using the one before it")
            continue
        if saved.step > steps:
            raise ValueError(
                f"train.steps: {path} has done {saved.step} updates already, more than the {steps} asked for; "
                "raise train.steps, or use another output folder"
            )
        if saved.step == steps or saved.resting:
            return saved
        logger.warning(f"{path.name} is of a run that ended inside a batch: updates after the one before are repeated")
    if damaged:
        raise ValueError(f"{damaged[0]}; no other checkpoint is left: name another output to begin anew")
    return None
