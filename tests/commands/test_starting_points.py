"""Trainings that begin with an existing adapter, a variant's files, or a single file of weights."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.families.diffusion import lora_names
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.lora import ADAPTERS, adapter_layers
from mmalign.families.types import Loading
from mmalign.modalities.loading import load_bare
from mmalign.policy import adapters_off
from mmalign.training import checkpoint
from tests.commands.test_export import adapted, logits, predicted
from tests.helpers import Folders, recipes
from tests.helpers.commands import UNET, VAE
from tests.helpers.loading import load_diffusion, load_vlm
from tests.helpers.runs import assert_same

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), [("sdxl", "diffusers"), ("sdxl", "comfyui"), ("sdxl", "peft"), ("sd3", "kohya")]
)
def test_an_adapter_is_continued_or_merged(
    name: str, form: str, diffusion_folders: Folders, flow_folders: Folders, tmp_path: Path
) -> None:
    base = (flow_folders if name == "sd3" else diffusion_folders)(name)
    first = adapted(load_diffusion(base))
    first.export(tmp_path, first.network, form, None)
    wanted, plain = predicted(first, first.network), predicted(first, load_diffusion(base).network)
    path = next(tmp_path.glob("*.safetensors")) if form == "comfyui" else tmp_path
    again: Any = load_diffusion(base)
    again.continue_adapter(str(path))
    torch.testing.assert_close(predicted(again, again.network), wanted, rtol=1e-4, atol=1e-5)
    with adapters_off(again.network):
        assert torch.equal(predicted(again, again.network), plain)
    trained = {name for name, p in again.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(adapter_layers(again.network)) and all(".lora_" in name for name in trained)
    merged: Any = load_family(str(base), Loading(CPU, adapter=str(path)))
    assert not adapter_layers(merged.network)
    torch.testing.assert_close(predicted(merged, merged.network), wanted, rtol=1e-4, atol=1e-5)


def test_a_vision_language_adapter_is_continued_or_merged(vlm_folders: Folders, tmp_path: Path) -> None:
    folder = vlm_folders("qwen2_5_vl")
    first = adapted(load_vlm(folder))
    first.export(tmp_path, first.network, "peft", None)
    processor = first.processor.processor
    wanted = logits(first.network.model, processor)
    again = load_vlm(folder)
    again.continue_adapter(str(tmp_path))
    merged: Any = load_vision_language(str(folder), Loading(CPU, adapter=str(tmp_path)))
    for family in (again, merged):
        torch.testing.assert_close(logits(family.network.model, processor), wanted, rtol=1e-4, atol=1e-5)
    assert not adapter_layers(merged.network) and any(p.requires_grad for p in again.network.parameters())


@pytest.mark.slow
def test_images_to_learn_from_are_those_of_the_adapter_to_continue(tiny_sd15: Path, tmp_path: Path) -> None:
    first = adapted(load_diffusion(tiny_sd15))
    first.export(tmp_path, first.network, "peft", None)
    prepare = {
        "prompts": 2,
        "images_per_prompt": 2,
        "min_confidence": 0.5,
        "reward": {"path": "models/tiny_clip"},
        "sampling": {"steps": 4, "guidance": 1.0},
    }
    images: dict[str, list[Any]] = {}
    for name, use in (("bare", None), ("continued", "continue"), ("merged", "merge")):
        adapter = {"adapter": {"path": str(tmp_path), "use": use}} if use is not None else {}
        content = recipes.diffusion(tiny_sd15, tmp_path / f"{name}.parquet", tmp_path / name, prepare=prepare)
        content["model"] |= {"tune": "lora", **adapter}
        rows = pq.read_table(mmalign.prepare(load_recipe(content))).to_pylist()
        images[name] = [
            np.asarray(Image.open(io.BytesIO(row[side])), float) for row in rows for side in ("jpg_0", "jpg_1")
        ]
    # Rounding to bytes may differ in few of 768 values
    for continued, merged, bare in zip(images["continued"], images["merged"], images["bare"], strict=True):
        assert (continued != merged).sum() < 10 and (continued != bare).sum() > 300


@pytest.mark.slow
def test_an_iterated_run(tiny_sd15: Path, tmp_path: Path) -> None:
    """The second run's whole model is the base with both adapters; its adapter alone is refused."""
    first = adapted(load_diffusion(tiny_sd15))
    (tmp_path / "first").mkdir()
    first.export(tmp_path / "first", first.network, "diffusers", None)
    start = {"path": str(tmp_path / "first"), "use": "merge"}
    content = recipes.diffusion_in(
        tiny_sd15, tmp_path, model={"tune": "lora", "adapter": start}, train={"steps": 1, "lr": 1e-2}
    )
    recipe = load_recipe(content)
    mmalign.train(recipe)
    with pytest.raises(ValueError, match=r"export: diffusers: this run began with .*first merged"):
        mmalign.export(recipe, to="diffusers")
    new: Any = load_diffusion(mmalign.export(recipe, to="merged"))
    second: Any = load_family(str(tiny_sd15), Loading(CPU, adapter=start["path"]))
    net = second.load_trained(tmp_path / "output" / "model")
    torch.testing.assert_close(predicted(new, new.network), predicted(second, net), rtol=1e-4, atol=1e-5)
    # Another adapter under the same path is another run
    weights = load_file(tmp_path / "first" / ADAPTERS)
    save_file({name: x / 2 for name, x in weights.items()}, tmp_path / "first" / ADAPTERS, {"format": "pt"})
    with pytest.raises(ValueError, match="belongs to another run"):
        mmalign.train(recipe)
    path = checkpoint.latest(tmp_path / "output")
    assert path is not None
    with pytest.raises(
        ValueError, match=r"is a checkpoint; write its adapter with `mmalign export .*output --checkpoint 1"
    ):
        load_diffusion(tiny_sd15).continue_adapter(str(path))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"tune": "full", "adapter": {"path": "x"}}, "continue trains an adapter, got tune full; use merge"),
        ({"lora": {"rank": 4}, "adapter": {"path": "x"}}, "has its own rank, alpha and layers; leave lora out"),
    ],
)
def test_wrong_adapters(model: dict[str, Any], sentence: str, tiny_sd15: Path, tmp_path: Path) -> None:
    content = recipes.diffusion(tiny_sd15, tmp_path / "pairs", tmp_path, model={"tune": "lora", **model})
    with pytest.raises(ValueError, match=sentence):
        load_recipe(content)


