"""Comparison of attention backends on whole models with adapters, by their outputs and gradients.

The computation is that of training. The denoiser has heads of 32 and 64 numbers, with self- and cross-attention. The
decoder has heads of 64 numbers, and its responses share their prompt. Frozen weights are in half precision under
autocast. Adapters are in float32, moved off zero so that both of their factors have gradients. Any device and precision
will do.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.attention import decoders, denoisers
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading, LoraSettings
from mmalign.language.chat import Turn
from tests.benchmarks import random_models
from tests.helpers import vlm_reference

CPU = torch.device("cpu")
ADAPTERS: dict[str, Any] = {"rank": 8, "alpha": 8.0, "seed": 0}
MOVED = 0.02  # standard deviation of the change of an adapter's weights
SHARPER = {"to_q.": 3.0, "to_k.": 3.0, "q_proj.": 8.0, "k_proj.": 8.0, "v_proj.": 8.0, "o_proj.": 8.0, "lm_head.": 16.0}
SIDE = 128  # pixels: 64 queries of heads with 64 numbers, 256 of heads with 32; half of it on a CPU
TEXT: random_models.Sizes = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
TOWER: random_models.Sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
MODELS = ("denoiser", "decoder")
# Limits on the distance of two backends: values and gradient. A product of bfloat16 is rounded by up to 2^-9 of its
# value, and the error passes through up to fourteen attentions, and back. On a CPU, PyTorch's own kernel and the plain
# formula are 0.015 and 0.040 apart; logits of 1.1 times their size make 0.044 and 0.20. In float32 they are 1e-6 and
# 3e-6 apart, and the limits allow ten times that for other kernels and devices.
APART = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (0.03, 0.08)}
SAID = [["There is a red cube and a green ball on the table.", "Yes."], ["No, there is no dog.", "A cat sits on it."]]


def compare(name: str, *given: Any) -> list[tuple[float, float]]:
    """Run the comparison of one of MODELS."""
    return {"denoiser": denoiser, "decoder": decoder}[name](*given)


def loading(device: torch.device, dtype: torch.dtype) -> Loading:
    """Return the loading options of a recipe with LoRA in this precision."""
    half = None if dtype == torch.float32 else dtype
    return Loading(device, half=half, network_half=half is not None)


def denoiser(device: torch.device, dtype: torch.dtype, folder: Path, pair: Sequence[str]) -> list[tuple[float, float]]:
    """Compare the backends of the pair on the UNet of `sd_middle`."""
    sizes = random_models.resized("sd_middle", text_encoder={"num_hidden_layers": 1})
    random_models.write("sd_middle", folder, CPU, sizes)
    number, side = (4, SIDE) if device.type == "cuda" else (2, SIDE // 2)  # a CPU is slow in bfloat16
    x_t = torch.randn(number, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(1)).to(device)
    t = torch.tensor([10, 300, 600, 900][:number], device=device)

    def under(backend: str) -> tuple[Tensor, list[Tensor]]:
        family = load_family(str(folder), loading(device, dtype))
        assert denoisers.head_sizes(family.network) == {32, 64}
        weights = adapted(family)
        denoisers.install(family.network, backend)
        text = family.encode_prompts(["a red fox in the long grass", "a hen", "", "two boats"][:number]).to(device)
        cond = family.condition(text, torch.full((number, 6), float(side), device=device))
        return family.predict(family.network, x_t, t, cond), weights

    return apart(under, pair)


def decoder(device: torch.device, dtype: torch.dtype, folder: Path, pair: Sequence[str]) -> list[tuple[float, float]]:
    """Compare the backends of the pair on a LLaVA whose pairs are packed."""
    random_models.write("llava_middle", folder, CPU, {"text": TEXT, "tower": TOWER})
    asked = [Turn("user", "<image>What is it?")]

    def under(backend: str) -> tuple[Tensor, list[Tensor]]:
        family: Any = load_vision_language(str(folder), loading(device, dtype))
        inner = family.network.model.get_decoder()
        assert decoders.head_sizes(inner) == {64}
        weights, rows = adapted(family), []
        decoders.install(inner, backend)
        views = {key: family.processor.preprocess_image(vlm_reference.PICTURES[key]) for key in ("wide", "square")}
        for (key, view), responses in zip(views.items(), SAID, strict=True):
            rows += family.processor.tokenize_responses(asked, responses, [(key, view)])
        tokens, features = family.processor.collate(rows).to(device), family.encode_images(views)
        assert "mmalign_packed_mask" in family._inputs(tokens, features)[1]  # they are one row
        return family.token_logps(family.network, tokens, features), weights

    return apart(under, pair)


def adapted(family: Any) -> list[Tensor]:
    """Add adapters in float32 to a family's network; return their weights, moved off their first values.

    Attention with new weights is nearly a mean. Larger queries and keys, and a larger head, make it matter.
    """
    with torch.no_grad():
        for name, p in family.network.named_parameters():
            p.mul_(next((factor for part, factor in SHARPER.items() if part in name), 1.0))
    family.add_lora(LoraSettings(**ADAPTERS, targets=family.default_lora_targets))
    draw = torch.Generator().manual_seed(2)
    weights = [p for p in family.network.parameters() if p.requires_grad]
    assert weights and all(p.dtype == torch.float32 for p in weights)
    with torch.no_grad():
        for p in weights:
            p.add_(MOVED * torch.randn(p.shape, generator=draw).to(p.device))
    return weights


def apart(under: Callable[[str], tuple[Tensor, list[Tensor]]], pair: Sequence[str]) -> list[tuple[float, float]]:
    """Return the distances of each backend's answer and gradient from the first one's, relative to its norms.

    The gradient is that of a sum of the answer with random weights, so no symmetry hides an error.
    """
    result: list[tuple[Tensor, Tensor]] = []
    for backend in pair:
        out, weights = under(backend)
        asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
        grads = torch.autograd.grad((out.float() * asked).sum(), weights)
        assert all(bool(grad.abs().max() > 0) for grad in grads)
        result.append((out.detach(), torch.cat([grad.flatten() for grad in grads])))
    first = result[0]
    return [(relative(out, first[0]), relative(grad, first[1])) for out, grad in result[1:]]


def near(distances: tuple[float, float], tolerance: tuple[float, float]) -> bool:
    return distances[0] < tolerance[0] and distances[1] < tolerance[1]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
