"""Console output: plain log lines, progress bars and messages of errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30

logger = logging.getLogger(__name__)


def on_main_process(_: logging.LogRecord | None = None) -> bool:
    """Return whether this is the main process, by accelerate's state or the launcher's RANK (a log filter)."""
    if "accelerate.state" in sys.modules:  # without this test the import would load torch
        from accelerate.state import PartialState, is_initialized

        if is_initialized():
            return bool(PartialState().is_main_process)
    return os.environ.get("RANK", "0") == "0"


class LineHandler(logging.Handler):
    """Log handler that prints plain lines on the main process only.

    Lines go to standard output, or to `console` if it is set. Write errors reach the caller, as those of print do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console: Console | None = None
        self.addFilter(on_main_process)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as plain text, without reading brackets and colons as markup."""
        line = self.format(record)
        if self.console is None:
            print(line, flush=True)
        else:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


_ROOT = logging.getLogger("mmalign")
_HANDLER = LineHandler()


def configure_logging() -> None:
    """Print mmalign's log as plain lines, unless the logger `mmalign` already has a handler."""
    if _ROOT.handlers:
        return
    _ROOT.addHandler(_HANDLER)
    _ROOT.propagate = False  # logging.info() in a library adds a root handler, which would print each line again
    if _ROOT.level == logging.NOTSET:
        _ROOT.setLevel(logging.INFO)


def print_through(console: Console | None) -> None:
    """Print log lines on a progress bar's console while the bar is shown; None ends it."""
    _HANDLER.console = console


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Silence mmalign's loggers, for calls whose lines would repeat what the caller logs."""
    level = _ROOT.level
    _ROOT.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        _ROOT.setLevel(level)


def tracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar on a terminal and else with a log line every half minute.

    Only the main process shows them, for more than one item.

    Args:
        items: the items.
        description: the work, in the imperative.
        total: number of items, if they have no length.
    """
    number = len(items) if isinstance(items, Sized) else total
    assert number is not None, "items without a length need a total"
    console = Console(stderr=True)
    if number < 2 or not on_main_process():
        yield from items
    elif console.is_terminal:
        yield from track(items, description=description, total=number, transient=True, console=console)
    else:
        yield from _logged(items, description, number)


def _logged(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS_BETWEEN_LINES:
            rate, last = done / (now - started), now
            minutes = (total - done) / rate / 60
            logger.info(f"{description}: {done:,} of {total:,}, {rate:.3g} a second, {minutes:,.0f} minutes left")
        yield item


def error_message(error: Exception) -> str:
    """Return the message of an error; an error of the operating system also gets a remedy."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno is None or error.strerror is None:  # raised by a library
        return " ".join(str(error).split())
    if error.strerror != os.strerror(error.errno):  # raised by mmalign, with its own message
        return error.strerror
    prefix = f"{error.filename}: " if error.filename else ""
    return (
        f"{prefix}{error.strerror}; free disk space or give a writable path, and run the same command again to resume"
    )


def silence_libraries() -> None:
    """Silence the libraries' warnings and progress bars, which would bury the command's messages."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(accelerate|huggingface_hub|diffusers|peft|torch\.utils\.data)\."
    )
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Imports of torchao and of bitsandbytes on a CPU warn, and mmalign names the attention itself.
    for library in ("torch.utils._pytree", "bitsandbytes", "xformers"):
        logging.getLogger(library).setLevel("ERROR")
    # The logger's level is for libraries already imported, the environment variable for later imports. Diffusers also
    # logs the errors that it raises.
    for library, level in (("transformers", "error"), ("diffusers", "critical")):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", level)
        logging.getLogger(library).setLevel(level.upper())
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
