"""Random CLIP reward models of the real classes at tiny sizes, written as the Hub stores them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.helpers.data_files import SIDE
from tests.helpers.diffusion_models import CONTEXT, tokenizer

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 2, "hf_tokenizer_name": "tiny"},
}


def clip(folder: Path, seed: int = 0) -> Path:
    """Write a random open_clip model as on the Hub: a reward model without any knowledge."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save_pretrained(folder)
    config: dict[str, Any] = json.loads(json.dumps(CLIP))
    config["text_cfg"]["vocab_size"] = len(words)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**json.loads(json.dumps(config)))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def transformers_clip(folder: Path, seed: int = 0, activation: str = "gelu") -> Path:
    """Write a random CLIPModel and its processor as on the Hub."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": 8, "hidden_act": activation}
    words = tokenizer()
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": CONTEXT, "hidden_act": activation}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.eos_token_id}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for weight in model.parameters():  # also biases and scales, which start equal
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size=SIDE, crop_size=SIDE), words).save_pretrained(folder)
    return folder


def step_aware(folder: Path, clip_folder: Path) -> Path:
    """Write the reward model of `clip`, with time in every block: noisy and clean images score differently."""
    from mmalign.rewards import step_aware

    parts = step_aware.begin(str(clip_folder))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in (*parts.net.blocks.parameters(), *parts.net.final.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    step_aware.save(parts, folder)
    return folder


def spo_release(file: Path, clip_folder: Path) -> dict[str, torch.Tensor]:
    """Write a random judge with the names and shapes of the file that SPO's authors published, for a CLIPModel."""
    torch.manual_seed(5)
    model = CLIPModel.from_pretrained(clip_folder)
    width, frequencies = model.config.vision_config.hidden_size, 256
    linears = {"t_embedder.mlp.0": (width, frequencies), "t_embedder.mlp.2": (width, width)}
    linears |= {
        f"vision_model.encoder.layers.{i}.adaLN_modulation.1": (6 * width, width)
        for i in range(model.config.vision_config.num_hidden_layers)
    }
    linears["vision_model.adaLN_modulation.1"] = (2 * width, width)
    weights = {name: x + 0.05 * torch.randn_like(x) for name, x in model.state_dict().items()}
    for name, shape in linears.items():
        weights |= {f"{name}.weight": 0.2 * torch.randn(shape), f"{name}.bias": 0.3 * torch.randn(shape[0])}
    positions = {"text": model.config.text_config.max_position_embeddings}
    positions |= {"vision": (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2 + 1}
    weights |= {f"{tower}_model.embeddings.position_ids": torch.arange(n)[None] for tower, n in positions.items()}
    weights = {f"model.{name}": x for name, x in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file) if file.suffix == ".safetensors" else torch.save(weights, file)
    return weights
