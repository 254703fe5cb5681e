"""Work that was stopped: what was written whole is kept, what was cut short is not, and a stranger's is refused."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.caches.journal import AppendLog

JOB = {"seed": 1, "settings": {"rho": 0.99}, "name": "ü"}
PIECES: list[Any] = [[{"text": "A dög.\n"}], [], ["a\u2028\U0001f415", 0.1, None]]


def filled(path: Path) -> AppendLog[Any]:
    log = AppendLog(path, JOB, Any)
    for piece in PIECES:
        log.append(piece)
    return log


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    assert filled(tmp_path / "work").entries == PIECES
    again = AppendLog(tmp_path / "work", JOB, Any)
    assert again.entries == PIECES
    again.append("more")
    assert AppendLog(tmp_path / "work", JOB, Any).entries == [*PIECES, "more"]
    again.remove()
    assert not (tmp_path / "work").exists() and AppendLog(tmp_path / "work", JOB, Any).entries == []


@pytest.mark.parametrize("kept", range(4))
def test_a_file_cut_anywhere_has_its_whole_lines(kept: int, tmp_path: Path) -> None:
    """After each byte: as many pieces as lines that end before it, and going on gives the same file."""
    filled(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 4
    begin, end = (0, *ends)[kept], ends[kept]
    for length in (begin, begin + 1, (begin + end) // 2, end - 1):
        path = tmp_path / f"cut {length}"
        path.write_bytes(content[:length])
        log = AppendLog(path, JOB, Any)
        assert log.entries == PIECES[: max(kept - 1, 0)]
        for piece in PIECES[len(log.entries) :]:
            log.append(piece)
        assert path.read_bytes() == content


def test_another_job_is_refused_by_what_differs(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    before = (tmp_path / "work").read_bytes()
    with pytest.raises(ValueError) as raised:
        AppendLog(tmp_path / "work", {**JOB, "seed": 2, "model": "x"}, Any)
    assert str(raised.value) == (
        f'{tmp_path / "work"}: was started with other settings (model, seed differ; model was null and is "x"); use '
        "the same settings to resume, or move that file away to start over"
    )
    assert (tmp_path / "work").read_bytes() == before


@pytest.mark.parametrize("content", [b"\x00\n", b"[1]\n", b"hello\nyou\n"])
def test_what_is_no_journal_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "work").write_bytes(content)
    with pytest.raises(ValueError, match="is not a record of unfinished work; move it away"):
        AppendLog(tmp_path / "work", JOB, Any)
    assert (tmp_path / "work").read_bytes() == content


@pytest.mark.parametrize("damage", [b"[[", b"\xff", b"[" * 3000, b"{}", b'["a", "b", "c"]', b"NaN"])
def test_damaged_line_is_named(damage: bytes, tmp_path: Path) -> None:
    kind = list[tuple[str, str, str]]
    AppendLog(tmp_path / "work", JOB, kind).append([("a.png", "What?", "A dog.")])
    with (tmp_path / "work").open("ab") as file:
        file.write(damage + b"\n")
    with pytest.raises(ValueError, match=r"work: line 3 is damaged .*; delete it and the lines after it"):
        AppendLog(tmp_path / "work", JOB, kind)


def test_two_runs_that_begin_together_write_one_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "work")
    with monkeypatch.context() as patched:
        patched.setattr(AppendLog, "_whole_lines", lambda log: [])  # as read before the other run began
        AppendLog(tmp_path / "work", JOB, Any)
    assert AppendLog(tmp_path / "work", JOB, Any).entries == PIECES


def test_a_line_that_another_run_is_writing_is_awaited(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    with ThreadPoolExecutor() as pool:
        with (tmp_path / "work").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b'"beg')
            file.flush()
            opened = pool.submit(AppendLog, tmp_path / "work", JOB, Any)
            with pytest.raises(TimeoutError):
                opened.result(timeout=0.2)
            file.write(b'un"\n')
        assert opened.result().entries == [*PIECES, "begun"]
