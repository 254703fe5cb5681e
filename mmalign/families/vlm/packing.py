"""Packed rows for a decoder: the responses to a prompt share one run of the prompt and its images.

Responses share all that comes before them, text and images. A prompt with another image, or with a corrupted one, is
another prompt. One row holds all prompts of a batch, each with its responses, without padding. The log-probabilities
are those of separate rows, up to the rounding of sums in another order.

N is the number of separate rows, L the longest row's tokens, T the number of prompts, M the responses' tokens and P the
packed row's tokens.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.attention import PackedPrefixMask, PrefixGroup, decoders
from mmalign.families.types import ImageFeatures
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable_packing(decoder: PreTrainedModel) -> None:
    """Install attention for shared prompts if the decoder supports it; its other numbers stay the same."""
    if not decoders.packing_unsupported_reason(decoder, longest=0):
        with contextlib.suppress(ValueError):  # `unpacked_reason` reports it
            decoders.install(decoder, "sdpa")


def unpacked_reason(decoder: PreTrainedModel, longest: int) -> str | None:
    """Return the reason why a decoder does not pack rows of up to `longest` tokens; None if it packs them."""
    if why := decoders.packing_unsupported_reason(decoder, longest):
        return why
    return None if decoders.installed(decoder) else "it has its own attention code"


def build_packed_mask(tokens: Tokens, quirks: ModelQuirks) -> PackedPrefixMask:
    """Return the mask of all prompts with their responses; equal masks are one cached object."""
    both_ways, trees = quirks.prefix_attention, list[PrefixGroup]()
    for numbers in tokens.by_prompt:
        rows = [tokens.rows[number] for number in numbers]
        trees.append(PrefixGroup(rows[0].start, tuple(len(row.response) for row in rows), both_ways))
    return _cached_mask(tuple(trees))


# Masks of a batch: for policy and reference, with and without other images
_cached_mask = lru_cache(maxsize=16)(PackedPrefixMask)


def packed_inputs(
    model: PreTrainedModel, quirks: ModelQuirks, tokens: Tokens, packed_mask: PackedPrefixMask, features: ImageFeatures
) -> tuple[Tensor, dict[str, object]]:
    """Return the positions that predict the responses' tokens [M], in the order of `tokens`, and the model's inputs.

    The model computes position ids for one separate row per prompt, the one with the longest response. They hold for
    all responses: a token's position depends only on its index in the row and on the images before it.

    Args:
        model: a transformers model with a head.
        quirks: the quirks of its type.
        tokens: the separate rows.
        packed_mask: the mask of these tokens.
        features: the features of every image of the rows.
    """
    device, width, prompts = tokens.ids.device, tokens.ids.shape[1], tokens.by_prompt
    lengths = [len(row.ids) for row in tokens.rows]
    longest = [max(rows, key=lambda row: lengths[row]) for rows in prompts]
    images = [features.images[key] for row in longest for key in tokens.images[row]]

    # Position ids of the longest row of each prompt
    longest_rows = torch.tensor(longest, device=device)
    ids, mask, is_response = (x[longest_rows] for x in (tokens.ids, tokens.mask, tokens.is_response))
    alone = decoder_inputs(model, quirks, ids, mask, is_response, images)
    positions = model._prepare_position_ids_for_generation(ids, alone) + quirks.first_position

    def joined(starts: list[int]) -> Tensor:
        """Return each packed token's index in flattened rows [P], given the first index of each row."""
        order = [row for rows in prompts for row in rows]
        return packed_mask.join([torch.arange(lengths[row]) + start for row, start in zip(order, starts, strict=True)])

    # Each packed token's index in the flattened rows [N * L], and in those of the longest alone [T * L]
    rows = joined([row * width for rows in prompts for row in rows])
    alike = joined([tree * width for tree, rows in enumerate(prompts) for _ in rows]).to(device)
    # Inputs of the packed row, with these position ids
    ids, is_response = (x.flatten()[rows.to(device)][None] for x in (tokens.ids, tokens.is_response))
    inputs = decoder_inputs(model, quirks, ids, torch.ones_like(ids), is_response, images)
    # [..., T, L] to [..., 1, P]; M-RoPE has axes before the rows
    inputs["position_ids"] = positions.flatten(-2)[..., None, alike]
    # Predicting positions, from the packed order to the order of `tokens`
    places = packed_mask.predictor_positions[rows[packed_mask.target_positions].argsort()]
    return places.to(device), inputs | decoders.attention_kwargs(packed_mask, model.get_decoder())
