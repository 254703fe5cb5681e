"""What vision-language models do differently from one another, by their `model_type`; what is not here is the rule.

The rule: `processor.image_token` in a prompt's text is the place of an image, the text is tokenised as it is written,
and attention is causal throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _unchanged(processor: Any, text: str) -> str:
    return text


@dataclass(frozen=True)
class ModelQuirks:
    """What is particular of a type.

    Attributes:
        placeholder: the processor's attribute with the text that is an image's place.
        format_prompt: the text that a processor tokenises in the place of a prompt, given the processor and the prompt.
        prefix_attention: the prompt's tokens see one another in both directions; the model must be told where it ends.
        first_position: of a row's tokens, where the model is not told their positions.
    """

    placeholder: str = "image_token"
    format_prompt: Callable[[Any, str], str] = _unchanged
    prefix_attention: bool = False
    first_position: int = 0


def _paligemma(processor: Any, text: str) -> str:
    """All images, then the beginning of the text, which ends with a line: PaliGemma's processor adds both itself."""
    images = text.count(processor.image_token)
    rest = text.replace(processor.image_token, "")
    return f"{processor.image_token * images}{processor.tokenizer.bos_token}{rest}\n"


QUIRKS = {"paligemma": ModelQuirks(format_prompt=_paligemma, prefix_attention=True, first_position=1)}

# Types whose logits are not the head's alone, in ways not known here.
SCALED_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def quirks_of(model_type: str) -> ModelQuirks:
    """The facts of a type."""
    return QUIRKS.get(model_type, ModelQuirks())
