"""Whose a cache is: what was made of another model, by other settings or of other data is never taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.commands import cache
from mmalign.commands.load_recipe import load_recipe
from mmalign.modalities import loading
from tests.helpers import Folders, data_files, first_fast
from tests.helpers.runs import EPOCH, assert_close, pictures, responses, trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    first_fast(
        [
            "train.seed=1",
            "train.precision=bfloat16",
            "train.compile=true",
            "method.loss=ipo",
            "train.pack_responses=off",
        ]
    ),
)
def test_scores_of_other_settings_are_not_taken(
    override: str, vlm_folders: Folders, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made anew, in a folder of their own; other settings, such as beta, share them."""
    content = responses(vlm_folders("llava"), tmp_path, "out", data={"format": "realign", "cache": f"{tmp_path}/all"})
    cache.cache(load_recipe(content))
    asked.clear()
    cache.cache(load_recipe(content, ["method.beta=0.3", "train.lr=1.0", "model.lora.rank=1"]))
    assert asked == []
    monkeypatch.setattr(loading, "compile_blocks", lambda blocks: None)  # that it is asked for is enough
    monkeypatch.setattr("mmalign.families.compile.check", lambda device: None)
    cache.cache(load_recipe(content, [override]))
    assert asked and len(list((tmp_path / "all" / "reference").iterdir())) == 2


def test_scores_of_another_executor_are_not_taken(
    vlm_folders: Folders, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    cache.cache(load_recipe(content))
    asked.clear()
    monkeypatch.setattr(cache, "backend_name", lambda _: "another")
    cache.cache(load_recipe(content))
    assert asked and len(list((tmp_path / "out" / "cache" / "reference").iterdir())) == 2


def other_template(folder: Path) -> None:
    """A chat template that tells the model something first."""
    file = folder / "chat_template.jinja"
    file.write_text("You are a careful assistant.\n" + file.read_text())


def other_tokenizer(folder: Path) -> None:
    """The same words as other tokens."""
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def other_pixels(folder: Path) -> None:
    """An image processor that takes another mean off."""
    file = folder / "processor_config.json"
    output = json.loads(file.read_text())
    output["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    file.write_text(json.dumps(output))


def other_layer(folder: Path) -> None:
    """The features of another layer of the same tower."""
    edit(folder / "config.json", vision_feature_layer=-1)


def other_rope(folder: Path) -> None:
    """The same decoder with other positions."""
    file = folder / "config.json"
    output = json.loads(file.read_text())
    output["text_config"]["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    file.write_text(json.dumps(output))


def other_weight(folder: Path, part: str = "embed_tokens") -> None:
    """One number of the decoder's largest matrix; no sample of every thousandth would see it."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    name = max((name for name in weights if part in name), key=lambda name: weights[name].numel())
    weights[name].view(-1)[1] += 1e-3
    save_file(weights, file, {"format": "pt"})


def other_projector(folder: Path) -> None:
    """One number of what makes features of the tower's states."""
    other_weight(folder, "multi_modal_projector")


def other_tower(folder: Path) -> None:
    """One number of the tower."""
    other_weight(folder, "vision_tower")


def edit(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "kinds"),
    first_fast(
        [
            (other_template, ["reference"]),
            (other_tokenizer, ["features", "reference"]),
            (other_pixels, ["features", "reference"]),
            (other_layer, ["features", "reference"]),
            (other_rope, ["features", "reference"]),
            (other_weight, ["reference"]),
            (other_projector, ["features", "reference"]),
            (other_tower, ["features", "reference"]),
        ]
    ),
)
def test_scores_of_a_model_that_was_changed_are_not_taken(
    change: Callable[[Path], None], kinds: list[str], vlm_folders: Folders, tmp_path: Path, asked: list[str]
) -> None:
    """In the same folder, under the same name; what does not depend on the change is taken."""
    model = tmp_path / "model"
    shutil.copytree(vlm_folders("llava"), model)
    content = responses(model, tmp_path, "out", train={"steps": 2})
    cache.cache(load_recipe(content))
    asked.clear()
    change(model)
    weights, _ = trained(content)
    assert len(asked) == 2
    expected, _ = trained({**content, "output": str(tmp_path / "plain")}, "data.cache='off'")
    assert_close(weights, expected)
    folders = {kind: len(list((tmp_path / "out" / "cache" / kind).iterdir())) for kind in ("features", "reference")}
    assert [kind for kind, number in folders.items() if number == 2] == kinds


@pytest.mark.slow
def test_errors_of_another_schedule_are_not_taken(tiny_sd15: Path, tmp_path: Path, asked: list[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd15, model)
    method = {"name": "diffusion_dpo", "beta": 100.0, "num_cached_draws": 1}
    content = pictures(model, tmp_path, "out", method=method, train={"steps": 2})
    cache.cache(load_recipe(content))
    asked.clear()
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    trained(content)
    assert len(asked) == 2


@pytest.mark.slow
def test_errors_of_another_empty_prompt_are_not_taken(tiny_sdxl: Path, tmp_path: Path, asked: list[str]) -> None:
    """SDXL's pipeline says whether a prompt that is left out is zeros or the words ""."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sdxl, model)
    method = {"name": "diffusion_dpo", "beta": 100.0, "num_cached_draws": 1, "caption_dropout": 0.9}
    content = pictures(model, tmp_path, "out", method=method, train={"steps": 2})
    cache.cache(load_recipe(content))
    asked.clear()
    output = json.loads((model / "model_index.json").read_text())
    edit(model / "model_index.json", force_zeros_for_empty_prompt=not output.get("force_zeros_for_empty_prompt", True))
    trained(content)
    assert len(asked) == 2


@pytest.mark.slow
def test_an_image_that_was_changed_is_scored_again(vlm_folders: Folders, tmp_path: Path, asked: list[str]) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    cache.cache(load_recipe(content))
    asked.clear()
    (tmp_path / "rows" / "1.png").write_bytes(data_files.png(77, 16))
    cache.cache(load_recipe(content))
    assert 0 < len(asked) <= EPOCH
