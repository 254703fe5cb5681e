"""Model families on the CPU, and fixtures that load them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading
from tests.helpers import first_fast

CPU = Loading(torch.device("cpu"))


def load_diffusion(folder: Path | str) -> TextToImage:
    return load_family(str(folder), CPU)


def load_vlm(folder: Path | str) -> Any:
    return load_vision_language(str(folder), CPU)


def diffusion_families(*names: str, fast: int = 1) -> Callable[..., TextToImage]:
    """Return a fixture that loads a fresh copy of each of these tiny models, named by their fixtures."""

    @pytest.fixture(params=first_fast(names, fast))
    def family(request: pytest.FixtureRequest) -> TextToImage:
        return load_diffusion(request.getfixturevalue(request.param))

    return family
