"""Flow-matching models, and sources of small images for those that edit."""

from pathlib import Path

import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_image_edit_plus

from mmalign.families.base import TextToImage
from tests.helpers import Folders, first_fast, flow_models
from tests.helpers.flow_pipelines import SIZE
from tests.helpers.loading import load_diffusion


@pytest.fixture
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Qwen-Image-Edit's pipelines scale a source to this size, and not to a megapixel."""
    monkeypatch.setattr(qwen_image_edit, "calculate_dimensions", lambda *_: (*SIZE, None))
    monkeypatch.setattr(qwen_image_edit_plus, "VAE_IMAGE_SIZE", SIZE.width * SIZE.height)
    monkeypatch.setattr(qwen_image_edit_plus, "CONDITION_IMAGE_SIZE", 4 * SIZE.width * SIZE.height)


@pytest.fixture(params=first_fast(flow_models.BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(name: str, flow_folders: Folders) -> Path:
    return flow_folders(name)


@pytest.fixture
def family(path: Path) -> TextToImage:
    return load_diffusion(path)
