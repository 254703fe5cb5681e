"""From a recipe to the objects that a run needs, every check before the first gigabyte is read."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mmalign import families, methods
from mmalign.attention import choice
from mmalign.data import prompts, responses, sources
from mmalign.families import Family, Loading, Sampling, compiled, step_judge
from mmalign.families.compiled import compile_blocks
from mmalign.optim import build_optimizer
from mmalign.policy import AdaptersOff, FrozenCopy, Policy, Reference
from mmalign.rewards import Judge, judge_module, load_judge
from mmalign.sections import (
    Coco,
    Data,
    Drawing,
    EvaluateImages,
    EvaluateResponses,
    Files,
    ImageData,
    ImageModel,
    JudgeConfig,
    JudgeModel,
    Model,
    PrepareImages,
    Recipe,
    ResponseData,
    Train,
)
from mmalign.share import locate, resolve, resolve_model

F = TypeVar("F", bound=Family)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(recipe: Recipe, *, data: bool = True, training: bool = False) -> None:
    """Everything that can be known to be wrong without loading a model: files, columns, classes, devices, packages.

    Args:
        recipe: what to check.
        data: the preference pairs too; drawing pictures needs none.
        training: what only training needs too: optimizer and trackers.

    Raises:
        ValueError: one sentence that says where, what came, what was expected, and what to do.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; expected a folder, or a name that is free")
    check_precision(recipe.train)
    if recipe.train.pack != "auto" and isinstance(recipe.model, ImageModel | JudgeModel):
        raise ValueError(
            f"train.pack: {recipe.train.pack} is about responses that share a prompt, and method.name: "
            f"{recipe.method.name} compares images; leave it out"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice.check(recipe.train.attention, device, DTYPES[recipe.train.precision])
    if training:
        if recipe.train.compile and isinstance(recipe.model, JudgeModel):
            raise ValueError(step_judge.NOT_COMPILED)
        _check_training(recipe.train, device)
        least = getattr(methods.find(recipe.method.name), "least_pairs", 1)
        if recipe.train.batch_size < least:
            raise ValueError(
                f"train.batch_size: method.name: {recipe.method.name} compares the pairs of a batch with one another; "
                f"expected at least {least}, got {recipe.train.batch_size}"
            )
    _check_of_prompts(recipe)
    if data:
        check_data(recipe.data)
    if isinstance(recipe.evaluate, EvaluateImages):
        _check_drawing("evaluate", recipe.evaluate)
    if isinstance(recipe.evaluate, EvaluateResponses):
        _check_asking(recipe.evaluate)
    if isinstance(recipe.prepare, PrepareImages):
        _check_drawing("prepare", recipe.prepare)
    if (named := method_judge(recipe)) is not None:
        _check_judge("method.judge", named)
    # The last, since it may ask the Hub.
    path = _located("model.path", recipe.model.path)
    if isinstance(recipe.model, ImageModel | JudgeModel):
        if recipe.model.vae is not None:
            _located("model.vae", recipe.model.vae)
        if isinstance(recipe.model, JudgeModel):
            path = _located("model.denoiser", recipe.model.denoiser)
        families.pipeline_class(path, recipe.model.revision)
    else:
        families.model_type(path, recipe.model.revision)


def check_precision(options: Train) -> None:
    """Refuse float16 where there is no GPU.

    Raises:
        ValueError: that is so.
    """
    if options.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("train.precision: float16 needs a GPU; use bfloat16 or float32")


def check_data(data: Data) -> None:
    """The pairs' files are there and have their columns.

    Raises:
        ValueError: where, what came, what was expected, what to do.
    """
    if data.cache not in ("off", "auto") and Path(data.cache).exists() and not Path(data.cache).is_dir():
        raise ValueError(f"data.cache: {data.cache} is a file; expected a folder, or a name that is free")
    if isinstance(data, ResponseData):
        responses.check_responses(
            data.format,
            locate(data.path),
            split=data.split,
            columns=data.columns,
            group_by=data.group_by,
            images=Path(data.images) if data.images is not None else None,
        )
        return
    assert isinstance(data, ImageData)
    if data.format == "prompts":
        prompts.open_prompts(locate(data.path))
        return
    sources.check_source(data.format, locate(data.path), split=data.split, columns=data.columns, group_by=data.group_by)
    if data.crop == "random" and data.cache not in ("off", "auto"):
        raise ValueError(
            f"data.cache: {data.cache} cannot be used with data.crop: random, which is never the same twice; "
            "use cache: off"
        )


def _check_of_prompts(recipe: Recipe) -> None:
    """A method that draws its own images takes nothing of the data but prompts."""
    if getattr(methods.find(recipe.method.name), "learns_from", "pairs") != "prompts":
        return
    data, unread = recipe.data, ["group_by", "max_bad", "workers", "crop", "flip"]
    from_text = isinstance(data, ImageData) and data.format == "prompts"
    unread += ["split", "columns"] if from_text else []
    given = [name for name in unread if getattr(data, name) != type(data).model_fields[name].default]
    if given:
        source = "a text file with one a line (data.format: prompts)" if from_text else "the pairs of data.path"
        raise ValueError(
            f"data.{given[0]}: means nothing here: method.name: {recipe.method.name} draws its own images, and takes "
            f"prompts alone, from {source}; leave {' and '.join(given)} out"
        )


def _check_training(train: Train, device: torch.device) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in train.trackers:  # accelerate would go on without one that is not installed
        if name not in available:
            what = "is not installed; install it" if name in LOGGER_TYPE_TO_CLASS else "is unknown; correct it"
            installed = ", ".join(available) or "none"
            raise ValueError(f"train.trackers: {name} {what}, or leave it out (there are: {installed})")
    if train.compile:
        compiled.check(device)
    some = [nn.Parameter(torch.zeros(1))]  # the optimizer says whether its package is there
    build_optimizer(some, train.optimizer, lr=train.lr, betas=(0.9, 0.999), weight_decay=0.0)


def _check_drawing(name: str, section: EvaluateImages | PrepareImages) -> None:
    """A section that has pictures drawn and judged: its judge, its prompts, and the size of the pictures."""
    if section.judge is not None:
        _check_judge(f"{name}.judge", section.judge)
    contrast = isinstance(section, PrepareImages) and section.contrast
    _check_prompts(f"{name}.prompts", section.prompts, read_couples if contrast else read_prompts)
    side = section.drawing.resolution or 0
    if side % 8:
        raise ValueError(f"{name}.drawing.resolution: expected a multiple of 8 pixels, got {side}")


def _check_judge(key: str, config: JudgeConfig) -> None:
    judge_module(config.name)
    if "/" in config.path:  # else the name of a model that the judge's library knows
        _located(f"{key}.path", config.path)


def method_judge(recipe: Recipe) -> JudgeConfig | None:
    """The judge that the method's settings name, if they do."""
    found = getattr(recipe.method, "judge", None)
    return found if isinstance(found, JudgeConfig) else None


def _check_asking(section: EvaluateResponses) -> None:
    """A section that has questions answered: the files that it names."""
    named: dict[str, Files | None] = {"questions": section.questions}
    if isinstance(section.annotations, Coco):
        for key in ("instances", "captions"):
            named[f"annotations.{key}"] = {name: name for name in getattr(section.annotations, key)}
    else:
        named["annotations"] = section.annotations
    if section.answers is not None:
        named |= {f"answers.{side}": getattr(section.answers, side) for side in ("before", "after")}
    for key, files in named.items():
        for file in [files] if isinstance(files, str) else (files or {}).values():
            _located(f"evaluate.{key}", file, resolve)
    if section.images is not None and not Path(section.images).is_dir():
        raise ValueError(
            f"evaluate.images: {section.images} is no folder; expected the one that images' names begin in"
        )


def _check_prompts(key: str, which: int | str, read: Callable[[str, str], Any]) -> None:
    if isinstance(which, str):
        read(key, which)
    elif which < 1:
        raise ValueError(f"{key}: expected at least 1, or a file with one prompt a line, got {which}")


def read_prompts(key: str, name: str) -> list[str]:
    """The prompts of a file, one a line; empty lines and those that begin with # are none.

    Raises:
        ValueError: there is no such file, it is no text, or it has no prompt; `key` says where its name came from.
    """
    return [prompt for _, prompt in prompts.read_prompts(key, Path(_located(key, name, resolve)))]


def read_couples(key: str, name: str) -> list[tuple[str, str]]:
    """The couples of prompts of a file, one a line, with a tab between them.

    Raises:
        ValueError: as `read_prompts`, or a line holds other than two prompts; `key` says where its name came from.
    """
    couples = []
    for line in read_prompts(key, name):
        first, _, second = (part.strip() for part in line.partition("\t"))
        if not first or not second or "\t" in second:
            raise ValueError(f"{key}: {name} has the line {line[:60]!r}; expected two prompts with a tab between them")
        couples.append((first, second))
    return couples


def _located(key: str, name: str, find: Callable[[str], str | Path] = resolve_model) -> str:
    """What a name of the recipe means; where there is nothing, the sentence begins with the name's key."""
    try:
        return str(find(name))
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).removeprefix('model: ')}") from None


