"""Methods that learn from images that the policy generates, on tiny networks of the real classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign import methods
from mmalign.config import RewardConfig
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.losses.advantages import advantages
from mmalign.methods.text_to_image import awm, nft
from mmalign.methods.text_to_image._online import Contrast, by_prompt, generate
from mmalign.policy import Policy
from mmalign.policy.lagging import LaggingCopy
from tests.helpers.image_batches import ROWS, bright, prompts
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import DRAWS, full, gradient

NAMES = ["awm", "crd", "dgpo", "diffusion_online_dpo", "nft"]
JUDGE = RewardConfig(name="function", path="none:none")
SHORT: dict[str, Any] = {"images": 3, "steps": 2, "noisings": 2}

family = diffusion_families("tiny_sd15", "tiny_sd3", "tiny_sd2", "tiny_sdxl", "tiny_flux", "tiny_qwen_image", fast=2)


def config(name: str, generation: dict[str, Any] | None = None, **options: Any) -> Any:
    return methods.find(name).Config(  # type: ignore[attr-defined]
        reward=JUDGE, generation=SHORT | (generation or {}), **options
    )


def made(name: str, policy: Policy, batch: Any, cfg: Any) -> list[Any]:
    with torch.no_grad():
        return methods.find(name).contrasts(policy, batch, cfg, DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_updates_of_one_generation(family: TextToImage, name: str) -> None:
    """Every family: all numbers are finite, both updates have a gradient, and the first moves what the second reads."""
    policy, cfg = full(family), config(name)
    contrasts = made(name, policy, prompts(family), cfg)
    assert len(contrasts) == 2
    for number, contrast in enumerate(contrasts):
        step = methods.find(name).loss(policy, contrast, cfg)
        assert step.losses.shape == step.weights.shape == (3,) and (step.weights == 1).all()
        assert torch.isfinite(step.losses).all() and all(torch.isfinite(x).all() for x in step.metrics.values())
        assert bool(step.metrics.get("shift", torch.ones(1)).any()) == (number > 0 or name == "diffusion_online_dpo")
        assert gradient(policy, step).norm() > 0
        for p in policy.trainable():
            p.data.sub_(1e-3 * p.grad.sign() if p.grad is not None else 0.0)


@pytest.mark.slow
def test_on_policy_gradient_is_the_advantage_s(family: TextToImage) -> None:
    """Before the first update nft and awm have the gradient of the mean of share times error."""
    policy, options = full(family), {"kl": 0.0, "advantages": {"scale": "group", "clip": 2.0}}
    contrast: Contrast
    contrast, _ = made("nft", policy, prompts(family), config("nft", **options))
    view = contrast.view
    error = (family.predict(policy.model, view.x_t, view.t, view.cond.repeat(3)) - view.target).square().mean((1, 2, 3))
    losses = (contrast.advantages / 2 * error.view(3, 3).T).mean(1)
    expected = gradient(policy, methods.Step(losses, contrast.weights, {}))
    for method, more in ((nft, {}), (awm, {"measure": "plain"})):
        step = method.loss(policy, contrast, config(method.__name__.rpartition(".")[2], **options, **more))
        actual = gradient(policy, step)
        assert (actual - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-4


@pytest.mark.parametrize("name", ["awm", "crd", "dgpo", "nft"])
def test_the_first_contrast_has_the_old_prediction_in_its_loss(sd: TextToImage, name: str) -> None:
    """It is the policy's own until the first update; the conditioning is that of the prompts."""
    policy, cfg, method = full(sd), config(name, **({"weighting": "l1"} if name == "nft" else {})), methods.find(name)
    first, second = made(name, policy, prompts(sd), cfg)
    assert first.old is None and second.old is not None and len(first.view.cond) == 3
    view = first.view
    with torch.no_grad():
        old = sd.predict(policy.model, view.x_t, view.t, view.cond.repeat(3))
    steps = [method.loss(policy, contrast, cfg) for contrast in (first, replace(first, old=old))]
    gradients = [gradient(policy, step) for step in steps]
    torch.testing.assert_close(steps[0].losses, steps[1].losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[1].norm() > 1e-3


def test_an_old_policy_that_lags_generates_and_is_the_centre_of_the_trust_region(sd: TextToImage) -> None:
    """Its contrasts are those of a policy with its weights, the first one's prediction included."""
    policy, cfg = full(sd), config("nft", {"noisings": 2}, old={"every": 1, "mix": 0.5})
    assert methods.find("nft").requirements(cfg).old == cfg.old
    expected = made("nft", policy, prompts(sd), cfg)
    lagging = replace(policy, old=LaggingCopy(policy.trainable(), lambda step: 0.5))
    moved(policy)
    first, second = made("nft", lagging, prompts(sd), cfg)
    assert torch.equal(first.view.x_t, expected[0].view.x_t) and torch.equal(second.old, expected[1].old)
    actual = policy.family.predict(
        policy.unwrapped, first.view.x_t, first.view.t, first.view.cond.cycle(len(first.old))
    )
    assert first.old is not None and not torch.allclose(first.old, actual, atol=1e-3)


def test_a_reference_that_caught_up_is_the_old_policy(sd: TextToImage) -> None:
    """One prediction serves both, bit for bit: the second contrast takes one pass less than if that is not known."""
    policy, calls = full(sd), list[object]()
    moving = LaggingCopy(policy.trainable(), lambda step: 1.0)
    lagging = replace(policy, moving=moving)
    handle = policy.unwrapped.register_forward_hook(lambda *_: calls.append(None))
    caught_up, number = made("dgpo", lagging, prompts(sd), config("dgpo")), len(calls)
    moving.load([weight.clone() for weight in moving.weights])
    unknown = made("dgpo", lagging, prompts(sd), config("dgpo"))
    handle.remove()
    assert len(calls) == 2 * number + 1
    assert torch.equal(caught_up[1].old, unknown[1].old)
    assert all(torch.equal(a.reference, b.reference) for a, b in zip(caught_up, unknown, strict=True))


def moved(policy: Policy) -> None:
    with torch.no_grad():
        for p in policy.trainable():
            p.mul_(1.02)


@pytest.mark.slow
def test_weighted_nft_is_the_published_loss(family: TextToImage) -> None:
    """Worked out by the predictions of x_0 of epsilon, v and flow networks, from the generated images themselves.

    Float32 subtracts x_0 from a prediction of it, which at the noisiest times divides by a signal of 0.07: 1e-3.
    """
    policy, batch, beta = full(family), prompts(family), 0.5
    cfg = config("nft", weighting="l1", beta=beta, kl=0.0)
    with torch.no_grad():
        generated = generate(policy, batch, cfg.generation, DRAWS)
    contrast: Contrast
    _, contrast = made("nft", policy, batch, cfg)
    moved(policy)
    step = nft.loss(policy, contrast, cfg)
    view, x_0 = contrast.view, generated.latents.flatten(0, 1)
    with torch.no_grad():
        new = family.predict(policy.model, view.x_t, view.t, view.cond.repeat(3))
    assert contrast.old is not None
    share, expected = contrast.advantages.T.flatten() / 5, torch.zeros(9)
    for sign in (1, -1):
        mixed = (1 - sign * beta) * contrast.old + sign * beta * new
        error = family.schedule.to_clean(mixed, view.x_t, view.t) - x_0
        weighted = error.square().mean((1, 2, 3)) / error.abs().mean((1, 2, 3))
        expected += (1 + sign * share) / 2 * weighted / beta
    torch.testing.assert_close(step.losses.detach(), by_prompt(expected, 3).mean(1), rtol=1e-3, atol=1e-4)


def test_best_and_worst_image_are_learned_from_under_one_noise(sd: TextToImage) -> None:
    policy, batch, cfg = full(sd), prompts(sd), config("diffusion_online_dpo", {"images": 4})
    with torch.no_grad():
        generated = generate(policy, batch, cfg.generation, DRAWS)
        view = made("diffusion_online_dpo", policy, batch, cfg)[1].view
    signal, noise = sd.schedule.levels(view.t)
    eps = view.target.view(2, 3, 4, 8, 8)
    assert torch.equal(eps[0], eps[1]) and torch.equal(view.t[:3], view.t[3:])
    x_0 = ((view.x_t - noise * view.target) / signal).view(2, 3, 4, 8, 8)
    for i, rewards in enumerate(generated.rewards):
        scores = bright(to_pil(sd.decode(generated.latents[:, i])), [""] * 4)
        torch.testing.assert_close(rewards, scores)
        for side, place in zip(x_0, (scores.argmax(), scores.argmin()), strict=True):
            torch.testing.assert_close(side[i], generated.latents[place, i], rtol=1e-3, atol=1e-3)


def test_prompts_of_equal_rewards_weigh_nothing_and_are_counted(sd: TextToImage) -> None:
    """The judge is mute about hens; a padding row counts nowhere."""

    def mute(images: Sequence[Image.Image], texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return bright(images, texts) * torch.tensor([float(text != "a hen") for text in texts])

    batch = replace(prompts(sd, mute), weights=torch.tensor([1.0, 1.0, 0.0]))
    for name in ("nft", "diffusion_online_dpo"):
        policy, cfg = full(sd), config(name)
        step = methods.find(name).loss(policy, made(name, policy, batch, cfg)[0], cfg)
        assert step.weights.tolist() == [1, 0, 0] and step.summary["equal rewards"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda number: torch.full((number,), torch.nan), "9 of 9 scores are not finite"),
        (lambda number: torch.zeros(number, 2), r"scores of shape \[9, 2\]"),
    ],
    ids=["nan", "shape"],
)
def test_scores_that_are_none_are_refused(sd: TextToImage, scores: Any, message: str) -> None:
    batch = prompts(sd, lambda images, texts, t=None: scores(len(images)))
    with pytest.raises(ValueError, match=message):
        made("nft", full(sd), batch, config("nft"))


