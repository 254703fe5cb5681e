"""The laws of the three methods, on tiny networks of the real classes and random latents."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign import methods
from mmalign.config.losses import DPOLossConfig
from mmalign.config.methods import METHODS
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.flow import Flow
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family
from mmalign.families.lora import ATTENTION, add_lora
from mmalign.families.types import Loading, LoraSettings, Moments
from mmalign.methods import Step
from mmalign.methods.text_to_image import _denoising, diffusion_dpo, mapo, sft
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from mmalign.rng import KeyedRNG
from tests.helpers.image_batches import ROWS, pairs, swapped
from tests.helpers.loading import diffusion_families, load_diffusion
from tests.helpers.policies import DRAWS, POLICIES, full, gradient, run

ALL = ["tiny_sd15", "tiny_sd3", "tiny_sd2", "tiny_sdxl", "tiny_flux", "tiny_qwen_image"]


family = diffusion_families(*ALL, fast=2)


def check_start(policy: Policy, name: str, config: dict[str, Any], expected: float) -> None:
    """Check the loss and the gradient of a policy that equals its reference."""
    method = methods.find(name)
    step = run(method, policy, pairs(policy.family), method.Config(**config))
    torch.testing.assert_close(step.losses.detach(), torch.full((4,), expected), rtol=1e-6, atol=0.0)
    gains = [values for metric, values in step.metrics.items() if metric.endswith("gain")]
    assert len(gains) == 2 and all((values == 0).all() for values in gains)
    for metric in {"accuracy", "gradient factor"} & step.metrics.keys():
        assert torch.equal(step.metrics[metric], torch.full((4,), 0.5))
    assert gradient(policy, step).norm() > (1e-3 if config.get("loss") != "ipo" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "terms"), [("diffusion_dpo", 1), ("inpo", 1), ("cca", 2), ("instruct_engine", 1)])
def test_policy_at_reference_has_ln_2_and_gradient(family: TextToImage, name: str, terms: int) -> None:
    check_start(full(family), name, {}, terms * math.log(2))


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("diffusion_dpo", {"loss": "ipo", "beta": 0.1}, 25.0),
        ("diffusion_dpo", {"loss": "hinge"}, 1.0),
        ("diffusion_dpo", {"loss": {"name": "robust", "flip_rate": 0.2}}, math.log(2)),
        ("diffusion_dpo", {"loss": {"name": "dpo", "label_smoothing": 0.2}}, math.log(2)),
        ("inpo", {"inverter": "reference"}, math.log(2)),
        ("inpo", {"inverter": "reference", "num_cached_draws": 1}, math.log(2)),
        ("instruct_engine", {"loss": "hinge"}, 1.0),
        ("instruct_engine", {"loss": "ipo", "beta": 0.1}, 25.0),
    ],
)
def test_every_pair_loss_is_reached_with_its_hyper_parameters(
    sd: TextToImage, tune: str, name: str, config: dict[str, Any], expected: float
) -> None:
    """At equality: ipo's is (1 / (2 beta))^2, hinge's 1, the others' ln 2."""
    check_start(POLICIES[tune](sd), name, config, expected)


