"""Flow-matching families on tiny random models of the real classes, against diffusers' own pipelines."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_image_edit_plus
from PIL import Image
from torch import Tensor

from mmalign.config import ImageSize, SamplingConfig
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.steps import grid
from mmalign.families.base import TextToImage
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.editing import EDITORS
from mmalign.families.loading import load_family
from mmalign.families.types import Conditioning, Loading, LoraSettings
from mmalign.policy import adapters_off
from tests.helpers import Folders, first_fast, flow_models
from tests.helpers.loading import CPU, load_diffusion

HALF = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
PROMPTS = ["a red fox in the long grass", "a hen"]
SEEDS = [3, 4]
SIZE = ImageSize(64, 32)  # Sana generates multiples of 32 alone
# How each pipeline is told that it should guide with scale 3, in our unit, against what the family has for no prompt.
GUIDED: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 3.0},
    "sd3_without_t5": {"guidance_scale": 3.0},
    "flux": {"guidance_scale": 3.0},
    "flux_schnell": {},
    "flux2": {"guidance_scale": 3.0},
    "z_image": {"guidance_scale": 2.0, "negative_prompt": ["", ""]},
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "sana": {"guidance_scale": 3.0, "use_resolution_binning": False},
    "flux_kontext": {"guidance_scale": 3.0},
    "qwen_image_edit": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "qwen_image_edit_plus": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
}
# How each is told not to, or to tell its network what training tells it.
PLAIN: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 1.0},
    "sd3_without_t5": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 3.5},
    "flux_schnell": {},
    "flux2": {"guidance_scale": 4.0},
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "flux_kontext": {"guidance_scale": 3.5},
    "qwen_image_edit": {"true_cfg_scale": 1.0},
    "qwen_image_edit_plus": {"true_cfg_scale": 1.0},
}
SHIFT_FIELDS = ["base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"]
MASKED = ["z_image", "qwen_image", "sana", "qwen_image_edit", "qwen_image_edit_plus"]
SOURCES = flow_models.sources(2, *SIZE)


@pytest.fixture(autouse=True)
def _sources_of_this_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Qwen-Image-Edit's pipelines scale a source to this size, and not to a megapixel."""
    monkeypatch.setattr(qwen_image_edit, "calculate_dimensions", lambda *_: (*SIZE, None))
    monkeypatch.setattr(qwen_image_edit_plus, "VAE_IMAGE_SIZE", SIZE.width * SIZE.height)
    monkeypatch.setattr(qwen_image_edit_plus, "CONDITION_IMAGE_SIZE", 4 * SIZE.width * SIZE.height)


