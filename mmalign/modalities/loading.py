"""Loading of a recipe's models, trained policies and reward models."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmalign.attention import choice
from mmalign.config import ImageModel, JudgeModel, Model, Recipe, RewardConfig, SamplingConfig
from mmalign.families import loading as loading_module
from mmalign.families import step_judge
from mmalign.families.base import Family
from mmalign.families.compile import compile_blocks
from mmalign.families.types import Loading, Sampling
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rewards import RewardModel, load_reward_model

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Family)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def method_reward(recipe: Recipe) -> RewardConfig | None:
    """Return the reward model that the method's settings name, or None."""
    reward = getattr(recipe.method, "reward", None)
    return reward if isinstance(reward, RewardConfig) else None


def load_model(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, frozen: a TextToImage, a StepJudge or a VisionLanguage, depending on its section.

    The log names the attention backend, and for a vision-language model the packing of responses.

    Args:
        recipe: the recipe, with the model, its precision and its attention backend.
        device: target device.

    Raises:
        ValueError: the model cannot be loaded, or the attention backend is unavailable.
    """
    model, options = recipe.model, recipe.train
    choice.check(options.attention, device, DTYPES[options.precision])
    family = _load(model, options.precision, device, pack=options.pack_responses != "off")
    logger.info(str(family.use_attention(options.attention)))
    if not isinstance(model, ImageModel | JudgeModel):
        logger.info(family.packing)
    return family


def load_for_training(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, compiled if the recipe asks for it, so that reference scores come from compiled blocks.

    Raises:
        ValueError: `load_model` refuses the recipe, or the network's blocks are unknown.
    """
    family = load_model(recipe, device)
    if recipe.train.compile:
        compile_blocks(family.blocks(family.network))
    return family


def _load(model: Model, precision: str, device: torch.device, *, pack: bool) -> Any:
    _without_loading_bars()
    half = None if precision == "float32" else DTYPES[precision]
    loading = Loading(device=device, half=half, network_half=model.tune == "lora", revision=model.revision)
    if not isinstance(model, ImageModel | JudgeModel):
        return loading_module.load_vision_language(resolve_model(model.path), replace(loading, pack_responses=pack))
    vae = model.vae and resolve_model(model.vae)
    painting = replace(loading, vae=vae, vae_dtype=DTYPES[model.vae_dtype])
    if isinstance(model, JudgeModel):
        frozen = loading_module.load_family(resolve_model(model.denoiser), replace(painting, network_half=True))
        return step_judge.load(model.path, frozen, loading)
    return loading_module.load_family(resolve_model(model.path), painting)


def _without_loading_bars() -> None:
    """Disable the libraries' loading bars, one for every component of a pipeline."""
    from diffusers.utils.logging import disable_progress_bar as diffusers_off
    from transformers.utils.logging import disable_progress_bar as transformers_off

    diffusers_off()
    transformers_off()


def load_trained_policy(family: F, folder: Path) -> Policy[F]:
    """Load a trained model as the policy, with its base model as the reference.

    Args:
        family: the base model; its network gets the adapters if `folder` holds LoRA weights.
        folder: the folder that `Family.save` wrote.

    Raises:
        ValueError: the folder has no trained model, or its files are damaged.
    """
    base = family.network
    net = family.load_trained(folder)
    return Policy(family, net, net, AdaptersOff() if net is base else FrozenCopy(base))


def sampling_options(sampling: SamplingConfig) -> Sampling:
    """Return the recipe's section as the families' options."""
    return Sampling(**sampling.model_dump())


def build_reward_model(config: RewardConfig, device: torch.device) -> RewardModel:
    """Load the recipe's reward model."""
    _without_loading_bars()
    return load_reward_model(config.name, config.path, device, **config.options)
