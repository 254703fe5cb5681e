"""Trained models in the forms of other programs, read by these programs and compared with the trained model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.families.diffusion import export as export_module
from mmalign.families.diffusion import lora_names
from mmalign.families.diffusion.flow_matching import JOINT
from mmalign.families.diffusion.lora_files import load_lora
from mmalign.families.loading import load_family
from mmalign.families.lora import adapter_layers
from mmalign.families.types import Loading, LoraSettings
from tests.helpers import Folders, first_fast, flow_models
from tests.helpers.commands import UNET
from tests.helpers.loading import load_diffusion, load_vlm, logits

FLOWS = ["sd3", "flux", "flux2", "z_image", "qwen_image", "sana", *flow_models.EDITORS]
VLMS = ["qwen2_5_vl", "llava", "llava_next", "qwen2_vl", "qwen3_vl", "idefics3", "paligemma", "internvl"]
# Forms that a pipeline has no reader for.
WITHOUT = {"sana": {"kohya", "comfyui"}, "flux": {"kohya"}, "flux_kontext": {"kohya"}}


@pytest.fixture
def folders(diffusion_folders: Folders, flow_folders: Folders, vlm_folders: Folders) -> Folders:
    def folder(name: str) -> Path:
        if name in ("sd15", "sdxl"):
            return diffusion_folders(name)
        return (flow_folders if name in FLOWS else vlm_folders)(name)

    return folder


def adapted(family: Any) -> Any:
    """Return the family with adapters that change its outputs, at a scale of 6."""
    family.add_lora(LoraSettings(rank=2, alpha=12.0, targets=family.default_lora_targets, seed=0))
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(family.network).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
    return family


@torch.no_grad()
def predicted(family: Any, net: Any) -> Tensor:
    """Return a denoiser's prediction."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if family.pipeline.__class__.__name__ in ("Flux2Pipeline",):
        noise = torch.randn(1, net.config.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    text = flow_models.conditioning(family, ["a fox"], 16, 16)
    t = torch.tensor([500]) if family.pipeline.__class__.__name__.startswith("StableDiffusion") else torch.tensor([0.5])
    return family.predict(net, noise, t, family.condition(text, sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15", *FLOWS])
def test_adapters_of_every_form_give_the_trained_prediction(name: str, folders: Folders, tmp_path: Path) -> None:
    family = adapted(load_diffusion(folders(name)))
    wanted, plain = predicted(family, family.network), predicted(family, load_diffusion(folders(name)).network)
    assert not torch.allclose(wanted, plain, rtol=1e-2)
    for form in ("diffusers", "kohya", "comfyui", "peft", "merged"):
        folder = tmp_path / form
        folder.mkdir()
        if form in WITHOUT.get(name, set()):
            with pytest.raises(
                ValueError, match=r"neither loads its LoRA; use diffusers, peft or merged|FLUX.1 of width 3072"
            ):
                family.export(folder, family.network, form, None)
            continue
        family.export(folder, family.network, form, None)
        other: Any = load_diffusion(folder if form == "merged" else folders(name))
        if form == "peft":
            PeftModel.from_pretrained(other.network, folder)
        elif (name, form) == ("sd3", "kohya"):
            load_lora(other.pipeline, other.network, str(folder), file=None, adapter="default")
        elif form != "merged":
            (file,) = folder.glob("*.safetensors")
            other.pipeline.load_lora_weights(load_file(file))  # the weights alone, as other programs read them
        torch.testing.assert_close(predicted(other, other.network), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(VLMS))
def test_vision_language_forms_give_the_trained_logits(name: str, folders: Folders, tmp_path: Path) -> None:
    family = adapted(load_vlm(folders(name)))
    wanted = logits(family.network.model, AutoProcessor.from_pretrained(folders(name)))
    for form, loader in (("peft", AutoPeftModel), ("merged", AutoModelForImageTextToText)):
        folder = tmp_path / form
        folder.mkdir()
        family.export(folder, family.network, form, None)
        model = loader.from_pretrained(folder)
        torch.testing.assert_close(logits(model, AutoProcessor.from_pretrained(folder)), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="comfyui has no vision-language models"):
        family.export(tmp_path, family.network, "comfyui", None)


def stored_in(folder: Path, target: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """Copy a model, the weights of its parts, or of itself at the empty name, in these dtypes."""
    shutil.copytree(folder, target)
    for part, dtype in dtypes.items():
        for file in (target / part).glob("*.safetensors"):
            tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
    return target


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_model_keeps_frozen_files_and_dtypes(folders: Folders, tmp_path: Path) -> None:
    """Also where the training loads the frozen parts in another precision."""
    dtypes = {"unet": torch.float16, "vae": torch.float16, "text_encoder": torch.bfloat16}
    base = stored_in(folders("sd15"), tmp_path / "base", dtypes)
    half = Loading(torch.device("cpu"), half=torch.bfloat16, vae_dtype=torch.bfloat16)
    family: Any = load_family(str(base), half)
    family.network.conv_in.weight.data.mul_(2)
    family.save(tmp_path / "saved", family.network)
    before, after = weight_bytes(base), weight_bytes(tmp_path / "saved")
    assert [name for name in before if after[name] != before[name]] == [UNET]
    old, new = load_file(base / UNET), load_file(tmp_path / "saved" / UNET)
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["conv_in.weight"]
    assert {x.dtype for x in new.values()} == {torch.float16}


def test_a_merged_model_keeps_the_dtype_of_every_weight(folders: Folders, tmp_path: Path) -> None:
    """And every file but the weights; another dtype is written into the config too."""
    base = stored_in(folders("llava"), tmp_path / "base", {"": torch.bfloat16})
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    norms = [name for name in tensors if "norm" in name]
    save_file({name: x.float() if name in norms else x for name, x in tensors.items()}, file, {"format": "pt"})
    family = adapted(load_vlm(base))
    for folder, dtype in (("kept", None), ("half", torch.float16)):
        (tmp_path / folder).mkdir()
        family.export(tmp_path / folder, family.network, "merged", dtype)
    kept, half = load_file(tmp_path / "kept" / file.name), load_file(tmp_path / "half" / file.name)
    assert {name: x.dtype for name, x in kept.items()} == {name: x.dtype for name, x in load_file(file).items()}
    assert all(torch.equal(x, load_file(file)[name]) for name, x in kept.items() if "vision" in name or name in norms)
    assert {x.dtype for x in half.values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert (tmp_path / "kept" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_other_numbers_are_refused(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that drops a layer, or a wrong number in a file."""
    family = adapted(load_diffusion(folders("sd15")))
    whole = lora_names.kohya

    def wrong(kind: str, adapters: Any, net: Any) -> dict[str, Tensor]:
        weights = whole(kind, adapters, net)
        name = next(name for name in weights if name.endswith("lora_up.weight"))
        return {**weights, name: 1.001 * weights[name]}

    monkeypatch.setitem(export_module.NAMES, "kohya", wrong)
    with pytest.raises(ValueError, match="was read back with other numbers"):
        family.export(tmp_path, family.network, "kohya", None)

    def short(kind: str, adapters: Any, net: Any) -> dict[str, Tensor]:
        return whole(kind, dict(list(adapters.items())[1:]), net)

    monkeypatch.setitem(export_module.NAMES, "kohya", short)
    with pytest.raises(ValueError, match="was read back with other numbers"):
        family.export(tmp_path, family.network, "kohya", None)


def test_flux_in_the_names_of_sd_scripts(folders: Folders) -> None:
    """Diffusers' converter, which knows FLUX.1's width of 3072 alone, gives the same changes of every layer."""
    width = 3072
    net = FluxTransformer2DModel.from_config(load_diffusion(folders("flux")).network.config)
    net.get_submodule = lambda name: SimpleNamespace(out_features=4 * width if name.endswith("mlp") else width)  # type: ignore
    generator = torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.0.attn.{name}" for name in JOINT]
    names += [f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v")]
    adapters = {
        name: (torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator)) for name in names
    }
    read = FluxPipeline.lora_state_dict(lora_names.kohya("FluxPipeline", adapters, net))
    for name in names:
        a, b = (read[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, adapters[name][0]) and torch.equal(b, adapters[name][1])
    others = [name for name in read if name.endswith("lora_B.weight") and name.split(".lora")[0][12:] not in names]
    assert others and not any(read[name].any() for name in others)
