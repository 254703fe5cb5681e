"""xformers' own idea of the masks that it is given, and of the kernels that take them; without a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import BACKENDS, PackedPrefixMask, PrefixGroup, kernels

pytest.importorskip("xformers", reason="xformers is not installed: pip install 'mmalign[cuda]'")
if why := kernels._unusable_reason():
    pytest.skip(f"xformers cannot be used: {why}", allow_module_level=True)

CAUSAL = PackedPrefixMask((PrefixGroup(9, (4, 3, 6)), PrefixGroup(5, (2,))))
MIXED = PackedPrefixMask((PrefixGroup(9, (4, 3)), PrefixGroup(5, (2, 8), bidirectional_prefix=True)))
ALONE = PackedPrefixMask((PrefixGroup(9, (4,)), PrefixGroup(5, (2,))))  # nothing is shared, and nothing laid out anew


def own_reference(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, scale: Any = None, op: Any = None) -> Tensor:
    """In place of the kernels: what xformers tests them against, with its own reading of its masks."""
    from xformers.attn_bias_utils import ref_attention_bmhk

    out: Tensor = ref_attention_bmhk(q, k, v, attn_bias, scale)
    return out


@pytest.mark.parametrize("packed_mask", [CAUSAL, MIXED, ALONE])
def test_xformers_reads_its_masks_as_we_mean_them(
    packed_mask: PackedPrefixMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", own_reference)
    result = []
    for name in ("xformers", "dense"):
        draw = torch.Generator().manual_seed(0)
        q, k, v, weight = (torch.randn(1, packed_mask.length, heads, 8, generator=draw) for heads in (4, 2, 2, 4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = BACKENDS[name](*inputs, packed_mask, scale=0.4)
        result.append([out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)])
    for actual, plain in zip(*result, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-6)  # float32


def test_xformers_reads_other_masks_as_we_mean_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", own_reference)
    q, k, v = (torch.randn(2, length, 4, 8) for length in (5, 7, 7))
    seen = torch.rand(2, 1, 1, 7) < 0.7
    for mask in (None, seen, torch.randn(2, 4, 5, 7)):
        torch.testing.assert_close(BACKENDS["xformers"](q, k, v, mask), BACKENDS["dense"](q, k, v, mask))
    actual, plain = (BACKENDS[name](q, k[:, :5], v[:, :5], causal=True) for name in ("xformers", "dense"))
    torch.testing.assert_close(actual, plain)


class Taken:
    """In place of the kernels: which of them take the inputs, forwards and backwards, on a GPU that has them all."""

    def __init__(self) -> None:
        self.calls: list[set[str]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: Any, op: Any) -> Tensor:
        from xformers.ops import fmha

        inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=attn_bias, scale=scale)
        inputs.validate_inputs()
        known = [fmha.flash, fmha.cutlass] if op is None else [fmha.cutlass]
        both = {module.__name__.split(".")[-1]: (module.FwOp, module.BwOp) for module in known}
        self.calls.append({name for name, ops in both.items() if not any(self.against(one, inputs) for one in ops)})
        return q

    @staticmethod
    def against(operator: Any, inputs: Any) -> list[str]:
        here = ("device=cpu", "bf16 is only supported on A100+ GPUs")  # what is wrong with this machine alone
        return [why for why in operator.not_supported_reasons(inputs) if not why.startswith(here)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 32, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("ordered", [False, True])
def test_every_mask_has_a_kernel_with_gradients(
    dtype: torch.dtype, size: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", taken := Taken())
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: ordered)
    text = torch.ones(1, 1, 1, 77, dtype=torch.bool)  # 77 is no multiple of 8
    for mask in (CAUSAL, MIXED, ALONE, text, None):
        length = mask.length if isinstance(mask, PackedPrefixMask) else 16
        q = torch.zeros(1, length, 4, size, dtype=dtype)
        k = torch.zeros(1, 77 if mask is text else length, 2, size, dtype=dtype)
        BACKENDS["xformers"](q, k, k, mask)
        assert all("cutlass" in names for names in taken.calls), (mask, taken.calls)
        if mask is not text and dtype != torch.float32 and not ordered:
            assert all("flash" in names for names in taken.calls), (mask, taken.calls)
        taken.calls.clear()
