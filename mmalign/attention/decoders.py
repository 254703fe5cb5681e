"""Attention of transformers' language decoders by an executor of ours.

transformers finds attention by a name in a model's config. We give it a name for each executor, for the function that
computes attention and for the one that makes its mask: without the second, transformers leaves padding unmasked and
says nothing.

A decoder that was given to `use` computes ordinary rows as ever, and takes a `PackedPrefixMask` beside its tokens:

    decoder(inputs_embeds=..., position_ids=forest.positions, use_cache=False, **of(forest, decoder))

where every layer's attention is the forest's, or it fails: `of` refuses decoders that know other tokens in other ways
(`packing_unsupported_reason`), and gives a mask of no tokens, which nothing but our function, which does not read it,
can use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.attention.executors import BACKENDS
from mmalign.attention.forest import PackedPrefixMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "mmalign_"  # of the executors' names in transformers
_KEYWORD = "mmalign_forest"  # what takes a forest through a model's layers


def install(decoder: PreTrainedModel, executor: str) -> None:
    """Have an executor compute the attention of a decoder of transformers, packed rows and others.

    With "sdpa" rows that are no forest are computed by transformers' own function: no number changes.

    Args:
        decoder: the language model; for a vision-language model not the whole, whose tower keeps its own attention.
        executor: a name of EXECUTORS.

    Raises:
        ValueError: the decoder computes attention in a way of its own.
    """
    name = _register(executor)
    decoder.set_attn_implementation(name)
    if decoder.config._attn_implementation != name:  # transformers says so in a line of its log, and goes on
        raise ValueError(
            f"train.attention: {executor} cannot serve: a {type(decoder).__name__} computes attention in a way of its "
            "own; use auto or sdpa"
        )


def installed(decoder: PreTrainedModel) -> str | None:
    """The executor that `use` gave a decoder; None for transformers' own attention."""
    name = str(decoder.config._attn_implementation)
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def attention_kwargs(packed_mask: PackedPrefixMask, decoder: PreTrainedModel) -> dict[str, object]:
    """What a decoder's forward pass takes for a packed row, beside its tokens and their positions.

    Raises:
        ValueError: the decoder cannot take it, or has no executor that does.
    """
    why = None if installed(decoder) else "it has transformers' own attention, to which a forest means nothing"
    if why := why or packing_unsupported_reason(decoder, packed_mask.longest):
        raise ValueError(f"attention: a {type(decoder).__name__} cannot take rows that share a prefix: {why}")
    device = next(decoder.parameters()).device
    return {_KEYWORD: packed_mask, "attention_mask": torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)}


def packing_unsupported_reason(decoder: PreTrainedModel, longest: int) -> str | None:
    """Return the reason why a decoder cannot take rows that share a prefix; None if it can.

    Args:
        decoder: the language model.
        longest: tokens of the longest row apart; a window that is as wide hides nothing.
    """
    config = decoder.config
    kinds = getattr(config, "layer_types", None) or []
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        return f"its {' and '.join(others)} layers do not see tokens by a mask"
    if getattr(config, "use_bidirectional_attention", None) == "vision":
        return "the tokens of an image see one another in both directions"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft cap, which no kernel here knows"
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    if window is not None and window < longest:
        return f"its tokens see {window} others, and a row has {longest}"
    return None


def xformers_unsupported_reason(decoder: PreTrainedModel) -> str | None:
    """Return the reason why no kernel of xformers computes a decoder's attention on any device; None if one may."""
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        return "the model's attention has a soft cap, which its kernels do not know"
    return None


def head_sizes(decoder: nn.Module) -> frozenset[int]:
    """Numbers of a head, of all layers that say so."""
    sizes = (getattr(module, "head_dim", None) for module in decoder.modules() if hasattr(module, "q_proj"))
    return frozenset(size for size in sizes if isinstance(size, int))


def _register(executor: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    run, name = BACKENDS[executor], _PREFIX + executor

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # else compiled anew for every forest
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **more: object,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: queries [B, H, M, K], keys and values [B, H, N, K]; the result is [B, M, H, K]."""
        forest = more.pop(_KEYWORD, None)
        assert forest is None or isinstance(forest, PackedPrefixMask)
        if forest is None and executor == "sdpa":
            return _own(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)
        _refuse(dropout, more, None if forest is None else forest.longest)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if forest is not None:
            return run(q, k, v, forest, scale=scaling).contiguous(), None
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = causal and attention_mask is None and q.shape[1] > 1
        if causal:  # an empty cache of fixed size follows the keys
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        return run(q, k, v, attention_mask, causal=causal, scale=scaling).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **more: object,
) -> tuple[Tensor, None]:
    """transformers' own function."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out, None


def _refuse(dropout: float, more: dict[str, object], longest: int | None) -> None:
    """What no executor knows.

    Args:
        dropout: of weights.
        more: what the layer says besides.
        longest: tokens of the longest row of a forest; a window that is wider hides nothing. None without a forest,
            where windows are in the mask.

    Raises:
        NotImplementedError: it is asked for.
    """
    window = more.get("sliding_window")
    if dropout:
        raise NotImplementedError(f"attention: dropout of weights ({dropout}) is not known here")
    for name in ("softcap", "position_bias", "s_aux"):
        if more.get(name) is not None:
            raise NotImplementedError(f"attention: {name} is not known here; use train.attention: sdpa, unpacked")
    if longest is not None and isinstance(window, int) and 0 < window < longest:
        raise NotImplementedError(
            f"attention: a window of {window} tokens is not known for rows that share a prefix, of up to {longest}"
        )
