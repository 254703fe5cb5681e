"""DoRA (arXiv:2402.09353, equation 5): each row of W + s B A is scaled to a trained magnitude.

peft rounds the norms of rows to the dtype of the computation. In bfloat16 the network then differs from the reference
before its first update, by up to 0.4 % of each row. Here norms are float32 sums over the two factors, and a magnitude
begins as the norm itself, so the first ratio is exactly 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


class Magnitudes(DoraLinearLayer):  # type: ignore[misc]
    """Magnitudes of a linear layer's rows, in peft's place and under its names."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = nn.Parameter(weight.float())

    def forward(self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, **given: Any) -> Tensor:
        """Return what is added to the base layer's output [..., out]; `given` may have that output, as `base_result`.

        The norms are constants to the gradient (section 4.3 of the paper).
        """
        base: Tensor | None = given.get("base_result")
        if base is None:  # dropout changed x
            base = F.linear(x, dequantize_module_weight(base_layer).to(x.dtype))
        elif base_layer.bias is not None:
            base = base - base_layer.bias
        ratio = self.weight / row_norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        change: Tensor = (ratio - 1).to(base.dtype) * base + (scaling * ratio).to(base.dtype) * lora_B(lora_A(x))
        return change.to(base.dtype)


@torch.no_grad()
def row_norms(base_layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of W + s B A, float32 [out], without that matrix."""
    weight = dequantize_module_weight(base_layer)
    kind = "cpu" if weight.is_meta else weight.device.type  # autocast has no meta device
    with torch.autocast(kind, enabled=False):
        a, b = a.float(), b.float()
        own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        crossed = ((weight @ a.T.to(weight.dtype)).float() * b).sum(1)
        added = ((b @ (a @ a.T)) * b).sum(1)
        square: Tensor = own + 2 * scaling * crossed + scaling**2 * added
        return square.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros is divided by it


def install(net: nn.Module, *, fresh: bool = False) -> None:
    """Replace peft's magnitudes in a network; `fresh` ones begin as the norms.

    Raises:
        ValueError: an adapted layer is not linear.
    """
    for name, layer in net.named_modules():
        for adapter, old in layer.lora_magnitude_vector.items() if isinstance(layer, LoraLayer) else ():
            base: Any = layer.get_base_layer()
            if not isinstance(base, nn.Linear):
                raise ValueError(f"model.lora.dora: {name} is a {type(base).__name__}; DoRA adapts linear layers alone")
            weight = old.weight.data
            # The norms of the rows now, so that DoRA changes nothing at first
            if fresh:
                matrices = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                weight = row_norms(base, *matrices, layer.scaling[adapter])
            layer.lora_magnitude_vector[adapter] = Magnitudes(weight)