@pytest.mark.slow
def test_files_of_a_variant(tiny_sd15: Path, tmp_path: Path) -> None:
    """A folder with fp16 files alone asks for the variant; a whole model has the names without it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_sd15, base)
    for file in base.rglob("*.safetensors"):
        halves = {name: x.half() if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    content = recipes.diffusion_in(base, tmp_path, train={"steps": 1, "lr": 1e-2})
    with pytest.raises(ValueError, match=r"model.variant: .*unet has no weights without a variant; set .* to fp16"):
        mmalign.train(load_recipe(content))
    mmalign.train(load_recipe(content, ["model.variant=fp16"]))
    model = tmp_path / "output" / "model"
    assert (model / VAE).read_bytes() == (base / VAE.replace(".safetensors", ".fp16.safetensors")).read_bytes()
    assert {x.dtype for x in load_file(model / UNET).values()} == {torch.float16}
    load_diffusion(model)


def original_layout(folder: Path, file: Path) -> Path:
    """Write a Stable Diffusion 1.x as a single file, in the names of its authors and in float16."""
    pipeline: Any = load_diffusion(folder)
    pipeline = pipeline.pipeline
    weights = dict[str, Tensor]()
    norms = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
    for name, x in pipeline.unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        original = "out.0" if layer == "conv_norm_out" else lora_names._original_name(layer, pipeline.unet.config)
        before, _, last = original.rpartition(".")
        original = f"{before}.{norms[last]}" if "resnets" in layer and last in norms else original
        weights[f"model.diffusion_model.{original}.{kind}"] = x
    for name, x in pipeline.vae.state_dict().items():
        weights[f"first_stage_model.{vae_name(name, len(pipeline.vae.config.block_out_channels))}"] = x
    for name, x in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.{name if name.startswith('text_model') else f'text_model.{name}'}"] = x
    save_file({name: x.half().contiguous() for name, x in weights.items()}, file, {"format": "pt"})
    return file


def vae_name(name: str, levels: int) -> str:
    """Return the original name of an autoencoder's weight."""
    for pattern, original in (
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("attn_1.group_norm", "attn_1.norm"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = re.sub(pattern, original, name)
    return re.sub(r"\bup\.(\d+)", lambda level: f"up.{levels - 1 - int(level[1])}", name)


@pytest.mark.slow
def test_a_single_file(tiny_sd15: Path, tmp_path: Path) -> None:
    file = original_layout(tiny_sd15, tmp_path / "model.safetensors")
    content = recipes.diffusion_in(file, tmp_path, model={"tune": "lora"}, train={"steps": 1, "lr": 1e-2})
    with pytest.raises(ValueError, match=r"model.config: .*model.safetensors is a single file; name a pipeline"):
        mmalign.train(load_recipe(content))
    recipe = load_recipe(content, [f"model.config={tiny_sd15}"])
    family = load_bare(recipe, CPU)
    of_folder: Any = load_diffusion(tiny_sd15)
    for part in ("unet", "vae", "text_encoder"):
        weights, others = (getattr(x.pipeline, part).state_dict() for x in (family, of_folder))
        assert_same(weights, {name: x.half().float() if x.is_floating_point() else x for name, x in others.items()})
    mmalign.train(recipe)
    merged: Any = load_diffusion(mmalign.export(recipe, to="merged"))
    net = family.load_trained(tmp_path / "output" / "model")
    torch.testing.assert_close(predicted(merged, merged.network), predicted(family, net), rtol=1e-2, atol=1e-3)
    assert torch.equal(merged.pipeline.vae.decoder.conv_in.weight, family.pipeline.vae.decoder.conv_in.weight)


def test_a_single_file_takes_another_autoencoder(tiny_sd15: Path, tmp_path: Path) -> None:
    file, vae = original_layout(tiny_sd15, tmp_path / "model.safetensors"), tmp_path / "vae"
    shutil.copytree(tiny_sd15 / "vae", vae)
    weights = {name: 2 * x for name, x in load_file(vae / Path(VAE).name).items()}
    save_file(weights, vae / Path(VAE).name, {"format": "pt"})
    family: Any = adapted(load_family(str(file), Loading(CPU, config=str(tiny_sd15), vae=str(vae))))
    assert_same(family.pipeline.vae.state_dict(), weights)
    (tmp_path / "merged").mkdir()
    family.export(tmp_path / "merged", family.network, "merged", None)
    assert (tmp_path / "merged" / VAE).read_bytes() == (vae / Path(VAE).name).read_bytes()


def test_pickles_that_a_recipe_allows_are_merged_and_copied(tiny_sd15: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd15, base)
    for file in base.rglob("*.safetensors"):
        stem = "pytorch_model" if file.parent.name == "text_encoder" else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    family: Any = adapted(load_family(str(base), Loading(CPU, allow_pickle=True)))
    wanted = predicted(family, family.network)
    (tmp_path / "merged").mkdir()
    family.export(tmp_path / "merged", family.network, "merged", None)
    merged: Any = load_family(str(tmp_path / "merged"), Loading(CPU, allow_pickle=True))
    torch.testing.assert_close(predicted(merged, merged.network), wanted, rtol=1e-4, atol=1e-5)
