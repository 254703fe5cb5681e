"""Flow-GRPO: published values, its window, and the gradient before the first update."""

import math
from typing import Any

import pytest
import torch

from mmalign.config import RewardConfig
from mmalign.diffusion.noise import Gaussian
from mmalign.families.base import TextToImage
from mmalign.losses.policy_gradient import clipped
from mmalign.methods import Step, requirements_of
from mmalign.methods.text_to_image import flow_grpo
from mmalign.policy import Policy
from tests.helpers.golden import golden
from tests.helpers.image_batches import ROWS, prompts
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import DRAWS, full, gradient

VALUES = golden("objectives")
JUDGE = RewardConfig(name="function", path="none:none")

family = diffusion_families("tiny_sd15", "tiny_sd3", "tiny_sd2", "tiny_sdxl", "tiny_flux", "tiny_qwen_image", fast=2)


def config(generation: dict[str, Any] | None = None, **options: Any) -> flow_grpo.Config:
    own = {"images": 3, "steps": 3, "window": 2, "guidance": 2.0} | (generation or {})
    return flow_grpo.Config(reward=JUDGE, generation=own, **options)  # type: ignore[arg-type]


def made(policy: Policy, cfg: flow_grpo.Config, rows: Any = ROWS[:3]) -> list[flow_grpo.Contrast]:
    with torch.no_grad():
        return flow_grpo.contrasts(policy, prompts(policy.family, rows=rows), cfg, DRAWS)


def moved(policy: Policy) -> None:
    with torch.no_grad():
        for p in policy.trainable():
            p.mul_(1.01)


def test_worked_step() -> None:
    """One step of three elements: log-probabilities, ratio, loss and divergence of the specification, in float32."""
    means = ([0.1, -0.2, 0.05], [0.12, -0.25, 0.0], [0.4, -0.1, -0.2])
    new, old, to = (torch.tensor(x).view(1, 1, 1, 3) for x in means)
    std = torch.full((1, 1, 1, 1), 0.3)
    laws = Gaussian(new, std), Gaussian(old, std)
    log_new, log_old = (law.log_prob(to) for law in laws)
    ratio = (log_new - log_old).exp()
    expected = VALUES["grpo step log p new, old, ratio"]
    torch.testing.assert_close(torch.cat([log_new, log_old, ratio]), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    loss = clipped(ratio, torch.tensor([1.2]), 1e-4, 1e-4)
    assert float(loss) == pytest.approx(VALUES["grpo step A=1.2 clip 1e-4"], rel=1e-5)
    assert float(laws[0].kl(laws[1])) == pytest.approx(VALUES["grpo gaussian kl (mean unit)"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"guard": True, "published_kl": True}], ids=["plain", "guarded"])
def test_two_updates(family: TextToImage, options: dict[str, Any]) -> None:
    """Every family: finite numbers, a gradient in both updates, and a divergence once the policy has moved."""
    policy, cfg = full(family), config(**options)
    contrasts = made(policy, cfg)
    assert len(contrasts) == requirements_of(cfg).contrasts(3).number == 2
    for number, contrast in enumerate(contrasts):
        step = flow_grpo.loss(policy, contrast, cfg)
        assert all(torch.isfinite(x).all() for x in (step.losses, *step.metrics.values()))
        assert bool((step.metrics["kl"] > 1e-9).all()) == (number > 0) and gradient(policy, step).norm() > 0
        moved(policy)


def test_gradient_before_the_first_update_is_the_policy_gradient(sd: TextToImage) -> None:
    """The mean of advantage times log-probability, negative; the ratios are 1 to rounding."""
    policy, cfg = full(sd), config({"window": None}, kl=0.0, clip=0.5)
    contrast = made(policy, cfg)[1]
    law = flow_grpo.step_law(sd, cfg, contrast.view, policy.model)
    expected = gradient(
        policy, Step(-(contrast.advantages * law.log_prob(contrast.view.to).view(3, 3).T).mean(1), contrast.weights, {})
    )
    actual = gradient(policy, flow_grpo.loss(policy, contrast, cfg))
    assert (actual - expected).norm() < 1e-3 * expected.norm() and expected.norm() > 1e-4


