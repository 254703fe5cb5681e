"""Guard against bad updates: skipped, rolled back or named, exactly repeatable."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmalign.commands import train as command
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.training import checkpoint
from mmalign.training.guard import FIRST, MAX_BAD, Guard
from mmalign.training.loop import BadUpdateError, Progress
from tests.helpers import data_files, recipes
from tests.helpers.linear_runs import Regression, Run, data, of
from tests.helpers.runs import assert_same, train_weights

Content = dict[str, Any]


def spoil_row(*rows: int) -> Regression:
    """Return a method whose loss is not finite on these rows."""

    def spoil(batch: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * float("nan") if set(batch.rows) & set(rows) else losses

    return Regression(spoil=spoil)


def test_skipped_batch_leaves_no_trace(start: Callable[..., Run], log_lines: list[str]) -> None:
    """The updates are those of the data without it."""
    batches = data([2, 2, 2, 2])
    guarded, clean = start(), start()
    guarded.train_state.guard.action = "skip"
    guarded(spoil_row(3), of(batches), steps=3)
    clean(Regression(), of([batches[0], *batches[2:]]), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(guarded.net.parameters(), clean.net.parameters(), strict=True))
    assert guarded.train_state.guard.left_out == 1
    expected = "update 2 was left out: the loss is not finite, in batch 2 of epoch 0 (rows 2, 3); 1 so far"
    assert log_lines == [expected]


def test_too_many_bad_updates_in_a_row_stop(start: Callable[..., Run]) -> None:
    run = start()
    run.train_state.guard.action = "skip"
    with pytest.raises(BadUpdateError, match="the loss is not finite"):
        run(spoil_row(*range(8)), of(data([2] * 4)), steps=3)
    assert run.train_state.guard.left_out == MAX_BAD


def test_limits_of_loss_and_gradient() -> None:
    guard = Guard(max_loss=5.0, max_grad_norm_ratio=3.0)
    assert "max_loss" in guard.problem(5.1, 1.0) and not guard.problem(5.0, 100.0)
    guard = Guard(max_grad_norm_ratio=3.0)
    assert not any(guard.problem(1.0, 2.0) for _ in range(FIRST))
    assert guard.mean_norm == pytest.approx(2.0)
    assert "is 3.5 times its mean" in guard.problem(1.0, 7.0) and not guard.problem(1.0, 5.9)
    other = Guard()
    other.load(guard.state())
    assert other.state() == guard.state()


@pytest.mark.parametrize("first", [0.0, 2.0])
def test_updates_without_a_gradient_do_not_enter_the_mean(first: float) -> None:
    """As those of a group-relative method, while the rewards of every group are equal."""
    guard = Guard(max_grad_norm_ratio=3.0)
    norms = [first] * FIRST + [0.0] * 50 + [2.0]
    assert not any(guard.problem(1.0, norm) for norm in norms) and guard.mean_norm == pytest.approx(2.0)
    # A mean of 0, as checkpoints once had it, begins anew
    guard.load({"mean_norm": 0.0, "number": FIRST, "left_out": 0})
    assert not guard.problem(1.0, 2.0) and guard.mean_norm == 2.0


@pytest.fixture
def content(tiny_sd15: Path, tmp_path: Path) -> Content:
    """Return a recipe of six updates with a checkpoint after every second one."""
    path = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    options = {"steps": 6, "save_every": 2, "keep_checkpoints": 9, "ema": 0.9}
    return recipes.diffusion(tiny_sd15, path, tmp_path / "out", method={"name": "sft"}, train=options)


@pytest.fixture
def bad_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil the losses of the rows in batch 4 of epoch 0, when they are trained on together."""
    from mmalign.methods.text_to_image import sft

    contrasts, loss = sft.contrasts, sft.loss
    seen, rows = list[tuple[int, ...]](), dict[int, tuple[int, ...]]()  # batches in order; rows of each contrast

    def watched(policy: Any, batch: Any, *rest: Any) -> Any:
        result = contrasts(policy, batch, *rest)
        rows[id(result[0])] = tuple(batch.rows)
        if tuple(batch.rows) not in seen:
            seen.append(tuple(batch.rows))
        return result

    def spoiled(policy: Any, contrast: Any, cfg: Any) -> Any:
        step = loss(policy, contrast, cfg)
        if torch.is_grad_enabled() and len(seen) >= 4 and rows[id(contrast)] == seen[3]:
            step.losses.mul_(float("nan"))
        return step

    monkeypatch.setattr(sft, "contrasts", watched)
    monkeypatch.setattr(sft, "loss", spoiled)


@pytest.mark.slow
@pytest.mark.usefixtures("bad_batch")
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_guarded_run_resumes_exactly(action: str, content: Content, tmp_path: Path, log_lines: list[str]) -> None:
    guard = f"train.guard.action={action}"
    whole = train_weights(content, guard)
    for first_removed in (1, -1):  # before the bad update, and after it
        killed = tmp_path / f"killed{first_removed}"
        shutil.copytree(tmp_path / "out", killed)
        for late in checkpoint.complete(killed)[first_removed:]:
            shutil.rmtree(late)
        assert_same(train_weights({**content, "output": str(killed)}, guard), whole)
    counts = [line for line in log_lines if "bad updates were left out" in line]
    assert len(counts) == 3 and len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("bad_batch")
def test_rollback_goes_on_past_the_bad_batch(content: Content, log_lines: list[str]) -> None:
    train(load_recipe(content, ["train.guard.action=rollback", "train.steps=4"]))
    (line,) = [line for line in log_lines if ": back to " in line]
    assert "the loss is not finite after update 3, in batch 4 of epoch 0 (pairs.parquet: row " in line
    assert line.endswith("back to checkpoint-00000002, and on with the next batch")


def test_rollback_keeps_the_position_and_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Updates that are repeated have taken their time."""
    run: Any = SimpleNamespace(progress=Progress(3, 1, 4, seconds=9.0, contrast_seconds=6.0))
    run.train_state = SimpleNamespace(guard=Guard(left_out=1), optimizer=SimpleNamespace(zero_grad=lambda: None))

    def resume(run: Any, *_: object) -> None:
        run.progress = Progress(2, 0, 2, seconds=5.0, contrast_seconds=3.0)

    monkeypatch.setattr(command, "resume", resume)
    command._roll_back(run, run, tmp_path)
    assert vars(run.progress) == vars(Progress(2, 1, 4, seconds=9.0, contrast_seconds=6.0))
    assert run.train_state.guard.left_out == 2


@pytest.mark.slow
def test_broken_weights_are_rolled_back_or_named(content: Content, tmp_path: Path) -> None:
    """Every update breaks the weights, so the run gives up; only the start was saved."""
    with pytest.raises(FloatingPointError, match="not finite"):
        train(load_recipe(content, ["train.guard.action=rollback", "train.lr=1e39", "train.save_every=1"]))
    (path,) = checkpoint.complete(tmp_path / "out")
    assert path.name == "checkpoint-00000000"
