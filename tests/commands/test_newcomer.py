"""A newcomer's path: from a folder of liked and disliked images to an aligned model, in three commands."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmalign.cli import app
from tests.helpers import data_files


@pytest.mark.slow
def test_a_folder_of_liked_and_disliked_images_aligns_a_model(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image needs a partner of its name."""
    for side, seeds in (("liked", range(3)), ("disliked", range(3, 8))):
        (tmp_path / "gallery" / side).mkdir(parents=True)
        for seed in seeds:
            (tmp_path / "gallery" / side / f"{seed}.png").write_bytes(data_files.png(seed))
            (tmp_path / "gallery" / side / f"{seed}.txt").write_text(f"prompt {seed}")
    monkeypatch.chdir(tmp_path)
    few = ["train.steps=2", "train.batch_size=2", "train.precision=float32", "train.trackers=[]"]
    assignments = [part for one in few for part in ("--set", one)]
    for command in (
        ["init", str(tiny_sd15), "gallery", "--method", "diffusion_kto", *assignments],
        ["train", "recipe.yaml"],
        ["export", "recipe.yaml", "--to", "diffusers"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert recipe["data"]["format"] == "thumbs" and recipe["method"]["name"] == "diffusion_kto"
    assert (Path(recipe["output"]) / "model").is_dir()
