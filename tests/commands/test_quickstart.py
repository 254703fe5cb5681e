"""The whole way in one command, on the bundled models and few prompts; and the pairs that come with it."""

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.commands import quickstart as module
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.images import open_pairs
from mmalign.resources import resolve
from mmalign.toy import scenes
from tests.helpers import Folders, data_files
from tests.helpers.logged import recorded_lines

COLUMNS = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "image_0_uid", "image_1_uid"]  # Pick-a-Pic v2's names
STEPS = 2
SHORT = [
    "data.limit=6",
    f"train.steps={STEPS}",
    "train.batch_size=3",
    "train.save_every=1",
    "train.log_every=1",
    "evaluate.prompts=12",
    "evaluate.sampling.steps=2",
]
# As sure as a coin at least, which the better of two images always is: every prompt gives a pair.
DRAWN = ["prepare.prompts=6", "prepare.images_per_prompt=2", "prepare.min_confidence=0.5", "prepare.sampling.steps=3"]


class Stopped(Exception):
    pass


def run(
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    generate: bool,
    seed: int = 0,
    modality: str = "text_to_image",
    short: Sequence[str] = (*SHORT, *DRAWN),
) -> list[str]:
    """The quickstart with few prompts and updates; what it says."""

    def shortened(source: str, overrides: Sequence[str] = ()) -> Any:
        return load_recipe(source, [*overrides, *short])

    with monkeypatch.context() as patch, recorded_lines() as lines:
        patch.setattr(module, "load_recipe", shortened)
        module.quickstart(modality, seed=seed, generate=generate, output=output)
    return lines


def stopped(output: Path, monkeypatch: pytest.MonkeyPatch, *, generate: bool) -> None:
    """The same, killed when the training is done and the measurement begins."""

    def kill(*_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("mmalign.commands.evaluate.evaluate", kill)
        run(output, monkeypatch, generate=generate)


def weights(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("checkpoint-*/*.safetensors"))}


class Loads(HTMLParser):
    """What a page makes a browser load: the values of these attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "href", "data", "poster", "action", "background")
        self.found += [value for name, value in attrs if name in names and value]


def assert_complete(output: Path, seed: int) -> None:
    """The numbers and the page are there."""
    result = json.loads((output / "result.json").read_text())
    assert result["seed"] == seed and result["updates"] == STEPS
    overall = result["details"]["overall"]
    for side in ("before", "after", "difference"):
        assert overall[side]["low"] <= overall[side]["estimate"] <= overall[side]["high"]
    assert result["base accuracy"] == overall["before"]["estimate"]
    assert result["aligned accuracy"] == overall["after"]["estimate"]
    assert result["difference"] == overall["difference"]
    difference = result["aligned accuracy"] - result["base accuracy"]
    assert result["difference"]["estimate"] == pytest.approx(difference, abs=1e-12)  # of shares, in float64
    assert_page(output)


def assert_page(output: Path) -> None:
    """The page is there, and needs no network."""
    gallery = output / "gallery"
    assert json.loads((gallery / "manifest.json").read_text())["entries"]
    for picture in (output / "gallery.png", gallery / "gallery.png"):
        with Image.open(picture) as image:
            image.verify()
    page = (gallery / "index.html").read_text(encoding="utf-8")
    loaded = [*Loads(page).found, *re.findall(r"url\([\"']?(.*?)\)", page)]
    assert loaded and all(what.startswith(("#", "data:image/")) for what in loaded)  # places and pictures of its own
    assert not re.search(r"@import|\b(fetch|XMLHttpRequest|WebSocket|importScripts)\b", page)


@pytest.mark.slow
def test_pairs_are_generated_and_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second command generates no pair and makes no update again: it evaluates, and shows."""
    stopped(tmp_path, monkeypatch, generate=True)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert set(COLUMNS) <= set(table.column_names) and table.num_rows == 6
    for row in table.to_pylist():
        assert sorted((row["label_0"], row["label_1"])) == [0.0, 1.0]
        assert scenes.split_of(scenes.parse(row["caption"])) == "train"
        for picture in ("jpg_0", "jpg_1"):
            assert Image.open(io.BytesIO(row[picture])).size == (64, 64)
    generated, trained = (tmp_path / "pairs.parquet").read_bytes(), weights(tmp_path)
    assert len(trained) == STEPS and not (tmp_path / "result.json").exists()
    lines = run(tmp_path, monkeypatch, generate=True)
    assert any(f"resuming from checkpoint-{STEPS:08d}" in line for line in lines)
    assert any("all updates were done already" in line for line in lines)
    assert any(line.startswith("prompts rendered correctly: ") for line in lines)
    assert (tmp_path / "pairs.parquet").read_bytes() == generated and weights(tmp_path) == trained
    assert_complete(tmp_path, seed=0)


