"""Log lines: where they are printed, by which process, and what leaves them alone."""

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from mmalign import console
from mmalign.console import configure_logging, muted, on_main_process
from mmalign.training.reporter import Reporter

logger = logging.getLogger("mmalign.training.run")
LINE = "dropped 1 image: [/data]/a[bold] :smile:.png"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The logger `mmalign` as an import leaves it."""
    root = logging.getLogger("mmalign")
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    root.handlers[:], root.propagate = [], True
    root.setLevel(logging.NOTSET)
    yield root
    root.handlers[:], root.propagate = handlers, propagate
    root.setLevel(level)


def test_a_line_is_printed_as_it_is(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, without markup, and whatever handler a library gives the root logger."""
    configure_logging()
    configure_logging()
    logger.info(LINE)
    logger.warning("100%")
    assert capsys.readouterr() == (f"{LINE}\n100%\n", "") and not root.propagate


def test_a_handler_of_the_users_is_left_alone(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    root.addHandler(logging.NullHandler())
    configure_logging()
    logger.info(LINE)
    assert capsys.readouterr() == ("", "") and root.propagate and root.level == logging.NOTSET


def test_a_level_of_the_users_is_kept(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    root.setLevel(logging.WARNING)
    configure_logging()
    logger.info("information")
    logger.warning("warning")
    assert capsys.readouterr().out == "warning\n"


def test_lines_appear_on_the_bars_console(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    tracker: Any = SimpleNamespace(is_main_process=True, trackers=[])
    with Reporter(tracker, steps=1, every=1):
        logger.info(LINE)
    logger.info("end")
    assert capsys.readouterr() == ("end\n", f"{LINE}\n")


def test_muted_lines_are_not_printed(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    with pytest.raises(KeyError), muted():
        logger.critical("inside")
        raise KeyError
    logger.info("outside")
    assert capsys.readouterr().out == "outside\n"


def test_errors_of_writing_reach_the_caller(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: str) -> int:
            raise OSError("No space left on device")

    configure_logging()
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        logger.info(LINE)


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """No state of accelerate, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("with_accelerate", [True, False])
def test_rank_of_the_launcher_decides(with_accelerate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_accelerate:
        monkeypatch.delitem(sys.modules, "accelerate.state")
    record = logging.makeLogRecord({})
    assert on_main_process(record)
    monkeypatch.setenv("RANK", "1")
    assert not on_main_process(record)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("index", [0, 1])
def test_rank_of_accelerate_decides_once_known(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says."""
    Accelerator(cpu=True)
    monkeypatch.setattr(PartialState(), "process_index", index)
    monkeypatch.setenv("RANK", str(1 - index))
    assert on_main_process(logging.makeLogRecord({})) == (index == 0)


def test_items_pass_a_bar_unchanged() -> None:
    assert list(console.tracked([3, 1, 2], "count")) == [3, 1, 2]


def test_progress_is_logged_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "mmalign"):
        assert list(console.tracked((i for i in range(6)), "encode images", 6)) == list(range(6))
    assert caplog.messages == [
        "encode images: 1 of 6, 0.025 a second, 3 minutes left",
        "encode images: 3 of 6, 0.0375 a second, 1 minutes left",
        "encode images: 5 of 6, 0.0417 a second, 0 minutes left",
    ]
