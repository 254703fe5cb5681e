"""Attention backends in diffusers' UNets and transformers.

diffusers has three attention paths, and its own switch (`set_attention_backend`) reaches one of them. The switch
silently does nothing to UNets and Stable Diffusion 3. With xformers it gives wrong numbers for masked text, as in
Qwen-Image. Here, `Attention` modules of UNets, Stable Diffusion 3 and Sana get equivalent processors that call a
backend. For models that use diffusers' registry, the registry's xformers entry is replaced. Any other module is an
error.

Sana's self-attention is linear, so no softmax backend applies, and it stays unchanged.

N rows, T tokens, C channels, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.attention.backends import BACKENDS

if TYPE_CHECKING:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention


_MARK = "_mmalign_backend"  # an attribute of the network, so that deep copies have it too
_LINEAR = ("SanaLinearAttnProcessor2_0",)


def install(net: nn.Module, backend: str) -> None:
    """Let a backend compute all softmax attention of a denoiser.

    Models that use diffusers' registry share one entry: the backend installed last serves them all.

    Args:
        net: a UNet or a transformer of diffusers.
        backend: a name in BACKENDS.

    Raises:
        ValueError: an attention module has an unsupported type, or the network has none.
    """
    from diffusers.models import attention_processor as plain
    from diffusers.models.transformers import sana_transformer as sana

    kinds: dict[type, Single | Joint] = {
        plain.AttnProcessor2_0: Single(backend),
        sana.SanaAttnProcessor2_0: Single(backend, norm_before_heads=True),
        plain.JointAttnProcessor2_0: Joint(backend),
    }
    # Modules with softmax attention, and those of unsupported types
    attention_modules = _attention(net)
    own = [(n, m) for n, m in net.named_modules() if _has_own_code(m)]
    if own:
        raise ValueError(
            f"train.attention: {own[0][0]} of this {type(net).__name__} is a {type(own[0][1]).__name__}, which has its "
            "own attention code; use sdpa"
        )
    softmax_modules = [
        (name, module) for name, module in attention_modules if type(module.processor).__name__ not in _LINEAR
    ]
    unknown = [
        f"{name} ({type(module).__name__} with {type(module.processor).__name__})"
        for name, module in softmax_modules
        if type(module.processor) not in kinds and not _uses_registry(module)
    ]
    if unknown or not softmax_modules:
        more = f"{unknown[0]} and {len(unknown) - 1} more have unsupported types" if unknown else "it has no attention"
        raise ValueError(f"train.attention: {backend} does not support this {type(net).__name__}: {more}; use sdpa")
    # Replacement of their processors
    for _, module in softmax_modules:
        if _uses_registry(module):
            _replace_registered(module, backend)
        else:
            module.set_processor(kinds[type(module.processor)])
    setattr(net, _MARK, backend)


def installed(net: nn.Module) -> str | None:
    """Return the backend that `install` set; None for diffusers' own attention."""
    return getattr(net, _MARK, None)


def head_sizes(net: nn.Module) -> frozenset[int]:
    """Return the head dimensions of a denoiser's softmax attention layers."""
    sizes: set[int] = set()
    for _, module in _attention(net):
        inner = getattr(module, "inner_dim", None)
        if inner is not None and type(module.processor).__name__ not in _LINEAR:
            sizes.add(int(inner) // int(module.heads))
    return frozenset(sizes)


def _attention(net: nn.Module) -> list[tuple[str, Attention | AttentionModuleMixin]]:
    """Return the attention modules whose processor can be replaced, with their names."""
    return [(name, module) for name, module in net.named_modules() if getattr(module, "processor", None) is not None]


def _has_own_code(module: nn.Module) -> bool:
    """Return whether a module computes attention without a processor that could be replaced."""
    is_attention = isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("Attention")
    return is_attention and getattr(module, "processor", None) is None


def _uses_registry(module: Attention | AttentionModuleMixin) -> bool:
    """Return whether the module's processor looks up its attention function in diffusers' registry."""
    return hasattr(module.processor, "_attention_backend")


def _replace_registered(module: Attention | AttentionModuleMixin, backend: str) -> None:
    """Register the backend as diffusers' xformers function, and let the module's processor use it."""
    from diffusers.models import attention_dispatch as dispatch

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: object = None,
    ) -> Tensor:
        """Compute attention as diffusers calls it, [N, T, H, C / H]; a mask is [N, T] of keys, or 4-dimensional."""
        if dropout_p or _parallel_config is not None:
            raise NotImplementedError("attention: dropout and attention over several devices are not supported")
        # A mask of keys serves all heads and queries
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[:, None, None]
        return BACKENDS[backend](query, key, value, attn_mask, causal=is_causal, scale=scale)

    # The registry has one entry, for all modules of all models
    dispatch._AttentionBackendRegistry.register(dispatch.AttentionBackendName.XFORMERS)(attend)
    module.processor._attention_backend = dispatch.AttentionBackendName.XFORMERS


