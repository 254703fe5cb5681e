"""Judge that is a Python function from a batch of images and prompts to scores.

`path` names the function as "module:function", of an installed module or of a file in the current folder. The log names
the file before any of its code runs. For responses it is a function of images, prompts and responses, where each row
has a list of images; a fourth argument named `truths` gets the texts of each row's true answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType

import torch
from PIL import Image
from torch import Tensor

from mmalign.registry import import_callable, import_function
from mmalign.rewards import BatchConfig, ResponseJudge, Shown, Truths, as_scores, in_batches

TRUTHS = "truths"  # name of the argument for true answers
REMEDY = "correct the function (MMALIGN_TRACEBACK=1 shows the line of an error)"


class Config(BatchConfig):
    """Options of the calls."""

    of_responses = True
    runs_path = True

    def reads_truths(self, path: str) -> bool:
        """Return whether the function has an argument for them."""
        return _takes_truths(import_callable("reward.path", path))


@dataclass(frozen=True)
class FunctionJudge:
    """Judge by a user's function, which is called with at most `batch_size` rows at a time."""

    name: str
    function: Callable[..., object]
    batch_size: int

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; `t` is not read.

        Raises:
            ValueError: the function raises an error, or returns anything but one finite number for each image.
        """
        return self._scores(images, prompts)

    def score_responses(
        self, images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None
    ) -> Tensor:
        """Return scores [N] of responses, float32, on the CPU; the errors are those of images.

        Raises:
            ValueError: the function reads true answers, and the caller has none.
        """
        if not _takes_truths(self.function):
            return self._scores(images, prompts, responses)
        if truths is None:
            raise ValueError(f"reward function: {self.name} reads {TRUTHS}, which there are none of here; {REMEDY}")
        return self._scores(images, prompts, responses, truths)

    def _scores(self, images: Sequence[object], prompts: Sequence[str], *more: Sequence[object]) -> Tensor:
        """Return scores [N]; the function gets the rows of all columns.

        Raises:
            ValueError: the function raises an error, or returns anything but one finite number for each row.
        """

        def score(rows: slice) -> Tensor:
            texts = list(prompts[rows])
            try:
                values = self.function(*(list(column[rows]) for column in (images, prompts, *more)))
            except Exception as error:
                raise ValueError(
                    f"reward function: {self.name} failed for {len(texts)} prompts, the first of which is "
                    f"{texts[0][:80]!r} ({type(error).__name__}: {error}); {REMEDY}"
                ) from error
            return as_scores(f"reward function: {self.name}", values, texts, REMEDY)

        return in_batches(score, len(prompts), self.batch_size)


def check(key: str, path: str) -> None:
    """Import the function.

    Raises:
        ValueError: it cannot be imported, or takes other arguments.
    """
    _imported(key, path)


def load(path: str, device: torch.device, cfg: Config) -> FunctionJudge:
    """Import the function that `path` names.

    Raises:
        ValueError: it cannot be imported, or takes other arguments.
    """
    return FunctionJudge(path, _imported("reward.path", path), cfg.batch_size)


def load_responses(path: str, device: torch.device, cfg: Config) -> ResponseJudge:
    """Import the function that `path` names, of images, prompts and responses.

    Raises:
        ValueError: it cannot be imported, or takes other arguments.
    """
    return FunctionJudge(path, _of_responses("reward.path", path), cfg.batch_size).score_responses


def check_responses(key: str, path: str) -> None:
    """Import the function of images, prompts and responses.

    Raises:
        ValueError: it cannot be imported, or takes other arguments.
    """
    _of_responses(key, path)


def _takes_truths(function: Callable[..., object]) -> bool:
    is_plain = not isinstance(function, BuiltinFunctionType | type)
    return is_plain and TRUTHS in inspect.signature(function).parameters


def _of_responses(key: str, path: str) -> Callable[..., object]:
    arguments, function = ["images", "prompts", "responses"], import_callable(key, path)
    if _takes_truths(function):
        arguments.append(TRUTHS)
    return import_function(key, path, arguments, "one number for each response")


def _imported(key: str, path: str) -> Callable[..., object]:
    return import_function(key, path, ["images", "prompts"], "one number for each image")
