"""Times of flow-matching families, against the schedulers of diffusers' own pipelines."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from mmalign.diffusion.flow import Flow
from mmalign.families.base import TextToImage
from mmalign.families.diffusion import flow_matching
from mmalign.families.loading import load_family
from tests.helpers import flow_models
from tests.helpers.flow_pipelines import (
    PLAIN,
    SIZE,
    edits,
    own,
)
from tests.helpers.loading import CPU

pytestmark = pytest.mark.usefixtures("small_sources")


SHIFT_FIELDS = ["base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"]


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
    assert torch.equal(schedule.times(steps), expected)
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