def make_folder(key: str, folder: Path) -> Path:
    """The folder that the recipe names at `key`, made if it is not there.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{key}: {folder} cannot be written to ({error.strerror}); name a folder in which you may write"
        ) from error
    return folder


def load_model(recipe: Recipe, device: torch.device, say: Callable[[str], None] = lambda _: None) -> Any:
    """The recipe's model in memory, frozen: a TextToImage, a StepJudge or a VisionLanguage, as its section says.

    Args:
        recipe: says which one, its precision, and who computes its attention.
        device: where it goes.
        say: hears what computes attention, and whether responses share their prompts, and why.

    Raises:
        ValueError: the model cannot be loaded, or its attention not be computed as wanted.
    """
    model, options = recipe.model, recipe.train
    choice.check(options.attention, device, DTYPES[options.precision])
    family = _load(model, options.precision, device, pack=options.pack != "off")
    say(str(family.use_attention(options.attention)))
    if not isinstance(model, ImageModel | JudgeModel):
        say(family.packing)
    return family


def load_to_train(recipe: Recipe, device: torch.device, say: Callable[[str], None] = lambda _: None) -> Any:
    """As `load_model`, and compiled if the recipe says so: before the reference's scores are worked out by it.

    Raises:
        ValueError: as `load_model`, or the network's blocks are not known.
    """
    family = load_model(recipe, device, say)
    if recipe.train.compile:
        compile_blocks(family.blocks(family.network))
    return family


def _load(model: Model, precision: str, device: torch.device, *, pack: bool) -> Any:
    _without_loading_bars()
    half = None if precision == "float32" else DTYPES[precision]
    loading = Loading(device=device, half=half, network_half=model.tune == "lora", revision=model.revision)
    if not isinstance(model, ImageModel | JudgeModel):
        return families.load_vision_language(resolve_model(model.path), replace(loading, pack=pack))
    vae = model.vae and resolve_model(model.vae)
    painting = replace(loading, vae=vae, vae_dtype=DTYPES[model.vae_dtype])
    if isinstance(model, JudgeModel):
        frozen = families.load_family(resolve_model(model.denoiser), replace(painting, network_half=True))
        return step_judge.load(model.path, frozen, loading)
    return families.load_family(resolve_model(model.path), painting)


def _without_loading_bars() -> None:
    """A bar for every component of a pipeline says nothing that a person can act on."""
    from diffusers.utils.logging import disable_progress_bar as diffusers_off
    from transformers.utils.logging import disable_progress_bar as transformers_off

    diffusers_off()
    transformers_off()


def build_policy(family: F, recipe: Recipe, *, kept: bool = False) -> Policy[F]:
    """The policy to train: LoRA with the adapters off as reference, or the whole network with a frozen copy.

    A method that needs no reference gets none, and no copy is made; nor is one of a reference whose scores are `kept`.
    """
    model, options = recipe.model, recipe.train
    needed = methods.find(recipe.method.name).needs_reference
    reference: Reference = None
    if model.tune == "lora":
        lora = model.lora
        targets = family.usual_targets if lora.targets is None else lora.targets
        family.add_lora(rank=lora.rank, alpha=lora.alpha or lora.rank, targets=targets, seed=options.seed)
        reference = AdaptersOff() if needed else None
    else:
        if needed and not kept:
            reference = FrozenCopy(family.frozen_copy())
        family.unfreeze()
    if options.gradient_checkpointing:
        family.checkpoint_activations()
    if options.compile and isinstance(reference, FrozenCopy):  # no copy is compiled as its original is
        compile_blocks(family.blocks(reference.model))
    return Policy(family, family.network, family.network, reference)


def load_aligned(family: F, folder: Path) -> Policy[F]:
    """A trained model beside its base, as policy and reference.

    Args:
        family: the base model; its network gets the adapters if `folder` holds LoRA weights.
        folder: what `Family.save` wrote.

    Raises:
        ValueError: nothing has been trained there yet, or its files are damaged.
    """
    base = family.network
    net = family.load_trained(folder)
    return Policy(family, net, net, AdaptersOff() if net is base else FrozenCopy(base))


def sampling(drawing: Drawing) -> Sampling:
    """The recipe's section as the families take it."""
    return Sampling(**drawing.model_dump())


def judge(config: JudgeConfig, device: torch.device) -> Judge:
    """The recipe's judge in memory."""
    _without_loading_bars()
    return load_judge(config.name, config.path, device, **config.options)


def fingerprint(net: nn.Module) -> str:
    """Sixteen hex digits that tell networks apart: names, shapes, and a thousand values of every tensor.

    It is seen at once whether a run goes on from the model that it began with. What is kept on disk, and taken for what
    would be computed, must not miss a single number: `families.identity`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some)
    return digest.hexdigest()
