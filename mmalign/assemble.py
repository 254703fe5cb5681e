"""From a recipe to the objects that a run needs, every check before the first gigabyte is read."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign import families, methods
from mmalign.data import sources
from mmalign.families import Loading, Sampling, TextToImage
from mmalign.families.lora import add_lora
from mmalign.policy import AdaptersOff, FrozenCopy, Policy, Reference
from mmalign.recipe import Data, Drawing, JudgeConfig, Model, Recipe
from mmalign.rewards import Judge, judge_module, load_judge
from mmalign.share import locate, resolve, resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(recipe: Recipe, *, data: bool = True) -> None:
    """Everything that can be known to be wrong without loading a model: files, columns, classes, devices, packages.

    Args:
        recipe: what to check.
        data: the preference pairs too; drawing pictures needs none.

    Raises:
        ValueError: one sentence that says where, what came, what was expected, and what to do.
    """
    path = resolve_model(recipe.model.path)
    if Path(path).is_dir():
        families.pipeline_class(path)
    if data:
        check_data(recipe.data)
    if recipe.train.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("train.precision: float16 needs a GPU; use bfloat16 or float32")
    judges = [section.judge for section in (recipe.evaluate, recipe.prepare) if section is not None and section.judge]
    for judge in judges:
        judge_module(judge.name)
        if "/" in judge.path:  # else the name of a model that the judge's library knows
            resolve_model(judge.path)
    if recipe.evaluate and isinstance(recipe.evaluate.prompts, str):
        resolve(recipe.evaluate.prompts)
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; expected a folder, or a name that is free")


def check_data(data: Data) -> None:
    """The pairs' files are there and have their columns.

    Raises:
        ValueError: where, what came, what was expected, what to do.
    """
    sources.check_source(data.format, locate(data.path), split=data.split, columns=data.columns, group_by=data.group_by)


def load_model(model: Model, precision: str, device: torch.device) -> TextToImage:
    """The recipe's model in memory, frozen."""
    _without_loading_bars()
    half = None if precision == "float32" else DTYPES[precision]
    loading = Loading(
        device=device,
        half=half,
        denoiser_half=model.tune == "lora",
        vae=model.vae and resolve_model(model.vae),
        vae_dtype=DTYPES[model.vae_dtype],
        revision=model.revision,
    )
    return families.load_family(resolve_model(model.path), loading)


def _without_loading_bars() -> None:
    """A bar for every component of a pipeline says nothing that a person can act on."""
    from diffusers.utils.logging import disable_progress_bar as diffusers_off
    from transformers.utils.logging import disable_progress_bar as transformers_off

    diffusers_off()
    transformers_off()


def build_policy(family: TextToImage, model: Model, method: str, *, seed: int, checkpointing: bool) -> Policy:
    """The policy to train: LoRA with the adapters off as reference, or the whole denoiser with a frozen copy.

    A method that needs no reference gets none, and no copy is made.
    """
    net: Any = family.denoiser
    needed = methods.find(method).needs_reference
    reference: Reference = None
    if model.tune == "lora":
        add_lora(
            net, rank=model.lora.rank, alpha=model.lora.alpha or model.lora.rank, targets=model.lora.targets, seed=seed
        )
        reference = AdaptersOff() if needed else None
    else:
        if needed:
            reference = FrozenCopy(_frozen(net))
        net.requires_grad_(True)
    if checkpointing:
        net.enable_gradient_checkpointing()
    return Policy(family, net, net, reference)


def _frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False).eval()


def load_aligned(family: TextToImage, folder: Path) -> Policy:
    """A trained model beside its base, as policy and reference.

    Args:
        family: the base model; its denoiser gets the adapters if `folder` holds LoRA weights.
        folder: what `TextToImage.save` wrote.

    Raises:
        ValueError: nothing has been trained there yet.
    """
    base: Any = family.denoiser
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        base.load_lora_adapter(folder, prefix="unet")
        return Policy(family, base, base, AdaptersOff())
    if not (folder / "unet").is_dir():
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first")
    net = type(base).from_pretrained(folder / "unet", dtype=base.dtype).to(base.device).requires_grad_(False).eval()
    return Policy(family, net, net, FrozenCopy(base))


def sampling(drawing: Drawing) -> Sampling:
    """The recipe's section as the families take it."""
    return Sampling(**drawing.model_dump())


def judge(config: JudgeConfig, device: torch.device) -> Judge:
    """The recipe's judge in memory."""
    return load_judge(config.name, config.path, device, **config.options)


def fingerprint(net: nn.Module) -> str:
    """Sixteen hex digits that tell networks apart: names, shapes, and a thousand values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some)
    return digest.hexdigest()
