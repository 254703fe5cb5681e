"""Names of adapters' weights in other programs: kohya's sd-scripts and ComfyUI.

Adapters are pairs (A [R, in], B [out, R]) by diffusers' layer name, R the rank, with the scale folded into B. Each
function returns the tensors of a file. `mmalign.families.diffusion.export` reads the file back by diffusers' own
converters (`mmalign.families.diffusion.lora_files`).

ComfyUI's key map (comfy/lora.py, `model_lora_keys_unet`) has UNets under `lora_unet_` with diffusers' or the original
layer names, FLUX.2 and SD3 under `lora_unet_` with the original names, and FLUX.1, SD3, Qwen-Image and Z-Image under
`transformer.` with diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import ModelMixin

Adapters = Mapping[str, tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]
# Layers of a block: diffusers' names and the original one; several names share one fused layer, in this order.
Block = Mapping[tuple[str, ...], str]

FLUX_WIDTH = 3072
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX_DOUBLE: Block = {
    tuple(f"attn.{name}" for name in _QKV): "img_attn_qkv",
    tuple(f"attn.{name}" for name in _ADDED): "txt_attn_qkv",
    ("attn.to_out.0",): "img_attn_proj",
    ("attn.to_add_out",): "txt_attn_proj",
    ("ff.net.0.proj",): "img_mlp_0",
    ("ff.net.2",): "img_mlp_2",
    ("ff_context.net.0.proj",): "txt_mlp_0",
    ("ff_context.net.2",): "txt_mlp_2",
    ("norm1.linear",): "img_mod_lin",
    ("norm1_context.linear",): "txt_mod_lin",
}
_FLUX_SINGLE: Block = {
    (*(f"attn.{name}" for name in _QKV), "proj_mlp"): "linear1",
    ("proj_out",): "linear2",
    ("norm.linear",): "modulation_lin",
}
_FLUX2_DOUBLE: Block = {
    **{names: name for names, name in _FLUX_DOUBLE.items() if names[0].startswith("attn.")},
    ("ff.linear_in",): "img_mlp_0",
    ("ff.linear_out",): "img_mlp_2",
    ("ff_context.linear_in",): "txt_mlp_0",
    ("ff_context.linear_out",): "txt_mlp_2",
}
_FLUX2_SINGLE: Block = {
    ("attn.to_qkv_mlp_proj",): "linear1",
    ("attn.to_out",): "linear2",
}
# library/sd3_models.py of sd-scripts, in which a joint block is an MMDiTBlock
_SD3_BLOCK: Block = {
    tuple(f"attn.{name}" for name in _QKV): "x_block.attn.qkv",
    tuple(f"attn2.{name}" for name in _QKV): "x_block.attn2.qkv",
    tuple(f"attn.{name}" for name in _ADDED): "context_block.attn.qkv",
    ("attn.to_out.0",): "x_block.attn.proj",
    ("attn2.to_out.0",): "x_block.attn2.proj",
    ("attn.to_add_out",): "context_block.attn.proj",
    ("ff.net.0.proj",): "x_block.mlp.fc1",
    ("ff.net.2",): "x_block.mlp.fc2",
    ("ff_context.net.0.proj",): "context_block.mlp.fc1",
    ("ff_context.net.2",): "context_block.mlp.fc2",
    ("norm1.linear",): "x_block.adaLN_modulation.1",
    ("norm1_context.linear",): "context_block.adaLN_modulation.1",
}
_SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def kohya(family: str, adapters: Adapters, net: ModelMixin) -> Weights:
    """Return the file of sd-scripts, which Automatic1111, Forge and ComfyUI read too.

    Args:
        family: the pipeline's class name.
        adapters: the adapters.
        net: the denoiser, for the sizes of its blocks and layers.

    Raises:
        ValueError: sd-scripts lacks the family, or a layer has no name there.
    """
    return _known(_KOHYA, family)(adapters, net)


def comfyui(family: str, adapters: Adapters, net: ModelMixin) -> Weights:
    """Return the file of ComfyUI, by the names that its key map has for the family; arguments as in `kohya`.

    Raises:
        ValueError: ComfyUI's key map lacks the family, or a layer has no name there.
    """
    return _known(_COMFYUI, family)(adapters, net)


def sd3_layers(net: ModelMixin) -> dict[str, list[str]]:
    """Return diffusers' layers in each layer of the original Stable Diffusion 3, by its name."""
    outside = {name: [layer] for layer, name in _SD3_OUTSIDE.items()}
    return outside | _original_layers(net, ("transformer_blocks", "joint_blocks", _SD3_BLOCK))


