"""Settings for a model and a method, from the shipped recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.commands.load_recipe import read_content
from mmalign.config.methods import find_method
from mmalign.resources import bundled_recipes

# The end of a shipped recipe's name, by the file of a pipeline's family or the type of a vision-language model
OWN = {
    "stable_diffusion": "sd15",
    "sdxl": "sdxl",
    "sd3": "sd35m",
    "flux": "flux",
    "flux_kontext": "flux_kontext",
    "llava": "llava15",
    "llava_next": "llava16",
    "qwen2_5_vl": "qwen25vl",
    "qwen3_vl": "qwen3vl",
    "paligemma": "paligemma",
    "smolvlm": "smolvlm",
}
# Models without recipes of their own have those of their kin
RECIPES = OWN | {
    "flux2": "flux",
    "qwen_image": "flux",
    "qwen_image_edit": "flux_kontext",
    "qwen_image_edit_plus": "flux_kontext",
    "z_image": "flux",
    "sana": "sd35m",
    "qwen2_vl": "qwen25vl",
    "idefics3": "smolvlm",
}
USUAL = {"text_to_image": ("diffusion_dpo", "sd35m"), "vision_language": ("dpo", "llava15")}  # method and model
# A judge for methods that need one: PickScore, or a vision-language model that is asked about each answer
JUDGES = {
    "text_to_image": {"name": "transformers_clip", "path": "yuvalkirstain/PickScore_v1"},
    "vision_language": {"name": "vlm", "path": "Qwen/Qwen2.5-VL-7B-Instruct"},
}
REASONS = "# Why these values:"


@dataclass(frozen=True)
class Settings:
    """Sections of a recipe without paths, and their origin.

    Attributes:
        name: the method's name.
        source: the shipped recipe and its model.
        reasons: its comment on the values.
        method, model, data, train: the sections.
        unknown: sentences on what no shipped recipe says.
    """

    name: str
    source: str
    reasons: tuple[str, ...]
    method: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    unknown: tuple[str, ...]


def find_settings(modality: str, family: str, method: str) -> Settings:
    """Return the settings of the shipped recipe nearest to a model's family and a method, with LoRA if there is one."""
    recipes = bundled_recipes()
    usual, other = USUAL[modality]
    model, unknown = RECIPES.get(family, other), list[str]()
    # The method for this model, else the usual method for it, else the usual method for the usual model
    named = ((method, model), (usual, model), (usual, other))
    name = next(
        path for m, n in named for end in ("_lora", "", "_full") if (path := f"{modality}/{m}_{n}{end}") in recipes
    )
    content = read_content(recipes[name])
    sections: dict[str, Any] = {part: dict(content[part]) for part in ("method", "model", "data", "train")}  # type: ignore[call-overload]
    checkpoint = sections["model"].pop("path")
    # What is a guess, in words
    if family not in OWN:
        unknown.append(f"settings for a {family}: no shipped recipe has one; these are a {checkpoint}'s, a first guess")
    if sections["method"]["name"] != method:
        unknown.append(
            f"settings of {method} for this model: those of `train` are {sections['method']['name']}'s, whose learning "
            "rate may not suit it"
        )
        sections["method"] = _method_section(method, recipes)
        # A method that cannot do without a judge gets the usual one
        reward = find_method(method)[1].model_fields.get("reward")
        if reward is not None and reward.is_required() and "reward" not in sections["method"]:
            sections["method"]["reward"] = dict(JUDGES[modality])
            unknown.append(
                f"the judge: {JUDGES[modality]['path']} is a first guess; docs/judges.md has the other kinds"
            )
    # Not the shipped recipe's data, nor an autoencoder that a fine-tuned model may not fit
    if "vae" in sections["model"]:
        del sections["model"]["vae"], sections["model"]["vae_dtype"]
    data = {key: sections["data"][key] for key in _KEPT if key in sections["data"]}
    return Settings(
        method,
        f"{name} ({checkpoint})",
        _reasons(recipes[name]),
        sections["method"],
        sections["model"],
        data,
        sections["train"],
        tuple(unknown),
    )


_KEPT = ("resolution", "flip", "max_length", "num_workers")  # settings of data that do not name or limit files


def _method_section(method: str, recipes: dict[str, Path]) -> dict[str, Any]:
    """Return the hyper-parameters of a method in the first recipe of a released model, or its name alone."""
    for path in recipes.values():
        section: Any = read_content(path).get("method")
        if section["name"] == method and "tiny" not in path.stem:
            return dict(section)
    return {"name": method}


def _reasons(path: Path) -> tuple[str, ...]:
    """Return the comment of a shipped recipe on its values."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith(REASONS)), len(lines))
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("#")), len(lines))
    return tuple(line.lstrip("# ") for line in lines[start:end])
