"""Guard of a training run: which updates are bad, and how many were left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_BAD = 10  # bad updates in a row, after which a run stops
DECAY = 0.9  # of the mean gradient norm
FIRST = 10  # updates that the mean is made of before it judges


@dataclass
class Guard:
    """Limits of an update, and the state that a checkpoint holds.

    Attributes:
        action: what happens to a bad update.
        max_loss: largest mean loss of an update; None for no limit.
        max_grad_norm_ratio: largest gradient norm, relative to its moving mean; None for no limit.
        mean_norm: moving mean of the gradient norm, over good updates with a gradient.
        number: updates in the mean.
        left_out: updates that were left out.
        in_a_row: bad updates since the last good one.
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    max_loss: float | None = None
    max_grad_norm_ratio: float | None = None
    mean_norm: float = 0.0
    number: int = 0
    left_out: int = 0
    in_a_row: int = 0

    @property
    def is_active(self) -> bool:
        """True if finite updates can be bad, which costs a wait for the GPU at every update."""
        return self.max_loss is not None or self.max_grad_norm_ratio is not None

    def problem(self, loss: float, norm: float) -> str:
        """Return what is bad about a finite update; empty for a good one, whose norm enters the mean if not 0."""
        if self.max_loss is not None and loss > self.max_loss:
            return f"the loss of {loss:.4g} is above train.guard.max_loss: {self.max_loss:g}"
        if not norm:  # as of groups of equal rewards, which do not tell the size of a gradient
            return ""
        # The first updates only fill the mean
        if self.max_grad_norm_ratio is not None and self.number >= FIRST:
            ratio = norm / self.mean_norm
            if ratio > self.max_grad_norm_ratio:
                return (
                    f"the gradient norm of {norm:.4g} is {ratio:.3g} times its mean (train.guard.max_grad_norm_ratio)"
                )
        # A plain mean of the first updates, then a moving one
        decay = min(DECAY, self.number / (self.number + 1))
        self.mean_norm, self.number = decay * self.mean_norm + (1 - decay) * norm, self.number + 1
        return ""

    def leave_out(self) -> bool:
        """Count a bad update; return False after too many in a row."""
        self.left_out, self.in_a_row = self.left_out + 1, self.in_a_row + 1
        return self.in_a_row < MAX_BAD

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, which follows a good update."""
        return {"mean_norm": self.mean_norm, "number": self.number, "left_out": self.left_out}

    def load(self, state: dict[str, float]) -> None:
        """Load the state of a checkpoint."""
        self.mean_norm, self.number, self.left_out = state["mean_norm"], int(state["number"]), int(state["left_out"])
        self.in_a_row = 0
        if not self.mean_norm:  # of a checkpoint whose mean held updates without a gradient
            self.number = 0