def underscored(layer: str) -> str:
    """Return the name of a layer's tensors in a file of sd-scripts."""
    return f"lora_unet_{layer}".replace(".", "_")


def _known(names: Mapping[str, Callable[[Adapters, Any], Weights]], family: str) -> Callable[[Adapters, Any], Weights]:
    """Return the function for a family; both programs lack the same ones."""
    if family not in names:
        raise ValueError(
            f"sd-scripts and ComfyUI have no {family}, so neither loads its LoRA; use diffusers, peft or merged"
        )
    return names[family]


def _down_up(layer: str, a: Tensor, b: Tensor) -> Weights:
    """Return a layer's tensors; alpha is the rank, since the scale is folded."""
    return {
        f"{layer}.lora_down.weight": a.contiguous(),
        f"{layer}.lora_up.weight": b.contiguous(),
        f"{layer}.alpha": torch.tensor(float(len(a))),
    }


def _underscored(adapters: Adapters, _: ModelMixin) -> Weights:
    """Return diffusers' layer names with underscores."""
    return _named(adapters, lambda layer: layer)


def _original_unet(adapters: Adapters, net: ModelMixin) -> Weights:
    """Return the layer names of the original SDXL, which sd-scripts trains."""
    return _named(adapters, lambda layer: _original_name(layer, net.config))


def _named(adapters: Adapters, name: Callable[[str], str]) -> Weights:
    weights = Weights()
    for layer, (a, b) in adapters.items():
        weights |= _down_up(underscored(name(layer)), a, b)
    return weights


def _original_name(layer: str, config: Any) -> str:
    """Return the original name of a UNet's layer; its blocks are numbered through all levels."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    # A level of the encoder has its layers and a downsampler, one of the decoder a layer more
    per_level = config.layers_per_block + 1
    if (part := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", layer)) is not None:
        return f"middle_block.{_MIDDLE[f'{part[1]}.{part[2]}']}.{_RESNET.get(part[3], part[3])}"
    part = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer)
    if part is None:
        raise ValueError(f"the layer {layer} has no name in the original UNet; leave it out of model.lora.targets")
    side, level, kind, place, rest = part[1], int(part[2]), part[3], int(part[4]), part[5]
    # Samplers: the down one is a block of its own, the up one the last part of its level's last block
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.op"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[level]
        return f"output_blocks.{(level + 1) * per_level - 1}.{2 if attends else 1}.conv"
    # Layers; input block 0 is the first convolution
    block = level * per_level + place + (1 if side == "down" else 0)
    prefix = f"{'input' if side == 'down' else 'output'}_blocks.{block}"
    return f"{prefix}.{0 if kind == 'resnets' else 1}.{_RESNET.get(rest, rest)}"


def _original_layers(net: ModelMixin, *blocks: tuple[str, str, Block]) -> dict[str, list[str]]:
    """Return diffusers' layers in each layer of the original network, by its name.

    Args:
        net: the denoiser.
        blocks: diffusers' name of a list of blocks, the original one, and the layers of a block.
    """
    known = dict(net.named_modules()).keys()  # in order
    layers = {}
    for list_name, original, block in blocks:
        for place in (name for name in known if re.fullmatch(rf"{list_name}\.\d+", name)):
            for names, name in block.items():
                parts = [f"{place}.{part}" for part in names]
                if known >= {*parts}:
                    layers[f"{original}{place.removeprefix(list_name)}.{name}"] = parts
    return layers


def _in_layers(adapters: Adapters, net: ModelMixin, layers: Mapping[str, list[str]]) -> Weights:
    """Return the tensors of original layers, which hold diffusers' layers."""
    left, weights = dict(adapters), Weights()
    for name, parts in layers.items():
        # An original layer may hold several of diffusers', such as q, k and v
        pairs = [left.pop(part, None) for part in parts]
        if any(pair is not None for pair in pairs):
            outs = [net.get_submodule(part).out_features for part in parts]
            weights |= _down_up(underscored(name), *_fused(pairs, outs))
    if left:
        raise ValueError(f"the layer {next(iter(left))} has no name in sd-scripts; use diffusers")
    return weights


