"""Attention of diffusers' UNets and transformers by an executor of ours.

diffusers computes attention in three ways, and its own switch (`set_attention_backend`) reaches one of them: it does
nothing to UNets and Stable Diffusion 3 and says so nowhere, and for masked text as of Qwen-Image it makes wrong numbers
of xformers. Here `Attention` modules of UNets, of Stable Diffusion 3 and of Sana get processors of ours, which
compute what the ones that they replace do; the models that ask diffusers' registry get its place for xformers, with our
function in it. What is covered by neither is an error.

Sana's self-attention is linear: no kernel of softmax attention is for it, and it stays as it is.

N rows, T tokens, C channels, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.attention.executors import BACKENDS

if TYPE_CHECKING:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention


_MARK = "_mmalign_executor"  # a network's attribute: deep copies have it too
_LINEAR = ("SanaLinearAttnProcessor2_0",)


def install(net: nn.Module, executor: str) -> None:
    """Have an executor compute all softmax attention of a denoiser.

    The models that ask diffusers' registry share one place in it: the last executor that any of them was given.

    Args:
        net: a UNet or a transformer of diffusers.
        executor: a name of EXECUTORS.

    Raises:
        ValueError: an attention module is of a kind that is not known here, or there is none.
    """
    from diffusers.models import attention_processor as plain
    from diffusers.models.transformers import sana_transformer as sana

    kinds: dict[type, Single | Joint] = {
        plain.AttnProcessor2_0: Single(executor),
        sana.SanaAttnProcessor2_0: Single(executor, norm_before_heads=True),
        plain.JointAttnProcessor2_0: Joint(executor),
    }
    attention_modules = list(_attention(net))
    softmax_modules = [
        (name, module) for name, module in attention_modules if type(module.processor).__name__ not in _LINEAR
    ]
    unknown = [
        f"{name} ({type(module).__name__} with {type(module.processor).__name__})"
        for name, module in softmax_modules
        if type(module.processor) not in kinds and not _asks_registry(module)
    ]
    if unknown or not softmax_modules:
        more = f"{unknown[0]} and {len(unknown) - 1} more are of kinds that are not known here" if unknown else ""
        raise ValueError(
            f"train.attention: {executor} cannot serve this {type(net).__name__}: {more or 'it has no attention'}; use "
            "sdpa"
        )
    for _, module in softmax_modules:
        if _asks_registry(module):
            _ask_for(module, executor)
        else:
            module.set_processor(kinds[type(module.processor)])
    setattr(net, _MARK, executor)


def installed(net: nn.Module) -> str | None:
    """The executor that `use` gave a denoiser; None for diffusers' own attention."""
    return getattr(net, _MARK, None)


def head_sizes(net: nn.Module) -> frozenset[int]:
    """Numbers of a head, of all softmax attention of a denoiser."""
    sizes: set[int] = set()
    for _, module in _attention(net):
        inner = getattr(module, "inner_dim", None)
        if inner is not None and type(module.processor).__name__ not in _LINEAR:
            sizes.add(int(inner) // int(module.heads))
    return frozenset(sizes)


def _attention(net: nn.Module) -> list[tuple[str, Attention | AttentionModuleMixin]]:
    """The attention modules by name.

    Raises:
        ValueError: one has no processor, and so no place where another executor fits in.
    """
    modules: list[tuple[str, Attention | AttentionModuleMixin]] = []
    for name, module in net.named_modules():
        if getattr(module, "processor", None) is not None:
            modules.append((name, module))
        elif isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("Attention"):
            raise ValueError(
                f"train.attention: {name} of this {type(net).__name__} is a {type(module).__name__}, which computes "
                "attention in a way of its own; use sdpa"
            )
    return modules


def _asks_registry(module: Attention | AttentionModuleMixin) -> bool:
    """Whether attention is computed by what diffusers' registry has under the processor's choice."""
    return hasattr(module.processor, "_attention_backend")


def _ask_for(module: Attention | AttentionModuleMixin, executor: str) -> None:
    """Have a module's processor ask the registry for xformers, and find our function there."""
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
        """As diffusers calls it, [N, T, H, C / H]; a mask is [N, T] of keys, or has four dimensions."""
        if dropout_p or _parallel_config is not None:
            raise NotImplementedError("attention: neither dropout nor attention over several devices is known here")
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[:, None, None]
        return BACKENDS[executor](query, key, value, attn_mask, causal=is_causal, scale=scale)

    dispatch._AttentionBackendRegistry.register(dispatch.AttentionBackendName.XFORMERS)(attend)
    module.processor._attention_backend = dispatch.AttentionBackendName.XFORMERS


class Single:
    """Attention of one sequence to itself or to another: UNets', and Sana's to its text.

    It computes what diffusers' AttnProcessor2_0 does, or with `norm_before_heads`, where queries and keys are normed
    over all heads together, its SanaAttnProcessor2_0.
    """

    def __init__(self, executor: str, norm_before_heads: bool = False) -> None:
        self.backend, self.norm_before_heads = executor, norm_before_heads

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it: [N, T, C] or a map [N, C, H, W], and what it attends to [N, T', C']."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        as_map = x.shape if x.dim() == 4 else None
        if as_map is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        seen = x
        if encoder_hidden_states is not None:
            norm = attn.norm_encoder_hidden_states if attn.norm_cross else None
            seen = encoder_hidden_states if norm is None else norm(encoder_hidden_states)
        q, k, v = self._heads(attn, attn.to_q(x), attn.to_k(seen), attn.to_v(seen))
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, seen.shape[1], len(x)).view(len(x), attn.heads, -1, seen.shape[1])
        x = _out(attn, BACKENDS[self.backend](q, k, v, mask).flatten(2).to(q.dtype))
        if as_map is not None:
            x = x.transpose(1, 2).reshape(as_map)
        if attn.residual_connection:
            x = x + hidden_states
        out: Tensor = x / attn.rescale_output_factor
        return out

    def _heads(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norm_before_heads:
            q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        q, k, v = (_split(attn, x) for x in (q, k, v))
        if not self.norm_before_heads:
            q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        return q, k, v


class Joint:
    """Attention of image and text together, or of the image alone: Stable Diffusion 3's.

    It computes what diffusers' JointAttnProcessor2_0 does.
    """

    def __init__(self, executor: str) -> None:
        self.backend = executor

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: [N, T, C] of the image, and of the text."""
        assert attention_mask is None, "Stable Diffusion 3 masks nothing"
        q, k, v = (_split(attn, to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        text = encoder_hidden_states
        if text is None:
            return _out(attn, BACKENDS[self.backend](q, k, v).flatten(2).to(q.dtype))
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (_split(attn, to(text)) for to in projections)
        text_q, text_k = _normed(attn.norm_added_q, text_q), _normed(attn.norm_added_k, text_k)
        joined = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        x = BACKENDS[self.backend](*joined).flatten(2).to(q.dtype)
        x, text = x[:, : hidden_states.shape[1]], x[:, hidden_states.shape[1] :]
        return _out(attn, x), text if attn.context_pre_only else attn.to_add_out(text)


def _split(attn: Attention, x: Tensor) -> Tensor:
    """[N, T, H, C / H] of [N, T, C]."""
    return x.view(*x.shape[:-1], attn.heads, -1)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _out(attn: Attention, x: Tensor) -> Tensor:
    """The projection after attention, and its dropout."""
    linear, dropout = attn.to_out
    out: Tensor = dropout(linear(x))
    return out
