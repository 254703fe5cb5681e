"""LoRA files in sd-scripts' names of Stable Diffusion 3, by diffusers' converter of original checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign.families.diffusion import export as export_module
from mmalign.families.diffusion import lora_names
from mmalign.families.lora import adapter_layers, all_linear
from mmalign.families.types import LoraSettings
from tests.commands.test_export import adapted
from tests.helpers import Folders
from tests.helpers.loading import load_diffusion

SD3_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
# Of the tiny SD3: the first block has a second attention, the text leaves the last one.
SD3_LAYERS = [
    *(f"joint_blocks.{index}.x_block.{layer}" for index in range(2) for layer in SD3_BLOCK),
    *(f"joint_blocks.0.x_block.attn2.{layer}" for layer in ("qkv", "proj")),
    *(f"joint_blocks.0.context_block.{layer}" for layer in SD3_BLOCK),
    *(f"joint_blocks.1.context_block.{layer}" for layer in ("attn.qkv", "adaLN_modulation.1")),
    *("context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"),
    *("final_layer.adaLN_modulation.1", "final_layer.linear"),
]


def test_sd3_in_the_names_of_sd_scripts(flow_folders: Folders, tmp_path: Path) -> None:
    """Each layer's change, written into an original checkpoint, is converted by diffusers to the trained change."""
    family: Any = load_diffusion(flow_folders("sd3"))
    family.add_lora(LoraSettings(rank=2, alpha=12.0, targets=all_linear(family.network), seed=0))
    trained = adapter_layers(family.network)
    for layer in trained.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    family.export(tmp_path, family.network, "kohya", None)
    file = load_file(tmp_path / "lora.safetensors")
    names = {f"lora_unet_{layer}".replace(".", "_"): layer for layer in SD3_LAYERS}
    assert {name.split(".")[0] for name in file} == set(names)
    checkpoint = {key: torch.zeros(1) for key in ("pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias")}
    for name, layer in names.items():
        a, b, alpha = (file[f"{name}.{key}"] for key in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha == len(a) == (6 if "qkv" in name else 2)
        checkpoint |= {f"{layer}.weight": b @ a, f"{layer}.bias": torch.zeros(len(b))}
    changes = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for layer_name, adapter in trained.items():
        torch.testing.assert_close(
            changes[f"{layer_name}.weight"], adapter.get_delta_weight("default"), rtol=1e-5, atol=1e-5
        )


def test_sd3_with_keys_in_the_place_of_queries_is_refused(
    flow_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = adapted(load_diffusion(flow_folders("sd3")))
    swapped = {"to_q": "to_k", "to_k": "to_q"}

    def wrong(kind: str, adapters: Any, net: Any) -> dict[str, Tensor]:
        parts = {name: name.rpartition(".") for name in adapters}
        other = {name: adapters[f"{part[0]}.{swapped.get(part[2], part[2])}"] for name, part in parts.items()}
        return lora_names.kohya(kind, other, net)

    monkeypatch.setitem(export_module.NAMES, "kohya", wrong)
    with pytest.raises(ValueError, match=r"to_q was read back with other numbers"):
        family.export(tmp_path, family.network, "kohya", None)


def test_a_layer_of_a_text_encoder_is_refused(flow_folders: Folders, tmp_path: Path) -> None:
    family: Any = load_diffusion(flow_folders("sd3"))
    weights = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1, 1)}
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"model.adapter: .*its layer lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        family.continue_adapter(str(tmp_path))
