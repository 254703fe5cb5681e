"""Progress of the loop on a linear network: ends of epochs, resuming, and data of which nothing counts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mmalign.methods import Memory, Requirements
from mmalign.policy.lagging import mixed_share
from mmalign.rng import KeyedRNG
from mmalign.training import loop
from mmalign.training.guard import Guard
from mmalign.training.loop import Progress
from mmalign.training.optim import schedule
from tests.helpers.linear_runs import START, WEIGHTS, Batch, Regression, Relative, Run, by_hand, data, flat, of


@pytest.mark.slow
@pytest.mark.parametrize("contrasts", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_going_on_from_any_checkpoint_equals_never_stopping(
    start: Callable[..., Run], contrasts: int, accumulate: int
) -> None:
    """Bit for bit: AdamW, warm-up, clipping, an average, a moving reference, noise from the draws.

    Stops are within epochs and at their end.
    """
    batches = of(data([4, 4, 4, 2, 4]))
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "lr": 0.05,
        "max_grad_norm": 1.0,
        "ema": 0.9,
        "share": partial(mixed_share, every=2, mix=0.5, ramp=0.1, flat=1),
        "lr_factor": schedule("cosine", warmup_steps=3, steps=17),
    }
    straight = start(**options)
    straight(Relative(contrasts, noise=0.5), batches, steps=17, accumulate=accumulate)
    assert len(straight.snapshots) >= 5 and straight.progress.epoch >= 1
    for snapshot in straight.snapshots:
        again = start(**options)
        again.restore(snapshot)
        done = snapshot["progress"].step
        again(Relative(contrasts, noise=0.5), batches, steps=17, accumulate=accumulate)
        assert torch.equal(flat(again.net), flat(straight.net))
        assert again.said == straight.said[done:]
        assert len(straight.copies) == 2
        for mine, expected in zip(again.copies, straight.copies, strict=True):
            assert all(map(torch.equal, mine.weights, expected.weights))


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
    with pytest.raises(AssertionError, match="cannot be recomputed"):
        run(Regression(contrasts_of_a_batch=3), batches, steps=6)


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
    assert [draws for what, _, draws, *_ in method.seen if what == "contrasts"] == [KeyedRNG(3, 0)] * 2 + [
        KeyedRNG(3, 1)
    ] * 3


def test_a_window_may_reach_over_the_end_of_an_epoch(start: Callable[..., Run]) -> None:
    """Two batches an epoch and three an update: the second update's are batch 1 of epoch 1 and both of epoch 2."""
    run = start()
    run(Regression(), of(data([2, 2])), steps=2, accumulate=3)
    first, second = data([2, 2])
    joined = [Batch([], torch.cat([b.x for b in bs]), torch.cat([b.y for b in bs]), torch.ones(6))
              for bs in ((first, second, first), (second, first, second))]  # fmt: skip
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


def test_epoch_without_a_batch_is_an_error(start: Callable[..., Run]) -> None:
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


def test_many_empty_batches_in_a_row_end_the_run(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch may be long. A batch with one update begins the count anew; the method says what may be wrong."""
    monkeypatch.setattr(loop, "MAX_EMPTY_BATCHES", 3)
    full, empty = [1.0], [0.0]
    run = start()
    with pytest.raises(
        ValueError,
        match=r"3 batches in a row, up to batch 7 of epoch 0, .*limit is 3\)$",
    ):
        run(Regression(), of(data([1] * 8, weights=[*full, *empty * 2, *full, *empty * 4])), steps=9)
    assert run.progress == Progress(2, 0, 7)
    method = Regression()
    method.needs = Requirements(hint_if_empty="look at it")
    with pytest.raises(ValueError, match=r"limit is 3\): look at it"):
        start()(method, of(data([1] * 4, weights=empty * 4)), steps=9)


@pytest.mark.parametrize(("contrasts", "accumulate"), [(16, 1), (16, 2), (3, 2), (1, 5)])
def test_batches_are_counted_and_not_their_contrasts(
    start: Callable[..., Run], contrasts: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many contrasts a batch has; nor while one that may count is in an update that is not full yet."""
    monkeypatch.setattr(loop, "MAX_EMPTY_BATCHES", 4)
    run, method = start(), Regression(contrasts_of_a_batch=contrasts)
    run(method, of(data([1] * 12, weights=[0.0, 0.0, 0.0, 1.0] * 3)), steps=2, accumulate=accumulate)
    assert run.progress.step == 2
    with pytest.raises(ValueError, match="batches in a row"):
        start()(method, of(data([1] * 12, weights=[0.0] * 12)), steps=2, accumulate=accumulate)


def _remembering() -> Regression:
    """Return a method whose targets move by the running mean of its losses, which begins at 1."""

    def remember(memory: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        return {"mean": 0.5 * memory["mean"] + 0.5 * metrics["loss"]}

    return Regression(needs=Requirements(memory=Memory({"mean": 1.0}, remember)), offset="mean")


def test_memory_is_that_of_the_update_before(start: Callable[..., Run]) -> None:
    """By hand: targets move by 1 in the first update, and by half of 1 and of its loss in the second."""
    run, batches = start(), data([3, 5])
    run.policy.memory["mean"] = 1.0
    run(_remembering(), of(batches), steps=2)
    at, offset = START, 1.0
    for batch in batches:
        moved = replace(batch, y=batch.y + offset)
        error = moved.x @ at[:3] + at[3] - moved.y
        at, offset = at - 0.1 * by_hand(moved, at), 0.5 * offset + 0.5 * float(error.square().mean())
    torch.testing.assert_close(flat(run.net), at)
    assert run.policy.memory["mean"] == pytest.approx(offset)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_resumes_bit_for_bit(start: Callable[..., Run], accumulate: int) -> None:
    batches = of(data([4, 4, 2, 4]))
    straight = start(optimizer=torch.optim.AdamW)
    straight.policy.memory["mean"] = 1.0
    straight(_remembering(), batches, steps=6, accumulate=accumulate)
    for snapshot in straight.snapshots[:-1]:
        again = start(optimizer=torch.optim.AdamW)
        again.restore(snapshot)
        again(_remembering(), batches, steps=6, accumulate=accumulate)
        assert torch.equal(flat(again.net), flat(straight.net))
        assert again.policy.memory == straight.policy.memory


def test_memory_does_not_depend_on_the_division_into_batches(start: Callable[..., Run]) -> None:
    """The same eight rows of unequal weights in one batch and in four: the memory is the mean over all rows."""
    memories = []
    for sizes in ([8], [2, 2, 3, 1]):
        run = start()
        run.policy.memory["mean"] = 1.0
        run(_remembering(), of(data(sizes, WEIGHTS)), steps=1, accumulate=len(sizes))
        memories.append(run.policy.memory["mean"])
    assert memories[0] == pytest.approx(memories[1], rel=1e-6)


def test_a_bad_update_is_not_remembered(start: Callable[..., Run]) -> None:
    run = start()
    run.policy.memory["mean"] = 1.0
    run.train_state.guard = Guard(action="skip")
    method = _remembering()
    method.spoil = lambda batch, losses: losses * float("nan") if 0 in batch.rows else losses
    batches = data([2, 2])
    run(method, of(batches), steps=1)
    error = batches[1].x @ START[:3] + START[3] - batches[1].y - 1.0
    assert run.policy.memory["mean"] == pytest.approx(0.5 + 0.5 * float(error.square().mean()), rel=1e-5)
