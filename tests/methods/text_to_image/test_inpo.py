"""InPO on tiny networks of the real classes, as diffusion and as a flow, and on the published values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion import inversion
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, Schedule
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family
from mmalign.families.types import Conditioning, Loading, Moments
from mmalign.methods.text_to_image import _denoising, diffusion_dpo, inpo
from mmalign.policy import FrozenCopy, Policy
from mmalign.rng import KeyedRNG
from tests.helpers import first_fast
from tests.helpers.golden import golden
from tests.helpers.image_batches import ROWS, pairs
from tests.helpers.loading import load_diffusion
from tests.helpers.policies import DRAWS, adapted, full, gradient, run

GOLDEN = golden("inpo")["cases"]


@pytest.fixture(params=first_fast(["tiny_sd15", "flow", "tiny_sd2", "tiny_sdxl"], 2))
def family(request: pytest.FixtureRequest) -> TextToImage:
    """Epsilon, velocity, a text that is pooled too; and the first one asked as if it had learned a flow."""
    name = "tiny_sd15" if request.param == "flow" else request.param
    loaded: Any = load_diffusion(request.getfixturevalue(name))
    return replace(loaded, schedule=Flow()) if request.param == "flow" else loaded


def contrast(policy: Policy, batch: EncodedPairs, cfg: inpo.Config, rng: KeyedRNG = DRAWS) -> _denoising.Contrast:
    with torch.no_grad():
        (result,) = inpo.contrasts(policy, batch, cfg, rng)
    return result


@pytest.mark.slow
def test_fresh_noise_alone_is_diffusion_dpo(family: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradient, to the rounding of the implied noise, which divides by the noise's level."""
    policy, batch = full(family, moved=0.02), pairs(family)
    dpo = run(diffusion_dpo, policy, batch, diffusion_dpo.Config(beta=300.0))
    inverted = run(inpo, policy, batch, inpo.Config(beta=300.0))
    assert (inverted.losses - dpo.losses).abs().max() > 1e-3
    expected = gradient(policy, dpo)

    def fresh(_: Any, schedule: Schedule, x_0: Tensor, *__: Any) -> Tensor:
        eps = DRAWS.normal(ROWS, (4, 8, 8), "noise").repeat(2, 1, 1, 1)
        return schedule.add_noise(x_0, eps, schedule.draw_time(ROWS, DRAWS).repeat(2))

    monkeypatch.setattr(inversion, "invert", fresh)
    step = run(inpo, policy, batch, inpo.Config(beta=300.0))
    actual = gradient(policy, step)
    torch.testing.assert_close(step.losses, dpo.losses, rtol=1e-4, atol=1e-4)
    assert expected.norm() > 1e-2 and (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("inverter", ["policy", "reference"])
def test_a_row_s_numbers_are_its_own_whatever_its_company(family: TextToImage, inverter: Any) -> None:
    """Alone, in another order, with rows that need more hops; to the rounding of batches of another size."""
    policy, cfg = full(family, moved=0.02), inpo.Config(beta=100.0, caption_dropout=0.5, inverter=inverter)
    whole, result = run(inpo, policy, pairs(family), cfg), contrast(policy, pairs(family), cfg)
    assert len(set(result.view.t.tolist())) == 4
    for rows in (list(reversed(ROWS)), ROWS[2:], ROWS[1:2]):
        at = [ROWS.index(row) for row in rows]
        part, mine = run(inpo, policy, pairs(family, rows), cfg), contrast(policy, pairs(family, rows), cfg)
        for metric, values in part.metrics.items():
            torch.testing.assert_close(values, whole.metrics[metric][at], rtol=1e-3, atol=1e-3)
        both = at + [i + 4 for i in at]
        torch.testing.assert_close(mine.view.x_t, result.view.x_t[both], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.view.target, result.view.target[both], rtol=1e-3, atol=1e-3)


def test_the_target_is_each_image_s_own_noise_at_the_pair_s_t(family: TextToImage) -> None:
    """x_t and the right answer there lead back to the image, so x_t is at t; and the noise differs within a pair."""
    policy, batch = full(family, moved=0.02), pairs(family)
    view, schedule = contrast(policy, batch, inpo.Config()).view, family.schedule
    assert torch.equal(view.t[:4], view.t[4:])
    clean = _denoising.sample_clean_pairs(family, batch, 0.2, DRAWS)
    # Divided by the signal, of which 0.07 is left at the end.
    torch.testing.assert_close(schedule.to_clean(view.target, view.x_t, view.t), clean.x_0, rtol=1e-3, atol=1e-4)
    eps = schedule.to_eps(view.target, view.x_t, view.t)
    torch.testing.assert_close(schedule.add_noise(clean.x_0, eps, view.t), view.x_t, rtol=1e-3, atol=1e-4)
    assert ((eps[:4] - eps[4:]).flatten(1).abs().mean(1) > 0.05).all()


def test_the_inverter_is_the_one_that_is_named(sd: TextToImage) -> None:
    """The policy's latents move with it, the reference's stay; and adapters are on again afterwards."""
    policy, batch = adapted(sd, moved=0.1), pairs(sd)
    by = {who: contrast(policy, batch, inpo.Config(inverter=who)).view.x_t for who in ("policy", "reference")}  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in sd.network.named_parameters():
            if "lora_B" in name:
                p.fill_(-0.1)
    later = {who: contrast(policy, batch, inpo.Config(inverter=who)).view.x_t for who in ("policy", "reference")}  # type: ignore[arg-type]
    assert torch.equal(by["reference"], later["reference"])
    assert (by["policy"] - later["policy"]).abs().max() > 1e-3
    assert (by["policy"] - by["reference"]).abs().max() > 1e-3


def test_fresh_noise_depends_on_row_and_eta(sd: TextToImage) -> None:
    policy, batch = full(sd), pairs(sd)
    of = {eta: contrast(policy, batch, inpo.Config(eta=eta)).view for eta in (0.0, 0.5)}
    again = contrast(policy, batch, inpo.Config(eta=0.5)).view
    assert torch.equal(of[0.5].x_t, again.x_t)
    moved = (of[0.5].x_t - of[0.0].x_t).abs().flatten(1).amax(1) > 1e-3
    assert torch.equal(moved, of[0.0].t > 100)  # one hop from the clean image has no place for fresh noise


class Counted(nn.Module):
    """A network that notes the time and the conditioning of every row that it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows, self.embeds = net, 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, t: Tensor, **more: Any) -> Any:
        self.rows += len(x)
        self.embeds.append(more["encoder_hidden_states"])
        return self.net(x, t, **more)


@pytest.mark.parametrize("order", [1, 2])
def test_inversion_runs_two_forwards_per_hop_and_pair(sd: TextToImage, order: Literal[1, 2]) -> None:
    policy, batch = full(sd), pairs(sd)
    assert isinstance(policy.reference, FrozenCopy)
    policy_net, reference_net = Counted(policy.unwrapped), Counted(policy.reference.model)
    counted = Policy(sd, policy_net, policy_net, FrozenCopy(reference_net))
    result = contrast(counted, batch, inpo.Config(caption_dropout=0.5, order=order))
    hops = [-(-int(t) // 100) for t in result.view.t]
    assert policy_net.rows == order * sum(hops) and reference_net.rows == 8
    # Both images of a pair are inverted under the caption, dropped or not, that they are scored under.
    assert torch.equal(policy_net.embeds[0], reference_net.embeds[0])


@pytest.mark.parametrize("inverter", ["policy", "reference"])
def test_contrasts_keep_no_graph_and_losses_are_float32(tiny_sd15: Path, inverter: Any) -> None:
    """Also where the network answers in bfloat16."""
    loading = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
    family = load_family(str(tiny_sd15), loading)
    policy = adapted(family, moved=0.1)
    (result,) = inpo.contrasts(policy, pairs(family), inpo.Config(inverter=inverter), DRAWS)
    tensors = [result.view.x_t, result.view.target, *(result.reference or {}).values()]
    assert all(x.dtype == torch.float32 for x in tensors)
    step = inpo.loss(policy, result, inpo.Config())
    assert step.losses.dtype == torch.float32 and step.losses.requires_grad


def test_an_equal_pair_has_no_margin(sd: TextToImage) -> None:
    """With fresh noise the sides of a pair would part; without, equal images stay equal."""
    policy, batch = full(sd, moved=0.02), pairs(sd, std=0.0)
    same = Moments(batch.latents.mean[:4].repeat(2, 1, 1, 1), batch.latents.std)
    step = run(inpo, policy, replace(batch, latents=same), inpo.Config(eta=0.0))
    torch.testing.assert_close(step.metrics["logit"], torch.zeros(4), rtol=0.0, atol=1e-2)  # beta times rounding


class Fixed(Diffusion):
    """Every row at one time."""

    time = 0

    def draw_time(self, rows: Any, rng: KeyedRNG, index: int = 0) -> Tensor:
        return torch.full((len(rows),), self.time)


class Toy(nn.Module):
    """eps = p0 x + p1 sin(t / 100) + p2 c."""

    def __init__(self, parameters: list[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(parameters))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        x, t, c = x.double(), t.view(-1, 1, 1, 1).double(), c.view(-1, 1, 1, 1).double()
        return self.p[0].double() * x + self.p[1].double() * torch.sin(t / 100) + self.p[2].double() * c


@dataclass(frozen=True)
class ToyFamily:
    """What InPO asks of a family."""

    schedule: Schedule
    condition: Callable[[Conditioning, Tensor], Conditioning] = lambda text, sizes: text

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        result: Tensor = net(x_t, t, cond.tensors["c"])
        return result


@pytest.mark.parametrize("name", GOLDEN)
def test_the_release_s_loss_and_gradient(name: str) -> None:
    """From the images to the gradient of the policy's parameters, in float32, whose rounding beta magnifies."""
    given, expected = GOLDEN[name]["inputs"], GOLDEN[name]["expected"]
    schedule = Fixed.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "test")
    object.__setattr__(schedule, "time", given["timesteps"][0])
    x_0 = torch.tensor(given["latents"])
    text = Conditioning({"c": torch.tensor(given["prompt_scalar"][:1])})
    batch = EncodedPairs([1], Moments(x_0, torch.zeros_like(x_0)), text, text, torch.zeros(2, 6), torch.ones(1))
    net, reference = Toy(given["policy_params"]), Toy(given["ref_params"]).requires_grad_(False)
    policy: Policy[Any] = Policy(ToyFamily(schedule), net, net, FrozenCopy(reference))  # type: ignore[arg-type]
    cfg = inpo.Config(beta=given["beta_dpo"], inversion="release", eta=0.0, caption_dropout=0.0)
    result = contrast(policy, batch, cfg)
    torch.testing.assert_close(result.view.x_t, torch.tensor(expected["x_t"]), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result.view.target, torch.tensor(expected["target_noise"]), rtol=5e-6, atol=5e-6)
    step = inpo.loss(policy, result, cfg)
    assert step.metrics["chosen error"].item() == pytest.approx(expected["model_losses_w"][0], rel=2e-5)
    assert step.metrics["rejected error"].item() == pytest.approx(expected["model_losses_l"][0], rel=2e-5)
    assert step.metrics["logit"].item() == pytest.approx(expected["inside_term"][0], abs=5e-4)
    assert step.losses.item() == pytest.approx(expected["loss"], abs=5e-4)
    step.losses.sum().backward()
    torch.testing.assert_close(net.p.grad, torch.tensor(expected["grad_policy_params"]), rtol=1e-3, atol=1e-2)


def test_exact_inversion_differs_from_the_release_off_grid(sd: TextToImage) -> None:
    """At t = 2 the release's noise is 6.5 times too much (its grid's next place is 101)."""
    t = torch.tensor([2])
    (*_, last) = inversion.release(sd.schedule, t, steps=10)
    assert float(last.direction / sd.schedule.levels(t)[1]) == pytest.approx(6.5, abs=0.1)
    (*_, last) = inversion.exact(sd.schedule, t, steps=10)
    assert float(last.direction / sd.schedule.levels(t)[1]) == 1.0


def test_order_2_is_refused_with_the_release_s_grid() -> None:
    with pytest.raises(ValueError, match="order: 2 does not fit inversion: release"):
        inpo.Config(inversion="release", order=2)


def test_order_is_a_setting_of_cached_inversions() -> None:
    specs = [inpo.requirements(inpo.Config(inverter="reference", num_cached_draws=1, order=order)) for order in (1, 2)]
    assert specs[0].precompute != specs[1].precompute
