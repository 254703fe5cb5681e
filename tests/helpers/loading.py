"""Model families on the CPU, and fixtures that load them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading
from tests.helpers import first_fast

CPU = Loading(torch.device("cpu"))
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


def load_diffusion(folder: Path | str) -> TextToImage:
    return load_family(str(folder), CPU)


def load_vlm(folder: Path | str) -> Any:
    return load_vision_language(str(folder), CPU)


def logits(model: Any, processor: Any) -> Tensor:
    """Return the logits of a model of transformers for a question about a red image."""
    image = Image.new("RGB", (32, 32), "red")
    text = processor.apply_chat_template(QUESTION) if processor.chat_template else "<image>what?"
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    return model.eval()(**inputs).logits


def diffusion_families(*names: str, fast: int = 1) -> Callable[..., TextToImage]:
    """Return a fixture that loads a fresh copy of each of these tiny models, named by their fixtures."""

    @pytest.fixture(params=first_fast(names, fast))
    def family(request: pytest.FixtureRequest) -> TextToImage:
        return load_diffusion(request.getfixturevalue(request.param))

    return family
