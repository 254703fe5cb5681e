"""xformers on a GPU: what the plain reference computes, forwards and backwards. `pytest -m gpu tests/attention`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmalign.attention import BACKENDS, PackedPrefixMask, PrefixGroup, decoders, denoisers, kernels
from mmalign.families.loading import load_family
from mmalign.families.types import Loading
from tests.helpers import STANDING_VLMS, Folders, attention_models
from tests.helpers.vlm_models import BUILDERS

CUDA = torch.device("cuda")
why = (
    "there is no CUDA device"
    if not torch.cuda.is_available()
    else kernels.platform_unsupported_reason(CUDA, torch.bfloat16)
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why), reason=f"xformers cannot be tried: {why}")]

PACKED_MASKS = {
    "pair": PackedPrefixMask((PrefixGroup(130, (40, 33)),)),
    "row": PackedPrefixMask((PrefixGroup(61, (9, 17, 5)), PrefixGroup(12, (30,)), PrefixGroup(3, (1, 2)))),
    "both_ways": PackedPrefixMask((PrefixGroup(64, (8, 24), bidirectional_prefix=True), PrefixGroup(20, (7, 9)))),
}
# What the kernels round away, as a share of the largest value: the products' inputs have 8, 11, or (with TF32) 11 bits.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def run(name: str, dtype: torch.dtype, size: int, mask: PackedPrefixMask | Tensor | None, length: int) -> list[Tensor]:
    """The result and the gradients, of values that `dtype` holds exactly; the reference computes in float64."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(1, length, heads, size, generator=draw).to(dtype) for heads in (4, 2, 2, 4)]
    wide = torch.float64 if name == "dense" else dtype
    q, k, v, weight = (x.to(CUDA, wide) for x in given)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = BACKENDS[name](*inputs, mask)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_near(tensors: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for actual, expected in zip(tensors, plain, strict=True):
        assert (actual.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [40, 64, 128])
@pytest.mark.parametrize("packed_mask", list(PACKED_MASKS))
def test_packed_attention_equals_the_reference(dtype: torch.dtype, size: int, packed_mask: str) -> None:
    mask = PACKED_MASKS[packed_mask]
    fast, plain = (run(name, dtype, size, mask, mask.length) for name in ("xformers", "dense"))
    assert_near(fast, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("hidden", [False, True])
def test_other_masks_are_the_reference_s(dtype: torch.dtype, hidden: bool) -> None:
    mask = torch.arange(77, device=CUDA)[None, None, None] < 50 if hidden else None
    fast, plain = (run(name, dtype, 64, mask, 77) for name in ("xformers", "dense"))
    assert_near(fast, plain, TOLERANCE[dtype])


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch asks for it before the reference's products
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("packed_mask", list(PACKED_MASKS))
def test_the_same_seed_gives_the_same_bits(packed_mask: str) -> None:
    mask = PACKED_MASKS[packed_mask]
    first, *others = (run("xformers", torch.bfloat16, 64, mask, mask.length) for _ in range(3))
    for repetition in others:
        assert all(a.equal(b) for a, b in zip(first, repetition, strict=True))
    assert_near(first, run("dense", torch.bfloat16, 64, mask, mask.length), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", STANDING_VLMS)
def test_a_decoder_packed_by_xformers_is_its_rows_apart(name: str) -> None:
    torch.manual_seed(0)
    decoder = BUILDERS[name]()[0].get_decoder().eval().to(CUDA)
    packed_mask = PackedPrefixMask(
        (PrefixGroup(9, (4, 3), name == "paligemma"), PrefixGroup(5, (2,), name == "paligemma"))
    )
    packed = torch.randn(1, packed_mask.length, decoder.get_input_embeddings().embedding_dim, device=CUDA)
    results = []
    for backend in ("xformers", "dense"):
        decoders.install(decoder, backend)
        given = decoders.attention_kwargs(packed_mask, decoder)
        results.append(
            decoder(inputs_embeds=packed, position_ids=packed_mask.positions.to(CUDA), use_cache=False, **given)[0]
        )
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)  # TF32


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "z_image"])
def test_a_transformer_of_diffusers_is_the_reference_s(name: str, flow_folders: Folders) -> None:
    images, results = torch.rand(2, 3, 32, 32) * 2 - 1, []
    for backend in ("xformers", "dense"):
        family = load_family(str(flow_folders(name)), Loading(CUDA))  # anew: a denoiser gets a backend once
        denoisers.install(family.network, backend)
        text = family.encode_prompts(["a red fox in the long grass", "a hen"])
        cond = family.condition(text, torch.ones(2, 6, device=CUDA))
        x_t = family.encode_images(images).mean
        results.append(family.predict(family.network, x_t, torch.tensor([0.3, 0.9], device=CUDA), cond))
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)  # TF32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", attention_models.MODELS)
def test_model_with_adapters_agrees_with_sdpa(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Values, and the gradients of all adapters. With TF32, whose products have three bits more than bfloat16's."""
    values, gradient = attention_models.APART[torch.bfloat16]
    less = 1.0 if dtype == torch.bfloat16 else 2**-3
    (result,) = attention_models.compare(name, CUDA, dtype, tmp_path, ("sdpa", "xformers"))
    assert attention_models.near(result, (less * values, less * gradient)), result
