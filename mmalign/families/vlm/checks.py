"""Checks that a vision-language model is supported, is free of dropout, and has its own processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from mmalign.families.vlm.quirks import SCALED_LOGITS
from mmalign.reading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mmalign.families.base import VisionLanguage


def check_type(path: str, model_type: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Check that the adapter supports the model's type.

    Raises:
        ValueError: the type lacks a call or a config entry, scales its logits, or has other tokens for image features.
    """
    # Calls that the model must have
    lacking = [name for name in ("get_image_features", "get_decoder") if not hasattr(model, name)]
    if not model._supports_mm_encoder_outputs():
        lacking.append("mm_encoder_outputs")
    # Logits and image tokens
    text, image = model.config.get_text_config(), getattr(model.config, "image_token_id", None)
    lacking += [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1, 1.0)]
    place = _image_place(processor)
    if image is None:
        lacking.append("image_token_id")
    elif place and place[1] != image and image in processor.image_token_ids:
        lacking.append(f"an image's placeholder in a prompt is {place[0]}, and its features have other tokens")
    if lacking:
        raise ValueError(
            f"model.path: {path} is a {model_type}, which is not supported ({', '.join(lacking)}); use a type such as "
            "llava, llava_next, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl, paligemma or internvl"
        )


def check_processor(path: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Check that the processor is the model's own.

    Raises:
        ValueError: its image token is not the model's, or it has more tokens than the model.
    """
    image, place = model.config.image_token_id, _image_place(processor)
    if not place or place[1] != image:
        image_token = f"{place[0]} is token {place[1]}" if place else "it has no image token"
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model ({image_token}, and the model's image token "
            f"is {image}); copy the processor's files again"
        )
    # Models may pad their embeddings to more rows than there are tokens
    num_tokens, num_rows = len(processor.tokenizer), model.get_input_embeddings().num_embeddings
    if num_tokens > num_rows:
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model (it has {num_tokens:,} tokens, and the "
            f"model {num_rows:,}); copy the processor's files again"
        )


def _image_place(processor: ProcessorMixin) -> tuple[str, int] | None:
    """Return the token that stands for an image in a prompt's text, with its id; None if there is none."""
    tokenizer, token = getattr(processor, "tokenizer", None), getattr(processor, "image_token", None)
    return None if tokenizer is None or token is None else (str(token), tokenizer.convert_tokens_to_ids(token))


def remove_dropout(model: nn.Module) -> None:
    """Set all dropout to 0, so that policy and reference differ by training alone, never by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def check_one_image(family: VisionLanguage) -> None:
    """Encode one image, because a processor of another model can pass every other check.

    Raises:
        ValueError: the image's tokens do not match its features, or the model fails on the processor's output.
    """
    try:
        family.encode_images({"a picture": family.processor.preprocess_image(Image.new("RGB", (96, 64), "gray"))})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the kind of error depends on model and processor
        if isinstance(error, ValueError) and str(error).startswith("model.path"):
            raise
        raise ValueError(
            f"model.path: the processor of {family.name} belongs to another model, which cannot read its images "
            f"({first_line(error)}); copy the processor's files again"
        ) from error
