"""Commands on models that edit a source image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import mmalign
from mmalign.commands import preflight
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.show import show
from mmalign.commands.train import train
from mmalign.data.formats.images import open_pairs
from mmalign.families.shapes import without_storage
from mmalign.methods import requirements_of
from mmalign.modalities import modality_of
from mmalign.modalities.text_to_image.plan import encode_example
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_diffusion
from tests.helpers.page_reader import Page

SOURCE = {"columns": {"source": "source_image"}}
SIDES = ("source", "before", "after")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_files.pick_a_pic(tmp_path_factory.mktemp("edits") / "pairs.parquet", number=4, sources=True)


def test_models_and_sources_that_do_not_fit(
    flow_folders: Folders, tiny_sd15: Path, tiny_step_judge: Path, pairs: Path, tmp_path: Path
) -> None:
    plain, kontext, qwen = tiny_sd15, flow_folders("flux_kontext"), flow_folders("qwen_image_edit")
    alone = data_files.pick_a_pic(tmp_path / "alone.parquet", number=4)
    spo: Any = {"name": "spo", "reward": {"name": "step_aware", "path": str(tiny_step_judge)}}

    def check(model: Path, rows: Path, **sections: Any) -> None:
        preflight.check(load_recipe(recipes.diffusion(model, rows, tmp_path / "out", **sections)), "training")

    check(plain, pairs)  # such a column may have another meaning
    check(kontext, alone)
    check(kontext, pairs)
    check(qwen, pairs, data=SOURCE)
    with pytest.raises(ValueError, match=r"data.columns: there are source images, and .* is a StableDiffusionPipeline"):
        check(plain, pairs, data=SOURCE)
    with pytest.raises(ValueError, match=r"has no 'source' .*data.columns"):
        check(qwen, alone, data={"format": "pick_a_pic"})
    with pytest.raises(ValueError, match=r"method.name: spo generates images from prompts alone, and .* edits"):
        check(qwen, pairs, method=spo)


@pytest.mark.slow
def test_the_source_changes_what_is_learned(flow_folders: Folders, pairs: Path, tmp_path: Path) -> None:
    alone = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=4)
    losses = []
    for number, data in enumerate((pairs, alone)):
        options = {"steps": 1, "batch_size": 4, "save_every": 1}
        output = tmp_path / str(number)
        content = recipes.diffusion(flow_folders("flux_kontext"), data, output, method={"name": "sft"}, train=options)
        losses.append(train(load_recipe(content)).history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_random_crops_need_the_cache_off(flow_folders: Folders, pairs: Path, tmp_path: Path) -> None:
    content = recipes.diffusion(flow_folders("qwen_image_edit"), pairs, tmp_path, data={"crop": "random"})
    with pytest.raises(ValueError, match=r"data.crop: random changes the source image, which the text encoder of"):
        train(load_recipe(content))


def test_show_has_the_source(flow_folders: Folders, pairs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipes.diffusion(flow_folders("qwen_image_edit"), pairs, tmp_path))
    view = show(recipe, number=2, html=tmp_path / "page.html")
    assert all([side.name for side in example.sides] == ["chosen", "rejected", "source"] for example in view.examples)
    assert any("source is 'source_image'" in fact for fact in view.facts)


def test_a_plan_counts_the_source(flow_folders: Folders, pairs: Path, tmp_path: Path) -> None:
    alone, caches = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=4), []
    for name, data in (("flux_kontext", pairs), ("flux_kontext", alone), ("qwen_image_edit", pairs)):
        recipe = load_recipe(recipes.diffusion(flow_folders(name), data, tmp_path))
        needs = requirements_of(recipe.method)
        splits = modality_of(recipe).open_pairs(recipe, needs)
        example = encode_example(load_diffusion(flow_folders(name)), recipe, needs, splits)
        assert ("source" in example.batch(2).text.tensors) is (data is pairs)
        caches.append(example.cache_bytes)
    assert caches[0]["latents"] * 2 == caches[1]["latents"] * 3
    assert caches[2]["text"] > 4 * 2 * 512 * 16 * 4  # four pairs, with and without prompt


def test_rotary_frequencies_of_a_plan_have_no_storage() -> None:
    """Qwen-Image's are attributes of a module."""
    with torch.device("meta"):
        net = QwenEmbedRope(10, [2, 2, 4])
    without_storage([net], mode := FakeTensorMode(allow_non_fake_inputs=True))
    with mode:
        image, text = net([[(1, 2, 3)]], max_txt_seq_len=5, device=torch.device("cpu"))
    assert image.shape == (6, 4) and text.shape == (5, 4)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Edits of two sources by one prompt."""
    for seed in (1, 2):
        (tmp_path / f"{seed}.png").write_bytes(data_files.png(seed, 20))
    rows = ({"prompt": "make it blue", "source": f"{seed}.png"} for seed in (1, 2))
    return data_files.write_jsonl(tmp_path / "asked.jsonl", *rows)


def sections(asked: Path) -> dict[str, Any]:
    """Settings of commands that generate images of 16 pixels."""
    sampling = {"steps": 2, "guidance": 2.0, "resolution": data_files.SIDE}
    common = {"prompts": str(asked), "reward": {"path": "models/tiny_clip"}, "sampling": sampling}
    train = {"steps": 1, "lr": 1e-2, "warmup_steps": 0, "sample_every": 1, "samples": 2}
    return {
        "train": train,
        "evaluate": {**common, "images_per_prompt": 2},
        "prepare": {**common, "images_per_prompt": 2, "min_confidence": 0.5},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit_plus"])
def test_samples_evaluation_and_gallery_have_the_source(
    name: str, flow_folders: Folders, pairs: Path, asked: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipes.diffusion(flow_folders(name), pairs, tmp_path / "out", **sections(asked)))
    mmalign.train(recipe)
    shown = Page(tmp_path / "out" / "samples.html").values("img", "alt")
    assert [alt.partition(":")[0] for alt in shown] == ["source image", "base", "update 1"] * 2

    done = mmalign.evaluate(recipe)
    samples = json.loads((done.folder / "samples.json").read_text())["samples"]
    assert [sample["source"].partition("asked.jsonl: ")[2] for sample in samples] == [
        f"line {line}, source" for line in (1, 1, 2, 2)
    ]
    images = {side: [np.asarray(Image.open(done.folder / side / f"{n:05d}.png")) for n in range(4)] for side in SIDES}
    assert np.array_equal(*images["source"][:2]) and not np.array_equal(*images["source"][1:3])
    assert all(image.shape == (16, 16, 3) for side in SIDES for image in images[side])
    assert len({image.tobytes() for image in images["after"]}) == 4
    assert len(list((tmp_path / "out" / "drawings").rglob("*.png"))) == 8

    folder = mmalign.gallery(recipe).parent
    record = json.loads((folder / "manifest.json").read_text())["entries"][0]
    assert (folder / record["source_image"]).is_file()
    alts = Page(folder / "index.html").values("img", "alt")
    assert [alt.partition(":")[0] for alt in alts] == ["source", "before", "after"] * 4


@pytest.mark.slow
def test_prepared_pairs_keep_their_source(flow_folders: Folders, asked: Path, tmp_path: Path) -> None:
    path = tmp_path / "drawn.parquet"
    recipe = load_recipe(recipes.diffusion(flow_folders("flux_kontext"), path, tmp_path / "out", **sections(asked)))
    mmalign.prepare(recipe)
    written = open_pairs("auto", str(path), sources="required")
    assert {pair.source.read() for pair in written if pair.source} == {data_files.png(seed, 20) for seed in (1, 2)}


def test_prompts_and_models_that_do_not_fit(
    flow_folders: Folders, tiny_sd15: Path, pairs: Path, asked: Path, tmp_path: Path
) -> None:
    def check(model: Path, section: str, **changes: Any) -> None:
        content = recipes.diffusion(model, pairs, tmp_path / "out", **sections(asked))
        content[section] = {**content[section], **changes}
        preflight.check(load_recipe(content), "preparation" if section == "prepare" else "evaluation")

    for section in ("evaluate", "prepare"):
        check(flow_folders("qwen_image_edit"), section)
        check(flow_folders("flux_kontext"), section, prompts="assets/prompts/everyday.txt")
        with pytest.raises(ValueError, match=rf"{section}.prompts: there are source images, and .* a StableDiffusionP"):
            check(tiny_sd15, section)
        with pytest.raises(ValueError, match=rf"{section}.prompts: .* edits a source image; expected a file of JSON l"):
            check(flow_folders("qwen_image_edit"), section, prompts=4)
    # Edits of different sources are not compared, though their prompt is the same
    clip, pairwise = {"path": "models/tiny_clip"}, {"name": "vlm_pairs", "path": "models/tiny_llava"}
    voted: dict[str, Any] = {"reward": [clip, clip], "combine": "vote"}
    for section, changes, where in (
        ("evaluate", voted, "evaluate: combine: vote"),
        ("evaluate", {"best_of": {"n": [2], **voted}}, "evaluate.best_of: combine: vote"),
        ("prepare", {"reward": pairwise}, "prepare: reward vlm_pairs"),
    ):
        with pytest.raises(ValueError, match=f"^{where} compares all images of a prompt, and 'make it blue' edits 2 "):
            check(flow_folders("flux_kontext"), section, **changes)
    asked.write_text(asked.read_text().replace("2.png", "1.png"))
    check(flow_folders("flux_kontext"), "evaluate", **voted)
