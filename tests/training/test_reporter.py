"""Progress lines where there is no terminal, one warning, and the numbers kept for a verdict."""

import logging
import re
from typing import Any

import pytest
import torch

from mmalign.training.reporter import NUM_FRESH, Reporter


class Tracker:
    """Stand-in for an accelerator, with all that the reporter asks of it."""

    is_main_process, device = True, torch.device("cpu")

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.trackers: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def reporter(steps: int = 100, every: int = 1, **more: Any) -> Reporter:
    return Reporter(Tracker(), steps, every, **more)


def metrics(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("_", " "): torch.tensor(value) for name, value in values.items()}


def pair(factor: float = 0.3, size: float = 1.0, saturated: float = 0.0, error: float = 0.1) -> dict[str, torch.Tensor]:
    """Return metrics of a pair loss whose base error is 0.1."""
    sides = {"chosen_error": error, "chosen_gain": (0.1 - error) / 2}
    return metrics(loss=0.5, logit=1.0, gradient_factor=factor, logit_size=size, saturated=saturated, **sides)


def test_fresh_updates_survive_a_checkpoint() -> None:
    """The last 64 updates are known, and the later half of these are returned."""
    r = reporter(steps=200)
    for step in range(1, 101):
        r.update(step, metrics(loss=float(step)))
    r.update(101, metrics(loss=0.0), is_fresh=False)
    assert r.fresh() == {"loss": [float(step) for step in range(100 - NUM_FRESH // 2 + 1, 101)]}
    other = reporter(steps=200)
    other.load(r.state())
    assert other.fresh() == r.fresh()


def test_a_report_is_the_mean_since_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Every second update, and the last: means of 1 and 3, of 5 and 7, and 9 alone."""
    r = reporter(steps=5, every=2)
    with r:
        for step, loss in enumerate((1.0, 3.0, 5.0, 7.0, 9.0), start=1):
            r.update(step, metrics(loss=loss))
    assert r.accelerator.logged == [(2, {"loss": 2.0}), (4, {"loss": 6.0}), (5, {"loss": 9.0})]
    assert [h["loss"] for h in r.history] == [2.0, 6.0, 9.0]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["update 2/5", "loss 2"], ["update 4/5", "loss 6"], ["update 5/5", "loss 9"],
    ]  # fmt: skip


def test_without_a_terminal_lines_are_printed_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    r = reporter(steps=2)
    with r:
        r.update(
            1, {**pair(), **metrics(accuracy=0.75, chosen_error=0.1, rejected_error=0.2, gradient_norm=1.5, lr=1e-5)}
        )
    captured = capsys.readouterr()
    line = "update 1/2  loss 0.5  accuracy 0.75  logit 1  chosen 0.1  rejected 0.2  grad 1.5  "
    assert captured.err.startswith(line) and captured.out == ""


class Clock:
    """A clock that moves by hand."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mmalign.training.reporter.time", clock)
    return clock


def test_a_line_has_speed_and_remaining_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed at 10 of 4,000: 5 updates of 8 pairs in 20 s are 2 pairs/s, and 3,985 updates of 4 s remain."""
    clock.seconds = 100.0
    r = reporter(steps=4000, every=5, first=10, pairs_per_update=8)
    clock.seconds = 500.0  # models and caches do not count
    with r:
        for step in range(11, 16):
            clock.seconds += 4
            r.update(step, metrics(loss=0.5))
        assert capsys.readouterr().err == "update 15/4000  loss 0.5  2 pairs/s  ETA 4:25:40\n"
        # Back at a checkpoint: measured anew, not over the updates that are lost
        for step in range(6, 11):
            clock.seconds += 2
            r.update(step, metrics(loss=0.5))
    assert capsys.readouterr().err == "update 10/4000  loss 0.5  4 pairs/s  ETA 2:13:00\n"


MANY = dict(accuracy=0.5625, logit=0.0412, chosen_error=0.1234, rejected_error=0.2345, gradient_norm=1.234)


@pytest.mark.parametrize(("columns", "line"), [(60, True), (80, True), (200, False)])
@pytest.mark.parametrize("steps", [60, 100_000])
def test_the_bar_is_whole_at_any_width(
    columns: int,
    line: bool,
    steps: int,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Numbers that do not fit are in a line above the bar; nothing is cut to an ellipsis."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setenv("COLUMNS", str(columns))
    r = reporter(steps=steps, every=5, pairs_per_update=4)
    with r:
        for step in range(1, 6):
            clock.seconds += 1.237
            r.update(step, metrics(loss=0.6733, **MANY))
        r.bar.refresh()
    text = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    rows = re.split("[\r\n]+", text)
    bars = [row for row in rows if row.startswith("train ")]
    assert bars and all(len(row) <= columns for row in bars) and "…" not in text and "..." not in text
    assert f"5/{steps}" in bars[-1] and "3.23 pairs/s  ETA" in bars[-1]
    numbers = "loss 0.6733  accuracy 0.5625  logit 0.0412  chosen 0.1234  rejected 0.2345  grad 1.234"
    lines = [row for row in rows if row.startswith("update ")]
    assert [numbers in row for row in lines] == [True] * line and (numbers in bars[-1]) != line


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    r = reporter(steps=4, first=2)
    with r:
        r.update(3, metrics(loss=0.5))
    text = capsys.readouterr().err
    assert "3/4" in text and "loss 0.5" in text and "update 3/4" not in text


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Tracker, "is_main_process", False)
    r = reporter(steps=1)
    with r:
        r.update(1, pair(factor=1e-9))
    assert capsys.readouterr().err == ""


def train(reports: list[dict[str, torch.Tensor]]) -> None:
    """Report these metrics, and log a line after each."""
    r = reporter(steps=len(reports))
    for step, values in enumerate(reports, start=1):
        r.update(step, values)
        logging.getLogger("mmalign.training.reporter").info(f"after {step}")


BROKEN = pair(0.5, 300.0, 1.0, error=0.3)


def test_a_warning_appears_once_and_not_at_the_first_update(log_lines: list[str]) -> None:
    train([BROKEN, pair(), BROKEN, BROKEN, pair()])
    problem = "the model is breaking, its error is 3 times the base model's: lower train.lr"
    assert log_lines == [
        "after 1", "after 2", f"warning: mean |logit| 3e+02: {problem}", "after 3", "after 4",
        "after 5",
    ]  # fmt: skip


def test_warns_of_saturation_in_both_directions(log_lines: list[str]) -> None:
    """The mean gradient factor of a half at +240 and a half at -240 is that of an unmoved policy."""
    train([pair(), pair(0.5, 240.0, 1.0)])
    assert [line for line in log_lines if "the loss is saturated" in line]


def test_warns_of_an_unmoved_policy_from_half_the_run(log_lines: list[str]) -> None:
    """Before, the learning rate may be warming up."""
    train([pair(0.5, 1e-4)] * 10)
    assert log_lines.index("after 4") + 1 == next(i for i, line in enumerate(log_lines) if "has hardly moved" in line)
    assert sum("warning" in line for line in log_lines) == 1
    log_lines.clear()
    train([pair(0.5, 1e-4)])
    assert log_lines == ["after 1"]


def test_no_warning_for_a_learning_loss(log_lines: list[str]) -> None:
    train([pair(0.5, 1e-4), pair(0.3), pair(0.5, 3.0, 0.2), pair(0.7), pair(0.9)])
    assert log_lines == [f"after {step}" for step in range(1, 6)]
    r = reporter(steps=4)
    for step in range(1, 5):
        r.update(step, metrics(loss=1.0))
    assert log_lines[5:] == []
