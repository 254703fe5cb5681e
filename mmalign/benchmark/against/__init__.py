"""Other programs' training steps, one file each: on the model and the pairs that our run has, from its own loader.

The file's name is what `mmalign bench --against NAME` takes. A file offers what `Peer` says. Its loss must be that of
our method on the same pairs under the same draws; `mmalign bench` compares both, and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmalign import registry
from mmalign.config import Recipe, Train
from mmalign.policy import Policy
from mmalign.rng import Draws

if TYPE_CHECKING:
    from mmalign.benchmark.runs import Run


class Peer(Protocol):
    """What a file in this folder must offer; a module satisfies it."""

    @property
    def about(self) -> str:
        """One sentence on how that program makes its step."""

    @property
    def own(self) -> Sequence[str]:
        """Settings of the recipe for the peer's side alone, which make it run as that program does."""

    def available(self) -> None:
        """Look for what the file needs, before anything is made.

        Raises:
            ValueError: a package is missing; how to install it.
        """

    def check(self, recipe: Recipe, processes: int) -> None:
        """Refuse what that program has no step for, or has none here that so many processes share.

        Raises:
            ValueError: why, and what to do.
        """

    def alike(self, recipe: Recipe) -> Sequence[str]:
        """Settings of the recipe, for both sides, without which they would compute different things.

        The recipe has passed `check`.
        """

    def prepare(self, policy: Policy) -> None:
        """What is done to the networks before the first step."""

    def optimizer(self, parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
        """That program's optimizer; None for the recipe's."""

    def loss(self, run: Run, batch: Any, draws: Draws, switch: Callable[[str], None]) -> Tensor:
        """The mean loss of a batch as the loader gives it; `switch` is told which part of the step begins."""


def names() -> list[str]:
    """The programs there are."""
    return registry.names(__name__)


def find(name: str) -> Peer:
    """The module of a program's step.

    Raises:
        ValueError: there is no such file.
    """
    return cast(Peer, registry.find([__name__], name, "--against: there is no step of"))
