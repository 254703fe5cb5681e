"""Loading of a recipe's models, trained policies and reward models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmalign import atomic_io
from mmalign.attention import choice
from mmalign.config import ImageData, ImageSize, Lora, Recipe, ResponseData, RewardConfig, Rewards
from mmalign.config.evaluation import Combine, reward_models
from mmalign.data.caches import fingerprint
from mmalign.data.caches.scores import CHUNK, CachedJudge, CachedResponseJudge, ScoreCache
from mmalign.families.base import Family, VisionLanguage
from mmalign.families.compile import compile_blocks
from mmalign.families.loading import local_folder
from mmalign.families.precision import warn_if_emulated
from mmalign.families.types import Loading
from mmalign.methods import requirements_of
from mmalign.modalities import modality_of
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rewards import (
    ResponseJudge,
    RewardModel,
    image_module,
    load_response_judge,
    load_reward_model,
    response_module,
    reward_config,
)
from mmalign.rewards._combine import Combination, combined, combined_responses
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Family)
J = TypeVar("J")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(recipe: Recipe, device: torch.device) -> Any:
    """Load the recipe's model, frozen: a TextToImage, a StepJudge or a VisionLanguage, depending on its section.

    The log names the attention backend, and for a vision-language model the packing of responses.

    Raises:
        ValueError: the model cannot be loaded, or the attention backend is unavailable.
    """
    options = recipe.train
    choice.check(options.attention, device, DTYPES[options.precision])
    warn_if_emulated("train.precision", options.precision, device)
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
    # Merged on loading; an adapter to continue is added by `build_policy` and `load_to_generate`
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


def load_to_generate(recipe: Recipe, device: torch.device) -> Any:
    """Load the model that a training begins with, frozen: with the adapter that it continues, if the recipe names one.

    Raises:
        ValueError: `load_model` refuses the recipe, or the adapter cannot be read or is another model's.
    """
    family, adapter = load_model(recipe, device), recipe.model.adapter
    if adapter is not None and adapter.use == "continue":
        family.continue_adapter(resolve_model(adapter.path))
        family.network.requires_grad_(False).eval()
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
    """Load a trained model from the folder that `Family.save` wrote, as the policy, with the base model as reference.

    With LoRA weights the base model's network gets the adapters.

    Raises:
        ValueError: the folder has no trained model, or its files are damaged.
    """
    base = family.network
    net = family.load_trained(folder)
    # Adapters are in the base network, and a fully trained network is another one
    return Policy(family, net, net, AdaptersOff() if net is base else FrozenCopy(base))


def build_reward_model(
    reward: Rewards, device: torch.device, *, allow_pickle: bool, combine: Combine = "sum", scores: Path | None = None
) -> RewardModel:
    """Load the recipe's reward model, or several as one.

    Args:
        reward: the section of the recipe.
        device: target device.
        allow_pickle: read pickles too.
        combine: the combination of several.
        scores: folder of a cache of scores by the content of image and prompt; None stores none. With a cache the
            processes of a launch share the judging, and all have to call the model with the same images.

    Raises:
        ValueError: a reward model cannot be loaded.
    """

    def load(config: RewardConfig) -> RewardModel:
        return load_reward_model(config.name, config.path, device, allow_pickle=allow_pickle, **config.options)

    return _build(reward, combine, scores, load, CachedJudge, combined)


def build_response_judge(
    reward: Rewards, device: torch.device, *, allow_pickle: bool, combine: Combine = "sum", scores: Path | None = None
) -> ResponseJudge:
    """Load the recipe's judge of responses, or several as one; arguments and errors of `build_reward_model`."""

    def load(config: RewardConfig) -> ResponseJudge:
        return load_response_judge(config.name, config.path, device, allow_pickle=allow_pickle, **config.options)

    return _build(reward, combine, scores, load, CachedResponseJudge, combined_responses)


def _build(
    reward: Rewards,
    combine: Combine,
    scores: Path | None,
    load: Callable[[RewardConfig], J],
    cached: Callable[[J, ScoreCache], J],
    join: Callable[[Sequence[J], Combination], J],
) -> J:
    """Load one judge, or join several; each has a cache of its scores, if there is a folder for it."""
    disable_progress_bars()
    configs, judges = reward_models(reward), list[J]()
    for config in configs:
        judge, cache = load(config), _score_cache(config, scores)
        judges.append(judge if cache is None else cached(judge, cache))
    if len(judges) == 1:
        return judges[0]
    weights = torch.tensor([config.weight for config in configs])
    return join(judges, Combination(combine, weights, [config.at_least for config in configs]))


