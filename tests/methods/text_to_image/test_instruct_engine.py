"""InstructEngine's grid: each comparison by hand, and what it becomes where images or prompts are the same."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.families.types import Moments
from mmalign.methods.text_to_image import diffusion_dpo, instruct_engine
from mmalign.policy import FrozenCopy, Policy
from tests.helpers.image_batches import ROWS, pairs, swapped
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import DRAWS, full, gradient, run

LN2 = math.log(2)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # of logits: beta magnifies rounding


family = diffusion_families("tiny_sd15", "tiny_sd2", "tiny_sdxl")


def exchanged(batch: EncodedPairs) -> EncodedPairs:
    """The prompts of every pair the other way round."""
    assert batch.rejected_text is not None
    return replace(batch, text=batch.rejected_text, rejected_text=batch.text)


def config(*weights: float, **more: Any) -> instruct_engine.Config:
    return instruct_engine.Config(beta=300.0, weights=list(weights) or [0.25] * 4, **more)


def gaps(policy: Policy, batch: EncodedPairs) -> dict[tuple[int, int], Tensor]:
    """By definition: -1/2 (the policy's error - the reference's) of image i under prompt j, both from 1."""
    family, rows = policy.family, batch.rows
    t = DRAWS.integers(rows, 0, 1000, "time")
    eps = DRAWS.normal(rows, (4, 8, 8), "noise")
    spread = DRAWS.normal(rows, (2, 4, 8, 8), "posterior")
    abar = family.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert isinstance(policy.reference, FrozenCopy) and batch.rejected_text is not None
    results = {}
    for i, mean in enumerate(batch.latents.mean.chunk(2)):
        x_0 = mean + batch.latents.std[:4] * spread[:, i]
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
        velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x_0
        target = velocity if family.schedule.prediction == "v_prediction" else eps
        for j, text in enumerate((batch.text, batch.rejected_text)):
            cond = family.condition(text, batch.sizes.chunk(2)[i])
            with torch.no_grad():
                policy_errors, reference_errors = (
                    (family.predict(net, x_t, t, cond) - target).square().mean((1, 2, 3))
                    for net in (policy.model, policy.reference.model)
                )
            results[i + 1, j + 1] = -0.5 * (policy_errors - reference_errors)
    return results


@pytest.mark.slow
def test_each_comparison_is_a_diffusion_dpo_worked_out_by_hand(family: TextToImage) -> None:
    """x1 under y1 against y2, x2 under y2 against y1; under y1 x1 against x2, under y2 x2 against x1."""
    policy, batch = full(family, moved=0.02), pairs(family)
    gap = gaps(policy, batch)
    z = [
        300 * (gap[better] - gap[worse])
        for better, worse in (((1, 1), (1, 2)), ((2, 2), (2, 1)), ((1, 1), (2, 1)), ((2, 2), (1, 2)))
    ]
    assert min(each.abs().max() for each in z) > 0.05
    for place, each in enumerate(z):
        step = run(instruct_engine, policy, batch, config(*(float(i == place) for i in range(4))))
        torch.testing.assert_close(step.losses.detach(), -each.sigmoid().log(), **CLOSE)
        torch.testing.assert_close(step.metrics["logit"], each, **CLOSE)
        assert torch.equal(step.metrics["accuracy"], (each > 0).float())
    mixed = run(instruct_engine, policy, batch, config(0.5, 0.0, 0.25, 1.0)).losses.detach()
    parts = [weight * -each.sigmoid().log() for weight, each in zip((0.5, 0.0, 0.25, 1.0), z, strict=True)]
    torch.testing.assert_close(mixed, sum(parts), **CLOSE)  # type: ignore[arg-type]
    metrics = run(instruct_engine, policy, batch, config()).metrics
    torch.testing.assert_close(metrics["matched gain"], (gap[1, 1] + gap[2, 2]) / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(metrics["mismatched gain"], (gap[1, 2] + gap[2, 1]) / 2, rtol=1e-3, atol=1e-6)
    for name, logits in (("prompt accuracy", z[:2]), ("image accuracy", z[2:])):
        torch.testing.assert_close(metrics[name], sum((each > 0).float() for each in logits) / 2)  # type: ignore[arg-type]


def test_its_comparison_of_images_is_diffusion_dpo_s_own(family: TextToImage) -> None:
    """Under the first prompt as the pairs are; under the second with images and prompts exchanged."""
    policy, batch = full(family, moved=0.02), pairs(family, std=0.0)
    plain = diffusion_dpo.Config(beta=300.0, caption_dropout=0.0)
    for weights, same in (((0, 0, 1, 0), batch), ((0, 0, 0, 1), swapped(exchanged(batch)))):
        expected = run(diffusion_dpo, policy, same, plain)
        actual = run(instruct_engine, policy, batch, config(*map(float, weights)))
        torch.testing.assert_close(actual.losses, expected.losses, **CLOSE)
        torch.testing.assert_close(actual.metrics["logit"], expected.metrics["logit"], **CLOSE)
        a, b = gradient(policy, actual), gradient(policy, expected)
        assert b.norm() > 0 and (a - b).norm() < 1e-4 * b.norm()


def test_equal_prompts_leave_two_dpo_terms_and_two_ln_2(family: TextToImage) -> None:
    """The images are compared under one prompt, once each way round."""
    policy, batch = full(family, moved=0.02), pairs(family, std=0.0)
    batch = replace(batch, rejected_text=batch.text)
    step = run(instruct_engine, policy, batch, config(1.0, 1.0, 1.0, 1.0))
    plain = diffusion_dpo.Config(beta=300.0, caption_dropout=0.0)
    both = [run(diffusion_dpo, policy, some, plain).losses for some in (batch, swapped(batch))]
    torch.testing.assert_close(step.losses, both[0] + both[1] + 2 * LN2, **CLOSE)
    assert torch.equal(step.metrics["prompt accuracy"], torch.full((4,), 0.5))


def test_equal_images_leave_the_comparisons_of_prompts(family: TextToImage) -> None:
    policy, batch = full(family, moved=0.02), pairs(family, std=0.0)
    same = Moments(batch.latents.mean[:4].repeat(2, 1, 1, 1), batch.latents.std)
    step = run(instruct_engine, policy, replace(batch, latents=same), config(0.0, 0.0, 0.5, 0.5))
    # Of one image y1 and y2 are compared: 0.5 * (softplus(-0) + softplus(-0)).
    torch.testing.assert_close(step.losses.detach(), torch.full((4,), LN2))
    assert (
        run(instruct_engine, policy, replace(batch, latents=same), config(1.0, 0.0, 0.0, 0.0))
        .metrics["logit"]
        .abs()
        .min()
        > 1e-4
    )


def test_exchanging_the_prompts_negates_every_comparison(family: TextToImage) -> None:
    policy, batch = full(family, moved=0.02), pairs(family)
    metrics, exchanged_metrics = (run(instruct_engine, policy, b, config()).metrics for b in (batch, exchanged(batch)))
    assert metrics["logit"].abs().max() > 1e-2
    torch.testing.assert_close(metrics["logit"], -exchanged_metrics["logit"], **CLOSE)
    torch.testing.assert_close(metrics["matched gain"], exchanged_metrics["mismatched gain"], rtol=1e-3, atol=1e-6)
    for name in ("accuracy", "prompt accuracy", "image accuracy"):
        torch.testing.assert_close(metrics[name], 1 - exchanged_metrics[name])


def test_all_four_share_time_and_noise(family: TextToImage) -> None:
    """Of latents of zeros x_t is the noise alone."""
    batch = pairs(family)
    zeros = torch.zeros_like(batch.latents.mean)
    batch = replace(batch, latents=Moments(zeros, zeros))
    (contrast,) = instruct_engine.contrasts(full(family), batch, config(), DRAWS)
    assert contrast.view.t.shape == (16,) and len(set(contrast.view.t.tolist())) == len(ROWS)
    for x in (contrast.view.t, contrast.view.x_t, contrast.view.target):
        assert all(torch.equal(part, x[:4]) for part in x.chunk(4))


@pytest.mark.parametrize(
    ("weights", "text"),
    [([0, 0, 0, 0], "weights are all 0"), ([1, 1, 1], "at least 4"), ([1, 1, 1, -1], "greater than or equal to 0")],
)
def test_weights_that_compare_nothing_are_refused(weights: list[float], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        instruct_engine.Config(weights=[float(w) for w in weights])
