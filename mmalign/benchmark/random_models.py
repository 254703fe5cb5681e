"""Models of random weights in the shapes of real ones, written to a folder as the Hub would have them.

What a step costs depends on shapes alone, so no checkpoint is needed. Sizes are those of the published configurations,
or given; tokenizers are the bundled one of models/tiny_sd, and bytes for decoders: a token is a character.

A model's networks are built by a function of their own, on the default device: on "meta", only their shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmalign.resources import resolve_model

Sizes = dict[str, Any]  # of a network, by the names of its configuration

CLIP_L: Sizes = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: Sizes = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_SMALL: Sizes = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
VAE: Sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE_16: Sizes = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
VAE_SMALL: Sizes = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1, "latent_channels": 4}
SD15_UNET: Sizes = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SMALL_UNET: Sizes = {
    "sample_size": 16,
    "block_out_channels": (128, 256),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 256,
}
SDXL_UNET: Sizes = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35M: Sizes = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SCHEDULE: Sizes = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

LLAMA_7B: Sizes = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
LLAMA_SMALL: Sizes = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}
VIT_L: Sizes = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VIT_SMALL: Sizes = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 64,
}
QWEN_7B: Sizes = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
QWEN_TOWER: Sizes = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
LLAVA_MARKS = ["<image>"]
LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def stable_diffusion(
    folder: Path, device: torch.device, *, unet: Sizes = SD15_UNET, vae: Sizes = VAE, text: Sizes = CLIP_L
) -> None:
    """Stable Diffusion 1.x."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with _beginning(device):
        parts = stable_diffusion_parts(unet, vae, text)
    StableDiffusionPipeline(
        **_saved(parts, device),
        tokenizer=_words(),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_parts(unet: Sizes = SD15_UNET, vae: Sizes = VAE, text: Sizes = CLIP_L) -> dict[str, Any]:
    """Its networks."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    return {
        "vae": AutoencoderKL(**_blocks(vae)),
        "text_encoder": CLIPTextModel(_clip(text)),
        "unet": UNet2DConditionModel(**unet),
    }


def sdxl(
    folder: Path,
    device: torch.device,
    *,
    unet: Sizes = SDXL_UNET,
    vae: Sizes = VAE,
    texts: tuple[Sizes, Sizes] = (CLIP_L, CLIP_G),
) -> None:
    """Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with _beginning(device):
        parts = sdxl_parts(unet, vae, texts)
    StableDiffusionXLPipeline(
        **_saved(parts, device),
        tokenizer=_words(),
        tokenizer_2=_words(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
    ).save_pretrained(folder)


def sdxl_parts(
    unet: Sizes = SDXL_UNET, vae: Sizes = VAE, texts: tuple[Sizes, Sizes] = (CLIP_L, CLIP_G)
) -> dict[str, Any]:
    """Its networks."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "vae": AutoencoderKL(**_blocks(vae), scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(_clip(texts[0])),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(texts[1])),
        "unet": UNet2DConditionModel(**unet),
    }


def sd35_medium(
    folder: Path,
    device: torch.device,
    *,
    transformer: Sizes = SD35M,
    vae: Sizes = VAE_16,
    texts: tuple[Sizes, Sizes] = (CLIP_L, CLIP_G),
) -> None:
    """Stable Diffusion 3.5-medium without its T5, in whose place the pipeline puts as many zeros."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with _beginning(device):
        parts = sd35_medium_parts(transformer, vae, texts)
    StableDiffusion3Pipeline(
        **_saved(parts, device),
        tokenizer=_words(),
        tokenizer_2=_words(),
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def sd35_medium_parts(
    transformer: Sizes = SD35M, vae: Sizes = VAE_16, texts: tuple[Sizes, Sizes] = (CLIP_L, CLIP_G)
) -> dict[str, Any]:
    """Its networks."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    return {
        "vae": AutoencoderKL(**_blocks(vae), scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": CLIPTextModelWithProjection(_clip(texts[0])),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(texts[1])),
        "transformer": SD3Transformer2DModel(**transformer),
    }


def llava(folder: Path, device: torch.device, *, text: Sizes = LLAMA_7B, tower: Sizes = VIT_L) -> None:
    """LLaVA-1.5: 576 tokens an image."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = tower["image_size"]
    square = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        square,
        _bytes(LLAVA_MARKS),
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    with _beginning(device):
        model = llava_model(text, tower)
    _write(folder, model, processor, device)


def llava_model(text: Sizes = LLAMA_7B, tower: Sizes = VIT_L) -> Any:
    """Its network."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokens = _bytes(LLAVA_MARKS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**text, **_ids(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def qwen25_vl(folder: Path, device: torch.device, *, text: Sizes = QWEN_7B, tower: Sizes = QWEN_TOWER) -> None:
    """Qwen2.5-VL-7B: a token for every 28 pixels by 28."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    image, video = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    processor = Qwen2_5_VLProcessor(image, _qwen_tokens(), video, chat_template=QWEN_CHAT)
    with _beginning(device):
        model = qwen25_vl_model(text, tower)
    _write(folder, model, processor, device)


def qwen25_vl_model(text: Sizes = QWEN_7B, tower: Sizes = QWEN_TOWER) -> Any:
    """Its network."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = _qwen_tokens()
    marks = {name: tokens.convert_tokens_to_ids(mark) for name, mark in QWEN_MARKS.items()}
    config = Qwen2_5_VLConfig(vision_config=tower, text_config={**text, **_ids(tokens)}, **marks)
    return Qwen2_5_VLForConditionalGeneration(config)


@contextlib.contextmanager
def _beginning(device: torch.device) -> Iterator[None]:
    """Where new weights come from a fixed seed, on a device; the generators are as they were afterwards."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        yield


def _saved(parts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The networks as they are written: on a GPU in half the bytes."""
    if device.type == "cuda":
        return {name: net.to(torch.bfloat16) for name, net in parts.items()}
    return parts


def _write(folder: Path, model: Any, processor: Any, device: torch.device) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _saved({"model": model}, device)["model"].save_pretrained(folder)
    processor.save_pretrained(folder)


def _blocks(vae: Sizes) -> dict[str, Any]:
    number = len(vae["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * number, "up_block_types": ("UpDecoderBlock2D",) * number}
    return {**vae, **kinds, "sample_size": 128}


def _words() -> Any:
    """The bundled tokenizer, that reads as many tokens as Stable Diffusion's."""
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(Path(resolve_model("models/tiny_sd")) / "tokenizer")
    tokens.model_max_length = 77
    return tokens


def _clip(sizes: Sizes) -> Any:
    from transformers import CLIPTextConfig

    tokens = _words()
    return CLIPTextConfig(vocab_size=49408 if sizes["hidden_size"] >= 768 else len(tokens), **_ids(tokens), **sizes)


def _qwen_tokens() -> Any:
    return _bytes([*QWEN_MARKS.values(), "<|im_start|>", "<|im_end|>"], end="<|im_end|>")


def _ids(tokens: Any) -> dict[str, int]:
    return {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _bytes(special: list[str], end: str = "</s>") -> Any:
    """A tokenizer whose tokens are bytes, and these special ones; it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *special]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=special,
    )