class Single:
    """Self-attention or cross-attention of one sequence: UNets', and Sana's to its text.

    Equivalent to diffusers' AttnProcessor2_0. With `norm_before_heads`, queries and keys are normalized over all heads
    together, as in its SanaAttnProcessor2_0.
    """

    def __init__(self, backend: str, norm_before_heads: bool = False) -> None:
        self.backend, self.norm_before_heads = backend, norm_before_heads

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from [N, T, C], or a feature map [N, C, H, W], to itself or to [N, T', C']."""
        # Queries' tokens, normalized
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        as_map = x.shape if x.dim() == 4 else None
        if as_map is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        # Keys' and values' tokens
        context = x
        if encoder_hidden_states is not None:
            norm = attn.norm_encoder_hidden_states if attn.norm_cross else None
            context = encoder_hidden_states if norm is None else norm(encoder_hidden_states)
        # Attention
        q, k, v = self._heads(attn, attn.to_q(x), attn.to_k(context), attn.to_v(context))
        mask, num_keys = attention_mask, context.shape[1]
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, num_keys, len(x)).view(len(x), attn.heads, -1, num_keys)
        x = _project_out(attn, BACKENDS[self.backend](q, k, v, mask).flatten(2).to(q.dtype))
        # Residual, in the layout of the input
        if as_map is not None:
            x = x.transpose(1, 2).reshape(as_map)
        if attn.residual_connection:
            x = x + hidden_states
        out: Tensor = x / attn.rescale_output_factor
        return out

    def _heads(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norm_before_heads:
            q, k = _normalize(attn.norm_q, q), _normalize(attn.norm_k, k)
        q, k, v = (_split_heads(attn, x) for x in (q, k, v))
        if not self.norm_before_heads:
            q, k = _normalize(attn.norm_q, q), _normalize(attn.norm_k, k)
        return q, k, v


class Joint:
    """Joint attention of image and text, or of the image alone, as in Stable Diffusion 3.

    Equivalent to diffusers' JointAttnProcessor2_0.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over image tokens [N, T, C] and text tokens [N, T', C], joined; return both parts."""
        assert attention_mask is None, "Stable Diffusion 3 masks nothing"
        # Image tokens
        q, k, v = (_split_heads(attn, to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normalize(attn.norm_q, q), _normalize(attn.norm_k, k)
        text = encoder_hidden_states
        if text is None:
            return _project_out(attn, BACKENDS[self.backend](q, k, v).flatten(2).to(q.dtype))
        # Text tokens
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (_split_heads(attn, to(text)) for to in projections)
        text_q, text_k = _normalize(attn.norm_added_q, text_q), _normalize(attn.norm_added_k, text_k)
        # Attention over both, then apart again
        joined = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        x = BACKENDS[self.backend](*joined).flatten(2).to(q.dtype)
        x, text = x[:, : hidden_states.shape[1]], x[:, hidden_states.shape[1] :]
        return _project_out(attn, x), text if attn.context_pre_only else attn.to_add_out(text)


def _split_heads(attn: Attention, x: Tensor) -> Tensor:
    """Reshape [N, T, C] to [N, T, H, C / H]."""
    return x.view(*x.shape[:-1], attn.heads, -1)


def _normalize(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _project_out(attn: Attention, x: Tensor) -> Tensor:
    """Apply the projection after attention, and its dropout."""
    linear, dropout = attn.to_out
    out: Tensor = dropout(linear(x))
    return out
