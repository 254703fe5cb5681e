"""Commands on models that edit a source image."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch._subclasses.fake_tensor import FakeTensorMode

from mmalign.commands import preflight
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.show import show
from mmalign.commands.train import train
from mmalign.families.shapes import without_storage
from mmalign.methods import requirements_of
from mmalign.modalities import modality_of
from mmalign.modalities.text_to_image.plan import encode_example
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_diffusion

SOURCE = {"columns": {"source": "source_image"}}


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
    with pytest.raises(ValueError, match=r"data.columns: names source images, and .* is a StableDiffusionPipeline"):
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
