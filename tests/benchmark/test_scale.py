"""What a pair costs over what grows, on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmalign.benchmark import cases, scale
from mmalign.benchmark.bench import OURS
from mmalign.commands.load_recipe import load_recipe
from tests.helpers import data_files, recipes


def image_recipe(model: Path, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    content = recipes.diffusion(model, data_files.pick_a_pic(folder / "pairs.parquet"), folder / "output")
    file.write_text(yaml.dump(content))
    return file


def response_recipe(model: Path, folder: Path) -> Path:
    cases.draw_response_pairs(folder / "given.jsonl", side=32, number=4)
    file = folder / "recipe.yaml"
    content: dict[str, Any] = {
        "method": {"name": "dpo"},
        "model": {"path": str(model)},
        "data": {"format": "trl", "path": str(folder / "given.jsonl")},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-4},
        "output": str(folder / "output"),
    }
    file.write_text(yaml.dump(content))
    return file


def test_operations_of_a_pair_do_not_depend_on_the_batch(tiny_sd15: Path, tmp_path: Path) -> None:
    numbers, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    file = image_recipe(tiny_sd15, tmp_path)
    found = scale.scale(str(file), "pairs", values=[1, 4], repeats=1, json=numbers, plot=plot, say=lambda _: None)
    one, four = (rows[0] for rows in found.points.values())
    assert (one.batch_size, four.batch_size, one.variant) == (1, 4, OURS)
    assert 4 * sum(one.flops.values()) == sum(four.flops.values())
    assert list(json.loads(numbers.read_text())["points"]) == ["1", "4"]
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG" and drawn.width > drawn.height > 100


def test_operations_grow_with_the_area(tiny_sd15: Path, tmp_path: Path) -> None:
    """Convolutions by four, attention among pixels by sixteen: more than text and time, which do not grow, take off."""
    file = image_recipe(tiny_sd15, tmp_path)
    found = scale.scale(str(file), "resolution", values=[16, 32], repeats=1, say=lambda _: None)
    small, large = (sum(rows[0].flops.values()) for rows in found.points.values())
    assert 4 < large / small < 16


def test_prompts_are_drawn_as_long_as_they_are_asked_for(vlm_folders: Any, tmp_path: Path) -> None:
    recipe = load_recipe(response_recipe(vlm_folders("llava"), tmp_path))
    for value in (20, 60):
        (path, *_) = scale.AXES["prompt"].overrides(recipe, value, tmp_path / str(value))
        lines = [json.loads(line) for line in Path(json.loads(path.split("=", 1)[1])).read_text().splitlines()]
        assert {len(line["prompt"].removeprefix("<image>")) for line in lines} == {value}
        assert all((tmp_path / str(value) / line["images"][0]).is_file() for line in lines)


def test_responses_share_prompt_and_picture(vlm_folders: Any, tmp_path: Path) -> None:
    recipe = load_recipe(response_recipe(vlm_folders("llava"), tmp_path))
    path, *others = scale.AXES["responses"].overrides(recipe, 4, tmp_path / "four")
    lines = [json.loads(line) for line in Path(json.loads(path.split("=", 1)[1])).read_text().splitlines()]
    assert len(lines) == 64 and "train.batch_size=4" in others
    for first in range(0, 64, 4):
        group = lines[first : first + 4]
        assert len({(line["prompt"], line["images"][0]) for line in group}) == 1
        assert len({line["chosen"] for line in group}) == len({line["rejected"] for line in group}) == 4


def test_a_denoiser_has_no_longer_prompts(tiny_sd15: Path, tmp_path: Path) -> None:
    recipe = load_recipe(image_recipe(tiny_sd15, tmp_path))
    with pytest.raises(ValueError, match="--scale pairs, resolution or processes"):
        scale.AXES["prompt"].overrides(recipe, 20, tmp_path)


@pytest.mark.slow
def test_processes_share_the_work(tiny_sd15: Path, tmp_path: Path) -> None:
    """Two processes have twice the pairs of an update, and each its own half of the operations."""
    file = image_recipe(tiny_sd15, tmp_path)
    found = scale.scale(str(file), "processes", values=[1, 2], repeats=1, say=lambda _: None)
    one, two = (rows[0] for rows in found.points.values())
    assert (one.batch_size, two.batch_size) == (2, 4) and one.flops == two.flops
    assert (one.processes, two.processes) == (1, 2)
    assert two.bytes_of_a_pair == pytest.approx(one.bytes_of_a_pair, rel=0.2)  # what distributes gradients has buffers
    assert "of the clock on the wall" in str(found.machine["clock"])
