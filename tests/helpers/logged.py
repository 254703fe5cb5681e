"""Recorded log lines."""

import contextlib
import logging
from collections.abc import Iterator

from mmalign.console import on_main_process


class Recorder(logging.Handler):
    """A log handler that records the lines that the command line would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.addFilter(on_main_process)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def recorded_lines() -> Iterator[list[str]]:
    """Record the log lines of mmalign, printed or not."""
    logger, recorder = logging.getLogger("mmalign"), Recorder()
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.INFO)
    try:
        yield recorder.lines
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
