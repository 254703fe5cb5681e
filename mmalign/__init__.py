"""Preference alignment of text-to-image and vision-language models.

    recipe = mmalign.load_recipe("text_to_image/quickstart", ["train.seed=1"])
    mmalign.train(recipe)
    result = mmalign.evaluate(recipe)
    page = mmalign.gallery(recipe)
    folder = mmalign.export(recipe, to="comfyui")

Importing the package loads nothing heavy; `mmalign.losses` needs torch alone.

These functions log to the logger `mmalign`, and the main process prints its lines to standard output. To send the lines
elsewhere, give that logger a handler before the first call: your own, or `logging.NullHandler()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmalign.commands.bench import bench
    from mmalign.commands.cache import cache
    from mmalign.commands.compare import compare
    from mmalign.commands.evaluate import evaluate
    from mmalign.commands.explain import explain
    from mmalign.commands.export import export
    from mmalign.commands.gallery import gallery
    from mmalign.commands.init import init
    from mmalign.commands.load_recipe import load_recipe
    from mmalign.commands.plan import plan
    from mmalign.commands.prepare import prepare
    from mmalign.commands.quickstart import quickstart
    from mmalign.commands.show import show
    from mmalign.commands.train import train

__version__ = "0.1.0"
__all__ = [
    "bench",
    "cache",
    "compare",
    "evaluate",
    "explain",
    "export",
    "gallery",
    "init",
    "load_recipe",
    "plan",
    "prepare",
    "quickstart",
    "show",
    "train",
]


def __getattr__(name: str) -> Callable[..., object]:
    """Return the function of a command, which is imported at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    command: Callable[..., object] = getattr(importlib.import_module(f"mmalign.commands.{name}"), name)

    @wraps(command)
    def call(*args: object, **options: object) -> object:
        from mmalign.console import configure_logging

        configure_logging()
        return command(*args, **options)

    return call
