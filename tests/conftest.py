"""Tiny models, made once a session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import linear_runs
import pytest
import tiny
import tiny_flow
import tiny_vlm
import torch
from accelerate.state import AcceleratorState

from mmalign.families import Loading, VisionLanguage, load_vision_language


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("models") / "sd2", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def flow_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny flow-matching model by its name, written when first asked for."""
    there: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in there:
            there[name] = tiny_flow.write(name, tmp_path_factory.mktemp("models") / name)
        return there[name]

    return folder


@pytest.fixture(scope="session")
def tiny_sd3(flow_folders: Callable[[str], Path]) -> Path:
    return flow_folders("sd3")


@pytest.fixture(scope="session")
def tiny_flux(flow_folders: Callable[[str], Path]) -> Path:
    return flow_folders("flux")


@pytest.fixture(scope="session")
def tiny_qwen_image(flow_folders: Callable[[str], Path]) -> Path:
    return flow_folders("qwen_image")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def tiny_transformers_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.transformers_clip(tmp_path_factory.mktemp("models") / "transformers clip")


@pytest.fixture(scope="session")
def tiny_step_judge(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.step_aware(tmp_path_factory.mktemp("models") / "step judge", tiny_clip)


@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny vision-language model by its type, written when first asked for."""
    there: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in there:
            there[name] = tiny_vlm.write(name, tmp_path_factory.mktemp("models") / name)
        return there[name]

    return folder


@pytest.fixture(params=list(tiny_vlm.STANDING))
def vlm(request: pytest.FixtureRequest, vlm_folders: Callable[[str], Path]) -> VisionLanguage:
    """Each of the standing vision-language models, loaded anew."""
    return load_vision_language(str(vlm_folders(request.param)), Loading(torch.device("cpu")))


@pytest.fixture
def llava(vlm_folders: Callable[[str], Path]) -> VisionLanguage:
    return load_vision_language(str(vlm_folders("llava")), Loading(torch.device("cpu")))


@pytest.fixture
def start() -> Iterator[Callable[..., linear_runs.Run]]:
    """Begins runs of the loop on a linear network, all from the same weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield linear_runs.begin
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the reference was run for."""
    from mmalign.policy import Policy

    seen: list[str] = []
    ask = Policy.on_reference

    def noted(policy: Policy, run: Any) -> Any:
        seen.append(type(policy.reference).__name__)
        return ask(policy, run)

    monkeypatch.setattr(Policy, "on_reference", noted)
    return seen
