"""The command `prepare`: make the preference pairs that a recipe learns from."""

from __future__ import annotations

from pathlib import Path

from mmalign.atomic_io import file_lock, make_folder
from mmalign.commands import preflight
from mmalign.config import Recipe
from mmalign.modalities import modality_of
from mmalign.synthesis.rejected_responses import Writer
from mmalign.training.launch import GOES_ON, name_lost_processes
from mmalign.training.processes import connect_processes


def prepare(recipe: Recipe, *, writer: Writer | None = None) -> Path:
    """Generate the pairs that the recipe trains on, and write them to `data.path`.

    A text-to-image model generates images and a reward model ranks them. For a vision-language model, true answers
    get rejected responses. The processes of a launch share the work, and the main one writes.

    Args:
        recipe: the recipe, with a section `prepare`.
        writer: a user function for rejected responses (see `prepare_responses`).

    Raises:
        ValueError: there is no `prepare` section, the file exists, another process writes it, or no pair was found.
        ConnectionError: another process of the launch ended or stopped answering.
    """
    modality = modality_of(recipe)
    if modality.prepare is None:
        raise ValueError("prepare: a judge generates no images; use a recipe of a model that does")
    if recipe.prepare is None:
        raise ValueError(f"prepare: the recipe has no such section; add one: {modality.example_preparation}")
    preflight.check(recipe, "preparation", data=False)
    minutes = recipe.limits.rank_timeout
    connect_processes(minutes)
    path = Path(recipe.data.path)
    make_folder("data.path", path.parent)
    with file_lock(path), name_lost_processes(minutes, lambda: GOES_ON):
        return modality.prepare(recipe, writer)