def test_parts_of_a_batch_are_the_whole(sd: TextToImage) -> None:
    """Contrasts of two prompts at most, four images at a time: two a noising, with the rows of one contrast of all."""
    policy, batch = full(sd), prompts(sd)
    whole, parted = (
        made("nft", policy, batch, config("nft", {"prompts_per_contrast": size, "batch_size": 4})) for size in (None, 2)
    )
    assert [len(contrast.weights) for contrast in parted] == [2, 1, 2, 1]
    for index, contrast in enumerate(whole):
        parts = parted[2 * index : 2 * index + 2]
        assert torch.equal(torch.cat([part.advantages for part in parts]), contrast.advantages)
        rows = torch.arange(9).view(3, 3)
        assert torch.equal(parts[0].view.x_t, contrast.view.x_t[rows[:, :2].flatten()])
        assert torch.equal(parts[1].view.x_t, contrast.view.x_t[rows[:, 2]])
        assert [part.old is None for part in parts] == [index == 0, False]
    torch.testing.assert_close(parts[1].old, contrast.old[rows[:, 2]], rtol=1e-4, atol=1e-5)


def test_the_company_of_a_prompt_changes_neither_its_images_nor_its_advantages(sd: TextToImage) -> None:
    """Advantages have the scale of the group. Rounding differs between batch sizes, and the judge sees 8 bits."""
    cfg, policy = config("awm", advantages={"scale": "group"}), full(sd)
    together, alone = (made("awm", policy, prompts(sd, rows=rows), cfg)[1] for rows in (ROWS[:3], ROWS[1:2]))
    rows = torch.arange(9).view(3, 3)[:, 1]
    torch.testing.assert_close(together.view.x_t[rows], alone.view.x_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.advantages[1:2], alone.advantages, rtol=1e-2, atol=1e-2)
    assert together.view.x_t.flatten(1).unique(dim=0).shape[0] == 9