def _score_cache(config: RewardConfig, folder: Path | None) -> ScoreCache | None:
    """Return the cache of a judge's scores; None without a folder, for comparisons, and for code that is in no file."""
    cfg, options = reward_config(config.name, config.options), dict(config.options)
    # Scores that depend on a call's other outputs cannot be stored one by one
    if folder is None or cfg.compares:
        return None
    # The model behind an address
    if served := cfg.served_model(config.path):
        options["model"] = served
    identity = fingerprint.fingerprint_judge(config.name, config.path, options, runs_path=cfg.runs_path)
    if identity is None:
        return None
    atomic_io.make_folder("judges", folder)
    chunk = dict(cfg).get("batch_size", CHUNK)
    return ScoreCache(folder, identity, current_processes(), chunk=chunk)


def build_method_judge(recipe: Recipe, device: torch.device) -> RewardModel | ResponseJudge | None:
    """Load the judge that the recipe's method needs, of images or of responses; None if it needs none.

    Raises:
        ValueError: a judge cannot be loaded.
    """
    needs = requirements_of(recipe.method)
    if needs.reward is None:
        return None
    build = build_response_judge if isinstance(recipe.data, ResponseData) else build_reward_model
    return build(needs.reward, device, allow_pickle=recipe.allow_pickle, combine=needs.combine)


def check_method_judge(recipe: Recipe) -> None:
    """Check the judge that the recipe's method needs, if any.

    Raises:
        ValueError: a judge is missing or invalid, judges outputs of another kind, or compares images of a prompt, which
            may lie in different batches.
    """
    needs = requirements_of(recipe.method)
    if needs.reward is None:
        return
    is_of_responses = isinstance(recipe.data, ResponseData)  # a call then has all responses to a question
    check_reward_model(needs.reward_key, needs.reward, responses=is_of_responses, truths=needs.generates)
    comparing = comparing_parts(needs.reward, needs.combine)
    if comparing and not (is_of_responses or needs.judges_groups):
        raise ValueError(
            f"{needs.reward_key}: {comparing[0]} compares the images of a prompt, and "
            f"method.name: {recipe.method.name} judges them batch by batch; use combine: sum without "
            "at_least, and judges that score each image alone, such as vlm"
        )


def check_reward_model(key: str, reward: Rewards, *, responses: bool = False, truths: bool = False) -> None:
    """Check the names, the options and the paths of the reward models that a recipe names at `key`.

    They judge images, or `responses`, for which `truths` says that they may get the data's true answers.

    Raises:
        ValueError: there is no such reward model, an option is invalid, its folder or function is missing, it needs
            true answers, all are constraints, or one has a weight.
    """
    configs = reward_models(reward)
    if not configs:
        raise ValueError(f"{key}: an empty list; name at least one reward model")
    if all(config.at_least is not None for config in configs):
        raise ValueError(f"{key}: at_least makes all of them constraints; name a reward model without it too")
    for number, config in enumerate(configs):
        # Several are named by their places in the list
        place = key if isinstance(reward, RewardConfig) else f"{key}.{number}"
        if config.at_least is not None and config.weight != 1:
            raise ValueError(f"{place}.weight: {config.weight:g} means nothing beside at_least; leave one of them out")
        check = response_module(config.name).check_responses if responses else image_module(config.name).check
        check(f"{place}.path", config.path)
        options = reward_config(config.name, config.options)
        if responses and not truths and options.reads_truths(config.path):
            raise ValueError(
                f"{place}.name: {config.name} reads the true answers of the data, which methods that learn from "
                "prompts have; use another judge here, such as vlm or a function without them"
            )


def comparing_parts(reward: Rewards, combine: Combine = "sum") -> list[str]:
    """Return what makes a recipe's scores depend on the other outputs of a prompt: judges, combination and limits."""
    configs = reward_models(reward)
    judges = [f"reward {x.name}" for x in configs if reward_config(x.name, x.options).compares]
    limits = [f"at_least: {x.at_least:g}" for x in configs if x.at_least is not None]
    return [*judges, *([f"combine: {combine}"] if combine != "sum" else []), *limits]


def needs_truths(reward: Rewards) -> bool:
    """Return whether one of a recipe's judges judges only rows with a true answer."""
    return any(reward_config(x.name, x.options).needs_truths for x in reward_models(reward))


def describe_rewards(reward: Rewards) -> str:
    """Return the paths of a recipe's reward models, several with their weights."""
    configs = reward_models(reward)
    if len(configs) == 1:
        return configs[0].path
    terms = " + ".join(f"{x.weight:g} {x.path}" for x in configs if x.at_least is None)
    return "; ".join([terms, *(f"{x.path} at least {x.at_least:g}" for x in configs if x.at_least is not None)])
