"""The loop's updates, on a linear network: each is worked out by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mmalign.policy.lagging import mixed_share
from mmalign.rng import KeyedRNG
from mmalign.training.loop import Progress
from mmalign.training.optim import schedule
from tests.helpers.linear_runs import START, WEIGHTS, Batch, Regression, Relative, Run, by_hand, data, flat, of


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [3, 1, 4], [1] * 8])
def test_accumulated_micro_batches_are_one_big_batch(start: Callable[..., Run], sizes: list[int]) -> None:
    """Also with unequal weights, and with a micro-batch that weighs nothing."""
    run = start()
    run(Regression(), of(data(sizes, WEIGHTS)), steps=1, accumulate=len(sizes))
    (whole,) = data([8], WEIGHTS)
    torch.testing.assert_close(flat(run.net), START - 0.1 * by_hand(whole, START))
    ((_, metrics, resting),) = run.said
    errors = (whole.x @ START[:3] - whole.y).square()
    assert resting
    assert metrics["loss"] == pytest.approx(float(errors @ whole.weights / whole.weights.sum()), rel=1e-5)
    assert metrics["row"] == pytest.approx((0 + 0.5 * 1 + 2 * 2 + 6 + 3 * 7) / 7.5)
    assert metrics["read"] == pytest.approx(28 / 8)  # a summary counts all rows alike
    assert metrics["gradient norm"] == pytest.approx(float(by_hand(whole, START).norm()), rel=1e-5)


def test_every_update_begins_with_no_gradient_of_the_last(start: Callable[..., Run]) -> None:
    run = start()
    run(Regression(), of(data([4, 4])), steps=2)
    first, second = data([4, 4])
    at = START - 0.1 * by_hand(first, START)
    torch.testing.assert_close(flat(run.net), at - 0.1 * by_hand(second, at))


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_clipping_clips(start: Callable[..., Run], clip: float) -> None:
    """The step has the length lr * clip along the gradient; the norm that is reported is the one before."""
    run = start(max_grad_norm=clip)
    run(Regression(), of(data([2, 2])), steps=1, accumulate=2)
    (whole,) = data([4])
    gradient = by_hand(whole, START)
    assert gradient.norm() > 1
    torch.testing.assert_close(flat(run.net), START - 0.1 * clip * gradient / gradient.norm(), rtol=1e-4, atol=1e-6)
    assert run.said[0][1]["gradient norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_gradient_below_the_limit_is_left_alone(start: Callable[..., Run]) -> None:
    free, limited = start(), start(max_grad_norm=1e6)
    for run in (free, limited):
        run(Regression(), of(data([4])), steps=3)
    assert torch.equal(flat(free.net), flat(limited.net))


def test_the_schedule_is_applied_update_by_update(start: Callable[..., Run]) -> None:
    """Warm-up of one and a linear fall over three: factors 1/2, 1, 2/3, 1/3."""
    run = start(lr_factor=schedule("linear", warmup_steps=1, steps=4))
    run(Regression(), of(data([4])), steps=4)
    assert [responses["lr"] for _, responses, _ in run.said] == pytest.approx([0.05, 0.1, 0.2 / 3, 0.1 / 3])
    (batch,), at = data([4]), START
    for lr in (0.05, 0.1, 0.2 / 3, 0.1 / 3):
        at = at - lr * by_hand(batch, at)
    torch.testing.assert_close(flat(run.net), at)


def test_the_average_takes_in_every_update(start: Callable[..., Run]) -> None:
    run = start(ema=0.9)
    expected = START
    for step in range(1, 6):
        run(Regression(), of(data([4, 2])), steps=step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * flat(run.net)
    assert run.train_state.ema is not None
    torch.testing.assert_close(torch.cat([x.flatten() for x in run.train_state.ema.weights]), expected)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_hard_moves_of_the_reference_are_runs_one_after_another(start: Callable[..., Run], every: int) -> None:
    """Bit for bit: each of them has its own first weights as the reference, which stays."""
    batches = data([2] * 6)
    moving = start(share=partial(mixed_share, every=every, mix=1.0, ramp=None, flat=0))
    moving(Relative(), of(batches), steps=6)
    at = START
    for first in range(0, 6, every):
        run = start(weights=at)
        run(Relative(), of(batches[first : first + every]), steps=every)
        at = flat(run.net)
    assert torch.equal(flat(moving.net), at)
    fixed = start()
    fixed(Relative(), of(batches), steps=6)
    assert not torch.allclose(flat(fixed.net), at)


def test_a_reference_that_never_moves_stays(start: Callable[..., Run]) -> None:
    fixed, moving = start(), start(share=partial(mixed_share, every=7, mix=1.0, ramp=None, flat=0))
    for run in (fixed, moving):
        run(Relative(), of(data([2] * 6)), steps=6)
    assert torch.equal(flat(fixed.net), flat(moving.net))


def spoilt(value: float, row: int) -> Callable[[Batch, Tensor], Tensor]:
    return lambda batch, losses: losses.masked_fill(torch.tensor(batch.rows) == row, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_non_finite_loss_stops_before_any_change(start: Callable[..., Run], value: float, accumulate: int) -> None:
    """Row 9 is in the fourth batch of three, 9 to 11; what the updates before it made stays."""
    run = start()
    with pytest.raises(FloatingPointError) as raised:
        run(Regression(spoil=spoilt(value, 9)), of(data([3] * 6)), steps=6, accumulate=accumulate)
    done = 3 // accumulate
    assert f"not finite after update {done}, in batch 4 of epoch 0 (rows 9, 10, 11)" in str(raised.value)
    assert run.progress.step == done
    clean = start()
    clean(Regression(), of(data([3] * 6)), steps=done, accumulate=accumulate)
    assert torch.equal(flat(run.net), flat(clean.net))


def test_a_gradient_that_is_not_finite_changes_nothing(start: Callable[..., Run]) -> None:
    """A square root at zero: the loss is finite, its gradient is not."""
    run = start()
    method = Regression(spoil=lambda batch, losses: losses + (losses * 0).sqrt())
    with pytest.raises(FloatingPointError):
        run(method, of(data([2])), steps=1)
    assert torch.equal(flat(run.net), START)


def test_contrasts_precede_the_updates_on_them(start: Callable[..., Run]) -> None:
    run, method = start(), Regression(contrasts_of_a_batch=3, noise=0.5)
    (batch,) = data([4])
    run(method, of([batch]), steps=3)
    assert [what for what, *_ in method.seen] == ["contrasts", "loss", "loss", "loss"]
    at, rng = START, KeyedRNG(3, 0)
    for index in range(3):
        noise = rng.normal(batch.rows, (3,), "noise", index)
        at = at - 0.1 * by_hand(replace(batch, x=batch.x + 0.5 * noise), at)
    torch.testing.assert_close(flat(run.net), at)


def test_contrasts_run_in_eval_and_losses_in_train_mode(
    start: Callable[..., Run],
) -> None:
    run, method = start(), Regression()
    run(method, of(data([2, 2])), steps=2)
    modes = [(what, training, gradients) for what, _, _, training, gradients, _ in method.seen]
    assert modes == [("contrasts", False, False), ("loss", True, True)] * 2


def test_an_update_of_padding_alone_does_not_move_by_momentum(start: Callable[..., Run]) -> None:
    first, padding, last = data([2, 2, 2], weights=[1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    run, without = start(optimizer=torch.optim.AdamW), start(optimizer=torch.optim.AdamW)
    run(Regression(), of([first, padding, last]), steps=2)
    without(Regression(), of([first, last]), steps=2)
    assert torch.equal(flat(run.net), flat(without.net))
    assert run.progress == Progress(2, 0, 3)  # the padding was read, and is no update
    assert [p.step for p, _, _ in run.said] == [1, 2]


def test_rows_without_weight_are_in_the_next_summary(start: Callable[..., Run]) -> None:
    """The windows of batches 2 and 3 are no updates; the second update tells of rows 2 to 7, learning from 6 and 7."""
    run = start()
    run(Regression(), of(data([2, 2, 2, 2, 2], weights=[1.0, 1, 0, 0, 0, 0, 1, 1, 1, 1])), steps=3)
    assert [metrics["read"] for _, metrics, _ in run.said] == [0.5, 4.5, 8.5]
    assert [metrics["row"] for _, metrics, _ in run.said] == [0.5, 6.5, 8.5]
