"""Random models of the real classes at tiny sizes, written to a folder as the Hub would have them."""

import io
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

CONTEXT = 16
SIDE = 16  # pixels; the autoencoder halves them


def tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase + string.digits)
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=CONTEXT)


def text_config(**more: int) -> CLIPTextConfig:
    tok = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        **more,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=5.0,
    )


def unet(cross: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        **more,
    )


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """Stable Diffusion 1.x ("epsilon") or 2.x ("v_prediction")."""
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=unet(16),
        scheduler=DDIMScheduler(
            **SCHEDULE, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion XL: two encoders, pooled text, six sizes embedded in 4 numbers each."""
    torch.manual_seed(seed)
    StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=16)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
        unet=unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            transformer_layers_per_block=(1, 2),
        ),
    ).save_pretrained(folder)
    return folder


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 2, "hf_tokenizer_name": "tiny"},
}


def clip(folder: Path, seed: int = 0) -> Path:
    """A random open_clip model, as open_clip has it on the Hub: a judge that is as good as none."""
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
    """A random CLIPModel and its processor, as transformers has them on the Hub."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": 8, "hidden_act": activation}
    words = tokenizer()
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": CONTEXT, "hidden_act": activation}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.eos_token_id}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for weight in model.parameters():  # biases and scales too, which begin alike
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size=SIDE, crop_size=SIDE), words).save_pretrained(folder)
    return folder


def step_aware(folder: Path, clip_folder: Path) -> Path:
    """The judge that `clip` makes, told the time in every block: it scores a noisy image otherwise than a clean one."""
    from mmalign.rewards import step_aware

    parts = step_aware.begin(str(clip_folder))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in (*parts.net.blocks.parameters(), *parts.net.final.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    step_aware.save(parts, folder)
    return folder


def picture(seed: int, side: int = SIDE, upper: bool = True) -> bytes:
    """A PNG of noise, white in its upper or in its lower half."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 64, (side, side, 3), dtype=np.uint8)
    pixels[slice(0, side // 2) if upper else slice(side // 2, side)] += 191
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pick_a_pic(
    path: Path, number: int = 8, bad: dict[int, bytes] | None = None, rejected: dict[int, str | None] | None = None
) -> Path:
    """Pairs in the layout of Pick-a-Pic v2, white upper halves preferred; `bad` replaces a pair's first image.

    `rejected` gives the pairs a column of second prompts: these ones, or none, and of the others one each.
    """
    rows = []
    for i in range(number):
        first = i % 2 == 1  # whether the first image is the chosen one
        rows.append(
            {
                "caption": f"thing number {i}",
                "jpg_0": (bad or {}).get(i, picture(2 * i, SIDE, first)),
                "jpg_1": picture(2 * i + 1, SIDE + 4 * (i % 2), not first),
                "label_0": float(first),
                "label_1": float(not first),
                "image_0_uid": f"{path.name}-{i}-a",
                "image_1_uid": f"{path.name}-{i}-b",
            }
        )
        if rejected is not None:
            rows[-1]["rejected_caption"] = rejected.get(i, f"other number {i}")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def recipe(model: Path, pairs: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a tiny model; `train={...}` and so on add to its sections, `method={...}` takes its place."""
    base: dict[str, dict[str, Any]] = {
        "method": {"name": "diffusion_dpo", "beta": 100.0},
        "model": {"path": str(model), "tune": "full"},
        "data": {"path": str(pairs), "resolution": SIDE},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-3, "save_every": 2, "log_every": 1, "trackers": []},
    }
    for name, section in sections.items():
        base[name] = section if name == "method" else {**base.get(name, {}), **section}
    return {**base, "output": str(output)}


def recipe_in(folder_of_model: Path, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """The same with pairs of its own, all in a folder."""
    folder.mkdir(exist_ok=True)
    return recipe(folder_of_model, pick_a_pic(folder / "pairs.parquet"), folder / "output", **sections)