def test_window_of_a_prompt_is_its_own(sd: TextToImage) -> None:
    """Successive steps, drawn by row; the end of one is the start of the next, and the noise of each is its key's."""
    policy, cfg = full(sd), config({"steps": 5})
    together, alone = (made(policy, cfg, rows) for rows in (ROWS[:3], ROWS[1:2]))
    first = DRAWS.integers(ROWS[:3], 0, 4, "window")
    times = torch.tensor([801, 601, 401, 201, 1, 0])
    for number, contrast in enumerate(together):
        assert contrast.view.t.view(3, 3)[0].tolist() == times[first + number].tolist()
        assert contrast.view.prev.view(3, 3)[2].tolist() == times[first + number + 1].tolist()
        noise = (contrast.view.to - contrast.old.mean) / contrast.old.std
        for b, row in enumerate(ROWS[:3]):
            drawn = DRAWS.normal([row], (3, 4, 8, 8), "step", int(first[b]) + number)[0]
            torch.testing.assert_close(noise.view(3, 3, 4, 8, 8)[:, b], drawn, rtol=1e-2, atol=1e-2)
        assert len(contrast.view.text.cond) == 3
        view = contrast.view
        assert torch.equal(contrast.old.std, sd.schedule.step(view.x_t, view.x_t, view.t, view.prev, None).std)
    assert torch.equal(together[0].view.to, together[1].view.x_t)
    rows = torch.arange(9).view(3, 3)[:, 1]
    torch.testing.assert_close(together[1].view.to[rows], alone[1].view.to, rtol=1e-3, atol=1e-3)


def test_images_of_a_prompt_share_their_start(sd: TextToImage) -> None:
    """They begin alike and part with the first stochastic step; the start is that of a prompt's first image else."""
    policy = full(sd)
    shared, own = (made(policy, config({"window": None, "shared_start": value})) for value in (True, False))
    starts, others = (contrasts[0].view.x_t.view(3, 3, 4, 8, 8) for contrasts in (shared, own))
    assert torch.equal(starts, others[:1].expand_as(starts)) and not torch.equal(others[0], others[1])
    ends = shared[0].view.to.view(3, 3, 4, 8, 8)
    assert not torch.isclose(ends[0], ends[1]).any(-1).all()
    # Another prompt begins elsewhere
    assert not torch.equal(starts[:, 0], starts[:, 1])


def test_guarded_ratio_is_noise_times_the_change_of_the_mean(sd: TextToImage) -> None:
    """And the loss is divided by the step's length; three of 1000 timesteps are 333 apart."""
    policy, cfg = full(sd), config(kl=0.0, guard=True, clip=0.999)
    contrast = made(policy, cfg)[0]
    moved(policy)
    with torch.no_grad():
        law = flow_grpo.step_law(sd, cfg, contrast.view, policy.model)
        noise = (contrast.view.to - contrast.old.mean) / contrast.old.std
        log_ratio = (noise * (law.mean - contrast.old.mean)).mean((1, 2, 3)).view(3, 3).T
        length = (contrast.view.t - contrast.view.prev).view(3, 3).T / 1000
        losses = (clipped(log_ratio.exp(), contrast.advantages, 0.999, 0.999) / length).mean(1)
        torch.testing.assert_close(flow_grpo.loss(policy, contrast, cfg).losses, losses, rtol=1e-3, atol=1e-3)
    assert not math.isclose(float(log_ratio.abs().max()), 0.0, abs_tol=1e-4)


def test_published_divergence_is_shorter_by_the_step(sd: TextToImage) -> None:
    policy = full(sd)
    contrast = made(policy, config())[0]
    moved(policy)
    nothing, corrected, published = (
        flow_grpo.loss(policy, contrast, config(**options)).losses.detach()
        for options in ({"kl": 0.0}, {"kl": 1e3}, {"kl": 1e3, "published_kl": True})
    )
    length = (contrast.view.t - contrast.view.prev).view(3, 3)[0] / 1000
    torch.testing.assert_close(published - nothing, (corrected - nothing) * length, rtol=1e-3, atol=1e-5)


def test_a_window_longer_than_the_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="window: 4 steps are more than the 3 of the sampler; lower it"):
        config({"window": 4})
