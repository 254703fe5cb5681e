"""Progress of the loop on a linear network: ends of epochs, resuming, and data of which nothing counts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmalign.methods import Requirements
from mmalign.rng import KeyedRNG
from mmalign.training import loop
from mmalign.training.loop import Progress
from mmalign.training.optim import schedule
from tests.helpers.linear_runs import START, Batch, Regression, Run, by_hand, data, flat, of


@pytest.mark.slow
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
        "max_grad_norm": 1.0,
        "ema": 0.9,
        "lr_factor": schedule("cosine", warmup_steps=3, steps=17),
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
        assert again.train_state.ema is not None and straight.train_state.ema is not None
        for mine, expected in zip(again.train_state.ema.state(), straight.train_state.ema.state(), strict=True):
            assert torch.equal(mine, expected)


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
