"""Cost of a pair over a growing quantity, on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmalign.commands.bench import MMALIGN
from mmalign.commands.load_recipe import load_recipe
from tests.benchmarks import scale
from tests.benchmarks.against import Request
from tests.helpers import data_files, forked, recipes


def test_operations_of_a_pair_do_not_depend_on_the_batch(tiny_sd15: Path, tmp_path: Path) -> None:
    file, numbers, plot = tmp_path / "recipe.yaml", tmp_path / "scale.json", tmp_path / "scale.png"
    file.write_text(yaml.dump(recipes.diffusion_in(tiny_sd15, tmp_path)))
    options = ["--values", "1", "4", "--repeats", "1", "--json", str(numbers), "--plot", str(plot)]
    scale.main(["pairs", str(file), *options])
    reports = json.loads(numbers.read_text())
    single, four = (reports[value]["runs"][MMALIGN] for value in ("1", "4"))
    assert (single["num_pairs"], four["num_pairs"]) == (1, 4)
    assert 4 * sum(single["operations"].values()) == sum(four["operations"].values())
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > image.height > 100


def test_operations_grow_with_the_area(tiny_sd15: Path, tmp_path: Path) -> None:
    """Convolutions grow by four and attention among pixels by sixteen, which outweighs the constant text and time."""
    request = Request(recipes.diffusion_in(tiny_sd15, tmp_path))
    reports = scale.scale("resolution", request, [16, 32], repeats=1)
    small, large = (sum(report.runs[MMALIGN].operations.values()) for report in reports.values())
    assert 4 < large / small < 16


def atomic_write(axis: str, value: int, model: Path, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the pairs that an axis writes, and its other overrides."""
    recipe = load_recipe(recipes.vlm(model, data_files.response_pairs(folder / "rows"), folder / "run"))
    path, *others = scale.AXES[axis].overrides(recipe, value, folder / "pairs")
    lines = Path(json.loads(path.split("=", 1)[1])).read_text().splitlines()
    return [json.loads(line) for line in lines], others


def test_prompts_are_as_long_as_requested(vlm_folders: Any, tmp_path: Path) -> None:
    lines, _ = atomic_write("prompt", 60, vlm_folders("llava"), tmp_path)
    assert {len(line["prompt"].removeprefix("<image>")) for line in lines} == {60}
    assert all((tmp_path / "pairs" / line["images"][0]).is_file() for line in lines)


def test_responses_share_prompt_and_picture(vlm_folders: Any, tmp_path: Path) -> None:
    lines, others = atomic_write("responses", 4, vlm_folders("llava"), tmp_path)
    assert len(lines) == 64 and "train.batch_size=4" in others
    for first in range(0, 64, 4):
        group = lines[first : first + 4]
        assert len({(line["prompt"], line["images"][0]) for line in group}) == 1
        assert len({line["chosen"] for line in group}) == len({line["rejected"] for line in group}) == 4


def test_denoiser_has_no_longer_prompts(tiny_sd15: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path))
    with pytest.raises(ValueError, match="pairs, resolution or processes"):
        scale.AXES["prompt"].overrides(recipe, 20, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # one server forks them
def test_processes_share_the_work(tiny_sd15: Path, tmp_path: Path) -> None:
    """Two processes have twice the pairs of an update, and each has half of the operations."""
    forked.preload()
    request = Request(recipes.diffusion_in(tiny_sd15, tmp_path))
    reports = scale.scale("processes", request, [1, 2], repeats=1)
    single, two = (report.runs[MMALIGN] for report in reports.values())
    assert (single.num_pairs, two.num_pairs) == (2, 4) and single.operations == two.operations
    _, megabytes = scale.costs_of_a_pair(reports, by_processes=True).values()
    assert megabytes[MMALIGN][1] == pytest.approx(megabytes[MMALIGN][0], rel=0.2)  # reduced gradients need buffers
    assert reports[2].machine["seconds"] == "wall clock"
