"""CCA on denoising: what each image is contrasted with, by hand and by law. The loss itself is in test_losses.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.families.types import Conditioning, Moments
from mmalign.methods.text_to_image import _denoising, cca, diffusion_dpo
from mmalign.policy import FrozenCopy, Policy
from tests.helpers.image_batches import ROWS, pairs
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import DRAWS, full, run

family = diffusion_families("tiny_sd2", "tiny_sdxl")


def prompted(family: TextToImage, batch: EncodedPairs, prompts: list[str]) -> EncodedPairs:
    return replace(batch, text=Conditioning.cat([family.encode_prompts([p]) for p in prompts]))


def conditioned_prompts(view: _denoising.NoisedPairs, family: TextToImage, prompts: list[str]) -> list[str]:
    """Which of the prompts each row of a view is shown."""
    known = {p: family.encode_prompts([p]).tensors["embeds"][0] for p in prompts}
    return [next(p for p, x in known.items() if torch.equal(x, row)) for row in view.cond.tensors["embeds"]]


def gaps(policy: Policy, family: TextToImage, batch: EncodedPairs, text: Conditioning) -> Tensor:
    """By definition: -1/2 (the policy's error - the reference's) of the chosen images under `text` [B]."""
    number, rows = len(batch.rows), batch.rows
    t = DRAWS.integers(rows, 0, 1000, "time")
    eps = DRAWS.normal(rows, (4, 8, 8), "noise")
    x_0 = batch.latents.mean[:number] + 0.1 * DRAWS.normal(rows, (2, 4, 8, 8), "posterior")[:, 0]
    abar = family.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x_0
    target = velocity if family.schedule.prediction == "v_prediction" else eps
    cond = family.condition(text, batch.sizes[:number])
    assert isinstance(policy.reference, FrozenCopy)
    with torch.no_grad():
        policy_errors, reference_errors = (
            (family.predict(net, x_t, t, cond) - target).square().mean((1, 2, 3))
            for net in (policy.model, policy.reference.model)
        )
    return -0.5 * (policy_errors - reference_errors)


def test_the_loss_is_worked_out_from_its_definition(family: TextToImage) -> None:
    """Prompts a, a, b, c: the first pair's neighbour has its own prompt, so that both its terms are positive."""
    policy = full(family, moved=0.02)
    batch = prompted(family, pairs(family), ["a fox", "a fox", "a hen", "grass"])
    cfg = cca.Config(beta=300.0, weight=3.0, caption_dropout=0.0)
    step = run(cca, policy, batch, cfg)
    own, unlearned = (
        gaps(policy, family, batch, text) for text in (batch.text, batch.text[torch.tensor([1, 2, 3, 0])])
    )
    sign, weight = torch.tensor([1.0, -1, -1, -1]), torch.tensor([1.0, 3, 3, 3])
    expected = (-(300 * own).sigmoid().log() - weight * (sign * 300 * unlearned).sigmoid().log()) / 3
    torch.testing.assert_close(step.losses.detach(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.metrics["matched gain"], own, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(step.metrics["mismatched gain"], unlearned, rtol=1e-3, atol=1e-6)
    assert step.metrics["accuracy"].tolist() == [0.5, *(own > unlearned)[1:].float().tolist()]
    torch.testing.assert_close(step.metrics["logit"], 300 * (own - unlearned), rtol=1e-3, atol=1e-3)


def test_exchanging_the_prompts_of_two_pairs_negates_the_logit(family: TextToImage) -> None:
    policy, batch = full(family, moved=0.02), pairs(family, ROWS[:2])
    cfg = cca.Config(caption_dropout=0.0)
    metrics = run(cca, policy, batch, cfg).metrics
    exchanged_metrics = run(cca, policy, replace(batch, text=batch.text[torch.tensor([1, 0])]), cfg).metrics
    assert metrics["logit"].abs().min() > 1e-2
    torch.testing.assert_close(metrics["logit"], -exchanged_metrics["logit"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(metrics["matched gain"], exchanged_metrics["mismatched gain"], rtol=1e-3, atol=1e-6)


def test_both_halves_are_diffusion_dpo_s_chosen_images(family: TextToImage) -> None:
    batch = pairs(family)
    sizes = batch.sizes.clone()
    sizes[4:, 0] = 99.0  # of the rejected images, which have no part in it
    halved = replace(batch, sizes=sizes, latents=Moments(batch.latents.mean.clone(), batch.latents.std))
    halved.latents.mean[4:] = 0.0
    policy = full(family)
    with torch.no_grad():
        (dpo,) = diffusion_dpo.contrasts(policy, batch, diffusion_dpo.Config(caption_dropout=0.5), DRAWS)
        (contrast,) = cca.contrasts(policy, halved, cca.Config(caption_dropout=0.5), DRAWS)
    for half in (slice(0, 4), slice(4, 8)):
        for name in ("x_t", "t", "target"):
            assert torch.equal(getattr(contrast.view, name)[half], getattr(dpo.view, name)[:4])
    for name, given in dpo.view.cond.tensors.items():
        assert torch.equal(contrast.view.cond.tensors[name][:4], given[:4])  # also which captions are dropped


def test_dropped_captions_are_dropped_on_both_sides_and_positive(sd: TextToImage) -> None:
    """At a rate of one both terms are -log sigma(z) of the same z, and at one half some rows are of either kind."""
    policy, batch = full(sd, moved=0.02), pairs(sd)
    nothing = batch.unconditional
    step = run(cca, policy, batch, cca.Config(beta=300.0, weight=5.0, caption_dropout=1.0))
    z = 300 * gaps(policy, sd, batch, nothing)
    torch.testing.assert_close(step.losses.detach(), -2 * z.sigmoid().log() / 5, rtol=1e-3, atol=1e-4)
    (half,) = cca.contrasts(policy, batch, cca.Config(caption_dropout=0.5), DRAWS)
    keep = DRAWS.uniform(ROWS, (), "caption dropout") >= 0.5
    assert torch.equal(half.same_condition, ~keep) and 0 < int(keep.sum()) < 4


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1, 1], [1, 2, 3, 0]),
        ([1, 0, 1, 1], [2, 1, 3, 0]),
        ([0.5, 1, 0, 0], [1, 0, 2, 3]),
        ([0, 0, 1, 0], [0, 1, 2, 3]),  # alone: with itself
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([1], [0]),
    ],
)
def test_the_other_prompt_is_that_of_the_next_pair_that_counts(weights: list[float], expected: list[int]) -> None:
    assert cca.neighbours(torch.tensor(weights, dtype=torch.float32)).tolist() == expected


