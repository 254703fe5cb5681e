"""Model card of an exported model: the README.md that the Hub shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmalign.commands._trained import TrainedModel
from mmalign.families.loading import local_folder
from mmalign.modalities import modality_of
from mmalign.resources import is_hub_id, resolve_model

_LICENSE = ("license", "license_name", "license_link")
_FENCE = "---"


def card(trained: TrainedModel, form: str, table: Sequence[Sequence[str]] | None) -> str:
    """Return the model card of files of a form: metadata for the Hub, verdict, evaluation, use, data and recipe.

    `table` is that of the evaluation, header first; None if there was none.
    """
    recipe, info = trained.recipe, trained.info
    base, method = recipe.model.path, recipe.method.name
    on_hub = is_hub_id(base) and not Path(base).exists()
    data = recipe.data.path.partition(":")[0]  # without the configuration
    modality, is_adapter = modality_of(recipe), form != "merged" and recipe.model.tune == "lora"
    # Metadata for the Hub's search: files of this machine have no page there
    metadata: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"} if on_hub else {}),
        **base_license(base, recipe.model.revision),
        "library_name": "peft" if form == "peft" else modality.loaded_by,
        "pipeline_tag": modality.pipeline_tag,
        "tags": ["mmalign", method, *(["lora"] if is_adapter else [])],
        **({"datasets": [data]} if is_hub_id(data) and not Path(data).exists() else {}),
    }
    # The output is a path of this machine
    settings = {key: value for key, value in info.record.recipe.items() if key != "output"}
    changes = "".join(f"\n{change}" for change in info.record.changes)
    sections = {
        f"{_title(base)}, aligned by {method}": f"{info.verdict[:1].upper()}{info.verdict[1:]}.".removeprefix("."),
        "Evaluation": _markdown(table)
        if table
        else "Not evaluated: `mmalign evaluate` compares it with the base model.",
        "Use": f"`{modality.loading_hint(recipe.model.tune, Path('.'), form)}`",
        "Training": f"{info.step} updates of {trained.pairs_per_update} pairs from {base}, by mmalign. "
        f"Fingerprint of the pairs: `{info.identity['pairs']}`; of the base model: "
        f"`{info.identity['model']}`.{changes}",
        "Recipe": f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
    }
    # The first head is the page's title
    body = "\n\n".join(
        f"{'#' if not number else '##'} {head}\n\n{text}" for number, (head, text) in enumerate(sections.items())
    )
    return f"{_FENCE}\n{yaml.safe_dump(metadata, sort_keys=False)}{_FENCE}\n\n{body}\n"


def base_license(path: str, revision: str | None) -> dict[str, str]:
    """Return the licence fields of the base model's own card, or none."""
    located = resolve_model(path)
    # Of a model in a single file the folder around it
    folder = str(Path(located).parent) if Path(located).is_file() else local_folder(located, revision)
    file = Path(folder) / "README.md" if folder is not None else Path()
    if not file.is_file():
        return {}
    # Metadata stands between two fences at the head of the card
    _, fence, rest = file.read_text(encoding="utf-8", errors="replace").partition(f"{_FENCE}\n")
    try:
        metadata = yaml.safe_load(rest.partition(f"\n{_FENCE}")[0]) if fence else None
    except yaml.YAMLError:
        return {}
    known = metadata if isinstance(metadata, dict) else {}
    return {key: str(known[key]) for key in _LICENSE if key in known}


def _title(base: str) -> str:
    return Path(base).name


def _markdown(table: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])
