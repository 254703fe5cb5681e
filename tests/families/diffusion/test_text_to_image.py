"""Both families, on tiny random models of the real classes."""

from pathlib import Path

import pytest
import torch

from mmalign.config import SamplingConfig
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family, pipeline_class
from mmalign.families.types import Loading
from tests.helpers import first_fast
from tests.helpers.loading import load_diffusion

SIZES = torch.tensor([[16.0, 16, 0, 0, 16, 16], [32, 16, 8, 0, 16, 16]])


@pytest.fixture(params=first_fast(["tiny_sd15", "tiny_sd2", "tiny_sdxl"], 2))
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def family(path: Path) -> TextToImage:
    return load_diffusion(path)


def test_latents_round_trip_through_the_autoencoder_s_own_calls(family: TextToImage) -> None:
    vae = family.pipeline.vae
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = family.encode_images(images)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        torch.testing.assert_close(moments.mean, posterior.mean * vae.config.scaling_factor)
        torch.testing.assert_close(moments.std, posterior.std * vae.config.scaling_factor)
        torch.testing.assert_close(family.decode(moments.mean), vae.decode(posterior.mean).sample)


def test_predict_is_the_network_s_answer_for_each_row(family: TextToImage) -> None:
    """A batch gives what its rows give alone, and the prompt and (SDXL) the sizes reach the network."""
    net = family.network
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    cond = family.condition(family.encode_prompts(["a red fox", "a hen"]), SIZES)
    with torch.no_grad():
        both = family.predict(net, x_t, t, cond)
        for row in range(2):
            alone = family.predict(net, x_t[row : row + 1], t[row : row + 1], cond[slice(row, row + 1)])
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        swapped = family.condition(family.encode_prompts(["a hen", "a red fox"]), SIZES)
        assert not torch.allclose(family.predict(net, x_t, t, swapped), both)


def test_sdxl_is_told_the_real_sizes_and_sd_is_not(tiny_sd15: Path, tiny_sdxl: Path) -> None:
    for path, matters in ((tiny_sd15, False), (tiny_sdxl, True)):
        family = load_diffusion(path)
        text = family.encode_prompts(["fox"]).repeat(2)
        x_t, t = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([500, 500])
        with torch.no_grad():
            rows = family.predict(family.network, x_t, t, family.condition(text, SIZES))
        assert torch.allclose(rows[0], rows[1], atol=1e-6) is not matters


def test_unconditional_row_is_the_samplers(tiny_sd15: Path, tiny_sdxl: Path) -> None:
    sdxl = load_diffusion(tiny_sdxl)
    assert all((x == 0).all() for x in sdxl.unconditional().tensors.values())
    sd = load_diffusion(tiny_sd15)
    torch.testing.assert_close(sd.unconditional().tensors["embeds"], sd.encode_prompts([""]).tensors["embeds"])


def test_samples_depend_on_prompt_and_seed_alone(family: TextToImage) -> None:
    """Same seed, same picture, in whatever company; and the pipeline itself draws the same one."""
    sampling = SamplingConfig(steps=3, guidance=3.0)
    prompts, seeds = ["a fox", "a hen", "a fox"], [1, 2, 1]
    images = family.sample(family.network, prompts, seeds, sampling)
    assert images[0].tobytes() == images[2].tobytes()
    assert images[0].tobytes() != images[1].tobytes()
    alone = family.sample(family.network, prompts[1:2], seeds[1:2], sampling)[0]
    different = torch.tensor(list(alone.tobytes())).int() - torch.tensor(list(images[1].tobytes())).int()
    assert different.abs().max() <= 1  # a batch of another size may round a pixel otherwise
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))[None]
    expected = family.pipeline(
        "a hen", num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="np"
    ).images[0]
    actual = torch.tensor(list(images[1].tobytes())).view(16, 16, 3) / 255
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0.01)


def test_long_prompts_are_counted(family: TextToImage) -> None:
    assert family.count_truncated(["fox", "fox " * 40, "x" * 10_000]) == 2
    assert family.encode_prompts(["x" * 10_000]).tensors["embeds"].shape[1] == 16


def test_unsupported_pipeline_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        ValueError, match=r"KandinskyPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline"
    ):
        pipeline_class(str(tmp_path))
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        pipeline_class(str(tmp_path))


def test_half_precision_keeps_float32_outputs_of_the_encoders(tiny_sdxl: Path) -> None:
    family = load_family(str(tiny_sdxl), Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True))
    assert next(family.network.parameters()).dtype == torch.bfloat16
    assert family.encode_prompts(["fox"]).tensors["embeds"].dtype == torch.float32
    assert next(family.pipeline.vae.parameters()).dtype == torch.float32  # SDXL's overflows in half precision
    assert len(family.sample(family.network, ["fox"], [0], SamplingConfig(steps=2))) == 1
