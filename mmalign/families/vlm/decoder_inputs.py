"""Inputs of a transformers decoder: tokens, masks, image features and token types.

N is the number of rows, L the longest row's tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.families.vlm.quirks import ModelQuirks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling


def decoder_inputs(
    model: PreTrainedModel,
    quirks: ModelQuirks,
    ids: Tensor,
    mask: Tensor,
    is_response: Tensor,
    features: Sequence[BaseModelOutputWithPooling],
) -> dict[str, object]:
    """Return the inputs of the model's forward pass, for rows padded on either side.

    Args:
        model: a transformers model with a head.
        quirks: the quirks of its type.
        ids: the rows' tokens, [N, L].
        mask: mask of the tokens that are not padding, [N, L].
        is_response: mask of the response tokens, [N, L].
        features: the features of the rows' images, in their order.
    """
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": mask.long()}
    if features:
        inputs["mm_encoder_outputs"] = {"image": _joined(features)}
        if features[0].grid is not None:  # M-RoPE computes row and column positions from it
            inputs["image_grid_thw"] = torch.cat([one.grid for one in features])
    known = inspect.signature(model.base_model.forward).parameters
    if "mm_token_type_ids" in known:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if quirks.prefix_attention:
        inputs["token_type_ids"] = is_response.long()
    return inputs


def _joined(features: Sequence[BaseModelOutputWithPooling]) -> BaseModelOutputWithPooling:
    """Concatenate the features of several images, as the model returns them for images encoded together."""
    whole = copy.copy(features[0])
    pooled = [one.pooler_output for one in features]
    whole.pooler_output = torch.cat(pooled) if isinstance(pooled[0], Tensor) else [x for one in pooled for x in one]
    if getattr(whole, "deepstack_features", None) is not None:  # Qwen3-VL: a list of layers, each with its images
        layers = zip(*(one.deepstack_features for one in features), strict=True)
        whole.deepstack_features = [[x for one in layer for x in one] for layer in layers]
    return whole
