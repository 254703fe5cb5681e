"""Per-model quirks, keyed by `model_type`; types that are not listed use the defaults.

By default `processor.image_token` marks an image in a prompt's text, the text is tokenized unchanged, and all attention
is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def _unchanged(processor: ProcessorMixin, text: str) -> str:
    return text


@dataclass(frozen=True)
class ModelQuirks:
    """Quirks of one model type.

    Attributes:
        placeholder: the name of the processor's attribute with the text of an image placeholder.
        format_prompt: a function from the processor and a prompt's text to the text that is tokenized.
        prefix_attention: True if prompt tokens attend to one another in both directions. The model then needs token
            types that mark the response.
        first_position: the position of a row's first token where the model computes positions.
    """

    placeholder: str = "image_token"
    format_prompt: Callable[[ProcessorMixin, str], str] = _unchanged
    prefix_attention: bool = False
    first_position: int = 0


def _paligemma(processor: ProcessorMixin, text: str) -> str:
    """Return all images, the BOS token, the text and a newline, as PaliGemma's processor arranges them."""
    images = text.count(processor.image_token)
    rest = text.replace(processor.image_token, "")
    return f"{processor.image_token * images}{processor.tokenizer.bos_token}{rest}\n"


QUIRKS = {"paligemma": ModelQuirks(format_prompt=_paligemma, prefix_attention=True, first_position=1)}

# Config entries of types that rescale the head's logits, which the adapter does not support.
SCALED_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def quirks_of(model_type: str) -> ModelQuirks:
    """Return the quirks of a type."""
    return QUIRKS.get(model_type, ModelQuirks())
