"""What a person sees of a run: lines where there is no terminal, one warning, and a verdict that is true."""

import logging
from typing import Any

import pytest
import torch

from mmalign.training.reporter import Reporter, preference_verdict


class Tracker:
    """What the reporter asks of an accelerator."""

    is_main_process = True

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def reporter(steps: int = 100, every: int = 1, **more: Any) -> Reporter:
    return Reporter(Tracker(), steps, every, **more)


def metrics(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("_", " "): torch.tensor(value) for name, value in values.items()}


def pair(
    factor: float = 0.3, chosen: float = 0.1, rejected: float = -0.1, logit: float = 1.0
) -> dict[str, torch.Tensor]:
    return metrics(loss=0.5, logit=logit, gradient_factor=factor, chosen_gain=chosen, rejected_gain=rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "factor", "text"),
    [
        (1e-6, -1e-6, 0.4999, "nothing moved (chosen +1e-06, rejected -1e-06"),
        (0.0, 0.0, 0.5, "nothing moved"),
        (-0.2, -0.1, 0.6, "the preference was not learned (chosen -0.2, rejected -0.1"),
        (0.1, 0.3, 0.55, "the preference was not learned"),
        (-0.1, -0.4, 0.3, "both sides got worse, the rejected one more"),
        (0.4, 0.1, 0.3, "both sides improved, the chosen one more"),
        (0.2, -0.1, 0.3, "chosen images improved and rejected ones got worse"),
    ],
)
def test_a_verdict_is_plain_words(chosen: float, rejected: float, factor: float, text: str) -> None:
    verdict = preference_verdict(chosen, rejected, factor)
    assert verdict.startswith(text) and f"gradient factor {factor:.2f})" in verdict
    assert ("likelihood displacement" in verdict) is text.startswith("both sides got worse")
    assert ("train longer" in verdict) is text.startswith("nothing moved")


def test_a_policy_that_learned_the_opposite_has_moved() -> None:
    assert preference_verdict(-0.2, 0.2, 0.9).startswith("the preference was not learned")


def test_images_that_are_matched_with_prompts_are_called_so() -> None:
    r = reporter(steps=1)
    r.update(1, metrics(loss=0.5, gradient_factor=0.3, matched_gain=0.2, mismatched_gain=-0.1, matched_error=0.4))
    text = "matched images improved and mismatched ones got worse (matched +0.2, mismatched -0.1 "
    assert r.verdict().startswith(text)


def test_the_verdict_is_of_the_last_tenth_of_the_reports() -> None:
    """Twenty reports: the last two count, whose means are +0.2 and -0.3."""
    r = reporter(steps=20)
    for step in range(1, 19):
        r.update(step, pair(chosen=-5.0, rejected=-9.0))
    r.update(19, pair(chosen=0.1, rejected=-0.2))
    r.update(20, pair(chosen=0.3, rejected=-0.4))
    assert "improved and rejected ones got worse (chosen +0.2, rejected -0.3 " in r.verdict()


def test_a_method_without_reference_says_its_errors() -> None:
    r = reporter(steps=2)
    r.update(1, metrics(loss=0.5, chosen_error=0.25))
    r.update(2, metrics(loss=0.4, chosen_error=0.125))
    assert r.verdict() == "chosen error 0.25 at the start, 0.125 at the end (on other noise)"
    assert reporter().verdict() == "nothing was trained"


def test_a_report_is_the_mean_since_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Every second update, and the last: means of 1 and 3, of 5 and 7, and 9 alone."""
    r = reporter(steps=5, every=2)
    with r:
        for step, loss in enumerate((1.0, 3.0, 5.0, 7.0, 9.0), start=1):
            r.update(step, metrics(loss=loss))
    assert r.accelerator.logged == [(2, {"loss": 2.0}), (4, {"loss": 6.0}), (5, {"loss": 9.0})]
    assert [h["loss"] for h in r.history] == [2.0, 6.0, 9.0]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["update 2/5  loss 2", "update 4/5  loss 6", "update 5/5  loss 9"]


def test_without_a_terminal_lines_are_printed_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    r = reporter(steps=2)
    with r:
        r.update(
            1, {**pair(), **metrics(accuracy=0.75, chosen_error=0.1, rejected_error=0.2, gradient_norm=1.5, lr=1e-5)}
        )
    captured = capsys.readouterr()
    line = "update 1/2  loss 0.5  accuracy 0.75  logit 1  chosen 0.1  rejected 0.2  grad 1.5\n"
    assert captured.err == line and captured.out == ""


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


def train(factors: list[float]) -> None:
    """Report these gradient factors, and log a line after each."""
    r = reporter(steps=len(factors))
    for step, factor in enumerate(factors, start=1):
        r.update(step, pair(factor=factor, logit=9.0))
        logging.getLogger("mmalign.training.reporter").info(f"after {step}")


def test_a_warning_appears_once_and_not_at_the_first_update(log_lines: list[str]) -> None:
    train([1e-5, 0.3, 1e-5, 1e-5, 0.5])
    assert log_lines == [
        "after 1", "after 2",
        "warning: gradient factor 1e-05, mean logit 9: the loss is saturated: beta is too large",
        "after 3", "after 4", "after 5",
    ]  # fmt: skip


def test_warns_of_an_unmoved_policy_from_half_the_run(log_lines: list[str]) -> None:
    """Before, the learning rate may be warming up."""
    train([0.5] * 10)
    assert log_lines.index("after 4") + 1 == next(i for i, line in enumerate(log_lines) if "has hardly moved" in line)
    assert sum("warning" in line for line in log_lines) == 1
    log_lines.clear()
    train([0.5])
    assert log_lines == ["after 1"]


def test_no_warning_for_a_learning_loss(log_lines: list[str]) -> None:
    train([0.5, 0.3, 0.2, 0.7, 0.9])
    assert log_lines == [f"after {step}" for step in range(1, 6)]
    r = reporter(steps=4)
    for step in range(1, 5):
        r.update(step, metrics(loss=1.0))
    assert log_lines[5:] == []
