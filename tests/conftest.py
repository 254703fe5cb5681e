"""Shared fixtures. Heavy libraries are imported inside the fixtures that need them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.helpers import STANDING_VLMS, Folders, first_fast

if TYPE_CHECKING:
    from mmalign.families.base import TextToImage, VisionLanguage
    from tests.helpers.linear_runs import Run


def pytest_collection_finish() -> None:
    """Leave the million objects of imported libraries out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _written_at_leisure() -> Iterator[None]:
    """Leave written files to the system's cache: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def diffusion_folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the folder of a tiny diffusion or CLIP model by name, written at the first request."""

    @cache
    def folder(name: str) -> Path:
        from tests.helpers import clip_models, diffusion_models

        path = tmp_path_factory.mktemp("models") / name
        if name == "step judge":
            return clip_models.step_aware(path, folder("clip"))
        writers = {
            "sd15": diffusion_models.stable_diffusion,
            "sd2": lambda path: diffusion_models.stable_diffusion(path, "v_prediction"),
            "sdxl": diffusion_models.sdxl,
            "clip": clip_models.clip,
            "transformers clip": clip_models.transformers_clip,
        }
        return writers[name](path)

    return folder


@pytest.fixture(scope="session")
def flow_folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the folder of a tiny flow-matching model by name, written at the first request."""

    @cache
    def folder(name: str) -> Path:
        from tests.helpers import flow_models

        return flow_models.write(name, tmp_path_factory.mktemp("models") / name)

    return folder


@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the folder of a tiny vision-language model by type, written at the first request."""

    @cache
    def folder(name: str) -> Path:
        from tests.helpers import vlm_models

        return vlm_models.write(name, tmp_path_factory.mktemp("models") / name)

    return folder


def tiny_model(folders: str, name: str) -> Any:
    """Return a fixture for the folder of one model."""

    @pytest.fixture(scope="session")
    def folder(request: pytest.FixtureRequest) -> Path:
        path: Path = request.getfixturevalue(folders)(name)
        return path

    return folder


tiny_sd15 = tiny_model("diffusion_folders", "sd15")
tiny_sd2 = tiny_model("diffusion_folders", "sd2")
tiny_sdxl = tiny_model("diffusion_folders", "sdxl")
tiny_sd3 = tiny_model("flow_folders", "sd3")
tiny_flux = tiny_model("flow_folders", "flux")
tiny_qwen_image = tiny_model("flow_folders", "qwen_image")
tiny_clip = tiny_model("diffusion_folders", "clip")
tiny_transformers_clip = tiny_model("diffusion_folders", "transformers clip")
tiny_step_judge = tiny_model("diffusion_folders", "step judge")


@pytest.fixture
def sd(tiny_sd15: Path) -> TextToImage:
    """Load the tiny Stable Diffusion 1.x anew."""
    from tests.helpers.loading import load_diffusion

    return load_diffusion(tiny_sd15)


@pytest.fixture(params=first_fast(STANDING_VLMS))
def vlm(request: pytest.FixtureRequest, vlm_folders: Folders) -> VisionLanguage:
    """Load each of the standing vision-language models anew."""
    from tests.helpers.loading import load_vlm

    return load_vlm(vlm_folders(request.param))


@pytest.fixture
def llava(vlm_folders: Folders) -> VisionLanguage:
    from tests.helpers.loading import load_vlm

    return load_vlm(vlm_folders("llava"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if it reads weights."""
    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import PreTrainedModel

    for cls in (DiffusionPipeline, ModelMixin, PreTrainedModel):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("open_clip.create_model_from_pretrained", lambda *_, **__: pytest.fail("a judge was loaded"))


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Return a function that begins runs of the loop on a linear network, all from the same weights."""
    from accelerate.state import AcceleratorState

    from tests.helpers import linear_runs

    AcceleratorState._reset_state(reset_partial_state=True)
    yield linear_runs.begin
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Record the lines that mmalign logs during a test."""
    from tests.helpers.logged import recorded_lines

    with recorded_lines() as lines:
        yield lines


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the reference's type at every pass through it."""
    from mmalign.policy import Policy

    seen: list[str] = []
    ask = Policy.on_reference

    def noted(policy: Policy, run: Any) -> Any:
        seen.append(type(policy.reference).__name__)
        return ask(policy, run)

    monkeypatch.setattr(Policy, "on_reference", noted)
    return seen
