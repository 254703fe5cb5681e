"""Files of models that could run code: refused, or read as tensors alone, for every kind of model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import Recipe
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading
from mmalign.reading.weights import RefusedFileError, tensors_only
from mmalign.rewards import load_reward_model
from tests.helpers import Folders
from tests.helpers.hostile import Hostile

CPU = torch.device("cpu")
ALLOW = "set allow_pickle: true in the recipe"
Load = Callable[[Path, bool], object]


def family(path: Path, allow: bool) -> object:
    return load_family(str(path), Loading(CPU, allow_pickle=allow))


def autoencoder(path: Path, allow: bool) -> object:
    return load_family("models/tiny_sd", Loading(CPU, vae=str(path / "vae"), allow_pickle=allow))


def vision_language(path: Path, allow: bool) -> object:
    return load_vision_language(str(path), Loading(CPU, allow_pickle=allow))


def reward(name: str) -> Load:
    return lambda path, allow: load_reward_model(name, str(path), allow_pickle=allow)


# (the model's folder, its file of weights, the pickle that the library would take instead, a loader)
KINDS: dict[str, tuple[str, str, str, Load]] = {
    "denoiser": ("sd15", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", family),
    "encoder": ("sd15", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", family),
    "autoencoder": ("sd15", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", autoencoder),
    "vision-language": ("llava", "model.safetensors", "pytorch_model.bin", vision_language),
    "vlm": ("llava", "model.safetensors", "pytorch_model.bin", reward("vlm")),
    "open_clip": ("clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", reward("open_clip")),
    "open_clip pth": ("clip", "open_clip_model.safetensors", "open_clip_pytorch_model.pth", reward("open_clip")),
    "CLIP": ("transformers clip", "model.safetensors", "pytorch_model.bin", reward("transformers_clip")),
}


@pytest.fixture(params=KINDS)
def pickled(
    request: pytest.FixtureRequest, diffusion_folders: Folders, vlm_folders: Folders, tmp_path: Path
) -> tuple[Path, Path, Load]:
    """Return a model whose weights are a pickle, the pickle, and the model's loader."""
    name, weights, pickle, load = KINDS[request.param]
    folder = tmp_path / "model"
    shutil.copytree(vlm_folders(name) if name == "llava" else diffusion_folders(name), folder)
    tensors = load_file(folder / weights)
    (folder / weights).unlink()
    torch.save(tensors, folder / pickle)
    return folder, folder / pickle, load


def test_pickles_are_refused_unless_allowed(pickled: tuple[Path, Path, Load]) -> None:
    folder, file, load = pickled
    with pytest.raises(ValueError) as raised:
        load(folder, False)
    assert f"{file} is a pickle" in str(raised.value) and ALLOW in str(raised.value)
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    load(folder, True)


def test_allowed_pickles_hold_tensors_alone(pickled: tuple[Path, Path, Load], tmp_path: Path) -> None:
    folder, file, load = pickled
    torch.save({"a": Hostile(tmp_path / "ran")}, file)
    for content in (file.read_bytes(), b"no pickle", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError) as raised:
            load(folder, True)
        assert f"{file} is damaged, or holds more than tensors" in str(raised.value)
        assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_name_pickles(diffusion_folders: Folders, vlm_folders: Folders, tmp_path: Path) -> None:
    """An index of safetensors that names other files is no way around."""
    for name, weights, index, load in (
        ("sd15", *(f"unet/diffusion_pytorch_model.safetensors{end}" for end in ("", ".index.json")), family),
        ("llava", "model.safetensors", "model.safetensors.index.json", vision_language),
    ):
        folder = tmp_path / name
        shutil.copytree(vlm_folders(name) if name == "llava" else diffusion_folders(name), folder)
        tensors = load_file(folder / weights)
        (folder / weights).unlink()
        shard = (folder / weights).with_name("shard.bin")
        torch.save(tensors, shard)
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}))
        with pytest.raises(ValueError, match=r"shard\.bin is a pickle"):
            load(folder, False)


def test_damaged_safetensors_are_named(diffusion_folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(diffusion_folders("clip"), folder)
    file = folder / "open_clip_model.safetensors"
    torch.save({"a": torch.ones(1)}, file)  # a pickle under another name
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_reward_model("open_clip", str(folder))


def test_a_model_s_own_code_never_runs(diffusion_folders: Folders, vlm_folders: Folders, tmp_path: Path) -> None:
    """A tokenizer and a processor with classes of their own, and a config that asks for trust."""
    evil = "import pathlib\npathlib.Path({!r}).touch()\nclass Evil: pass\n"
    for name, load, options in (
        ("clip", reward("open_clip"), {"tokenizer_class": "Evil"}),
        ("llava", vision_language, {"tokenizer_class": "Evil", "processor_class": "Evil"}),
    ):
        folder, mark = tmp_path / name, tmp_path / f"{name}-ran"
        shutil.copytree(vlm_folders(name) if name == "llava" else diffusion_folders(name), folder)
        (folder / "evil.py").write_text(evil.format(str(mark)))
        auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}
        for file in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "config.json"):
            if (folder / file).is_file():
                content = json.loads((folder / file).read_text())
                (folder / file).write_text(json.dumps({**content, "auto_map": auto_map, **options}))
        config = folder / "open_clip_config.json"
        if config.is_file():
            content = json.loads(config.read_text())
            content["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"trust_remote_code": True}}
            config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="it brings its own code, which mmalign never runs"):
            load(folder, True)
        assert not mark.exists()


def test_the_libraries_are_as_before_afterwards() -> None:
    before = torch.load
    with pytest.raises(RefusedFileError), tensors_only(False):
        torch.load("weights.pt")
    assert torch.load is before
    assert Recipe.model_fields["allow_pickle"].default is False
