"""The loop, on a linear network whose updates can be worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mmalign import loop
from mmalign.draws import Draws
from mmalign.loop import Learner, Progress
from mmalign.methods import Step
from mmalign.optim import Average, schedule
from mmalign.policy import Policy


@dataclass(frozen=True)
class Batch:
    rows: list[int]
    x: Tensor
    y: Tensor
    weights: Tensor


@dataclass
class Regression:
    """Squared errors of a network under noise from the draws; remembers how it was called."""

    contrasts_of_a_batch: int = 1
    noise: float = 0.0
    spoil: Callable[[Batch, Tensor], Tensor] = lambda batch, losses: losses
    seen: list[Any] = field(default_factory=list)

    def contrasts(self, policy: Policy, batch: Batch, cfg: Any, draws: Draws) -> list[Batch]:
        weight = next(policy.model.parameters()).detach().clone()
        self.seen.append(("contrasts", batch.rows, draws, policy.model.training, torch.is_grad_enabled(), weight))
        found = []
        for index in range(self.contrasts_of_a_batch):
            x = batch.x + self.noise * draws.normal(batch.rows, (3,), "noise", index)
            found.append(replace(batch, x=x))
        return found

    def loss(self, policy: Policy, contrast: Batch, cfg: Any) -> Step:
        self.seen.append(("loss", contrast.rows, None, policy.model.training, torch.is_grad_enabled(), None))
        losses = self.spoil(contrast, (policy.model(contrast.x)[:, 0] - contrast.y).square())
        return Step(losses, contrast.weights, {"loss": losses.detach(), "row": torch.tensor(contrast.rows).float()})


def data(sizes: list[int], weights: list[float] | None = None, seed: int = 0) -> list[Batch]:
    """Batches of the given sizes, cut from the same rows whatever the sizes."""
    g = torch.Generator().manual_seed(seed)
    number = sum(sizes)
    x, y = torch.randn(number, 3, generator=g), torch.randn(number, generator=g)
    w = torch.tensor(weights) if weights else torch.ones(number)
    cut = zip(torch.arange(number).split(sizes), strict=True)
    return [Batch(i.tolist(), x[i], y[i], w[i]) for (i,) in cut]


def of(batches: list[Batch]) -> loop.Batches:
    def give(epoch: int, first: int) -> Iterator[Batch]:
        return iter(batches[first:])

    return give


def network() -> nn.Linear:
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        net.bias.zero_()
    return net


@dataclass
class Run:
    """What a run is made of, and what it said after every update."""

    net: nn.Linear
    policy: Policy
    learner: Learner
    progress: Progress = field(default_factory=Progress)
    said: list[tuple[Progress, dict[str, float], bool]] = field(default_factory=list)
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        average = self.learner.average.state() if self.learner.average is not None else None
        parts = self.net.state_dict(), self.learner.optimizer.state_dict(), self.progress, average
        return copy.deepcopy(dict(zip(("net", "optimizer", "progress", "average"), parts, strict=True)))

    def restore(self, snapshot: dict[str, Any]) -> None:
        snapshot = copy.deepcopy(snapshot)
        self.net.load_state_dict(snapshot["net"])
        self.learner.optimizer.load_state_dict(snapshot["optimizer"])
        self.progress = snapshot["progress"]
        if self.learner.average is not None:
            self.learner.average.load(snapshot["average"])

    def __call__(self, method: Any, batches: loop.Batches, *, steps: int, accumulate: int = 1) -> Progress:
        def after(progress: Progress, metrics: loop.Metrics) -> None:
            resting = not progress.pending
            self.said.append((copy.copy(progress), {name: float(x) for name, x in metrics.items()}, resting))
            if resting:
                self.snapshots.append(self.snapshot())

        return loop.train(
            method, None, self.policy, batches, self.learner,
            steps=steps, accumulate=accumulate, seed=3, progress=self.progress, after_update=after,
        )  # fmt: skip


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Begins runs, all from the same weights."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def begin(
        *,
        optimizer: Any = torch.optim.SGD,
        lr: float = 0.1,
        clip: float | None = None,
        factor: Callable[[int], float] = lambda _: 1.0,
        ema: float | None = None,
    ) -> Run:
        accelerator = Accelerator(cpu=True)
        net = network()
        model, wrapped = accelerator.prepare(net, optimizer(net.parameters(), lr=lr))
        average = Average(list(net.parameters()), ema) if ema else None
        policy = Policy(None, model, net, None)  # type: ignore[arg-type]
        return Run(net, policy, Learner(accelerator, wrapped, lr, factor, clip, average))

    yield begin
    AcceleratorState._reset_state(reset_partial_state=True)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


START = flat(network())
WEIGHTS = [1.0, 0.5, 2.0, 0.0, 0.0, 0.0, 1.0, 3.0]


def by_hand(batch: Batch, at: Tensor) -> Tensor:
    """The gradient of the weighted mean of (w x + b - y)^2: 2 sum(weight * error * (x, 1)) / sum(weight)."""
    error = batch.x @ at[:3] + at[3] - batch.y
    inputs = torch.cat([batch.x, torch.ones(len(batch.x), 1)], 1)
    return 2 * (batch.weights * error) @ inputs / batch.weights.sum()


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
    run = start(clip=clip)
    run(Regression(), of(data([2, 2])), steps=1, accumulate=2)
    (whole,) = data([4])
    gradient = by_hand(whole, START)
    assert gradient.norm() > 1
    torch.testing.assert_close(flat(run.net), START - 0.1 * clip * gradient / gradient.norm(), rtol=1e-4, atol=1e-6)
    assert run.said[0][1]["gradient norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_gradient_below_the_limit_is_left_alone(start: Callable[..., Run]) -> None:
    free, limited = start(), start(clip=1e6)
    for run in (free, limited):
        run(Regression(), of(data([4])), steps=3)
    assert torch.equal(flat(free.net), flat(limited.net))


def test_the_schedule_is_applied_update_by_update(start: Callable[..., Run]) -> None:
    """Warm-up of one and a linear fall over three: factors 1/2, 1, 2/3, 1/3."""
    run = start(factor=schedule("linear", warmup=1, steps=4))
    run(Regression(), of(data([4])), steps=4)
    assert [said["lr"] for _, said, _ in run.said] == pytest.approx([0.05, 0.1, 0.2 / 3, 0.1 / 3])
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
    assert run.learner.average is not None
    torch.testing.assert_close(torch.cat([x.flatten() for x in run.learner.average.state()]), expected)


def spoilt(value: float, row: int) -> Callable[[Batch, Tensor], Tensor]:
    return lambda batch, losses: losses.masked_fill(torch.tensor(batch.rows) == row, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_changes_anything(
    start: Callable[..., Run], value: float, accumulate: int
) -> None:
    """Row 9 is in the fourth batch of three, 9 to 11; what the updates before it made stays."""
    run = start()
    with pytest.raises(FloatingPointError) as raised:
        run(Regression(spoil=spoilt(value, 9)), of(data([3] * 6)), steps=6, accumulate=accumulate)
    done = 3 // accumulate
    assert f"not finite after update {done}, in batch 4 of epoch 0 (rows 9, 10, 11)" in str(raised.value)
    assert "the last checkpoint is good" in str(raised.value) and run.progress.step == done
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


@pytest.mark.parametrize("contrasts", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_going_on_from_any_checkpoint_equals_never_stopping(
    start: Callable[..., Run], contrasts: int, accumulate: int
) -> None:
    """Bit for bit: AdamW, warm-up, clipping, an average, noise from the draws, stops within epochs and at their end."""
    batches = of(data([4, 4, 4, 2, 4]))
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "lr": 0.05,
        "clip": 1.0,
        "ema": 0.9,
        "factor": schedule("cosine", warmup=3, steps=17),
    }
    straight = start(**options)
    straight(Regression(contrasts, noise=0.5), batches, steps=17, accumulate=accumulate)
    assert len(straight.snapshots) >= 5 and straight.progress.epoch >= 1
    for snapshot in straight.snapshots:
        again = start(**options)
        again.restore(snapshot)
        done = snapshot["progress"].step
        again(Regression(contrasts, noise=0.5), batches, steps=17, accumulate=accumulate)
        assert torch.equal(flat(again.net), flat(straight.net))
        assert again.said == straight.said[done:]
        assert again.learner.average is not None and straight.learner.average is not None
        for mine, theirs in zip(again.learner.average.state(), straight.learner.average.state(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_checkpoint_is_offered_only_where_nothing_is_pending(start: Callable[..., Run]) -> None:
    """Three contrasts a batch, two an update: updates end after contrasts 2 | 1 | 3 of batches 1 | 2 | 2."""
    run = start()
    run(Regression(contrasts_of_a_batch=3), of(data([2, 2, 2, 2])), steps=6, accumulate=2)
    assert [resting for _, _, resting in run.said] == [False, False, True, False, False, True]
    assert [progress.batch for progress, _, _ in run.said] == [1, 2, 2, 3, 4, 4]
    assert [progress.pending for progress, _, _ in run.said] == [1, 2, 0, 1, 2, 0]


def test_a_run_that_ends_inside_a_batch_knows_it(start: Callable[..., Run]) -> None:
    """What is pending was made with the weights before the batch: nothing goes on from there."""
    run = start()
    batches = of(data([2, 2]))
    assert run(Regression(contrasts_of_a_batch=3), batches, steps=4) == Progress(4, 0, 2, pending=2)
    with pytest.raises(AssertionError, match="cannot be made again"):
        run(Regression(contrasts_of_a_batch=3), batches, steps=6)


def test_several_contrasts_are_made_before_the_first_update_and_used_one_by_one(start: Callable[..., Run]) -> None:
    run, method = start(), Regression(contrasts_of_a_batch=3, noise=0.5)
    (batch,) = data([4])
    run(method, of([batch]), steps=3)
    assert [what for what, *_ in method.seen] == ["contrasts", "loss", "loss", "loss"]
    at, draws = START, Draws(3, 0)
    for index in range(3):
        noise = draws.normal(batch.rows, (3,), "noise", index)
        at = at - 0.1 * by_hand(replace(batch, x=batch.x + 0.5 * noise), at)
    torch.testing.assert_close(flat(run.net), at)


def test_contrasts_run_in_eval_mode_without_gradients_and_losses_in_train_mode_with_them(
    start: Callable[..., Run],
) -> None:
    run, method = start(), Regression()
    run(method, of(data([2, 2])), steps=2)
    modes = [(what, training, gradients) for what, _, _, training, gradients, _ in method.seen]
    assert modes == [("contrasts", False, False), ("loss", True, True)] * 2


def test_epochs_follow_each_other_with_draws_of_their_own(start: Callable[..., Run]) -> None:
    """Five updates of three batches an epoch, from the second batch of the first epoch on."""
    run, method, asked = start(), Regression(), []
    batches = data([2, 2, 2])

    def give(epoch: int, first: int) -> Iterator[Batch]:
        asked.append((epoch, first))
        return iter(batches[first:])

    run.progress = Progress(step=0, epoch=0, batch=1)
    assert run(method, give, steps=5) == Progress(step=5, epoch=1, batch=3)
    assert asked == [(0, 1), (1, 0)]
    assert [rows[0] // 2 for what, rows, *_ in method.seen if what == "contrasts"] == [1, 2, 0, 1, 2]
    assert [draws for what, _, draws, *_ in method.seen if what == "contrasts"] == [Draws(3, 0)] * 2 + [Draws(3, 1)] * 3


def test_a_window_may_reach_over_the_end_of_an_epoch(start: Callable[..., Run]) -> None:
    """Two batches an epoch and three an update: the second update's are batch 1 of epoch 1 and both of epoch 2."""
    run = start()
    run(Regression(), of(data([2, 2])), steps=2, accumulate=3)
    one, two = data([2, 2])
    joined = [Batch([], torch.cat([b.x for b in bs]), torch.cat([b.y for b in bs]), torch.ones(6))
              for bs in ((one, two, one), (two, one, two))]  # fmt: skip
    at = START
    for batch in joined:
        at = at - 0.1 * by_hand(batch, at)
    torch.testing.assert_close(flat(run.net), at)
    assert [(p.epoch, p.batch) for p, _, _ in run.said] == [(1, 1), (2, 2)]


