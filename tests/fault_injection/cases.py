"""Tiny runs of every method, and of every command that writes: recipes and the commands that run them in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmalign.attention import choice
from tests.helpers import clip_models, data_files, diffusion_models, preparation, recipes, vlm_models

Content = dict[str, Any]
ALL, CACHED, TRAINED = ("cache", "train", "evaluate", "gallery"), ("cache", "train"), ("train",)
TRAIN = {
    "steps": 3,
    "save_every": 1,
    "keep_checkpoints": 2,
    "log_every": 2,
    "gradient_accumulation_steps": 2,
    "ema": 0.9,
    "schedule": "cosine",
    "warmup_steps": 1,
}
FULL, LORA = {"tune": "full"}, {"tune": "lora", "lora": {"rank": 2}}
SCENES = {"benchmark": "scenes", "prompts": 2, "sampling": {"steps": 1, "resolution": 16}}
CROWDS = {"benchmark": "crowds", "num_images": 2, "decoding": {"max_new_tokens": 4, "batch_size": 4}}
ONLINE = {"max_new_tokens": 4, "similarity": "trigrams", "tries": 2}
JUDGE = {"path": "models/tiny_clip"}
GENERATED = {"prompts": 3, "images_per_prompt": 2, "min_confidence": 0.5, "reward": JUDGE}


@dataclass(frozen=True)
class Case:
    """Commands that are run in turn on a recipe.

    Attributes:
        content: the recipe, whose files lie in the folder of the models and in that of the run.
        commands: names of functions of `mmalign.commands`.
    """

    content: Callable[[Path, Path], Content]
    commands: tuple[str, ...] = TRAINED


def preload() -> None:
    """Import what the runs import, so that processes forked from this one need not."""
    choice.check("auto", torch.device("cpu"), torch.float32)  # as a run does before it imports diffusers
    import accelerate.tracking  # noqa: F401
    import open_clip  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401

    from mmalign.commands import cache, evaluate, gallery, prepare, train  # noqa: F401
    from mmalign.families.vlm import model  # noqa: F401


def write_models(folder: Path) -> None:
    """Write the tiny models and the rows of all cases into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    diffusion_models.stable_diffusion(folder / "sd")
    clip_models.clip(folder / "clip")
    clip_models.step_aware(folder / "judge", folder / "clip")
    vlm_models.write("llava", folder / "llava")
    data_files.pick_a_pic(folder / "pairs.parquet")
    data_files.pick_a_pic(folder / "contrast.parquet", rejected={})
    data_files.response_pairs(folder / "rows", layout="trl")
    data_files.response_pairs(folder / "rows", layout="realign")
    preparation.answers(folder / "answers")


def _image(model: Content, rows: str = "pairs.parquet", /, **method: Any) -> Case:
    """Return a case of a method that trains a Stable Diffusion."""

    def content(models: Path, run: Path) -> Content:
        judged = {"reward": {"name": "step_aware", "path": str(models / "judge")}} if method["name"] == "spo" else {}
        of = {"method": {**method, **judged}, "model": model, "train": TRAIN, "evaluate": SCENES}
        return recipes.diffusion(models / "sd", models / rows, run / "out", **of)

    return Case(content)


def _response(model: Content, layout: str = "trl", /, **method: Any) -> Case:
    """Return a case of a method that trains a LLaVA."""

    def content(models: Path, run: Path) -> Content:
        data = {"format": layout}
        of = {"method": method, "model": model, "data": data, "train": TRAIN, "evaluate": CROWDS}
        return recipes.vlm(models / "llava", models / "rows" / f"{layout}.jsonl", run / "out", **of)

    return Case(content)


def _step_preference(models: Path, run: Path) -> Content:
    of = {"method": {"name": "step_preference"}, "train": {**TRAIN, "steps": 2}}
    content = recipes.diffusion(models / "clip", models / "pairs.parquet", run / "out", **of)
    return {**content, "model": {"path": str(models / "clip"), "denoiser": str(models / "sd")}}


def _prepared_images(**prepare: Any) -> Case:
    def content(models: Path, run: Path) -> Content:
        sampling = {"steps": 1, "guidance": 1.0, "batch_size": 2}
        section = {**GENERATED, "sampling": sampling, **prepare}
        return recipes.diffusion(models / "sd", run / "made.parquet", run / "out", prepare=section)

    return Case(content, ("prepare",))


def _prepared_responses(kind: str, layout: str = "trl", /, **prepare: Any) -> Case:
    def content(models: Path, run: Path) -> Content:
        source = {"path": str(models / "answers/answers.jsonl")}
        section = {"kind": kind, "source": source, "save_every": 2, "keep_torn": True, **prepare}
        data = {"format": layout, "images": str(models / "answers")}
        return recipes.vlm(models / "llava", run / "made.jsonl", run / "out", prepare=section, data=data)

    return Case(content, ("prepare",))


TEXT_TO_IMAGE = {
    "diffusion_dpo": replace(_image(FULL, name="diffusion_dpo", beta=100.0), commands=ALL),
    "diffusion_dpo, cached": replace(_image(LORA, name="diffusion_dpo", num_cached_draws=1), commands=CACHED),
    "diffusion_dpo, moving reference": _image(
        LORA, name="diffusion_dpo", beta=100.0, reference={"every": 2, "mix": 0.5}
    ),
    "inpo": _image(LORA, name="inpo"),
    "inpo, cached": _image(FULL, name="inpo", inverter="reference", num_cached_draws=1),
    "mapo": _image(FULL, name="mapo"),
    "sft": _image(LORA, name="sft"),
    "cca": _image(FULL, name="cca"),
    "instruct_engine": _image(FULL, "contrast.parquet", name="instruct_engine"),
    "spo": _image(FULL, name="spo", steps=6, start=2, threshold=0.0),
    "diffusion_online_dpo": _image(
        LORA, name="diffusion_online_dpo", reward=JUDGE, generation={"images": 2, "steps": 2, "noisings": 2}
    ),
    "step_preference": Case(_step_preference),
    "prepare": _prepared_images(),
    "prepare, prompt pairs": _prepared_images(prompt_pairs=True),
}
VISION_LANGUAGE = {
    "dpo": replace(_response(FULL, name="dpo"), commands=ALL),
    "dpo, lora": replace(_response(LORA, name="dpo"), commands=CACHED),
    "rlhfv": _response(LORA, name="rlhfv"),
    "grpo": _response(
        FULL,
        name="grpo",
        reward={"name": "function", "path": "tests.helpers.judging:letters"},
        generation={"answers": 2, "max_new_tokens": 4, "updates": 2},
    ),
    "mdpo": _response(LORA, name="mdpo"),
    "povid": _response(LORA, name="povid"),
    "realign": _response(FULL, "realign", name="realign"),
    "response_sft": _response(FULL, name="response_sft"),
    "bdhs": _response(LORA, name="bdhs"),
    "bdhs, online": _response(LORA, name="bdhs", mode="online", online=ONLINE),
    "bdhs, mixed": _response(FULL, name="bdhs", mode="mixed", mixed={"max_new_tokens": 4, "vocabulary": "crowds"}),
    "prepare bdhs": _prepared_responses("bdhs", bdhs=preparation.FEW),
    "prepare realign": _prepared_responses("realign", "realign", realign=preparation.REALIGN),
    "prepare povid": _prepared_responses("povid"),
    "prepare own": _prepared_responses("own", own=preparation.OWN),
}
MODALITIES = {"text_to_image": TEXT_TO_IMAGE, "vision_language": VISION_LANGUAGE}