def test_options_reach_the_advantages(sd: TextToImage) -> None:
    policy, batch = full(sd), prompts(sd)
    for scale, clip in (("batch", 0.3), ("none", 5.0)):
        cfg = config("dgpo", advantages={"scale": scale, "clip": clip})
        with torch.no_grad():
            rewards = generate(policy, batch, cfg.generation, DRAWS).rewards
        expected = advantages(rewards, scale=scale, clip=clip)  # type: ignore[arg-type]
        given = made("dgpo", policy, batch, cfg)[0].advantages
        torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-2)  # the judge sees 8 bits of rounded images


def test_a_reference_is_loaded_for_what_reads_it() -> None:
    needs = {name: methods.requirements_of(config(name)).reference for name in NAMES}
    assert needs == dict.fromkeys(NAMES, True)
    free = {"awm": {"kl": 0.0}, "crd": {"kl": 0.0, "least_kl": 0.0}, "nft": {"kl": 0.0}}
    free["diffusion_online_dpo"] = {"loss": "simpo"}  # type: ignore[dict-item]
    assert not any(methods.requirements_of(config(name, **options)).reference for name, options in free.items())


def test_annotators_of_generated_images_are_refused() -> None:
    assert methods.requirements_of(config("diffusion_online_dpo", label_noise={})).memory is not None
    with pytest.raises(ValueError, match="a judge orders the generated images; leave it out"):
        config("diffusion_online_dpo", label_noise={"annotators": {"ann": 0.1}})