def test_a_run_that_is_done_does_nothing(start: Callable[..., Run]) -> None:
    run, method = start(), Regression()
    run.progress = Progress(step=4, epoch=1, batch=2)
    assert run(method, of(data([2])), steps=4) == Progress(4, 1, 2)
    assert method.seen == [] and run.said == []


def test_an_epoch_without_a_batch_is_an_error_and_the_end_of_one_is_none(start: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="epoch 0 has nothing to learn from, in 0 batches; there are fewer"):
        start()(Regression(), of([]), steps=1)
    run = start()
    run.progress = Progress(step=0, epoch=0, batch=2)  # stopped after the last batch of an epoch
    run(Regression(), of(data([2, 2])), steps=1)
    assert run.progress == Progress(1, 1, 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_of_which_nothing_counts_ends_the_run(start: Callable[..., Run], accumulate: int) -> None:
    """No contrasts at all, or rows of weight 0 alone, would go round for ever."""
    with pytest.raises(ValueError, match="nothing to learn from, in 2 batches"):
        start()(Regression(contrasts_of_a_batch=0), of(data([2, 2])), steps=1, accumulate=accumulate)
    with pytest.raises(ValueError, match="nothing to learn from, in 2 batches"):
        start()(Regression(), of(data([2, 2], weights=[0.0] * 4)), steps=1, accumulate=accumulate)


def test_many_batches_in_a_row_of_which_nothing_counts_end_the_run(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch may be long. A batch with one update begins the count anew; the method says what may be wrong."""
    monkeypatch.setattr(loop, "EMPTY", 3)
    full, empty = [1.0], [0.0]
    run = start()
    with pytest.raises(
        ValueError,
        match=r"3 batches in a row, up to batch 7 of epoch 0, had nothing to learn from \(3 are the limit\)$",
    ):
        run(Regression(), of(data([1] * 8, weights=[*full, *empty * 2, *full, *empty * 4])), steps=9)
    assert run.progress == Progress(2, 0, 7)
    method = Regression()
    method.made_nothing = "look at it"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"\(3 are the limit\): look at it"):
        start()(method, of(data([1] * 4, weights=empty * 4)), steps=9)


@pytest.mark.parametrize(("contrasts", "accumulate"), [(16, 1), (16, 2), (3, 2), (1, 5)])
def test_batches_are_counted_and_not_their_contrasts(
    start: Callable[..., Run], contrasts: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many contrasts a batch has; nor while one that may count is in an update that is not full yet."""
    monkeypatch.setattr(loop, "EMPTY", 4)
    run, method = start(), Regression(contrasts_of_a_batch=contrasts)
    run(method, of(data([1] * 12, weights=[0.0, 0.0, 0.0, 1.0] * 3)), steps=2, accumulate=accumulate)
    assert run.progress.step == 2
    with pytest.raises(ValueError, match="batches in a row"):
        start()(method, of(data([1] * 12, weights=[0.0] * 12)), steps=2, accumulate=accumulate)


def test_an_update_of_padding_alone_does_not_move_by_momentum(start: Callable[..., Run]) -> None:
    one, padding, other = data([2, 2, 2], weights=[1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    run, without = start(optimizer=torch.optim.AdamW), start(optimizer=torch.optim.AdamW)
    run(Regression(), of([one, padding, other]), steps=2)
    without(Regression(), of([one, other]), steps=2)
    assert torch.equal(flat(run.net), flat(without.net))
    assert run.progress == Progress(2, 0, 3)  # the padding was read, and is no update
    assert [p.step for p, _, _ in run.said] == [1, 2]
