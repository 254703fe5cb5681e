"""Images for reward models."""

import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Return five images of noise, of several sizes and modes."""
    g = torch.Generator().manual_seed(1)
    sizes = [(16, 16), (40, 24), (16, 48), (64, 64), (20, 16)]
    noise = [Image.fromarray(torch.randint(256, (h, w, 3), generator=g, dtype=torch.uint8).numpy()) for w, h in sizes]
    return [*noise[:3], noise[3].convert("RGBA"), noise[4].convert("L")]
