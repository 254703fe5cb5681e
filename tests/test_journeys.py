"""Whole ways of new users through the command line, on tiny models: no step is refused, and no file is edited."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmalign import cli
from tests.commands.test_init import sorted_pictures
from tests.helpers import Folders
from tests.helpers.data_files import png

pytestmark = pytest.mark.slow
SHORT = ["train.steps=2", "train.precision=float32"]


def run(*words: str | Path) -> str:
    """Run a command line of mmalign and return what it prints."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, f"{words}: {result.output}"
    return result.output


def test_folder_of_pictures_to_a_file_for_comfyui(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sorted_pictures(tmp_path / "pictures", 20)
    run("init", tiny_sdxl, "pictures", *SHORT)
    run("train", "recipe.yaml")
    run("evaluate", "recipe.yaml")
    run("export", "recipe.yaml", "--to", "comfyui", "--output", "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_llama_factory_file_to_a_merged_model(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.chdir(tmp_path)
    rows = []
    for n in range(20):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        rows.append(
            {
                "conversations": [{"from": "human", "value": "<image>What is in this image?"}],
                "chosen": {"from": "gpt", "value": "There is a red cube."},
                "rejected": {"from": "gpt", "value": "There is a dog and a cat."},
                "images": [f"{n}.png"],
            }
        )
    Path("rows.json").write_text(json.dumps(rows))
    run("init", vlm_folders("qwen2_5_vl"), "rows.json", *SHORT)
    run("train", "recipe.yaml")
    run("evaluate", "recipe.yaml")
    run("export", "recipe.yaml", "--to", "merged", "--output", "out")
    model: Any = AutoModelForImageTextToText.from_pretrained("out")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert AutoProcessor.from_pretrained("out").tokenizer is not None


def test_csv_and_a_bundled_recipe(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a bundled recipe on one's own table and model, with its evaluation's files not there (N1, N3, N8)."""
    monkeypatch.chdir(tmp_path)
    rows = ["prompt,chosen,rejected"]
    for n in range(6):
        for side in ("a", "b"):
            Path(f"{n}{side}.png").write_bytes(png(2 * n + (side == "b")))
        rows.append(f"thing {n},{n}a.png,{n}b.png")
    Path("prefs.csv").write_text("\n".join(rows) + "\n")
    own = [f"model.path={tiny_sdxl}", "model.vae=null", "data.path=prefs.csv", "data.resolution=16", "output=mine"]
    small = [
        "data.num_workers=0",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=1",
        "evaluate.prompts=missing.txt",
    ]
    printed = run("train", "diffusion_dpo_sdxl_lora", *own, *small, *SHORT)
    assert "mine/model" in printed and "load_lora_weights" in printed
    assert "evaluate.prompts" in printed  # a warning, no refusal


def test_bundled_recipe_on_own_responses(vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a bundled recipe whose benchmark was not downloaded, on 30 rows of another layout (N1)."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for n in range(30):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        said = {"chosen": "There is a red cube.", "rejected": "There is a dog."}
        rows.append(json.dumps({"image": f"{n}.png", "prompt": "What is in this image?", **said}))
    Path("rows.jsonl").write_text("\n".join(rows))
    own = [f"model.path={vlm_folders('qwen2_5_vl')}", "data.path=rows.jsonl", "data.format=auto", "output=mine"]
    small = ["data.num_workers=0", "train.gradient_accumulation_steps=4"]
    printed = run("train", "dpo_qwen25vl", *own, *small, *SHORT)
    assert "evaluate.questions" in printed and "mine/model" in printed
