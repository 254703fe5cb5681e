"""The short form of the suite, and that its comparison and its kills are real."""

import re
from pathlib import Path

import pytest
import torch

from mmalign.atomic_io import atomic_write
from tests.fault_injection.__main__ import main
from tests.fault_injection.killing import Kill, run
from tests.fault_injection.trials import state
from tests.helpers import forked

CASES = ["sft", "prepare", "dpo", "prepare own"]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # one server forks them
def test_killed_runs_leave_the_same_bits(tmp_path: Path) -> None:
    process = forked.start(main, ["--kills", "2", "--cases", *CASES], log=tmp_path / "log")
    process.join()
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0, output
    for modality in ("text_to_image", "vision_language"):
        assert re.search(rf"^{modality}: \d+ trials of 2 cases, [2-9] kills, 0 differ$", output, re.MULTILINE)


def write(folder: Path) -> str:
    with atomic_write(folder / "file") as part:
        part.write_text("new")
    return (folder / "file").read_text()


@pytest.mark.slow
def test_a_process_is_killed_at_each_moment_and_at_no_other(tmp_path: Path) -> None:
    """A file is old or new at any kill, and never in between."""
    (tmp_path / "file").write_text("old")
    ended = run(lambda: write(tmp_path), tmp_path)
    assert ended is not None and ended.result == "new"
    for kind in ("call", "change"):
        number, seen = int(ended.events[kind]), []
        assert number > 3
        for place in range(1, number + 2):
            (tmp_path / "file").write_text("old")
            stopped = run(lambda: write(tmp_path), tmp_path, Kill(kind, place))
            assert (stopped is None) == (place <= number)
            seen.append((tmp_path / "file").read_text())
        assert sorted(seen, reverse=True) == seen and {*seen} == {"old", "new"}


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(lambda: 1 // 0, tmp_path)


def test_one_other_bit_is_another_state(tmp_path: Path) -> None:
    path, weights = tmp_path / "state.pt", torch.zeros(3)
    torch.save({"optimizer": [weights], "progress": {"seconds": 1.0}}, path)
    before = state(tmp_path)
    torch.save({"optimizer": [weights], "progress": {"seconds": 2.0}}, path)
    assert state(tmp_path) == before
    weights[1] = 1e-45  # the least number above 0
    torch.save({"optimizer": [weights], "progress": {"seconds": 1.0}}, path)
    assert state(tmp_path) != before
