"""Log lines and progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, track

T = TypeVar("T")


def silent(_: str) -> None:
    """Take a line of text, and say nothing: for the processes beside the main one."""


def tracked(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, one after another, with a bar where there is a terminal and more than one of them."""
    console = Console(stderr=True)
    quiet = len(items) < 2 or not console.is_terminal
    return track(items, description=description, transient=True, console=console, disable=quiet)


def progress_bar(accelerator: Any) -> Progress:
    """A bar of the main process, where there is a terminal."""
    console = Console(stderr=True)
    return Progress(transient=True, console=console, disable=not (accelerator.is_main_process and console.is_terminal))