def test_padding_lends_no_prompt_and_changes_nothing(sd: TextToImage) -> None:
    prompts = ["a red fox", "a hen", "two owls", "grass"]
    policy, cfg = full(sd, moved=0.02), cca.Config(caption_dropout=0.0)
    batch = prompted(sd, pairs(sd), prompts)
    padded = replace(batch, weights=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    (contrast,) = cca.contrasts(policy, padded, cfg, DRAWS)
    assert conditioned_prompts(contrast.view, sd, prompts) == [*prompts, "a hen", "a red fox", "two owls", "grass"]
    few = prompted(sd, pairs(sd, ROWS[:2]), prompts[:2])
    alone, together = (run(cca, policy, b, cfg) for b in (few, padded))
    torch.testing.assert_close(together.losses[:2], alone.losses, rtol=1e-3, atol=5e-3)  # beta magnifies rounding
    single_pair = replace(batch, weights=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    (contrast,) = cca.contrasts(policy, single_pair, cfg, DRAWS)
    assert contrast.same_condition.tolist() == [True] * 4


def test_prompts_that_are_equal_once_cut_are_alike(sd: TextToImage) -> None:
    """The tiny encoder reads 16 tokens, one a letter: the network is told the same, so nothing is wrong about it."""
    batch = prompted(sd, pairs(sd, ROWS[:2]), ["a" * 40, "a" * 40 + " hen"])
    (contrast,) = cca.contrasts(full(sd), batch, cca.Config(caption_dropout=0.0), DRAWS)
    assert contrast.same_condition.tolist() == [True, True]
