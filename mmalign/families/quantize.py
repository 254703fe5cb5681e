"""Quantized weights of the frozen base under adapters, by the libraries' own configurations.

    int8   torchao, 8-bit integers with a scale for each row
    fp8    torchao, float8_e4m3fn with a scale for each row
    nf4    bitsandbytes, 4-bit normal floats with a scale for every 64 weights (QLoRA, arXiv:2305.14314)

Linear layers of the trained network alone are quantized, and of a vision-language model those of the decoder. Products
run in the dtype of the computation, on weights that are restored layer by layer.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["int8", "nf4", "fp8"]

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
# Parts of vision-language models that stay as they are: they run once for every image, or give the logits.
WHOLE = ("lm_head", *(rf".*{part}" for part in ("visual", "vision_tower", "vision_model", "projector", "connector")))
BLOCK = 64  # weights of one scale in nf4


def check(kind: Kind, library: str, device: torch.device) -> None:
    """Check that the kind works on the device.

    Raises:
        ValueError: the package is not installed, or the library quantizes this kind on a GPU alone.
    """
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"model.quantize: {kind} needs {package}, which is not installed; pip install 'mmalign[quantize]'"
        )
    if kind == "nf4" and library == "diffusers" and device.type == "cpu":
        raise ValueError(
            "model.quantize: nf4 needs a GPU, since diffusers loads weights of bitsandbytes on a GPU alone; use "
            "int8 or fp8"
        )


def configuration(kind: Kind, library: str, compute: torch.dtype) -> Any:
    """Return the library's quantization config; `compute` is the dtype of the products."""
    module: Any = importlib.import_module(library)
    of_vlm = library == "transformers"
    if kind == "nf4":
        skipped = {"llm_int8_skip_modules": list(WHOLE)} if of_vlm else {}
        return module.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, **skipped
        )
    return module.TorchAoConfig(_torchao(kind), modules_to_not_convert=list(WHOLE) if of_vlm else None)


def pipeline_options(kind: Kind, part: str, compute: torch.dtype, *, single_file: bool) -> dict[str, Any]:
    """Return the options that load a diffusers pipeline with the network `part` quantized.

    Raises:
        ValueError: the weights are in a single file.
    """
    from diffusers import PipelineQuantizationConfig

    if single_file:
        raise ValueError(
            f"model.quantize: {kind} reads weights from a pipeline's folder, and model.path is a single file; save the "
            "pipeline to a folder with diffusers, or leave quantize out"
        )
    mapping = {part: configuration(kind, "diffusers", compute)}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def _torchao(kind: Kind) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def fit_for_training(net: nn.Module, compute: torch.dtype) -> None:
    """Adapt the libraries' layers to training.

    Autocast does not see torchao's layers, so their inputs are cast to the dtype of the products. In a pass without
    gradients on a CPU with AVX512-BF16, such as the reference's, bitsandbytes would pack its weights into a form whose
    products have no gradients.
    """
    layer: Any
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("torchao."):
            layer.register_forward_pre_hook(partial(_cast, compute))
        elif type(layer).__module__.startswith("bitsandbytes."):
            layer.support_avx512bf16_for_cpu = False


def _cast(compute: torch.dtype, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(compute),)


def quantize_shapes(net: nn.Module, kind: Kind, library: str) -> None:
    """Quantize the same layers of a network on the meta device, which has shapes alone."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = list(WHOLE) if library == "transformers" else []
    names = {n for n, m in net.named_modules() if isinstance(m, nn.Linear) and should_convert_module(n, skipped)}
    if kind != "nf4":
        from torchao.quantization import quantize_

        quantize_(net, _torchao(kind), filter_fn=lambda _, name: name in names)
        return
    for name in names:
        net.set_submodule(name, _Nf4Shape(net.get_submodule(name)))


class _Nf4Shape(nn.Linear):
    """Linear layer with the bytes of nf4, for plans: packed weights and scales, restored for each product."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        number = layer.weight.numel()
        packed = torch.empty(number // 2 + 4 * -(-number // BLOCK), dtype=torch.uint8, device="meta")
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias
        self.dtype = layer.weight.dtype

    @property
    def W_q(self) -> Tensor:
        """The packed weights, under the name by which peft recognizes a layer with `dequantize`."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the restored weights [out, in], as DoRA reads them."""
        return self.weight.new_empty((self.out_features, self.in_features), dtype=self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return a product with restored weights, which do not live on for the backward pass."""
        product: Tensor = _Restored.apply(input, self.weight, (self.out_features, self.in_features), self.dtype)
        return product if self.bias is None else product + self.bias


class _Restored(torch.autograd.Function):
    """Product with weights that are restored in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype, ctx.of, ctx.given = shape, dtype, packed, input.dtype
        return input.to(dtype) @ packed.new_empty(shape, dtype=dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = grads[0].to(ctx.dtype) @ ctx.of.new_empty(ctx.shape, dtype=ctx.dtype)
        return gradient.to(ctx.given), None, None, None
