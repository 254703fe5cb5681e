"""Group of all commands of the command line, and the end of a command that fails."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from typer.core import TyperGroup

from mmalign.console import configure_logging, error_message, silence_libraries


class Commands(TyperGroup):
    """Group of all commands, in which an expected error prints one message and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of the context; MMALIGN_TRACEBACK=1 shows an error's traceback."""
        silence_libraries()
        configure_logging()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here, since typer's handling changes between versions
            print_error("stopped; the same command resumes from what was saved, if anything was")
            raise SystemExit(130) from None
        except Exception as error:
            from mmalign.atomic_io import CheckpointError
            from mmalign.training.stopping import TrainingStopped

            # A stopped run has its own exit code
            if isinstance(error, TrainingStopped):
                print_error(str(error))
                raise SystemExit(error.code) from None
            # Bugs keep their traceback, and click ends quietly for a closed pipe
            is_expected = isinstance(error, ValueError | OSError | FloatingPointError | CheckpointError)
            if not is_expected or isinstance(error, BrokenPipeError) or shows_tracebacks():
                raise
            print_error(f"error: {error_message(error)}")
            raise SystemExit(1) from None


def shows_tracebacks() -> bool:
    """Return whether MMALIGN_TRACEBACK=1 asks for the traceback of an expected error."""
    return bool(os.environ.get("MMALIGN_TRACEBACK"))


def print_error(text: str) -> None:
    """Print a message to standard error, in red on a terminal."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="red", markup=False)
