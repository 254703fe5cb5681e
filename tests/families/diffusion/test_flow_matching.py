"""Flow-matching families on tiny random models of the real classes, against diffusers' own pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxPipeline,
)
from torch import Tensor

from mmalign.config import SamplingConfig
from mmalign.families.base import TextToImage
from mmalign.families.diffusion import flow_matching
from mmalign.families.loading import load_family
from mmalign.families.types import Conditioning, Loading, LoraSettings
from mmalign.policy import adapters_off
from tests.helpers import Folders, flow_models
from tests.helpers.flow_pipelines import (
    GUIDED,
    PLAIN,
    PROMPTS,
    SEEDS,
    SIZE,
    SOURCES,
    as_seen,
    by_hand,
    own,
    pixels,
)
from tests.helpers.loading import CPU, load_diffusion

pytestmark = pytest.mark.usefixtures("small_sources")


HALF = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
MASKED = ["z_image", "qwen_image", "sana", "qwen_image_edit", "qwen_image_edit_plus"]


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