@pytest.fixture(params=first_fast(flow_models.BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(name: str, flow_folders: Folders) -> Path:
    return flow_folders(name)


@pytest.fixture
def family(path: Path) -> TextToImage:
    return load_diffusion(path)


@pytest.fixture
def sd3(flow_folders: Folders) -> TextToImage:
    return load_diffusion(flow_folders("sd3"))


def given(family: TextToImage, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor, Conditioning]:
    """Noisy latents, their times, and the conditioning of two prompts."""
    shape, generator = (2, 3, SIZE.height, SIZE.width), torch.Generator().manual_seed(0)
    moments = family.encode_images(torch.rand(shape, generator=generator) * 2 - 1)
    return moments.mean, torch.tensor([0.3, 0.9]), family.condition(text(family, prompts), torch.ones(2, 6))


def text(family: TextToImage, prompts: list[str] = PROMPTS) -> Conditioning:
    """Return the conditioning of prompts, with sources of this size for a model that edits."""
    return flow_models.conditioning(family, prompts, *SIZE)


def shown(family: TextToImage, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Return the argument of `sample` for the sources of these rows, if the model edits."""
    return {"sources": SOURCES[rows]} if family.editing else {}


def own(name: str, path: Path) -> Any:
    """The pipeline as its users load it; diffusers wants to hear that a part is to be left out."""
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_without_t5" else {}
    return DiffusionPipeline.from_pretrained(path, **left_out)


def by_hand(pipeline: Any, steps: int, **how: Any) -> tuple[list[Image.Image], list[Tensor]]:
    """Return what the pipeline draws of the text, and its latents after each step, as it holds them."""
    seen: list[Tensor] = []

    def watch(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    def drawn(rows: slice) -> list[Image.Image]:
        given = {key: value[rows] if isinstance(value, list) else value for key, value in how.items()}
        images: list[Image.Image] = pipeline(
            prompt=PROMPTS[rows],
            height=SIZE.height,
            width=SIZE.width,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[rows]],
            callback_on_step_end=watch,
            **given,
            **edits(pipeline, rows),
        ).images
        return images

    if not isinstance(pipeline, QwenImageEditPlusPipeline):
        return drawn(slice(None)), seen
    images = [*drawn(slice(0, 1)), *drawn(slice(1, 2))]  # this pipeline takes one prompt
    return images, [torch.cat(pair) for pair in zip(seen[:steps], seen[steps:], strict=True)]


def edits(pipeline: Any, rows: slice = slice(None)) -> dict[str, Any]:
    """Return the arguments of a pipeline for the sources of these rows, if it edits."""
    if type(pipeline).__name__ not in EDITORS:
        return {}
    unscaled = {"max_area": SIZE.width * SIZE.height, "_auto_resize": False}
    return {"image": to_pil(SOURCES[rows]), **(unscaled if isinstance(pipeline, FluxKontextPipeline) else {})}


def as_seen(latents: Tensor, shape: torch.Size) -> Tensor:
    """A pipeline's latents as methods see them, by the packing that diffusers' FLUX pipelines have."""
    if latents.dim() == 4:
        return latents
    number, channels, height, width = shape
    if latents.shape[2] == channels:  # FLUX.2: a token is a pixel
        return latents.permute(0, 2, 1).reshape(shape)
    pixels = latents.view(number, height // 2, width // 2, channels, 2, 2)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.slow
def test_predict_is_the_velocity_that_the_pipeline_steps_along(name: str, path: Path, family: TextToImage) -> None:
    """From x at sigma to x' at sigma' the pipeline goes x' - x = (sigma' - sigma) v; its network is shown both prompts
    at once, with the embeddings that it made of the text, its ids, its packing, and its own sign.

    It is its second step; of Sana the first, since its solver's next ones are not straight.
    """
    pipeline = own(name, path)
    _, seen = by_hand(pipeline, 3, **PLAIN[name])
    shape, k = given(family)[0].shape, 0 if name == "sana" else 1
    start = torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    states, sigmas = [start, *(as_seen(x, shape) for x in seen)], pipeline.scheduler.sigmas
    v = (states[k + 1] - states[k]) / (sigmas[k + 1] - sigmas[k])
    t = pipeline.scheduler.timesteps[k].repeat(2) / 1000
    with torch.no_grad():
        actual = family.predict(family.network, states[k], t, text(family))
    torch.testing.assert_close(actual, v, rtol=1e-3, atol=1e-4)  # rounding of two latents, over 0.3


@pytest.mark.slow
def test_samples_equal_the_pipelines_own(name: str, path: Path, family: TextToImage) -> None:
    expected, _ = by_hand(own(name, path), 3, **GUIDED[name])
    sampling = SamplingConfig(steps=3, guidance=3.0, resolution=str(SIZE))
    actual = family.sample(family.network, PROMPTS, SEEDS, sampling, **shown(family))
    assert np.abs(pixels(actual) - pixels(expected)).max() <= 1  # both round to eight bits
    assert pixels(actual).std() > 5


@pytest.mark.slow
def test_a_sample_is_its_own_whatever_its_company(family: TextToImage) -> None:
    sampling = SamplingConfig(steps=2, guidance=2.0, resolution=str(SIZE))
    both = family.sample(family.network, PROMPTS, SEEDS, sampling, **shown(family))
    second = shown(family, slice(1, 2))
    alone = family.sample(family.network, PROMPTS[1:], SEEDS[1:], sampling, **second)
    assert np.abs(pixels(both[1:]) - pixels(alone)).max() <= 1
    twice = {key: x.repeat(2, 1, 1, 1) for key, x in second.items()}
    again = family.sample(family.network, PROMPTS[1:] * 2, SEEDS[1:] * 2, sampling, **twice)
    assert again[0].tobytes() == again[1].tobytes()
    other_seed = family.sample(family.network, PROMPTS[1:], SEEDS[:1], sampling, **second)
    assert np.abs(pixels(other_seed) - pixels(alone)).max() > 1


def standardised(name: str, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the posterior as the denoiser is used to them, from the definitions."""
    vae = pipeline.vae
    if name.startswith("qwen_image"):
        raw = vae.encode(images[:, :, None]).latent_dist
        mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
        return (raw.mean[:, :, 0] - mean) / std, raw.std[:, :, 0] / std
    if name == "sana":
        latents = vae.encode(images).latent * 0.41
        return latents, torch.zeros_like(latents)
    raw = vae.encode(images).latent_dist
    if name == "flux2":
        spread = pipeline._patchify_latents(raw.std) / (vae.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
        return pipeline._encode_vae_image(images, None), spread
    return (raw.mean - 0.06) * 1.5, raw.std * 1.5


@pytest.mark.slow
def test_latents_are_in_the_denoiser_s_scale_and_back(name: str, family: TextToImage) -> None:
    pipeline = family.pipeline
    images = torch.rand(2, 3, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = family.encode_images(images)
    with torch.no_grad():
        mean, std = standardised(name, pipeline, images)
        torch.testing.assert_close(moments.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.std, std, rtol=1e-4, atol=1e-5)
        encoded = pipeline.vae.encode(images[:, :, None] if name.startswith("qwen_image") else images)
        decoded = pipeline.vae.decode(encoded.latent if name == "sana" else encoded.latent_dist.mean).sample
    decoded = decoded[:, :, 0] if name.startswith("qwen_image") else decoded
    assert family.decode(moments.mean).shape == images.shape
    torch.testing.assert_close(family.decode(moments.mean), decoded, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_row_prediction_depends_on_its_prompt_not_on_batch(family: TextToImage) -> None:
    x_t, t, cond = given(family)
    with torch.no_grad():
        both = family.predict(family.network, x_t, t, cond)
        for row in (slice(0, 1), slice(1, 2)):
            alone = family.predict(family.network, x_t[row], t[row], cond[row])
            torch.testing.assert_close(both[row], alone, rtol=1e-4, atol=1e-5)
        swapped = family.predict(family.network, x_t, t, text(family, PROMPTS[::-1]))
        later = family.predict(family.network, x_t, t.flip(0), cond)
    assert both.shape == x_t.shape
    assert not torch.allclose(swapped, both, atol=1e-3) and not torch.allclose(later, both, atol=1e-3)


@pytest.mark.slow
def test_prompt_encoding_is_independent_of_the_batch(family: TextToImage) -> None:
    if family.editing is None:
        both, empty = family.encode_prompts(PROMPTS), family.unconditional()
        alone = Conditioning.cat([family.encode_prompts([prompt]) for prompt in PROMPTS])
        assert len(empty) == 1
    else:
        both, empty = family.encode_edits(PROMPTS, SOURCES), family.unconditional_edits(SOURCES)
        alone = Conditioning.cat([family.encode_edits(PROMPTS[n : n + 1], SOURCES[n : n + 1]) for n in (0, 1)])
        empty = empty[slice(1, 2)]
    for key, rows in both.tensors.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, alone.tensors[key], rtol=1e-4, atol=1e-5)
        assert rows.shape[1:] == empty.tensors[key].shape[1:]
    mixed = both.where(torch.tensor([True, False]), empty)
    x_t, t, _ = given(family)
    with torch.no_grad():
        dropped = family.predict(family.network, x_t[1:], t[1:], empty)
        torch.testing.assert_close(family.predict(family.network, x_t, t, mixed)[1:], dropped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_padding_changes_nothing(family: TextToImage) -> None:
    """Whatever stands behind a text, and however long the longest one beside it is."""
    x_t, t, cond = given(family)
    embeds, mask = cond.tensors["embeds"], cond.tensors["mask"]
    lengths = mask.sum(1)
    assert lengths[0] != lengths[1]
    noisy = Conditioning({**cond.tensors, "embeds": embeds + 9 * (1 - mask)[:, :, None]})
    with torch.no_grad():
        clean, dirty = (family.predict(family.network, x_t, t, c) for c in (cond, noisy))
    torch.testing.assert_close(clean, dirty, rtol=1e-5, atol=1e-6)


def test_texts_are_padded_and_found_again() -> None:
    texts = [torch.randn(length, 3) for length in (2, 5, 1)]
    cond = flow_matching.padded(texts, 6)
    assert cond.tensors["embeds"].shape == (3, 6, 3) and cond.tensors["mask"].sum(1).tolist() == [2, 5, 1]
    assert (cond.tensors["embeds"][0, 2:] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(flow_matching.texts(cond), texts, strict=True))


def test_latents_are_packed_as_diffusers_packs_them() -> None:
    latents = torch.randn(2, 4, 6, 8)
    packed = flow_matching.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(flow_matching.unpack(packed, 6, 8), latents)


@pytest.mark.slow
def test_long_prompts_are_counted_and_cut(name: str, family: TextToImage) -> None:
    assert family.count_truncated(["fox", "fox " * 400, "x " * 2000]) == 2
    long, short = text(family, ["x " * 2000]), text(family, ["fox"])
    assert all(long.tensors[key].shape == x.shape for key, x in short.tensors.items())
    if name in MASKED:
        assert long.tensors["mask"].all()


def test_without_its_t5_sd3_counts_by_what_its_clips_read(flow_folders: Folders) -> None:
    """Sixteen tokens here; the T5 of the other reads 256, and stands in the text's tail, which is zeros without it."""
    whole, less = (load_diffusion(flow_folders(n)) for n in ("sd3", "sd3_without_t5"))
    assert [f.count_truncated(["fox", "red fox " * 4]) for f in (whole, less)] == [0, 1]
    tails = [f.encode_prompts(["fox"]).tensors["embeds"][:, -256:] for f in (whole, less)]
    assert tails[0].abs().sum() > 0 and (tails[1] == 0).all()
    assert [n for n, _ in less.encoders()] == ["vae", "text_encoder", "text_encoder_2"]


def with_adapters(family: TextToImage, by: float = 0.3) -> TextToImage:
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight, p in family.network.named_parameters():
            if "lora_B" in weight:
                p.add_(by * torch.randn(p.shape, generator=g))
    return family


@pytest.mark.slow
@pytest.mark.parametrize("loading", [CPU, HALF], ids=["float32", "bfloat16"])
def test_adapters_off_are_the_base_bit_for_bit(path: Path, loading: Loading) -> None:
    family = load_family(str(path), loading)
    x = given(family)
    with torch.no_grad():
        before = family.predict(family.network, *x)
        with_adapters(family)
        after = family.predict(family.network, *x)
        with adapters_off(family.network):
            assert torch.equal(family.predict(family.network, *x), before)
    assert before.isfinite().all() and not torch.allclose(before, after, atol=1e-2)
    assert {p.dtype for p in family.network.parameters() if p.requires_grad} == {torch.float32}


def test_usual_adapters_reach_every_stream(name: str, family: TextToImage) -> None:
    """Both streams of a double block, and those that have one alone."""
    with_adapters(family)
    adapted = {weight.split(".lora_A")[0].rpartition(".")[2] for weight, _ in family.network.named_parameters()}
    assert {"to_q", "to_k", "to_v"} <= adapted
    assert ("add_k_proj" in adapted) is (name not in ("z_image", "sana"))
    assert ("to_qkv_mlp_proj" in adapted) is (name == "flux2")


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_is_saved_diffusers_loads_and_draws_alike(
    tune: str, name: str, path: Path, family: TextToImage, tmp_path: Path
) -> None:
    sampling, seen = SamplingConfig(steps=2, guidance=3.0, resolution=str(SIZE)), shown(family)
    if tune == "lora":
        with_adapters(family)
    else:
        with torch.no_grad():
            for p in family.network.parameters():
                p.mul_(1.1)
    family.save(tmp_path, family.network)
    expected = pixels(family.sample(family.network, PROMPTS, SEEDS, sampling, **seen))
    if tune == "lora":
        pipeline: Any = own(name, path)
        plain = pixels(by_hand(pipeline, 2, **GUIDED[name])[0])
        assert np.abs(expected - plain).max() > 2
        pipeline.load_lora_weights(tmp_path)
    else:
        pipeline = own(name, tmp_path)
    assert np.abs(expected - pixels(by_hand(pipeline, 2, **GUIDED[name])[0])).max() <= 1
    base = load_diffusion(path)
    net = base.load_trained(tmp_path)
    assert (net is base.network) is (tune == "lora")
    x = given(family)
    with torch.no_grad():
        torch.testing.assert_close(base.predict(net, *x), family.predict(family.network, *x))


@pytest.mark.slow
def test_recomputed_activations_give_the_same_gradient(family: TextToImage) -> None:
    with_adapters(family)
    x = given(family)

    def gradient() -> Tensor:
        family.network.zero_grad()
        family.predict(family.network, *x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in family.network.parameters() if p.grad is not None])

    kept = gradient()
    family.enable_gradient_checkpointing()
    assert family.network.is_gradient_checkpointing
    torch.testing.assert_close(gradient(), kept)
    assert kept.norm() > 0


@pytest.mark.slow
def test_half_precision(path: Path) -> None:
    family = load_family(str(path), HALF)
    net = family.network
    assert next(net.parameters()).dtype == torch.bfloat16
    assert next(family.pipeline.vae.parameters()).dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in text(family, ["fox"]).tensors.values())
    x, exact = given(family), load_diffusion(path)
    with torch.no_grad():
        actual, expected = family.predict(net, *x).float(), exact.predict(exact.network, *given(exact))
    # FLUX.1 rounds 1000 t and its guidance to eight bits before it takes their cosines, as in its own pipeline.
    assert (actual - expected).norm() < 0.3 * expected.norm()
    sampling = SamplingConfig(steps=2, resolution=str(SIZE))
    assert len(family.sample(net, PROMPTS, SEEDS, sampling, **shown(family))) == 2


def test_times_are_shifted_as_the_sampler_shifts_them(family: TextToImage, name: str) -> None:
    schedule, config = family.schedule, family.pipeline.scheduler.config
    assert isinstance(schedule, Flow) and (schedule.mean, schedule.std, schedule.num_timesteps) == (0.0, 1.0, 1000)
    if not config.get("use_dynamic_shifting"):
        assert schedule.shift == (1.0 if name == "flux_schnell" else 3.0)
        return
    # 64 x 64 tokens, at these models' own resolution as at FLUX.1's, whose shift there is e^1.15.
    tokens = (family.resolution // 4) ** 2
    sizes = config.base_image_seq_len, config.max_image_seq_len
    mu = calculate_shift(tokens, *sizes, config.base_shift, config.max_shift)
    if name == "flux2":
        mu = compute_empirical_mu(tokens, 50)  # the pipeline's own, at its default number of steps
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = family.pipeline.scheduler.time_shift(mu, 1.0, t)
    torch.testing.assert_close(schedule.shift * t / (1 + (schedule.shift - 1) * t), expected)
    if name in ("flux", "flux_kontext"):
        assert tokens == 4096 and schedule.shift == pytest.approx(3.1582, abs=1e-4)


@pytest.mark.slow
def test_times_equal_the_pipelines_at_each_size(name: str, path: Path) -> None:
    """The pipeline itself generates images of that size; its scheduler then holds its shift and its times."""
    steps, pipeline = 5, own(name, path)
    guided = copy.deepcopy(PLAIN[name])
    size = {"height": SIZE.height, "width": SIZE.width}
    given = {**size, **guided, **edits(pipeline, slice(0, 1))}
    pipeline(prompt=["fox"], num_inference_steps=steps, output_type="latent", **given)
    expected = pipeline.scheduler.sigmas.clone()
    expected[0] = 1
    schedule = load_family(str(path), replace(CPU, size=SIZE)).schedule
    assert torch.equal(grid(schedule, steps), expected)
    if name.startswith(("flux", "qwen_image")) and name != "flux_schnell":
        shifts = pipeline.scheduler.config
        tokens = SIZE.width // 4 * (SIZE.height // 4)
        mu = (
            compute_empirical_mu(tokens, 50)
            if name == "flux2"
            else calculate_shift(tokens, *(shifts[key] for key in SHIFT_FIELDS))
        )
        assert isinstance(schedule, Flow) and schedule.shift == pytest.approx(math.exp(mu))


def test_published_flow_times_by_hand() -> None:
    """The values of the published schedulers, computed by hand."""
    flux, sd3 = flow_models.DYNAMIC, FlowMatchEulerDiscreteScheduler(shift=3.0)
    mu = [flow_matching.linear_mu(flux.config, (side // 16) ** 2, 20) for side in (512, 1024)]
    assert [math.exp(x) for x in mu] == pytest.approx([1.878, 3.158], abs=1e-3)
    times = flow_matching.scheduler_times(sd3, lambda _: 0.0, False, 10)
    assert times[-3:].tolist() == pytest.approx([0.278, 0.0089, 0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_a_sampler_of_diffusion_is_refused(family: TextToImage, sampler: str) -> None:
    own = type(family.pipeline.scheduler).__name__
    with pytest.raises(ValueError, match=rf"^sampler: .*, the checkpoint's own {own}"):
        sampling = SamplingConfig(steps=1, sampler=sampler, resolution=str(SIZE))
        family.sample(family.network, ["fox"], [0], sampling, **shown(family, slice(0, 1)))


def test_a_size_that_patches_do_not_divide_is_refused(family: TextToImage) -> None:
    sentence = r"^resolution: got (18x32|32x18); expected multiples of (4|32) pixels"
    with pytest.raises(ValueError, match=sentence):
        family.encode_images(torch.zeros(1, 3, 32, 18))
    with pytest.raises(ValueError, match=sentence):
        sampling = SamplingConfig(steps=1, resolution="32x18")
        family.sample(family.network, ["fox"], [0], sampling, **shown(family, slice(0, 1)))


def test_a_side_beyond_the_positions_is_refused(sd3: TextToImage) -> None:
    with pytest.raises(ValueError, match="resolution: got 64x128; StableDiffusion3Pipeline has positions for sides of"):
        sd3.sample(sd3.network, ["fox"], [0], SamplingConfig(steps=1, resolution="64x128"))


def test_a_scheduler_of_diffusion_is_refused(tmp_path: Path) -> None:
    pipeline = flow_models.BUILDERS["flux"]()
    pipeline.scheduler = DDIMScheduler()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DDIMScheduler that predicts epsilon; expected a FlowMatch"):
        load_diffusion(tmp_path)
