"""SPO on tiny networks of the real classes: its sampler against diffusers, its pairs, and the laws of its loss."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from mmalign.config import RewardConfig
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.flow import Flow
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.types import Conditioning
from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from mmalign.methods import Step
from mmalign.methods.text_to_image import spo
from mmalign.methods.text_to_image._images import Guided, predict_guided
from mmalign.policy import FrozenCopy, Policy
from mmalign.rng import KeyedRNG
from tests.helpers.golden import golden
from tests.helpers.image_batches import PROMPTS, bright, prompts
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import DRAWS, POLICIES, full

GOLDEN = golden("spo")
ROWS = [11, 2**62 + 3, 7]
JUDGE = RewardConfig(name="step_aware", path="models/none")
SHORT: dict[str, Any] = {"reward": JUDGE, "steps": 6, "start": 2, "threshold": 0.0}


family = diffusion_families("tiny_sd15", "tiny_sd2", "tiny_sdxl")


def made(policy: Policy, batch: EncodedPrompts, cfg: spo.Config, rng: KeyedRNG = DRAWS) -> list[spo.Contrast]:
    with torch.no_grad():
        return spo.contrasts(policy, batch, cfg, rng)


def learned(policy: Policy, contrasts: Sequence[spo.Contrast], cfg: spo.Config) -> tuple[Tensor, Tensor]:
    """The losses of all pairs that count, and the gradient of their sum, all parameters in one vector."""
    policy.model.zero_grad()
    results = []
    for contrast in contrasts:
        result: Step = spo.loss(policy, contrast, cfg)
        (result.losses * result.weights).sum().backward()
        results.append(result.losses[result.weights > 0].detach())
    return torch.cat(results), torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])


def walked(policy: Policy, batch: EncodedPrompts, cfg: spo.Config) -> list[spo.Preferred]:
    with torch.no_grad():
        return list(spo.preferred_steps(policy, batch, cfg, DRAWS))


@pytest.mark.slow
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_trajectory_equals_diffusers_with_the_same_noise(family: TextToImage, inner_steps: int) -> None:
    """Every step that the pairs hold, done again by DDIMScheduler with eta 1, guidance, and the draws by their keys.

    Six float32 steps on other batch sizes, each divided by a small sqrt(abar): 1e-3.
    """
    cfg = spo.Config(**SHORT | {"inner_steps": inner_steps, "guidance": 3.0})
    policy, batch = full(family), prompts(family)
    pairs = walked(policy, batch, cfg)
    own = family.pipeline.scheduler.config  # type: ignore[attr-defined]
    scheduler = DDIMScheduler.from_config(
        {**own, "_class_name": "DDIMScheduler"}, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(cfg.steps)

    def onwards(x: Tensor, b: int, at: int, noise: Tensor) -> Tensor:
        t = scheduler.timesteps[at]
        cond = family.condition(family.encode_prompts([batch.prompts[b]]), batch.sizes[:1])
        empty = family.condition(family.unconditional(), batch.sizes[:1])
        with torch.no_grad():
            e_text, e_empty = (family.predict(policy.model, x[None], t[None], c) for c in (cond, empty))
        guided = e_empty + 3.0 * (e_text - e_empty)
        result = scheduler.step(guided, int(t), x[None], eta=1.0, variance_noise=noise[None]).prev_sample
        return result[0]  # type: ignore[no-any-return]

    def noise(b: int, at: int, number: int) -> Tensor:
        return DRAWS.normal([ROWS[b]], (number, 4, 8, 8), "step", at)[0]

    assert len(pairs) == len(ROWS) * (cfg.steps - cfg.start)
    for b, row in enumerate(ROWS):
        x = DRAWS.normal([row], (4, 8, 8), "start")[0]
        for index in range(cfg.start):
            x = onwards(x, b, index, noise(b, index, 1)[0])
        for index in range(cfg.start, cfg.steps, inner_steps + 1):
            ways = [[x] for _ in range(4)]
            for k in range(inner_steps + 1):
                for way, z in zip(ways, noise(b, index + k, 4), strict=True):
                    way.append(onwards(way[-1], b, index + k, z))
            of = [pair for pair in pairs if pair.prompt == b and index <= pair.step_index <= index + inner_steps]
            for pair in of:
                k = pair.step_index - index
                torch.testing.assert_close(pair.start[0], ways[_which(ways, pair.to[0], k)][k], rtol=1e-3, atol=1e-3)
                assert len(pair.start) == (1 if k == 0 else 2)
                # One branch all along: the chosen side of every step is the same candidate's.
                assert _which(ways, pair.to[0], k) == _which(ways, of[0].to[0], 0)
                assert _which(ways, pair.to[1], k) == _which(ways, of[0].to[1], 0)
            x = ways[int(DRAWS.integers([row], 0, 4, "survivor", index))][-1]


def _which(ways: list[list[Tensor]], place: Tensor, k: int) -> int:
    """The candidate that is at a place after step k."""
    distances = torch.tensor([float((way[k + 1] - place).abs().max()) for way in ways])
    assert distances.min() < 1e-3 * max(1.0, float(place.abs().max()))
    return int(distances.argmin())


def test_reward_model_gets_each_candidates_prediction(sd: TextToImage) -> None:
    """The clean image predicted from the candidate itself, at the time after the step; a finished one at time 0."""
    seen: list[tuple[list[Image.Image], list[str], list[float]]] = []

    def judge(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None
        seen.append((list(images), list(prompts), t.tolist()))
        return bright(images, prompts)

    cfg = spo.Config(**SHORT)
    walked(full(sd), prompts(sd, judge), cfg)
    assert [set(t) for _, _, t in seen] == [{333.0}, {167.0}, {1.0}, {0.0}]  # of 831, 665, 499, 333, 167, 1, 0
    assert all(texts == [PROMPTS[row] for row in ROWS] * 4 for _, texts, _ in seen)


def test_chosen_step_has_the_best_scored_image(sd: TextToImage) -> None:
    """At the last step, where the judge sees the candidates themselves."""
    cfg, policy = spo.Config(**SHORT), full(sd)
    pairs = [pair for pair in walked(policy, prompts(sd), cfg) if pair.step_index == 5]
    for pair in pairs:
        chosen, rejected = bright(to_pil(sd.decode(pair.to)), ["", ""])
        prediction = _guided(sd, policy, pair, cfg)
        candidates = sd.schedule.step(prediction, pair.start, torch.tensor([1]), torch.tensor([0]), 1.0)
        noise = DRAWS.normal([ROWS[pair.prompt]], (4, 4, 8, 8), "step", 5)[0]
        all_four = bright(to_pil(sd.decode(candidates.sample(noise))), [""] * 4)
        assert chosen == all_four.max() and rejected == all_four.min() and chosen > rejected


def _guided(family: TextToImage, policy: Policy, pair: spo.Preferred, cfg: spo.Config) -> Tensor:
    text = family.encode_prompts([PROMPTS[ROWS[pair.prompt]]])
    with torch.no_grad():
        both = Guided(cfg.guidance, text, family.unconditional())
        return predict_guided(family, policy.model, pair.start, torch.tensor([1]), both)


@pytest.mark.slow
def test_the_company_of_a_prompt_does_not_change_its_way(sd: TextToImage) -> None:
    """Rounding differs between batch sizes, 1e-4 on latents of size 10; the draws and the judge's choice do not."""
    cfg, policy = spo.Config(**SHORT), full(sd)
    together = [pair for pair in walked(policy, prompts(sd), cfg) if pair.prompt == 1]
    alone = walked(policy, prompts(sd, rows=ROWS[1:2]), cfg)
    turned = [pair for pair in walked(policy, prompts(sd, rows=ROWS[::-1]), cfg) if pair.prompt == 1]
    assert (
        [p.step_index for p in alone]
        == [p.step_index for p in together]
        == [p.step_index for p in turned]
        == [2, 3, 4, 5]
    )
    for reordered in (alone, turned):
        for actual, expected in zip(together, reordered, strict=True):
            torch.testing.assert_close(actual.start, expected.start, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(actual.to, expected.to, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("result", GOLDEN["compare_func"]["results"], ids=lambda r: str(r["threshold"]))
def test_best_and_worst_are_the_release_s(result: dict[str, Any]) -> None:
    best, worst, sure = spo.best_and_worst(torch.tensor(GOLDEN["compare_func"]["scores"]), result["threshold"])
    assert sure.tolist() == result["valid"]
    kept = sure.nonzero().flatten()
    assert torch.stack([best, worst])[:, kept].tolist() == torch.tensor(result["indices_best_worst"])[:, kept].tolist()


@pytest.mark.slow
def test_padding_makes_no_contrast_pair(sd: TextToImage) -> None:
    """Empty contrasts come first, with one row of weight 0."""
    cfg, policy = spo.Config(**SHORT), full(sd)

    def picky(images: Sequence[Image.Image], texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Sure of the hen alone."""
        return bright(images, texts) * torch.tensor([float(text == "a hen") for text in texts])

    contrasts = made(policy, prompts(sd, picky), cfg)
    assert len(contrasts) == 4 and [float(c.weights.sum()) for c in contrasts] == [0, 0, 3, 1]
    assert all(c.summary["sure"].tolist() == [0, 1, 0] for c in contrasts)
    assert {pair.prompt for pair in walked(policy, prompts(sd, picky), cfg)} == {1}
    batch = replace(prompts(sd), weights=torch.tensor([1.0, 0.0, 1.0]))
    contrasts = made(policy, batch, cfg)
    assert sum(float(c.weights.sum()) for c in contrasts) == 8 and contrasts[0].summary["sure"].tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_policy_at_reference_has_ln_2_and_gradient(family: TextToImage, tune: str, inner_steps: int) -> None:
    policy = POLICIES[tune](family)
    cfg = spo.Config(**SHORT | {"inner_steps": inner_steps})
    contrasts = made(policy, prompts(family), cfg)
    values, gradient = learned(policy, contrasts, cfg)
    assert len(values) == 12
    assert torch.equal(values, torch.full((12,), math.log(2)))
    assert gradient.norm() > 1e-4


def two_forwards(policy: Policy, contrast: spo.Contrast, cfg: spo.Config) -> Tensor:
    """The loss as the release computes it: each side by its own run of the network."""
    view, sides = contrast.view, len(contrast.weights)
    scores = []
    for of, to in zip(view.source.split(sides), view.to.split(sides), strict=True):
        side_view = replace(view, x_t=view.x_t[of], t=view.t[of], prev=view.prev[of], prompt=view.prompt[of])
        side_view = replace(
            side_view,
            source=torch.arange(sides).repeat(2),
            to=to.repeat(2, 1, 1, 1),
        )
        scores.append(spo.step_scores(policy.family, cfg, side_view, policy.model)["chosen"])
    assert contrast.reference is not None
    reference_scores = Pair(contrast.reference["chosen"], contrast.reference["rejected"])
    return pairwise.clipped_dpo(Pair(*scores), reference_scores, beta=cfg.beta, clip=cfg.clip)


@pytest.mark.slow
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_one_forward_for_both_sides_is_two_in_loss_and_gradient(sd: TextToImage, inner_steps: int) -> None:
    """And it runs on one place a pair where a pair shares it. Float32 sums in another order: 1e-4 of the gradient."""
    cfg = spo.Config(**SHORT | {"inner_steps": inner_steps, "clip": 0.5})
    policy = full(sd)
    contrasts = made(policy, prompts(sd), cfg)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # after the sampling: an update
        for p in policy.trainable():
            p.add_(0.003 * torch.randn(p.shape, generator=g))
    places = sum(len(c.view.x_t) for c in contrasts)
    assert places == (12 if inner_steps == 0 else 6 + 2 * 6)
    values, gradient = learned(policy, contrasts, cfg)
    assert (values - math.log(2)).abs().max() > 1e-2
    policy.model.zero_grad()
    apart = torch.cat([two_forwards(policy, contrast, cfg) for contrast in contrasts])
    apart.sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
    torch.testing.assert_close(values, apart.detach(), rtol=1e-4, atol=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_a_ratio_outside_the_clip_has_no_gradient(sd: TextToImage) -> None:
    """A policy far from its reference: every ratio is outside a narrow clip, on both sides."""
    cfg = spo.Config(**SHORT | {"clip": 1e-6})
    policy = full(sd)
    contrasts = made(policy, prompts(sd), cfg)
    with torch.no_grad():
        for p in policy.trainable():
            p.mul_(1.05)
    _, gradient = learned(policy, contrasts, cfg)
    assert (gradient == 0).all()
    result = spo.loss(policy, contrasts[0], cfg)
    assert (result.metrics["clipped"] == 1).all()
    _, gradient = learned(policy, contrasts, spo.Config(**SHORT | {"clip": 0.99}))
    assert (gradient != 0).any()


def test_the_margin_is_linear_in_the_policy_s_mean(sd: TextToImage) -> None:
    """D_w - D_l = mean((x_w - x_l) (mu_policy - mu_ref)) / sigma^2, which the shared x_t makes exact."""
    cfg, policy = spo.Config(**SHORT), full(sd)
    contrasts = made(policy, prompts(sd), cfg)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.003 * torch.randn(p.shape, generator=g))
    assert isinstance(policy.reference, FrozenCopy)
    for contrast in contrasts:
        v = contrast.view
        with torch.no_grad():
            laws = [
                sd.schedule.step(predict_guided(sd, net, v.x_t, v.t, v.text[v.prompt]), v.x_t, v.t, v.prev, 1.0)
                for net in (policy.model, policy.reference.model)
            ]
            results = spo.loss(policy, contrast, cfg).metrics
        chosen, rejected = v.to.chunk(2)
        linear = ((chosen - rejected) * (laws[0].mean - laws[1].mean) / laws[0].std ** 2).mean((1, 2, 3))
        torch.testing.assert_close(results["logit"], cfg.beta * linear, rtol=2e-3, atol=2e-4)


def test_spo_goes_along_a_flow(sd: TextToImage) -> None:
    """The method knows no process: the same network taken for a flow's velocity, its time in a unit of its own."""
    predict = sd.predict
    flow = replace(sd, schedule=Flow())  # type: ignore[type-var]

    class OnFlow:
        schedule, network, condition, decode = flow.schedule, flow.network, flow.condition, flow.decode

        @staticmethod
        def predict(net: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return predict(net, x_t, t * 1000, cond)

    times: list[float] = []

    def judge(images: Sequence[Image.Image], texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None
        times.append(float(t[0]))
        return bright(images, texts)

    cfg = spo.Config(**SHORT | {"eta": 0.7, "start": 0})
    policy = replace(full(sd), family=OnFlow())
    values, gradient = learned(policy, made(policy, prompts(sd, judge), cfg), cfg)
    assert torch.equal(values, torch.full((18,), math.log(2))) and gradient.norm() > 0
    torch.testing.assert_close(torch.tensor(times), torch.tensor([5, 4, 3, 2, 1, 0]) * 1000 / 6)


def test_a_judge_that_is_never_sure_makes_contrasts_of_weight_0(sd: TextToImage) -> None:
    def unsure(images: Sequence[Image.Image], texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.zeros(len(images))

    cfg = spo.Config(**SHORT)
    contrasts = made(full(sd), prompts(sd, unsure), cfg)
    assert len(contrasts) == 4 and not any(c.weights.any() for c in contrasts)
    result = spo.loss(full(sd), contrasts[0], cfg)
    assert result.losses.isfinite().all() and result.losses.requires_grad


def test_segments_must_fit_between_start_and_end() -> None:
    assert spo.Config(reward=JUDGE, inner_steps=3).steps == 20
    with pytest.raises(
        ValueError, match=r"steps 20 less start 4 leaves 16 steps for segments of 3 \(inner_steps \+ 1\)"
    ):
        spo.Config(reward=JUDGE, inner_steps=2)
    with pytest.raises(ValueError, match="leaves 0 steps"):
        spo.Config(reward=JUDGE, start=20)