@pytest.mark.slow
def test_shipped_pairs_and_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a folder, [new]: yes"  # no name that YAML or a console reads as more than a name
    lines = run(output, monkeypatch, generate=False, seed=7)
    assert not any("going on" in line for line in lines) and not (output / "pairs.parquet").exists()
    assert_complete(output, seed=7)
    first, trained = json.loads((output / "result.json").read_text()), weights(output)
    lines = run(output, monkeypatch, generate=False, seed=7)
    assert any("all updates were done already" in line for line in lines)
    again = json.loads((output / "result.json").read_text())
    assert weights(output) == trained
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


ANSWERED = [
    "data.limit=6",
    f"train.steps={STEPS}",
    "train.batch_size=3",
    "train.save_every=1",
    "evaluate.num_images=4",
    "evaluate.decoding={max_new_tokens: 4, batch_size: 16}",
]


@pytest.fixture
def tiny_answers(vlm_folders: Folders, tmp_path: Path) -> list[str]:
    """Settings: a tiny model in the place of the bundled one, and true answers about a few pictures."""
    rows = data_files.response_pairs(tmp_path / "rows")
    source = {"path": str(rows), "format": "trl", "limit": 6}
    return [*ANSWERED, f"model.path={vlm_folders('llava')}", f"prepare.source={json.dumps(source)}"]


@pytest.mark.slow
def test_answers_with_pairs_made_anew(tiny_answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs, alignment, measurement and page; the second command makes no pair and asks nothing again."""
    output = tmp_path / "out"
    lines = run(output, monkeypatch, generate=True, modality="vision_language", short=tiny_answers)
    assert pq.read_table(output / "pairs.parquet").num_rows > 0
    assert any(line.startswith("descriptions with an invented object: ") for line in lines)
    assert any(line.startswith("yes/no questions answered correctly: ") for line in lines)
    result = json.loads((output / "result.json").read_text())
    assert result["updates"] == STEPS
    for name in ("CHAIR_i", "CHAIR_s", "recall", "POPE accuracy"):
        base, aligned, change = (result[name][key]["estimate"] for key in ("base", "aligned", "difference"))
        assert change == pytest.approx(aligned - base, abs=1e-12)
    assert_page(output)
    generated, trained = (output / "pairs.parquet").read_bytes(), weights(output)
    run(output, monkeypatch, generate=True, modality="vision_language", short=tiny_answers)
    again = json.loads((output / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert (output / "pairs.parquet").read_bytes() == generated and weights(output) == trained


def test_an_unknown_modality_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'images' is not a modality; expected text_to_image or vision_language"):
        module.quickstart("images", seed=0, generate=False)


def test_shipped_pairs_ask_for_no_prompt_that_measures() -> None:
    """Every caption is a training prompt of the bundled world; the quickstart reports on those held out."""
    path = resolve("assets/quickstart-pairs.parquet")
    assert set(COLUMNS) <= set(pq.read_schema(path).names)
    pairs = open_pairs("pick_a_pic", str(path))
    captions = {pairs[i].prompt for i in range(len(pairs))}
    assert len(pairs) >= 100
    for caption in captions:
        assert str(scenes.parse(caption)) == caption and scenes.split_of(scenes.parse(caption)) == "train"
    recipe = load_recipe(module.RECIPE.format("text_to_image"))
    assert resolve(recipe.data.path) == path and recipe.evaluate is not None and recipe.prepare is not None
    held_out = {str(p) for p in scenes.sample_prompts(recipe.evaluate.split, 10_000, recipe.evaluate.seed)}
    assert not captions & held_out


def test_bundled_pairs_have_size_and_one_chosen_side() -> None:
    rows = pq.read_table(resolve("assets/quickstart-pairs.parquet")).to_pylist()
    side = load_recipe(module.RECIPE.format("text_to_image")).data.resolution
    for row in rows:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        sizes = {Image.open(io.BytesIO(row[picture])).size for picture in ("jpg_0", "jpg_1")}
        assert sizes == {(side, side)} and row["jpg_0"] != row["jpg_1"]


def test_bundled_prompt_pairs_avoid_test_prompts() -> None:
    recipe = load_recipe("configs/text_to_image/instruct_engine_tiny_sd.yaml")
    rows = pq.read_table(resolve(recipe.data.path)).to_pylist()
    captions = {row[key] for row in rows for key in ("caption", "rejected_caption")}
    assert len(rows) >= 100 and all(row["caption"] != row["rejected_caption"] for row in rows)
    assert all(scenes.split_of(scenes.parse(caption)) == "train" for caption in captions)
    for row in rows:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0} and row["jpg_0"] != row["jpg_1"]
        sizes = {Image.open(io.BytesIO(row[picture])).size for picture in ("jpg_0", "jpg_1")}
        assert sizes == {(recipe.data.resolution, recipe.data.resolution)}