def _flux(adapters: Adapters, net: ModelMixin, double: Block, single: Block) -> Weights:
    """Return the names of a FLUX whose blocks have these layers."""
    blocks = ("transformer_blocks", "double_blocks", double), ("single_transformer_blocks", "single_blocks", single)
    return _in_layers(adapters, net, _original_layers(net, *blocks))


def _fused(pairs: list[tuple[Tensor, Tensor] | None], outs: list[int]) -> tuple[Tensor, Tensor]:
    """Return the pair of a fused layer: A's below one another, B's on a block diagonal; zeros where there is none."""
    known = [pair for pair in pairs if pair is not None]
    rank, like = max(len(a) for a, _ in known), known[0][0]
    if len(pairs) == 1:
        return known[0]
    # The parts share one rank: lacking rows and columns are zero
    a_parts, b_parts = [], []
    for pair, out in zip(pairs, outs, strict=True):
        a, b = like.new_zeros(rank, like.shape[1]), like.new_zeros(out, rank)
        if pair is not None:
            a[: len(pair[0])], b[:, : len(pair[0])] = pair
        a_parts.append(a)
        b_parts.append(b)
    return torch.cat(a_parts), torch.block_diag(*b_parts)  # type: ignore[no-untyped-call]


def _transformer(adapters: Adapters, _: ModelMixin) -> Weights:
    """Return diffusers' own layer names; without alpha, since the scale is folded."""
    return {
        f"transformer.{layer}.lora_{side}.weight": x
        for layer, pair in adapters.items()
        for side, x in zip("AB", pair, strict=True)
    }


def _flux1(adapters: Adapters, net: ModelMixin) -> Weights:
    """Return the names of FLUX.1; the one installed reader splits its fused layers at FLUX.1's own width."""
    fused = [layer for layer in adapters if layer.startswith("single_transformer_blocks") and ".to_" in layer]
    if fused and (width := net.get_submodule(fused[0]).out_features) != FLUX_WIDTH:
        raise ValueError(
            f"diffusers' reader of kohya's names knows a FLUX.1 of width {FLUX_WIDTH}, not {width}; use comfyui"
        )
    return _flux(adapters, net, _FLUX_DOUBLE, _FLUX_SINGLE)


def _flux2(adapters: Adapters, net: ModelMixin) -> Weights:
    return _flux(adapters, net, _FLUX2_DOUBLE, _FLUX2_SINGLE)


def _sd3(adapters: Adapters, net: ModelMixin) -> Weights:
    """Return the names of SD3, whose last two modulations have shift and scale in the other order than diffusers'."""
    last = len(net.transformer_blocks) - 1
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    turned = {layer: (a, b.roll(len(b) // 2, 0)) for layer, (a, b) in adapters.items() if layer in swapped}
    return _in_layers({**adapters, **turned}, net, sd3_layers(net))


_KOHYA: dict[str, Callable[[Adapters, Any], Weights]] = {
    "StableDiffusionPipeline": _underscored,
    "StableDiffusionXLPipeline": _original_unet,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux1,
    "FluxKontextPipeline": _flux1,
    "Flux2Pipeline": _flux2,
    "QwenImagePipeline": _underscored,
    "QwenImageEditPipeline": _underscored,
    "QwenImageEditPlusPipeline": _underscored,
    "ZImagePipeline": _underscored,
}
_COMFYUI: dict[str, Callable[[Adapters, Any], Weights]] = {
    "StableDiffusionPipeline": _underscored,
    "StableDiffusionXLPipeline": _underscored,
    "StableDiffusion3Pipeline": _transformer,
    "FluxPipeline": _transformer,
    "FluxKontextPipeline": _transformer,
    "Flux2Pipeline": _flux2,
    "QwenImagePipeline": _transformer,
    "QwenImageEditPipeline": _transformer,
    "QwenImageEditPlusPipeline": _transformer,
    "ZImagePipeline": _transformer,
}
