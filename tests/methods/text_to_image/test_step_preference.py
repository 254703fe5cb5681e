"""Training of the step judge, on tiny models of the real classes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families import step_judge
from mmalign.families.step_judge import StepJudge
from mmalign.families.types import Conditioning, LoraSettings, Moments
from mmalign.losses.wrappers import Labels
from mmalign.methods.text_to_image import step_preference
from mmalign.policy import Policy
from mmalign.rewards import load_reward_model
from mmalign.rng import KeyedRNG
from tests.helpers import first_fast
from tests.helpers.loading import CPU, load_diffusion
from tests.helpers.policies import run

DRAWS = KeyedRNG(seed=5, epoch=2)
ROWS = [11, 2**62 + 3, 7]
PROMPTS = ["a red fox", "a hen", "two owls"]


@pytest.fixture(params=first_fast(["tiny_sd15", "tiny_sd2", "tiny_sdxl"]))
def family(request: pytest.FixtureRequest, tiny_clip: Path) -> StepJudge:
    denoiser = load_diffusion(request.getfixturevalue(request.param))
    return step_judge.load(str(tiny_clip), denoiser, CPU)


@pytest.fixture
def sd(tiny_sd15: Path, tiny_clip: Path) -> StepJudge:
    return step_judge.load(str(tiny_clip), load_diffusion(tiny_sd15), CPU)


def pairs(family: StepJudge) -> EncodedPairs:
    painter = family.denoiser
    sides = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in ROWS]
    mean = torch.stack(sides, dim=1).flatten(0, 1)
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 6)
    text = Conditioning.cat([painter.encode_prompts([prompt]) for prompt in PROMPTS])
    moments = Moments(mean, torch.full_like(mean, 0.1))
    empty = painter.unconditional().expand(3)
    return EncodedPairs(ROWS, moments, text, empty, sizes, torch.ones(3), prompts=PROMPTS)


def learning(family: StepJudge) -> Policy[StepJudge]:
    family.unfreeze()
    return Policy(family, family.network, family.network, None)


def test_both_images_share_noise_time_and_guidance(family: StepJudge) -> None:
    """Worked out from the definitions, and shown to the judge through its own preprocessing."""
    batch, cfg = pairs(family), step_preference.Config(guidance=3.0)
    with torch.no_grad():
        (contrast,) = step_preference.contrasts(learning(family), batch, cfg, DRAWS)
    painter = family.denoiser
    t = DRAWS.integers(ROWS, 0, 1000, "time").repeat(2)
    assert torch.equal(contrast.t, t)
    eps = DRAWS.normal(ROWS, (4, 8, 8), "noise").repeat(2, 1, 1, 1)
    spread = DRAWS.normal(ROWS, (2, 4, 8, 8), "posterior")
    x_0 = batch.latents.mean + 0.1 * torch.cat([spread[:, 0], spread[:, 1]])
    abar = painter.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    cond = painter.condition(batch.text.repeat(2), batch.sizes)
    empty = painter.condition(batch.unconditional.repeat(2), batch.sizes)
    with torch.no_grad():
        answer, without = (painter.predict(painter.network, x_t, t, c) for c in (cond, empty))
        answer = without + 3.0 * (answer - without)
        if painter.schedule.prediction == "v_prediction":  # type: ignore[attr-defined]
            clean = abar.sqrt() * x_t - (1 - abar).sqrt() * answer
        else:
            clean = (x_t - (1 - abar).sqrt() * answer) / abar.sqrt()
        images = painter.decode(clean)
    expected = family.pixels(images)
    # A pixel's last bit may round the other way.
    torch.testing.assert_close(contrast.pixels, expected, rtol=0, atol=2.1 / 255 / 0.5)
    assert (contrast.pixels - expected).abs().mean() < 1e-3


def test_a_flow_s_judge_learns_at_all_times_alike(tiny_sd3: Path, tiny_clip: Path) -> None:
    """Uniform, and not where the denoiser learned, which is shifted towards noise and hardly near the image."""
    flow = step_judge.load(str(tiny_clip), load_diffusion(tiny_sd3), CPU)
    batch = pairs(flow)
    images, t = step_preference.predict_images(flow, batch, 1.0, DRAWS)
    assert torch.equal(t, 1000 * DRAWS.uniform(ROWS, (), "time").repeat(2))
    assert not torch.equal(t[:3], 1000 * flow.denoiser.schedule.draw_time(ROWS, DRAWS))
    assert images.shape == (6, 3, 16, 16)


def test_the_loss_is_the_judge_s_own_preference_at_the_beginning(sd: StepJudge, tiny_clip: Path) -> None:
    """-log softmax of the clean judge's scores of the predicted images, and a gradient for what tells the time."""
    policy, batch = learning(sd), pairs(sd)
    with torch.no_grad():
        (contrast,) = step_preference.contrasts(policy, batch, step_preference.Config(), DRAWS)
        images, _ = step_preference.predict_images(sd, batch, 5.0, DRAWS)
    from mmalign.families.diffusion.pipeline import to_pil

    scores = load_reward_model("open_clip", str(tiny_clip))(to_pil(images), PROMPTS * 2).view(2, 3)
    step = step_preference.loss(policy, contrast, step_preference.Config())
    torch.testing.assert_close(step.losses, -scores.log_softmax(0)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(step.metrics["accuracy"], (scores[0] > scores[1]).float())
    step.losses.sum().backward()
    assert sd.parts.net.blocks[0].weight.grad.any() and sd.parts.net.clip.visual.conv1.weight.grad.any()  # type: ignore[union-attr,operator]
    assert all(p.grad is None for p in sd.denoiser.network.parameters())


def test_labels_are_shares_and_factors(sd: StepJudge) -> None:
    policy, batch = learning(sd), pairs(sd)
    soft = Labels(torch.full((3,), 0.8), torch.zeros(3), torch.full((3,), 2.0))
    swapped = soft._replace(preference=torch.zeros(3), weight=torch.ones(3))
    plain, mixed, other = (
        run(step_preference, policy, replace(batch, labels=labels), step_preference.Config()).losses.detach()
        for labels in (None, soft, swapped)
    )
    torch.testing.assert_close(mixed, 2 * (0.8 * plain + 0.2 * other))


def test_a_judge_of_clean_images_labels_the_pairs_anew(sd: StepJudge) -> None:
    """Sure of the first pair, sure of the contrary of the second, and not sure of the third."""
    seen: list[int] = []

    def judge(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is None and list(prompts) == PROMPTS * 2
        seen.append(len(images))
        return torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0, 1.19])  # tanh(0.095) = 0.0947

    policy, batch = learning(sd), replace(pairs(sd), reward_model=judge)
    with torch.no_grad():
        (contrast,) = step_preference.contrasts(policy, batch, step_preference.Config(tie_margin=0.1), DRAWS)
    assert seen == [6] and contrast.share.tolist() == [1.0, 0.0, 0.5]
    step = step_preference.loss(policy, contrast, step_preference.Config())
    margin = step.metrics["margin"]
    expected = [math.log1p(math.exp(-margin[0])), math.log1p(math.exp(margin[1]))]
    torch.testing.assert_close(step.losses[:2].tolist(), expected, rtol=1e-4, atol=1e-5)
    assert step.metrics["accuracy"][2] == 0.5 and step.losses[2] >= 0


def test_a_judge_takes_no_adapters(sd: StepJudge) -> None:
    with pytest.raises(ValueError, match=r"a step judge needs all its weights trained; set model.tune: full"):
        sd.add_lora(LoraSettings(rank=1, alpha=1.0, targets=[], seed=0))


def test_what_is_saved_is_a_judge(sd: StepJudge, tmp_path: Path) -> None:
    sd.save(tmp_path / "judge", sd.network)
    again = sd.load_trained(tmp_path / "judge")
    pixels, ids = torch.randn(2, 3, 16, 16), sd.tokens(["a", "b"])
    t = torch.tensor([3, 700])
    assert torch.equal(sd.score(again, pixels, ids, t), sd.score(sd.network, pixels, ids, t))
    assert load_reward_model("step_aware", str(tmp_path / "judge"))([Image.new("RGB", (8, 8))], ["a"], t[:1]).isfinite()
