"""Trained model of a run: the one that `train` wrote at its end, or one of the run's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import build_policy, pairs_per_update
from mmalign.config import Recipe
from mmalign.methods import requirements_of
from mmalign.modalities import loading
from mmalign.policy import Policy
from mmalign.training import checkpoint
from mmalign.training.export import RUN_INFO, RunInfo, check_base_model, read_run_info
from mmalign.training.run import trainable_weights


@dataclass(frozen=True)
class TrainedModel:
    """Trained model, before its weights are loaded.

    Attributes:
        folder: the folder `model` of the run, or the checkpoint.
        info: its updates, identity, record and verdict.
        saved: the content of the checkpoint; None for the model at the end of the run.
    """

    folder: Path
    info: RunInfo
    saved: checkpoint.Checkpoint | None

    @property
    def suffix(self) -> str:
        """The end of the names of folders about this model: empty, or the checkpoint's update."""
        return self.folder.name.removeprefix("checkpoint") if self.saved is not None else ""

    @property
    def recipe(self) -> Recipe:
        """The recipe that the model was trained by.

        Raises:
            ValueError: the record of the recipe is damaged or of an earlier version.
        """
        try:
            return load_recipe(self.info.record.recipe)
        except ValueError as error:
            raise ValueError(f"{self.folder / RUN_INFO}: {error}; train again") from error

    @property
    def pairs_per_update(self) -> int:
        """The number of pairs of an update, over all processes and contrasts."""
        recipe = self.recipe
        num_processes = self.info.rows_per_batch // recipe.train.batch_size
        return pairs_per_update(recipe.train, requirements_of(recipe.method), num_processes)

    def load(self, family: Any) -> Policy:
        """Load the policy, with the base model as its reference, both frozen.

        Raises:
            ValueError: the family is another model than the training began with, or files are damaged.
        """
        check_base_model(self.info, self.folder, family)
        if self.saved is None:
            return loading.load_trained_policy(family, self.folder)
        # From a checkpoint: the policy as built for training, with the trained weights in it. It stays whole on the
        # family's device, and neither side is compiled.
        recipe = self.recipe
        whole = recipe.train.model_copy(update={"sharding": "none", "compile": False})
        policy: Policy = build_policy(family, recipe.model_copy(update={"train": whole}), with_reference=True)
        own, weights = trainable_weights(policy.unwrapped), self.saved.weights
        if own.keys() != weights.keys():
            raise ValueError(f"{self.folder}: has other weights than the model; train again")
        if "average" in self.saved.state:  # what `train` writes at its end
            weights = dict(zip(own, self.saved.state["average"], strict=True))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        policy.unwrapped.requires_grad_(False).eval()
        return policy


def find_trained(recipe: Recipe, which: str | int | None = None) -> TrainedModel:
    """Return the model at the end of a recipe's run, or one of its checkpoints: "best", or a number of updates.

    Raises:
        ValueError: there is no such model; the message names the checkpoints.
    """
    output = Path(recipe.output)
    known = [str(int(path.name.rpartition("-")[2])) for path in checkpoint.complete(output)]
    there = f"--checkpoint takes {', '.join(['best', *known])}" if known else "the run has no checkpoints either"
    # The model at the end of the run
    if which is None:
        folder = output / "model"
        if not (folder / RUN_INFO).exists() and known:
            raise ValueError(f"{folder}: there is no trained model, since the run has not ended; {there}")
        return TrainedModel(folder, read_run_info(folder), None)
    # A checkpoint, the best one or that of an update
    if which == "best":
        path = checkpoint.best(output)
        if path is None:
            raise ValueError(f"checkpoint: best: none has a score without data.validation_fraction; {there}")
    elif str(which) in known:
        path = output / checkpoint.name(int(which))
    else:
        raise ValueError(f"checkpoint: {output} has none of update {which!r}; {there}")
    saved = checkpoint.read(path, None)
    seconds, verdict = float(saved.state["progress"]["seconds"]), str(saved.state["reports"].get("verdict", ""))
    return TrainedModel(path, RunInfo(saved.step, seconds, saved.identity, saved.record, verdict), saved)
