"""Two updates of every pair loss on tiny models of both modalities, and what a loss asks of its method."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmalign import methods
from mmalign.config.base import Choice
from mmalign.config.losses import PairLossConfig
from mmalign.families.base import TextToImage, VisionLanguage
from mmalign.losses.wrappers import Labels
from mmalign.methods.text_to_image import diffusion_dpo, inpo, instruct_engine
from mmalign.methods.vision_language import bdhs, dpo, mdpo, povid, realign, rlhfv
from mmalign.policy import Policy
from tests.helpers import image_batches, response_batches
from tests.helpers.policies import adapted, gradient, run

LOSSES = list(Choice.sections(PairLossConfig))
FREE = {"simpo", "cpo", "orpo", "slic"}


def two_updates(method: Any, policy: Policy[Any], batch: Any, cfg: Any) -> None:
    """Update by the sign of the gradient, and check that all numbers are finite and the weights move."""
    if not methods.requirements_of(cfg).reference:
        policy = replace(policy, reference=None)
    for _ in range(2):
        step = run(method, policy, batch, cfg)
        assert torch.isfinite(step.losses).all() and all(torch.isfinite(x).all() for x in step.metrics.values())
        assert gradient(policy, step).norm() > 0
        for p in policy.trainable():
            p.data.sub_(1e-3 * p.grad.sign() if p.grad is not None else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "orpo"])
def test_two_updates_on_images(sd: TextToImage, loss: str) -> None:
    options = {"slic": {"name": "slic", "delta": 0.01}}
    cfg = diffusion_dpo.Config(loss=options.get(loss, loss), beta=200.0, sft=0.1, caption_dropout=0.0)
    assert methods.requirements_of(cfg).reference == (loss not in FREE)
    two_updates(diffusion_dpo, adapted(sd, moved=0.02), image_batches.pairs(sd), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_updates_on_responses(llava: VisionLanguage, loss: str) -> None:
    options = {"slic": {"name": "slic", "delta": 100.0}}
    cfg = dpo.Config(loss=options.get(loss, loss), nll=0.1)
    assert methods.requirements_of(cfg).reference == (loss not in FREE)
    assert (methods.requirements_of(cfg).precompute is None) == (loss in FREE)
    two_updates(dpo, adapted(llava, moved=0.1), response_batches.batch(llava), cfg)


@pytest.mark.parametrize("method", [bdhs, mdpo, povid, realign, rlhfv])
def test_methods_for_responses_run_without_a_reference(llava: VisionLanguage, method: Any) -> None:
    name = method.__name__.rpartition(".")[2]
    cfg = method.Config(loss="simpo")
    assert methods.requirements_of(cfg).reference == (name == "mdpo")  # for its anchor
    batch = response_batches.batch(llava)
    if method is not bdhs:  # these batches have no rows of data
        two_updates(method, adapted(llava, moved=0.1), batch, cfg)


@pytest.mark.parametrize("method", [inpo, instruct_engine])
def test_methods_for_images_run_without_a_reference(sd: TextToImage, method: Any) -> None:
    cfg = method.Config(loss={"simpo": 1.0, "cpo": 0.5}, beta=200.0, sft=0.1)
    assert not methods.requirements_of(cfg).reference and methods.requirements_of(cfg).measured_by is None
    two_updates(method, adapted(sd, moved=0.02), image_batches.pairs(sd), cfg)


def test_a_method_keeps_the_reference_that_it_needs_itself() -> None:
    assert methods.requirements_of(inpo.Config(loss="simpo", inverter="reference")).reference
    assert methods.requirements_of(povid.Config(loss="simpo", tokens="reference")).reference


def test_own_loss_of_images_is_the_chosen_side_s_error(sd: TextToImage) -> None:
    policy, batch = adapted(sd, moved=0.02), image_batches.pairs(sd)
    plain, more, cpo = (
        run(diffusion_dpo, policy, batch, diffusion_dpo.Config(caption_dropout=0.0, **options))
        for options in ({}, {"sft": 0.5}, {"loss": {"name": "cpo", "alpha": 2.0}})
    )
    error = plain.metrics["chosen error"]
    torch.testing.assert_close(more.losses - plain.losses, 0.5 * error)
    assert torch.equal(more.metrics["sft"], error) and torch.equal(cpo.metrics["sft"], error)
    assert torch.equal(more.metrics["loss"], more.losses.detach())


def test_score_divides_by_the_length(llava: VisionLanguage) -> None:
    policy, batch = adapted(llava, moved=0.1), response_batches.batch(llava)
    means, sums = (run(dpo, policy, batch, dpo.Config(score=score)).metrics for score in ("mean", "sum"))
    assert torch.equal(run(dpo, policy, batch, dpo.Config()).metrics["logit"], sums["logit"])
    for side in ("chosen", "rejected"):
        lengths = sums[f"{side} tokens"]
        torch.testing.assert_close(means[f"{side} log-probability"] * lengths, sums[f"{side} log-probability"])


def test_divergence_and_cap_reach_the_loss(llava: VisionLanguage) -> None:
    policy, batch = adapted(llava, moved=0.1), response_batches.batch(llava)
    plain = run(dpo, policy, batch, dpo.Config(beta=1.0))
    gains = [plain.metrics[f"{side} gain"] for side in ("chosen", "rejected")]
    js = run(dpo, policy, batch, dpo.Config(beta=1.0, divergence="js")).losses
    expected = torch.nn.functional.logsigmoid(gains[0]) - torch.nn.functional.logsigmoid(gains[1])
    torch.testing.assert_close(js.detach(), torch.nn.functional.softplus(-expected))
    z = plain.metrics["logit"]
    cap = float(z.max()) / 2
    capped = run(dpo, policy, batch, dpo.Config(beta=1.0, logit_cap=cap)).losses.detach()
    torch.testing.assert_close(capped, torch.nn.functional.softplus(-z.clamp(max=cap)))
    assert cap > 0 and not torch.equal(capped, plain.losses.detach())


def labels(number: int, **parts: float) -> Labels:
    """Return equal labels of so many pairs."""
    given = {"preference": 1.0, "margin": 0.0, "weight": 1.0, **parts}
    return Labels(*(torch.full((number,), value) for value in given.values()), [""] * number)


@pytest.mark.slow
@pytest.mark.parametrize("method", [diffusion_dpo, inpo, instruct_engine])
def test_methods_for_images_read_labels(sd: TextToImage, method: Any) -> None:
    policy, batch = adapted(sd, moved=0.02), image_batches.pairs(sd)
    cfg = method.Config(beta=300.0, sft=0.5, **({} if method is instruct_engine else {"caption_dropout": 0.0}))
    check_labels(method, policy, batch, cfg)
    assert methods.requirements_of(cfg).labels


@pytest.mark.parametrize("method", [dpo, mdpo, povid, realign, rlhfv])
def test_methods_for_responses_read_labels(llava: VisionLanguage, method: Any) -> None:
    policy, batch = adapted(llava, moved=0.1), response_batches.batch(llava)
    check_labels(method, policy, batch, method.Config(nll=0.5))
    assert methods.requirements_of(method.Config()).labels


def check_labels(method: Any, policy: Policy[Any], batch: Any, cfg: Any) -> None:
    """Check weights, margins and preferences; comparisons of other views than the two responses have weights alone."""
    number = len(batch.rows)

    def losses(**parts: float) -> torch.Tensor:
        return run(method, policy, replace(batch, labels=labels(number, **parts)), cfg).losses.detach()

    plain = run(method, policy, batch, cfg).losses.detach()
    torch.testing.assert_close(losses(weight=3.0), 3 * plain)
    torch.testing.assert_close(losses(), plain)
    if method is instruct_engine:
        torch.testing.assert_close(losses(preference=0.5, margin=1.0), plain)
        return
    shifted, even = losses(margin=2.0) - plain, losses(preference=0.5)
    assert (shifted > 0).all() and (shifted < 2.0).all()
    z = run(method, policy, batch, cfg).metrics["logit"]
    share = cfg.gamma if method is povid else 1.0
    mixed = share * (0.5 * torch.nn.functional.softplus(z) - 0.5 * torch.nn.functional.softplus(-z))
    torch.testing.assert_close(even - plain, mixed, rtol=1e-3, atol=1e-5)


def test_sppo_regresses_on_the_preference(llava: VisionLanguage) -> None:
    policy, batch = adapted(llava, moved=0.1), response_batches.batch(llava)
    cfg = dpo.Config(loss="sppo", beta=0.5)
    step = run(dpo, policy, replace(batch, labels=labels(3, preference=0.8)), cfg)
    chosen, rejected = (step.metrics[f"{side} gain"] for side in ("chosen", "rejected"))
    expected = 0.5 * ((chosen - 0.6) ** 2 + (rejected + 0.6) ** 2)
    torch.testing.assert_close(step.losses.detach(), expected)
