"""Judge that is a Python function from a batch of images and prompts to scores.

`path` names the function as "module:function", of an installed module or of a file in the current folder. The log names
the file before any of its code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmalign.registry import import_function
from mmalign.rewards import BatchConfig as Config
from mmalign.rewards import as_scores

REMEDY = "correct the function (MMALIGN_TRACEBACK=1 shows the line of an error)"


@dataclass(frozen=True)
class FunctionJudge:
    """Judge by a user's function, which is called with at most `batch_size` images at a time."""

    name: str
    function: Callable[[list[Image.Image], list[str]], object]
    batch_size: int

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; `t` is not read.

        Raises:
            ValueError: the function raises an error, or returns anything but one finite number for each image.
        """
        parts = [torch.empty(0)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            texts = list(prompts[rows])
            try:
                values = self.function(list(images[rows]), list(texts))
            except Exception as error:
                raise ValueError(
                    f"reward function: {self.name} failed for {len(texts)} images, the first with the prompt "
                    f"{texts[0][:80]!r} ({type(error).__name__}: {error}); {REMEDY}"
                ) from error
            parts.append(as_scores(f"reward function: {self.name}", values, texts, REMEDY))
        return torch.cat(parts)


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


def _imported(key: str, path: str) -> Callable[[list[Image.Image], list[str]], object]:
    return import_function(key, path, ["images", "prompts"], "one number for each image")
