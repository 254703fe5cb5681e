"""Stopping of a training run by a signal or a time limit, at an update that it can resume from."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from mmalign.console import on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator

STDERR = 2  # file descriptor
TIME_LIMIT_CODE = 75  # exit code of a run that reached its time limit ("temporary failure" of sysexits.h)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class TrainingStopped(Exception):
    """End of an unfinished run whose state was saved; `code` is the command's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Request to save and stop, made by SIGTERM, SIGUSR1, the first SIGINT or a time limit.

    The second SIGINT raises KeyboardInterrupt at once. Outside of the main thread only the time limit counts.

    Args:
        hours: the time limit from now; None for none.
    """

    def __init__(self, hours: float | None = None) -> None:
        self.hours = hours
        self.deadline = time.monotonic() + 3600 * hours if hours is not None else float("inf")
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        again = "; once more stops at once" if number == signal.SIGINT else ""
        if on_main_process():  # written past Python's buffers: logging may be in the middle of a line
            os.write(STDERR, f"{self.signal.name}: saving after this update{again}\n".encode())

    def exit_code(self, accelerator: Accelerator) -> int:
        """Return the exit code of a run that was asked to stop, on any process; 0 if none was."""
        # As in a shell: 128 and the signal's number
        code = 128 + self.signal if self.signal is not None else 0
        code = code or (TIME_LIMIT_CODE if time.monotonic() >= self.deadline else 0)
        # A signal may reach one process alone, and all must stop at the same update
        if accelerator.num_processes > 1:
            import torch  # here, since the command line reads this module to tell of a stopped run

            codes = accelerator.gather(torch.tensor([code], device=accelerator.device))
            code = int(codes.max())
        return code

    def stopped(self, code: int, step: int, name: str) -> TrainingStopped:
        """Return the error of a run that saved the checkpoint `name` after update `step`, and ends with this code."""
        limit = code == TIME_LIMIT_CODE
        reason = f"limits.hours: {self.hours:g} reached" if limit else signal.Signals(code - 128).name
        return TrainingStopped(
            f"train: stopped after update {step} ({reason}); the same command resumes from {name}", code
        )