def by_definition(family: Any, x_0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, x_t and the right answer."""
    if isinstance(family.schedule, Flow):
        t = DRAWS.normal(ROWS, (), "time").sigmoid().repeat(2)
        t = family.schedule.shift * t / (1 + (family.schedule.shift - 1) * t)
        sigma = t.view(-1, 1, 1, 1)
        return t, (1 - sigma) * x_0 + sigma * eps, eps - x_0
    t = DRAWS.integers(ROWS, 0, 1000, "time").repeat(2)
    abar = family.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x_0
    target = velocity if family.schedule.prediction == "v_prediction" else eps
    return t, abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, target


def test_score_is_minus_half_the_mean_squared_error(family: TextToImage) -> None:
    """Worked out from the definitions: x_t, the target (epsilon or v) and the loss, without the method's own code."""
    policy, batch = full(family, moved=0.02), pairs(family)
    cfg = diffusion_dpo.Config(beta=300.0, caption_dropout=0.0)
    step = run(diffusion_dpo, policy, batch, cfg)
    eps = DRAWS.normal(ROWS, (4, 8, 8), "noise").repeat(2, 1, 1, 1)
    spread = DRAWS.normal(ROWS, (2, 4, 8, 8), "posterior")
    x_0 = batch.latents.mean + 0.1 * torch.cat([spread[:, 0], spread[:, 1]])
    t, x_t, target = by_definition(family, x_0, eps)
    cond = family.condition(batch.text.repeat(2), batch.sizes)
    assert isinstance(policy.reference, FrozenCopy)
    with torch.no_grad():
        policy_errors, reference_errors = (
            (family.predict(net, x_t, t, cond) - target).square().mean((1, 2, 3)).chunk(2)
            for net in (policy.model, policy.reference.model)
        )
    z = -0.5 * 300 * ((policy_errors[0] - policy_errors[1]) - (reference_errors[0] - reference_errors[1]))
    torch.testing.assert_close(step.metrics["logit"], z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.losses.detach(), -z.sigmoid().log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.metrics["chosen error"], policy_errors[0])
    torch.testing.assert_close(step.metrics["rejected error"], policy_errors[1])
    torch.testing.assert_close(
        step.metrics["chosen gain"], 0.5 * (reference_errors[0] - policy_errors[0]), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(step.metrics["accuracy"], (z > 0).float())
    torch.testing.assert_close(step.metrics["gradient factor"], (-z).sigmoid(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_equal_pair_has_no_gradient(family: TextToImage) -> None:
    """Both sides' errors are the same numbers, and their gradients cancel to rounding; one side alone has one."""
    policy, batch = full(family, moved=0.02), pairs(family, std=0.0)
    same = Moments(batch.latents.mean[:4].repeat(2, 1, 1, 1), batch.latents.std)
    batch = replace(batch, latents=same)
    cfg = diffusion_dpo.Config(beta=1000.0)
    with torch.no_grad():
        (contrast,) = diffusion_dpo.contrasts(policy, batch, cfg, DRAWS)
    one_side = _denoising.denoising_scores(family, policy.model, contrast.view)["chosen"]
    alone = gradient(policy, Step(-0.5 * 1000 * one_side, batch.weights, {}))
    step = diffusion_dpo.loss(policy, contrast, cfg)
    both = gradient(policy, step)
    assert torch.equal(step.metrics["logit"], torch.zeros(4))
    assert alone.norm() > 1 and both.norm() < 1e-5 * alone.norm()


def test_swapping_the_sides_negates_the_logit(family: TextToImage) -> None:
    policy, batch = full(family, moved=0.02), pairs(family, std=0.0)
    cfg = diffusion_dpo.Config(beta=1000.0)
    metrics, swapped_metrics = (run(diffusion_dpo, policy, b, cfg).metrics for b in (batch, swapped(batch)))
    assert metrics["logit"].abs().min() > 1e-2
    torch.testing.assert_close(metrics["logit"], -swapped_metrics["logit"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metrics["accuracy"], 1 - swapped_metrics["accuracy"])
    torch.testing.assert_close(metrics["chosen error"], swapped_metrics["rejected error"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("diffusion_dpo", {"beta": 1000.0}),
        ("inpo", {"beta": 1000.0, "inverter": "reference"}),
        ("cca", {"caption_dropout": 0.0}),
        ("instruct_engine", {"beta": 1000.0}),
    ],
)
def test_a_step_against_the_gradient_prefers_the_better_side(
    family: TextToImage, name: str, config: dict[str, Any]
) -> None:
    method, policy, batch = methods.find(name), full(family), pairs(family)
    before = run(method, policy, batch, method.Config(**config))
    norm = gradient(policy, before).norm()
    torch.optim.SGD(policy.trainable(), lr=1e-4 / float(norm)).step()
    after = run(method, policy, batch, method.Config(**config))
    assert after.losses.mean() < before.losses.mean() and after.metrics["logit"].mean() > 0


def test_smoothing_changes_the_loss_as_its_formula_says(sd: TextToImage) -> None:
    policy, batch = full(sd, moved=0.02), pairs(sd)
    plain = run(diffusion_dpo, policy, batch, diffusion_dpo.Config())
    smooth = run(diffusion_dpo, policy, batch, diffusion_dpo.Config(loss=DPOLossConfig(label_smoothing=0.1)))
    torch.testing.assert_close(smooth.losses, plain.losses + 0.1 * plain.metrics["logit"], rtol=1e-4, atol=1e-4)


def test_time_and_noise_are_shared_within_a_pair(family: TextToImage) -> None:
    """With latents of zeros x_t is the noise alone, so it shows which noise a row has."""
    batch = pairs(family)
    zeros = torch.zeros_like(batch.latents.mean)
    view = _denoising.noise_pairs(family, replace(batch, latents=Moments(zeros, zeros)), 0.0, DRAWS)
    assert torch.equal(view.t[:4], view.t[4:]) and len(set(view.t[:4].tolist())) == 4
    assert torch.equal(view.x_t[:4], view.x_t[4:]) and torch.equal(view.target[:4], view.target[4:])
    noise = view.x_t[:4] / view.x_t[:4].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (torch.einsum("ichw,jchw->ij", noise, noise) - torch.eye(4)).abs().max() < 0.35
    for other_rng in (KeyedRNG(6, 2), KeyedRNG(5, 3)):
        assert not torch.equal(_denoising.noise_pairs(family, batch, 0.0, other_rng).t, view.t)
    again = _denoising.noise_pairs(family, batch, 0.0, DRAWS, index=1)
    assert not torch.equal(again.t, view.t)


def test_latents_of_a_pair_are_sampled_separately(sd: TextToImage) -> None:
    batch = pairs(sd, std=0.0)
    spread = replace(batch, latents=Moments(batch.latents.mean, torch.ones_like(batch.latents.std)))
    sharp, soft = (_denoising.noise_pairs(sd, b, 0.0, DRAWS) for b in (batch, spread))
    signal, _ = sd.schedule.levels(sharp.t)
    drawn = (soft.x_t - sharp.x_t) / signal
    seen = drawn[(signal > 0.1).flatten()]  # elsewhere the division loses the digits
    assert 0.8 < seen.std() < 1.2 and len(seen) >= 2
    assert not torch.allclose(drawn[:4], drawn[4:], atol=0.1)


def many(family: TextToImage, number: int) -> EncodedPairs:
    batch = pairs(family, ROWS[:1])
    return EncodedPairs(
        rows=list(range(number)),
        latents=Moments(
            batch.latents.mean.repeat_interleave(number, 0), batch.latents.std.repeat_interleave(number, 0)
        ),
        text=batch.text.repeat(number),
        unconditional=batch.unconditional.expand(number),
        sizes=batch.sizes.repeat_interleave(number, 0),
        weights=torch.ones(number),
    )


@pytest.mark.slow
def test_caption_dropout_decides_once_per_pair(family: TextToImage) -> None:
    """Of 2,000 pairs a share of 0.2 is dropped, within four standard deviations; sizes are never dropped."""
    number, batch = 2000, many(family, 2000)
    view = _denoising.noise_pairs(family, batch, 0.2, DRAWS)
    empty = family.unconditional()
    for name, given in batch.text.tensors.items():
        rows = view.cond.tensors[name]
        dropped = (rows == empty.tensors[name]).flatten(1).all(1)
        kept = (rows == given.repeat(2, *[1] * (given.dim() - 1))).flatten(1).all(1)
        assert torch.equal(kept, ~dropped)
        assert torch.equal(dropped[:number], dropped[number:])
        assert abs(dropped[:number].float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / number)
    if "time_ids" in view.cond.tensors:
        assert torch.equal(view.cond.tensors["time_ids"], batch.sizes)


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, False), (1.0, True)])
def test_caption_dropout_at_its_ends(sd: TextToImage, rate: float, dropped: bool) -> None:
    batch = many(sd, 50)
    embeds = _denoising.noise_pairs(sd, batch, rate, DRAWS).cond.tensors["embeds"]
    expected = batch.unconditional if dropped else batch.text
    assert torch.equal(embeds, expected.tensors["embeds"][:1].expand(100, -1, -1))


def test_sdxl_is_shown_each_side_s_own_sizes(tiny_sdxl: Path) -> None:
    family = load_diffusion(tiny_sdxl)
    batch = pairs(family)
    sizes = batch.sizes.clone()
    sizes[4:, 0] = 99.0
    view = _denoising.noise_pairs(family, replace(batch, sizes=sizes), 0.2, DRAWS)
    assert torch.equal(view.cond.tensors["time_ids"], sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name, views", [("diffusion_dpo", 2), ("instruct_engine", 4), ("mapo", 2), ("sft", 1)])
def test_a_row_s_numbers_are_its_own_whatever_its_company(family: TextToImage, name: str, views: int) -> None:
    """Alone, in another order, with others: the networks see the same bits, and answer alike to rounding.

    Not so in cca, whose pairs lend each other their prompts.
    """
    method, policy = methods.find(name), full(family, moved=0.02)
    cfg = method.Config(**({"caption_dropout": 0.5} if "caption_dropout" in method.Config.model_fields else {}))
    whole = run(method, policy, pairs(family), cfg)
    for rows in (list(reversed(ROWS)), ROWS[2:], ROWS[1:2]):
        part = run(method, policy, pairs(family, rows), cfg)
        at = [ROWS.index(row) for row in rows]
        for metric, values in part.metrics.items():
            is_magnified = metric in ("loss", "logit", "logit size", "gradient factor")
            atol = 5e-3 if is_magnified else 1e-5  # beta magnifies rounding
            torch.testing.assert_close(values, whole.metrics[metric][at], rtol=1e-3, atol=atol)
        (mine,) = method.contrasts(policy, pairs(family, rows), cfg, DRAWS)
        (contrast,) = method.contrasts(policy, pairs(family), cfg, DRAWS)
        at = [i + len(ROWS) * view for view in range(views) for i in at]
        assert torch.equal(mine.view.x_t, contrast.view.x_t[at]) and torch.equal(mine.view.t, contrast.view.t[at])
        assert torch.equal(mine.view.target, contrast.view.target[at])


class Untouchable(nn.Module):
    def forward(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the reference was called")


@pytest.mark.parametrize("name", ["mapo", "sft"])
def test_methods_without_a_reference_never_touch_one(sd: TextToImage, name: str) -> None:
    method, net = methods.find(name), sd.network.requires_grad_(True)
    assert not method.requirements(method.Config()).reference
    step = run(method, Policy(sd, net, net, FrozenCopy(Untouchable())), pairs(sd), method.Config())
    assert torch.isfinite(step.losses).all()


def test_mapo_is_its_formula(family: TextToImage) -> None:
    """error + beta * -log sigma(T * (s(snr e_c) - s(snr e_r))), s(x) = x / (e^x - 1), in float64."""
    policy, batch = full(family), pairs(family)
    step = run(mapo, policy, batch, mapo.Config(beta=0.3, snr=0.25))
    chosen, rejected = step.metrics["chosen error"].double(), step.metrics["rejected error"].double()
    s_c, s_r = (0.25 * e / (torch.exp(0.25 * e) - 1) for e in (chosen, rejected))
    expected = chosen - 0.3 * torch.sigmoid(1000 * (s_c - s_r)).log()
    torch.testing.assert_close(step.losses.detach().double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(step.metrics["accuracy"], (chosen < rejected).float())
    assert gradient(policy, step).norm() > 0


def test_mapo_and_dpo_compare_the_same_errors(family: TextToImage) -> None:
    """The same images and noise, so that their runs can be compared."""
    policy, batch = full(family, moved=0.02), pairs(family)
    steps = [run(m, policy, batch, m.Config(caption_dropout=0.3)).metrics for m in (diffusion_dpo, mapo)]
    for side in ("chosen error", "rejected error"):
        assert torch.equal(steps[0][side], steps[1][side])


def test_sft_s_loss_is_the_chosen_half_of_dpo_s_errors(family: TextToImage) -> None:
    policy, batch = full(family, moved=0.02), pairs(family)
    dpo = run(diffusion_dpo, policy, batch, diffusion_dpo.Config(caption_dropout=0.3))
    step = run(sft, policy, batch, sft.Config(caption_dropout=0.3))
    torch.testing.assert_close(step.losses.detach(), dpo.metrics["chosen error"])
    assert len(step.losses) == 4 and gradient(policy, step).norm() > 0


@pytest.mark.parametrize("name", ["cca", "diffusion_dpo", "instruct_engine", "mapo", "sft"])
def test_a_pair_of_weight_zero_gives_no_gradient(sd: TextToImage, name: str) -> None:
    """The gradient of four pairs of which two weigh nothing is that of the other two; of none it is zero."""
    method, policy = methods.find(name), full(sd, moved=0.02)
    cfg = method.Config()
    padded = replace(pairs(sd), weights=torch.tensor([1.0, 0.0, 0.5, 0.0]))
    few = replace(pairs(sd, [ROWS[0], ROWS[2]]), weights=torch.tensor([1.0, 0.5]))
    of_four, of_two = (gradient(policy, run(method, policy, batch, cfg)) for batch in (padded, few))
    assert of_two.norm() > 0
    assert (of_four - of_two).norm() < 1e-4 * of_two.norm()
    nothing = gradient(policy, run(method, policy, replace(padded, weights=torch.zeros(4)), cfg))
    assert (nothing == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cca", "diffusion_dpo", "instruct_engine", "mapo", "sft"])
def test_contrasts_keep_no_graph_and_losses_are_float32(tiny_sd15: Path, name: str) -> None:
    """Also where the network answers in bfloat16."""
    loading = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
    family, method = load_family(str(tiny_sd15), loading), methods.find(name)
    add_lora(family.network, LoraSettings(rank=2, alpha=2.0, targets=ATTENTION, seed=0))
    policy = Policy(
        family,
        family.network,
        family.network,
        AdaptersOff() if method.requirements(method.Config()).reference else None,
    )
    (contrast,) = method.contrasts(policy, pairs(family), method.Config(), DRAWS)
    tensors = [contrast.view.x_t, contrast.view.target, *(contrast.reference or {}).values()]
    assert not any(x.requires_grad for x in tensors) and all(x.dtype == torch.float32 for x in tensors)
    step = method.loss(policy, contrast, method.Config())
    assert step.losses.dtype == torch.float32 and step.losses.requires_grad
    assert not any(m.requires_grad for m in step.metrics.values())
    assert all(m.shape == (4,) for m in step.metrics.values())


def test_the_list_of_methods_is_the_folder() -> None:
    listed = [config.model_fields["name"].default for configs in METHODS.values() for config in configs]
    assert sorted(listed) == methods.names() and len(set(listed)) == len(listed)
    for name in methods.names():
        assert methods.find(name).Config.model_fields["name"].default == name
    known = ", ".join(methods.names())
    with pytest.raises(ValueError, match=rf"no method 'mappo'; did you mean 'mapo'\? \(there are {known}\)"):
        methods.find("mappo")
