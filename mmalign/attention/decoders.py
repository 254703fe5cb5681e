"""Attention backends in transformers' language decoders.

transformers looks up attention by a name in a model's config. Each backend is registered under a name of its own, as an
attention function and as a mask function: without the latter, transformers silently leaves padding unmasked.

After `install`, a decoder computes ordinary rows as before, and also accepts a `PackedPrefixMask`:

    decoder(inputs_embeds=..., position_ids=mask.positions, use_cache=False, **attention_kwargs(mask, decoder))

Every layer then applies the packed mask, or fails. `attention_kwargs` refuses decoders that mix tokens in other ways
(`packing_unsupported_reason`). It also passes an empty `attention_mask`, which any other attention function rejects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.attention.backends import BACKENDS
from mmalign.attention.packed_mask import PackedPrefixMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "mmalign_"  # of the backends' names in transformers
_KEYWORD = "mmalign_packed_mask"  # carries a packed mask through a model's layers


def install(decoder: PreTrainedModel, backend: str) -> None:
    """Let a backend compute a decoder's attention, for packed and for ordinary rows.

    With "sdpa", transformers' own function still computes ordinary rows: no number changes.

    Args:
        decoder: the language model alone; a vision tower keeps its own attention.
        backend: a name in BACKENDS.

    Raises:
        ValueError: the decoder does not support other attention functions.
    """
    name = _register(backend)
    decoder.set_attn_implementation(name)
    if decoder.config._attn_implementation != name:  # transformers only logs a warning
        raise ValueError(
            f"train.attention: {backend} does not support a {type(decoder).__name__}, which has its own attention "
            "code; use auto or sdpa"
        )


def installed(decoder: PreTrainedModel) -> str | None:
    """Return the backend that `install` set; None for transformers' own attention."""
    name = str(decoder.config._attn_implementation)
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def attention_kwargs(packed_mask: PackedPrefixMask, decoder: PreTrainedModel) -> dict[str, object]:
    """Return the keyword arguments of a decoder's forward pass that apply a packed mask.

    Raises:
        ValueError: the decoder cannot take packed rows, or has no backend installed.
    """
    why = None if installed(decoder) else "transformers' own attention ignores a packed mask"
    if why := why or packing_unsupported_reason(decoder, packed_mask.longest):
        raise ValueError(f"attention: a {type(decoder).__name__} cannot take rows that share a prefix: {why}")
    device = next(decoder.parameters()).device
    return {_KEYWORD: packed_mask, "attention_mask": torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)}


def packing_unsupported_reason(decoder: PreTrainedModel, longest: int) -> str | None:
    """Return the reason why a decoder cannot take rows that share a prefix; None if it can.

    Args:
        decoder: the language model.
        longest: tokens of the longest unpacked row; a window of this width hides nothing.
    """
    config = decoder.config
    kinds = getattr(config, "layer_types", None) or []
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        return f"its {' and '.join(others)} layers do not use an attention mask"
    if getattr(config, "use_bidirectional_attention", None) == "vision":
        return "the tokens of an image attend to each other in both directions"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft cap, which no backend supports"
    # A window counts only where some layer has one
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    if window is not None and window < longest:
        return f"its attention window is {window} tokens, and a row has {longest}"
    return None


def xformers_unsupported_reason(decoder: PreTrainedModel) -> str | None:
    """Return the reason why xformers cannot compute a decoder's attention on any device; None if it may."""
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        return "the model's attention has a soft cap, which its kernels do not support"
    return None


def head_sizes(decoder: nn.Module) -> frozenset[int]:
    """Return the head dimensions of all attention layers that state one."""
    sizes = (getattr(module, "head_dim", None) for module in decoder.modules())
    return frozenset(size for size in sizes if isinstance(size, int))


def _register(backend: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    run, name = BACKENDS[backend], _PREFIX + backend

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # else recompiled for every packed mask
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
        """Compute attention as transformers calls it.

        Queries are [B, H, M, K], keys and values [B, H, N, K]; the result is [B, M, H, K].
        """
        packed_mask = more.pop(_KEYWORD, None)
        assert packed_mask is None or isinstance(packed_mask, PackedPrefixMask)
        # With sdpa, ordinary rows take transformers' own function
        if packed_mask is None and backend == "sdpa":
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
            out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
            return out, None
        _refuse_unsupported(dropout, more, None if packed_mask is None else packed_mask.longest)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if packed_mask is not None:
            return run(q, k, v, packed_mask, scale=scaling).contiguous(), None
        # The rule of transformers' own function
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = causal and attention_mask is None and q.shape[1] > 1
        if causal:  # a static cache has unused keys at its end
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        return run(q, k, v, attention_mask, causal=causal, scale=scaling).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _refuse_unsupported(dropout: float, more: dict[str, object], longest: int | None) -> None:
    """Refuse attention options that no backend supports.

    Args:
        dropout: the dropout rate of attention weights.
        more: the layer's other keyword arguments.
        longest: tokens of the longest unpacked row; a window of this width hides nothing. None without a packed mask,
            where the mask itself holds the window.

    Raises:
        NotImplementedError: an option is set that no backend supports.
    """
    window = more.get("sliding_window")
    if dropout:
        raise NotImplementedError(f"attention: dropout of weights ({dropout}) is not supported")
    for name in ("softcap", "position_bias", "s_aux"):
        if more.get(name) is not None:
            raise NotImplementedError(f"attention: {name} is not supported; use train.attention: sdpa, unpacked")
    if longest is not None and isinstance(window, int) and 0 < window < longest:
        raise NotImplementedError(
            f"attention: a window of {window} tokens is not supported for packed rows of up to {longest} tokens"
        )
