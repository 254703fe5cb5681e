"""The command `export`: write a trained model in the form of another program, and push it to the Hub."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch

from mmalign.atomic_io import atomic_write, check_owned, make_folder
from mmalign.commands import _model_card
from mmalign.commands._trained import TrainedModel, find_trained
from mmalign.commands.evaluate import TABLE, StoredTable
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.evaluation.metrics import Table
from mmalign.modalities import loading, modality_of
from mmalign.modalities.loading import DTYPES
from mmalign.reading import first_line, read_as
from mmalign.resources import is_hub_id
from mmalign.training.export import RUN_INFO, write_run_info

Form = Literal["diffusers", "peft", "kohya", "comfyui", "merged"]

logger = logging.getLogger(__name__)


def export(
    recipe: Recipe | str | Path,
    *,
    to: Form,
    checkpoint: str | int | None = None,
    output: str | Path | None = None,
    dtype: str | None = None,
    push: str | None = None,
) -> Path:
    """Write a run's trained model in the form of another program, with a model card, and return the folder.

    The program's own reader, or diffusers' converter, reads the files back. The export is refused if its numbers differ
    from the trained ones.

    Args:
        recipe: a recipe, the name of one, or a run's folder.
        to: diffusers, peft, kohya, comfyui, or merged for a whole model.
        checkpoint: "best", or the updates of one of the run's checkpoints; None for the model at the end of the run.
        output: the folder to write; None is `export/` and the form in the run's folder.
        dtype: float32, float16 or bfloat16; None keeps that of the base model's files, or float32 for adapters.
        push: the Hub repository OWNER/NAME to upload to; it is private if it is new.

    Raises:
        ValueError: there is no such model or form, other numbers were read back, or the Hub refused the upload.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    # Arguments are checked before anything is loaded
    if to not in get_args(Form):
        raise ValueError(f"export: got the form {to!r}; expected one of {', '.join(get_args(Form))}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"export: got the dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if push is not None and not is_hub_id(push):
        raise ValueError(f"export: got {push!r} to push to; expected a name such as organisation/name")
    trained = find_trained(recipe, checkpoint)
    folder = Path(output) if output is not None else Path(recipe.output) / "export" / f"{to}{trained.suffix}"
    check_owned(folder, RUN_INFO)
    make_folder("--output", folder.parent)
    _write(trained, folder, to, DTYPES[dtype] if dtype is not None else None, _table(recipe, trained))
    hint = modality_of(recipe).loading_hint(trained.recipe.model.tune, folder, to)
    logger.info(f"{folder}: {to}, read back with the trained numbers; load it with {hint}")
    if push is not None:
        _push(folder, push)
    return folder


def _write(trained: TrainedModel, folder: Path, form: Form, dtype: torch.dtype | None, table: Table | None) -> None:
    """Write the form, the model card and the information on the model to a folder."""
    family = loading.load_bare(trained.recipe, torch.device("cpu"))
    policy = trained.load(family)
    with atomic_write(folder, marker=RUN_INFO) as part:
        part.mkdir()
        try:
            family.export(part, policy.unwrapped, form, dtype)
        except ValueError as error:
            raise ValueError(f"export: {form}: {error}") from error
        (part / "README.md").write_text(_model_card.card(trained, form, table), encoding="utf-8")
        write_run_info(part, trained.info)


def _table(recipe: Recipe, trained: TrainedModel) -> Table | None:
    """Return the table of the trained model's evaluation, if there is one."""
    file = Path(recipe.output) / f"evaluation{trained.suffix}" / TABLE
    if not file.is_file():
        return None
    content = read_as(StoredTable, file, "run `mmalign evaluate` with this recipe again")
    return content["table"] if content["of"].get("trained") == json.loads(json.dumps(asdict(trained.info))) else None


def _push(folder: Path, repository: str) -> None:
    """Upload a folder to a repository on the Hub, which is created as a private one if it is missing.

    Raises:
        ValueError: the Hub refused it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by mmalign", ignore_patterns=[RUN_INFO]
        )
    except Exception as error:  # the library and its HTTP client raise a dozen kinds
        raise ValueError(
            f"export: {repository} could not be written ({first_line(error)}); {folder} is complete: log in with `hf "
            "auth login`, check the name and your connection, and run the command again"
        ) from error
    logger.info(f"{repository}: uploaded, {commit.commit_url}")
