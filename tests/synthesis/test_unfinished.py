"""A preparation that is stopped at its very end: the next call completes it, and other files are never touched."""

import fcntl
import os
from pathlib import Path

import pytest

from mmalign.atomic_io import file_lock, hidden
from mmalign.synthesis import unfinished
from mmalign.synthesis.unfinished import is_written, write_final


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return the path of a preparation with unfinished work."""
    path = tmp_path / "made.parquet"
    (unfinished.unfinished(path) / "cache").mkdir(parents=True)
    return path


def test_a_stop_before_the_cleaning_is_made_up_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unfinished, "discard", stopped)
        write_final(work, lambda part: part.write_bytes(b"pairs") and None)
    assert work.read_bytes() == b"pairs" and unfinished.unfinished(work).exists()
    assert is_written(work)
    assert list(work.parent.iterdir()) == [work]


def test_a_stop_before_the_file_has_its_name_writes_it_again(work: Path) -> None:
    def stopped(part: Path) -> None:
        part.write_bytes(b"pai")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_final(work, stopped)
    hidden(work, "written").write_bytes(b"recorded, but never renamed")
    assert not is_written(work) and unfinished.unfinished(work).exists()
    write_final(work, lambda part: part.write_bytes(b"pairs") and None)
    assert list(work.parent.iterdir()) == [work]


@pytest.mark.parametrize("record", [None, b"of another file", b"\xff"])
def test_other_files_are_refused(work: Path, record: bytes | None) -> None:
    work.write_bytes(b"mine")
    if record is not None:
        hidden(work, "written").write_bytes(record)
    with pytest.raises(ValueError, match="already exists; move it away"):
        is_written(work)
    assert work.read_bytes() == b"mine" and unfinished.unfinished(work).exists()


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    path, lock = tmp_path / "made.jsonl", hidden(tmp_path / "made.jsonl", "lock")
    with lock.open("w") as file:  # as another process holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7 on elsewhere\n")
        file.flush()
        with pytest.raises(ValueError, match=r"made\.jsonl: another mmalign \(process 7 on elsewhere\)"):
            file_lock(path).__enter__()
        with file_lock(tmp_path / "other.jsonl"):
            pass
    with file_lock(path):
        assert f"process {os.getpid()} " in lock.read_text()
    assert list(tmp_path.iterdir()) == []
