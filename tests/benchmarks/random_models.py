"""Models of random weights in the shapes of real ones, written to a folder as on the Hub.

The cost of a step depends on shapes alone, so no checkpoint is needed. models.yaml lists the sizes. Diffusion models
have the tokenizer of models/tiny_sd; a token of a decoder is a byte. Networks are built on the default device: on
"meta" they have only shapes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml

from mmalign.resources import resolve_model

Sizes = dict[str, Any]  # sizes by configuration key

MODELS: dict[str, Sizes] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))


def resized(name: str, **changes: Sizes) -> Sizes:
    """Return a model's sizes with changes by part."""
    sizes = copy.deepcopy(MODELS[name])
    for part, change in changes.items():
        sizes.get("networks", sizes)[part].update(change)
    return sizes


def write(name: str, folder: Path, device: torch.device, sizes: Sizes | None = None) -> None:
    """Write a model to a folder, on a GPU in half the bytes; weights come from a fixed seed.

    Args:
        name: a key of `MODELS`.
        folder: the folder for the model and its other files.
        device: the device that draws the weights.
        sizes: the sizes, instead of those of `MODELS`.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes, parts = sizes or MODELS[name], dict[str, Any]()
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        if "pipeline" not in sizes:
            parts["model"], processor = _vision_language(name, sizes)
        else:
            parts, processor = networks(name, sizes), None
    if device.type == "cuda":
        parts = {part: net.to(torch.bfloat16) for part, net in parts.items()}
    for part in [_pipeline(sizes, parts)] if processor is None else [parts["model"], processor]:
        part.save_pretrained(folder)


def write_configurations(name: str, folder: Path) -> None:
    """Write a model's configurations, tokenizers and processor to a folder, without weights."""
    sizes = MODELS[name]
    if "pipeline" not in sizes:
        with torch.device("meta"):
            model, processor = _vision_language(name, sizes)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    with torch.device("meta"):
        parts = networks(name)
    pipeline = _pipeline(sizes, parts)  # schedulers have numbers, so they are not on meta
    pipeline.save_config(folder)
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            network: Any = component  # of diffusers or transformers
            save = getattr(network, "save_config", None) or network.config.save_pretrained
            save(folder / part)
        elif component is not None and part != "image_processor":
            component.save_pretrained(folder / part)


def networks(name: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """Return the networks of a model by part; a vision-language model has one, "model"."""
    import diffusers
    import transformers

    sizes = sizes or MODELS[name]
    if "pipeline" not in sizes:
        return {"model": _vision_language(name, sizes)[0]}
    parts = {}
    for part, given in sizes["networks"].items():
        kind, options = given["class"], {key: value for key, value in given.items() if key != "class"}
        if kind.startswith("T5"):
            parts[part] = getattr(transformers, kind)(transformers.T5Config(**options))
            continue
        if kind.startswith("CLIP"):
            tokens = _word_tokenizer()
            config = transformers.CLIPTextConfig(**{"vocab_size": len(tokens), **_ids(tokens), **options})
            parts[part] = getattr(transformers, kind)(config)
            continue
        if part == "vae":
            number = len(options["block_out_channels"])
            options |= {"down_block_types": ("DownEncoderBlock2D",) * number, "sample_size": 128}
            options |= {"up_block_types": ("UpDecoderBlock2D",) * number}
        parts[part] = getattr(diffusers, kind)(**options)
    return parts


def _pipeline(sizes: Sizes, parts: dict[str, Any]) -> Any:
    import diffusers

    schedule = sizes["schedule"]
    if sizes["scheduler"] == "DDIMScheduler":
        schedule = {**schedule, "clip_sample": False, "set_alpha_to_one": False}
    more = {"requires_safety_checker": False} if "safety_checker" in sizes["absent"] else {}
    tokenizers = {part.replace("text_encoder", "tokenizer"): _word_tokenizer() for part in parts if "text" in part}
    scheduler = getattr(diffusers, sizes["scheduler"])(**schedule)
    absent = dict.fromkeys(sizes["absent"])
    return getattr(diffusers, sizes["pipeline"])(**parts, **tokenizers, **absent, **more, scheduler=scheduler)


def _vision_language(name: str, sizes: Sizes) -> tuple[Any, Any]:
    """Return a model and its processor; Qwen's has a token for every 28 pixels by 28."""
    from tests.helpers import vlm_models

    if name.startswith("qwen"):
        tokens = vlm_models.tokenizer(vlm_models.QWEN_TOKENS, begin=True, end="<|im_end|>", merges=False)
        return vlm_models.qwen2_5_vl(sizes["text"], sizes["tower"], tokens, {})
    return vlm_models.llava(sizes["text"], sizes["tower"], vlm_models.tokenizer(["<image>"], begin=True, merges=False))


def _word_tokenizer() -> Any:
    """Return the bundled tokenizer, padded to as many tokens per text as Stable Diffusion's."""
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(Path(resolve_model("models/tiny_sd")) / "tokenizer")
    tokens.model_max_length = 77
    return tokens


def _ids(tokens: Any) -> dict[str, int]:
    return {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
