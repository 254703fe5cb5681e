"""The table of SPO's steps: who is compared, and what is counted."""

import torch

from tests.benchmarks.step_signal import row


def test_only_sure_candidates_are_compared() -> None:
    """Of four prompts the judge is sure of three; the best candidate is right for all of these, the worst for one."""
    scores = torch.tensor([[5.0, 0.0, 5.0, 0.0], [0.0, 5.0, 0.0, 0.1]])
    right = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    index, differ, sure, best, worst, change = (
        cell.strip() for cell in row(2, scores, right, "abcd", 0.4)[1:-1].split("|")
    )
    assert (index, differ, sure, best, worst) == ("3", "75.0%", "75.0%", "100.0%", "33.3%")
    assert change.startswith("+66.7 [")


def test_a_step_without_sure_candidates_has_no_difference() -> None:
    cells = row(2, torch.zeros(2, 3), torch.zeros(2, 3), "abc", 0.4).split("|")
    assert [cell.strip() for cell in cells[4:7]] == ["-", "-", "-"]
