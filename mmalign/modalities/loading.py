"""Loading of a recipe's models, trained policies and reward models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmalign.attention import choice
from mmalign.config import ImageData, ImageSize, Lora, Recipe, RewardConfig
from mmalign.families.base import Family, VisionLanguage
from mmalign.families.compile import compile_blocks
from mmalign.families.loading import local_folder
from mmalign.families.types import Loading
from mmalign.modalities import modality_of
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rewards import RewardModel, load_reward_model, reward_config, reward_module

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Family)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, frozen: a TextToImage, a StepJudge or a VisionLanguage, depending on its section.

    The log names the attention backend, and for a vision-language model the packing of responses.

    Args:
        recipe: the recipe, with the model, its precision and its attention backend.
        device: target device.

    Raises:
        ValueError: the model cannot be loaded, or the attention backend is unavailable.
    """
    options = recipe.train
    choice.check(options.attention, device, DTYPES[options.precision])
    family = load_bare(recipe, device)
    logger.info(str(family.use_attention(options.attention)))
    if family.packing:
        logger.info(family.packing)
    return family


def load_bare(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, frozen, with the attention of its library.

    Raises:
        ValueError: the model cannot be loaded.
    """
    model, options = recipe.model, recipe.train
    size = recipe.data.resolution if isinstance(recipe.data, ImageData) else None
    adapter = model.adapter
    disable_progress_bars()
    return modality_of(recipe).load_family(
        model,
        Loading(
            device=device,
            half=None if options.precision == "float32" else DTYPES[options.precision],
            network_half=model.tune == "lora",
            quantize=model.quantize,
            revision=model.revision,
            variant=model.variant,
            adapter=resolve_model(adapter.path) if adapter is not None and adapter.use == "merge" else None,
            size=ImageSize.parse(size) if size is not None else None,
            allow_pickle=recipe.allow_pickle,
            pack_responses=options.pack_responses != "off",
        ),
    )


def load_for_training(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, compiled if the recipe asks for it, so that reference scores come from compiled blocks.

    Raises:
        ValueError: `load_model` refuses the recipe, or the network's blocks are unknown.
    """
    family = load_model(recipe, device)
    if recipe.train.compile:
        compile_blocks(family.blocks(family.network))
    return family


def lora_targets(family: Family, lora: Lora) -> Sequence[str]:
    """Return the ends of the names of the layers that a recipe adapts."""
    if lora.targets == "all-linear":
        return family.linear_layers
    return family.default_lora_targets if lora.targets is None else lora.targets


def adapts_images(family: VisionLanguage, recipe: Recipe) -> bool:
    """Return whether a recipe trains adapters that change image features, which are then not cached.

    Raises:
        ValueError: an existing adapter cannot be read.
    """
    model, adapter = recipe.model, recipe.model.adapter
    if model.tune != "lora":
        return False
    existing = resolve_model(adapter.path) if adapter is not None and adapter.use == "continue" else None
    return family.adapts_images(lora_targets(family, model.lora), existing)


def find_local(name: str, revision: str | None) -> str:
    """Return the folder of a model that needs no download.

    Raises:
        ValueError: the model is on the Hub and not in the local cache.
    """
    folder = local_folder(resolve_model(name), revision)
    if folder is None:
        raise ValueError(f"{name} is on the Hub and not in the local cache; download it")
    return folder


def disable_progress_bars() -> None:
    """Disable the libraries' progress bars of loading, one for every component of a pipeline."""
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


def build_reward_model(config: RewardConfig, device: torch.device, *, allow_pickle: bool) -> RewardModel:
    """Load the recipe's reward model."""
    disable_progress_bars()
    return load_reward_model(config.name, config.path, device, allow_pickle=allow_pickle, **config.options)


def check_reward_model(key: str, config: RewardConfig) -> None:
    """Check the name, the options and the path of the reward model that a recipe names at `key`.

    Raises:
        ValueError: there is no such reward model, an option is invalid, or its folder or function is missing.
    """
    reward_config(config.name, config.options)
    reward_module(config.name).check(f"{key}.path", config.path)
