"""Responses to one prompt in one row of a decoder: the prompt and its images run once, and every response sees them.

What is shared is the whole of what comes before a response, words and images alike; a prompt with another image, or
with a disturbed one, is another prompt. All prompts of a batch stand in the same row, each with its responses, and no
padding. Log-probabilities mean what they mean in rows apart, and differ from those by the rounding of sums in another
order.

N rows apart, L tokens of the longest; T prompts; M tokens of responses; P tokens of the packed row.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmalign.attention import PackedPrefixMask, PrefixGroup, decoders
from mmalign.families.types import ImageFeatures
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.tokens import Tokens


def enable_packing(decoder: Any) -> None:
    """Give a decoder attention that knows of shared prompts, and leave its other numbers alone; or leave it all."""
    if not decoders.packing_unsupported_reason(decoder, longest=0):
        with contextlib.suppress(ValueError):  # `unpacked_reason` says so then
            decoders.install(decoder, "sdpa")


def unpacked_reason(decoder: Any, longest: int) -> str | None:
    """Why a decoder runs the responses of rows of up to that many tokens apart; None if it packs them."""
    why = decoders.packing_unsupported_reason(decoder, longest)
    return why or ("" if decoders.installed(decoder) else "it computes attention in a way of its own")


def build_packed_mask(tokens: Tokens, quirks: ModelQuirks) -> PackedPrefixMask:
    """The prompts of rows, each with its responses; equal ones are one object, with all that it has worked out."""
    both_ways, trees = quirks.prefix_attention, list[PrefixGroup]()
    for numbers in tokens.by_prompt:
        rows = [tokens.rows[number] for number in numbers]
        trees.append(PrefixGroup(rows[0].start, tuple(len(row.response) for row in rows), both_ways))
    return _cached_mask(tuple(trees))


@lru_cache(maxsize=16)  # of a batch, for policy and reference, with and without other images
def _cached_mask(trees: tuple[PrefixGroup, ...]) -> PackedPrefixMask:
    return PackedPrefixMask(trees)


def packed_inputs(
    model: Any, quirks: ModelQuirks, tokens: Tokens, packed_mask: PackedPrefixMask, features: ImageFeatures
) -> tuple[Tensor, dict[str, Any]]:
    """Where the responses' tokens are predicted [M], in the order of `tokens`, and what a forward pass takes.

    Positions are the model's own, of each prompt with its longest response in a row apart: that of a token depends on
    its place in its row, and of the images before it, alone.

    Args:
        model: a model of transformers with a head.
        quirks: of its type.
        tokens: the rows apart.
        packed_mask: of these tokens.
        features: of every image of the rows.
    """
    device, width, prompts = tokens.ids.device, tokens.ids.shape[1], tokens.by_prompt
    lengths = [len(row.ids) for row in tokens.rows]
    longest = [max(rows, key=lambda row: lengths[row]) for rows in prompts]
    images = [features.images[key] for row in longest for key in tokens.images[row]]

    length = torch.tensor(longest, device=device)
    ids, mask, is_response = (x[length] for x in (tokens.ids, tokens.mask, tokens.is_response))
    alone = decoder_inputs(model, quirks, ids, mask, is_response, images)
    positions = model._prepare_position_ids_for_generation(ids, alone) + quirks.first_position

    def joined(starts: list[int]) -> Tensor:
        """Where each token of the packed row is in flattened rows [P], given where these rows begin."""
        order = [row for rows in prompts for row in rows]
        return packed_mask.join([torch.arange(lengths[row]) + start for row, start in zip(order, starts, strict=True)])

    rows = joined([row * width for rows in prompts for row in rows])
    alike = joined([tree * width for tree, rows in enumerate(prompts) for _ in rows]).to(device)
    ids, is_response = (x.flatten()[rows.to(device)][None] for x in (tokens.ids, tokens.is_response))
    inputs = decoder_inputs(model, quirks, ids, torch.ones_like(ids), is_response, images)
    inputs["position_ids"] = positions.flatten(-2)[..., None, alike]
    places = packed_mask.predictor_positions[rows[packed_mask.target_positions].argsort()]
    return places.to(device), inputs | decoders.attention_kwargs(packed_mask, model.get_decoder())
