"""Work that the processes of a launch share without training: every process takes its turn, and the main one writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mmalign.training.launch import connect

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, as seen by one of them.

    Attributes:
        rank: this process's index; 0 is the main process.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes the files: the one of rank 0."""
        return self.rank == 0

    def is_mine(self, index: int) -> bool:
        """Check whether a piece of work is this process's: pieces are dealt out in turn."""
        return index % self.size == self.rank

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks; waits for all of them."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every process has put its value

    def on_main(self, function: Callable[[], T]) -> T:
        """Return the main process's result of a function in all processes; all raise its error.

        Raises:
            ValueError: the function raised one.
        """
        result: T | None = None
        error: ValueError | None = None
        if self.is_main:
            try:
                result = function()
            except ValueError as raised:
                error = raised
        # The error travels as a value: if the main process raised alone, the others would wait forever
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # of the main process


def connect_processes(rank_timeout: float) -> Processes:
    """Connect the processes of a launch; a command that was not launched is one process.

    Args:
        rank_timeout: minutes for which a process waits for the others.

    Raises:
        ValueError: the launched processes do not know of one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    accelerator = connect(rank_timeout)
    return Processes(accelerator.process_index, accelerator.num_processes)


def current_processes() -> Processes:
    """Return the processes that `connect_processes` has connected."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return Processes()
    return Processes(group.get_rank(), group.get_world_size())
