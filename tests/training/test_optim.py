"""Optimizers by name, the learning rate by hand, and the average of the weights."""

import builtins
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.policy.lagging import LaggingCopy
from mmalign.training.optim import average_share, build_optimizer, schedule


def parameters(seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,))]


def descend(optimizer: torch.optim.Optimizer, of: list[nn.Parameter], updates: int) -> None:
    for _ in range(updates):
        sum(p.square().sum() + p.sum() for p in of).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()


def test_a_constant_rate_warms_up_by_hand() -> None:
    """Three updates of warm-up: 1/4, 2/4, 3/4, then 1."""
    factor = schedule("constant", warmup_steps=3, steps=6)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [schedule("constant", warmup_steps=0, steps=2)(step) for step in range(2)] == [1.0, 1.0]


def test_a_linear_rate_falls_by_hand() -> None:
    """After one update of warm-up, four updates: 1, 3/4, 2/4, 1/4, and 0 beyond the last."""
    factor = schedule("linear", warmup_steps=1, steps=5)
    assert [factor(step) for step in range(7)] == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_cosine_rate_falls_by_hand() -> None:
    """Half a cosine over four updates: 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2, 0."""
    factor, r = schedule("cosine", warmup_steps=0, steps=4), math.sqrt(0.5)
    assert [factor(step) for step in range(5)] == pytest.approx([1.0, (1 + r) / 2, 0.5, (1 - r) / 2, 0.0])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (200, 200), (500, 10), (3, 20)])
def test_a_rate_is_never_zero_within_the_run_and_never_above_one(name: str, warmup: int, steps: int) -> None:
    factor = schedule(name, warmup_steps=warmup, steps=steps)
    assert all(0 < factor(step) <= 1 for step in range(steps))


def test_fused_adamw_is_adamw() -> None:
    """And its first update by hand: m / sqrt(v) is the gradient's sign, after the decay lr * weight_decay * p."""
    fused, plain = parameters(), parameters()
    start = [p.detach().clone() for p in plain]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    optimizer = build_optimizer(fused, "adamw", **options)
    assert optimizer.defaults["fused"] is True
    descend(optimizer, fused, 1)
    for p, p_0 in zip(fused, start, strict=True):
        torch.testing.assert_close(p.detach(), p_0 * (1 - 0.1 * 0.5) - 0.1 * (2 * p_0 + 1).sign(), atol=1e-5, rtol=1e-5)
    descend(optimizer, fused, 9)
    descend(torch.optim.AdamW(plain, **options, fused=False, foreach=False), plain, 10)
    for p, q in zip(fused, plain, strict=True):
        torch.testing.assert_close(p, q)


def test_adafactor_uses_the_given_rate() -> None:
    """Its first update of a vector is lr * clip(gradient / rms), whose root mean square is at most lr."""
    mine = parameters()
    before = [p.detach().clone() for p in mine]
    optimizer = build_optimizer(mine, "adafactor", lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    descend(optimizer, mine, 1)
    for p, p_0 in zip(mine, before, strict=True):
        moved = p.detach() - p_0
        assert (moved * (2 * p_0 + 1) <= 0).all() and moved.abs().max() > 0
        assert moved.square().mean().sqrt() <= 0.01 * 1.001
    optimizer.param_groups[0]["lr"] = 0.0  # the loop sets the rate, so it must count
    after = [p.detach().clone() for p in mine]
    descend(optimizer, mine, 1)
    assert all(torch.equal(p, q) for p, q in zip(mine, after, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.01}
    straight, stopped = parameters(), parameters()
    descend(build_optimizer(straight, name, **options), straight, 5)
    first = build_optimizer(stopped, name, **options)
    descend(first, stopped, 3)
    second = build_optimizer(stopped, name, **options)
    second.load_state_dict(first.state_dict())
    descend(second, stopped, 2)
    assert all(torch.equal(p, q) for p, q in zip(straight, stopped, strict=True))


def test_eight_bit_adamw_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError) as raised:
        build_optimizer(parameters(), "adamw_8bit", lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)
    assert str(raised.value) == (
        "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; "
        "pip install 'mmalign[cuda]', or use adamw"
    )


def averaged(decay: float, values: list[float]) -> tuple[LaggingCopy, nn.Parameter]:
    """An average that began at the first value and took in the others."""
    p = nn.Parameter(torch.tensor([values[0]]))
    ema = LaggingCopy([p], partial(average_share, decay=decay))
    for step, value in enumerate(values[1:], start=1):
        p.data.fill_(value)
        ema.update([p], step)
    return ema, p


def test_the_average_by_hand() -> None:
    """Decays min(0.5, (1 + n) / (10 + n)): 2/11, 3/12, 4/13."""
    ema, _ = averaged(0.5, [100.0, 1.0, 2.0, 4.0])
    first_average = 2 / 11 * 100 + 9 / 11 * 1
    two = 3 / 12 * first_average + 9 / 12 * 2
    three = 4 / 13 * two + 9 / 13 * 4
    assert ema.weights[0].item() == pytest.approx(three, rel=1e-6)


def test_the_average_is_its_closed_form() -> None:
    """The sum over n of (1 - d_n) p_n times the product of all later d; the initial weights are all but forgotten."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    ema, _ = averaged(0.9, [1e3, *values])
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(1, 41)]
    weights = [(1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays)]
    expected = math.prod(decays) * 1e3 + sum(w * v for w, v in zip(weights, values, strict=True))
    assert ema.weights[0].item() == pytest.approx(expected, abs=1e-4)
    assert math.prod(decays) < 1e-6
    assert sum(weights) == pytest.approx(1, abs=1e-6)


def test_the_average_of_a_constant_is_that_constant() -> None:
    ema, p = averaged(0.99, [0.3] * 50)
    assert torch.equal(ema.weights[0], p.detach())


def test_swapping_twice_is_nothing() -> None:
    ema, p = averaged(0.9, [1.0, 2.0, 3.0])
    mean = ema.weights[0].clone()
    ema.swap([p])
    assert torch.equal(p.detach(), mean) and ema.weights[0].item() == 3.0
    ema.swap([p])
    assert p.item() == 3.0 and torch.equal(ema.weights[0], mean)
    assert p.requires_grad


def test_average_is_a_float32_copy() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = LaggingCopy([p], partial(average_share, decay=0.9))
    p.data.fill_(5.0)
    assert ema.weights[0].dtype == torch.float32 and ema.weights[0].tolist() == [1.0, 1.0]


def test_an_average_goes_on_from_its_state_bit_for_bit() -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(1)).tolist()
    straight, _ = averaged(0.9, values)
    half, p = averaged(0.9, values[:5])
    again = LaggingCopy([p], partial(average_share, decay=0.9))
    saved: list[Tensor] = [x.clone() for x in half.weights]
    again.load(saved)
    for step, value in enumerate(values[5:], start=5):
        p.data.fill_(value)
        again.update([p], step)
    assert torch.equal(again.weights[0], straight.weights[0])
    with pytest.raises(ValueError, match="zip"):
        again.load([*saved, *saved])
