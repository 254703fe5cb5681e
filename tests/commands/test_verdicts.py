"""Verdicts on short runs with an injected fault, of both modalities."""

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file

from mmalign.commands.cache import cache
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from tests.helpers import Folders, data_files, first_fast, recipes

Content = dict[str, Any]
METHODS: dict[str, Content] = {
    "diffusion_dpo": {"beta": 100.0},
    "inpo": {"beta": 100.0, "steps": 2},  # whose own inversions a broken policy finds easy
    "cca": {},
    "mapo": {},
    "sft": {},
}
SHORT = ["train.steps=4", "train.batch_size=2", "train.warmup_steps=0", "train.trackers=[]", "data.limit=8"]


def verdict(content: Content, *overrides: str) -> str:
    return train(load_recipe(content, overrides)).verdict


@pytest.fixture
def pictures(tiny_sd15: Path, tmp_path: Path) -> Content:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    return recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"save_every": 9})


@pytest.fixture
def responses(vlm_folders: Folders, tmp_path: Path) -> Content:
    rows = data_files.response_pairs(tmp_path / "rows")
    return recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", train={"save_every": 9})


@pytest.mark.slow
@pytest.mark.parametrize("method", first_fast(list(METHODS)))
def test_denoiser_with_far_too_high_lr_is_broken(method: str, pictures: Content) -> None:
    content = {**pictures, "method": {"name": method, **METHODS[method]}}
    assert verdict(content, "train.lr=1").startswith("the model is broken, its error is ")


@pytest.mark.parametrize("method", first_fast(["dpo", "response_sft"]))
def test_language_model_with_far_too_high_lr_is_broken(method: str, tmp_path: Path) -> None:
    """The bundled model: a random one has nothing to lose."""
    recipe = load_recipe(
        "configs/vision_language/quickstart.yaml",
        [f"method={{name: {method}}}", f"output={tmp_path}", "train.lr=0.3", *SHORT],
    )
    assert train(recipe).verdict.startswith("the model is broken, it lost ")


@pytest.mark.slow
def test_judge_with_far_too_high_lr_got_worse(tiny_sd15: Path, tiny_clip: Path, pictures: Content) -> None:
    content = {**pictures, "method": {"name": "step_preference"}}
    content["model"] = {"path": str(tiny_clip), "denoiser": str(tiny_sd15)}
    assert verdict(content, "train.lr=1").startswith("the judge got worse (loss ")


@pytest.mark.slow
def test_start_is_before_the_first_update(pictures: Content, tmp_path: Path) -> None:
    """Also where the first update broke the model, and after a resume."""
    start = {**pictures, "method": {"name": "sft"}, "output": str(tmp_path / "still")}
    before = verdict(start, "train.lr=1e-12").split("chosen error ")[1].split()[0]
    content = {**pictures, "method": {"name": "sft"}}
    whole = verdict(content, "train.lr=0.1")
    assert f"chosen error {before} before the first update" in whole
    shutil.rmtree(tmp_path / "out")
    verdict(content, "train.lr=0.1", "train.steps=2")
    assert verdict(content, "train.lr=0.1") == whole


@pytest.mark.slow
def test_equal_conditions_are_nothing_to_prefer(pictures: Content) -> None:
    path = Path(pictures["data"]["path"])
    rows = [{**row, "caption": "one prompt for all"} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    content = {**pictures, "method": {"name": "cca"}}
    assert verdict(content).startswith("nothing to prefer: both sides of 100% of the pairs are equal")


def same_file(data: bytes) -> bytes:
    return data


def same_pixels(data: bytes) -> bytes:
    """Return another file of the same pixels."""
    buffer, comment = io.BytesIO(), PngInfo()
    comment.add_text("comment", "other bytes")
    Image.open(io.BytesIO(data)).save(buffer, "PNG", pnginfo=comment)
    assert buffer.getvalue() != data
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("copied", "cache"), first_fast([(same_pixels, "auto"), (same_file, "'off'")]))
def test_pairs_of_equal_images_are_dropped_and_counted(
    copied: Any, cache: str, pictures: Content, log_lines: list[str]
) -> None:
    path = Path(pictures["data"]["path"])
    rows = pq.read_table(path).to_pylist()
    for row in rows[:3]:
        row["jpg_1"] = copied(row["jpg_0"])
    pq.write_table(pa.Table.from_pylist(rows), path)
    train(load_recipe(pictures, [f"data.cache={cache}"]))
    assert any(line.startswith("3 images or pairs could not be used") for line in log_lines)
    for row in rows:
        row["jpg_1"] = copied(row["jpg_0"])
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"none of 8 pairs can be used .*both images are the same"):
        train(load_recipe({**pictures, "output": f"{pictures['output']}-all"}, [f"data.cache={cache}"]))


def test_zeroed_latents_are_refused(pictures: Content) -> None:
    folder = cache(load_recipe(pictures))
    for shard in (folder / "latents").rglob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        zeroed = {name: x if name.endswith("sizes") else torch.zeros_like(x) for name, x in arrays.items()}
        save_file(zeroed, shard, metadata)
    with pytest.raises(ValueError, match="none of 8 pairs can be used"):
        train(load_recipe(pictures))


def swap_half(rows: list[Content], first: str, second: str) -> list[Content]:
    """Swap the values of two columns in rows that a coin chooses."""
    coin = random.Random(0)
    return [{**row, first: row[second], second: row[first]} if coin.random() < 0.5 else row for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("is_coin", [True, False])
def test_coin_labels_of_images_are_noise(is_coin: bool, pictures: Content, tmp_path: Path) -> None:
    path = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=64)
    if is_coin:
        rows = swap_half(pq.read_table(path).to_pylist(), "label_0", "label_1")
        pq.write_table(pa.Table.from_pylist(rows), path)
    options = [
        "train.steps=40",
        "train.batch_size=8",
        "train.lr=3e-3",
        "method.beta=10",
        "data.validation_fraction=0.4",
    ]
    assert verdict(pictures, *options).startswith("no difference between the sides") is is_coin


@pytest.mark.parametrize("is_coin", first_fast([True, False]))
def test_coin_labels_of_responses_are_noise(is_coin: bool, vlm_folders: Folders, tmp_path: Path) -> None:
    """After more epochs they are known by heart, which is called so."""
    path = data_files.response_pairs(tmp_path / "rows", number=32)
    if is_coin:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        data_files.write_jsonl(path, *swap_half(rows, "chosen", "rejected"))
    content = recipes.vlm(vlm_folders("llava"), path, tmp_path / "out", train={"save_every": 99})
    assert verdict(content, "train.steps=16").startswith("no difference" if is_coin else "chosen responses")
    by_heart = "the training pairs were learned, perhaps by heart"
    assert verdict(content, "train.steps=48").startswith(by_heart) is is_coin
