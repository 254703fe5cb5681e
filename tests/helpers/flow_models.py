"""Random flow-matching models of the real classes at tiny sizes, written to a folder as on the Hub."""

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mmalign.families.base import TextToImage
from mmalign.families.editing import SOURCE
from mmalign.families.types import Conditioning
from tests.helpers.data_files import SIDE
from tests.helpers.diffusion_models import VAE, text_config
from tests.helpers.diffusion_models import tokenizer as clip_tokenizer
from tests.helpers.vlm_models import qwen2_5_vl
from tests.helpers.vlm_models import tokenizer as pieces

HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for m in messages %}[{{ m['role'] }}]"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}\n{% endfor %}"
)
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _autoencoder() -> AutoencoderKL:
    """Return an autoencoder with a shift, as in SD3, FLUX.1 and Z-Image."""
    return AutoencoderKL(**VAE, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def _t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a T5 encoder and a tokenizer with a token for every letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tok = T5Tokenizer(vocab=[*special, *((c, -2.0) for c in "▁" + string.ascii_lowercase + string.digits)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tok),
        d_model=width,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tok


def _sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    t5, t5_tokenizer = _t5(32) if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            **HEADS,
            sample_size=SIDE // 2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=CLIPTextModelWithProjection(text_config(projection_dim=16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=16)),
        text_encoder_3=t5,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer,
    )


def _flux(guided: bool = True, cls: Any = FluxPipeline) -> Any:
    t5, t5_tokenizer = _t5(16)
    return cls(
        transformer=FluxTransformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guided,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=DYNAMIC if guided else FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=t5,
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer,
    )


def _flux2() -> Flux2Pipeline:
    vae = AutoencoderKLFlux2(**VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    tok = pieces(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    # The pipeline reads the states of layers 10, 20 and 30.
    text = {"model_type": "mistral", "vocab_size": len(tok), "num_hidden_layers": 30, **LAYERS}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 8}
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=tok.convert_tokens_to_ids("[IMG]")
    )
    return Flux2Pipeline(
        transformer=Flux2Transformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        scheduler=DYNAMIC,
        vae=vae,
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), tok, patch_size=8, chat_template=MISTRAL_CHAT),
    )


def _z_image() -> ZImagePipeline:
    tok = pieces(["<|im_start|>", "<|im_end|>"], end="<|im_end|>")
    tok.chat_template = CHAT
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tok), num_hidden_layers=2, **LAYERS)),
        tokenizer=tok,
    )


def _qwen_image(cls: Any = QwenImagePipeline) -> Any:
    model, processor = qwen2_5_vl()
    parts = processor.image_processor, processor.tokenizer, processor.video_processor
    shown = {} if cls is QwenImagePipeline else {"processor": Qwen2VLProcessor(*parts)}
    return cls(
        **shown,
        transformer=QwenImageTransformer2DModel(
            **HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.2, 0.1, 1.5],
            latents_std=[2.8, 1.4, 0.6, 1.9],
        ),
        text_encoder=model,
        tokenizer=processor.tokenizer,
    )


def _sana() -> SanaPipeline:
    tok = pieces([], begin=True)
    blocks: dict[str, Any] = {f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")}
    blocks |= {f"{half}_block_out_channels": (8, 8, 8) for half in ("encoder", "decoder")}
    blocks |= {f"{half}_layers_per_block": (1, 1, 1) for half in ("encoder", "decoder")}
    blocks |= {f"{half}_qkv_multiscales": ((), (), ()) for half in ("encoder", "decoder")}
    return SanaPipeline(
        tokenizer=tok,
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tok), num_hidden_layers=1, **LAYERS)),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41, **blocks),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd3": _sd3,
    "sd3_without_t5": lambda: _sd3(with_t5=False),
    "flux": _flux,
    "flux_schnell": lambda: _flux(guided=False),
    "flux2": _flux2,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "sana": _sana,
    "flux_kontext": lambda: _flux(cls=FluxKontextPipeline),
    "qwen_image_edit": lambda: _qwen_image(QwenImageEditPipeline),
    "qwen_image_edit_plus": lambda: _qwen_image(QwenImageEditPlusPipeline),
}
EDITORS = ("flux_kontext", "qwen_image_edit", "qwen_image_edit_plus")


def sources(number: int, width: int, height: int) -> Tensor:
    """Return source images [N, 3, H, W] of noise, with the values of eight bits."""
    pixels = torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(7))
    return pixels / 127.5 - 1


def conditioning(family: TextToImage, prompts: Sequence[str], width: int, height: int) -> Conditioning:
    """Return the text conditioning of prompts, with source images of that size for a model that edits."""
    if family.editing is None:
        return family.encode_prompts(prompts)
    images = sources(len(prompts), width, height)
    text = family.encode_edits(prompts, images)
    return Conditioning({**text.tensors, SOURCE: family.encode_images(images).mean})


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny pipeline of that name to a folder."""
    torch.manual_seed(seed)
    pipeline = BUILDERS[name]()
    for weight in pipeline.transformer.parameters():  # weights differ enough for every token to matter
        weight.data.add_(0.1 * torch.randn_like(weight))
    pipeline.save_pretrained(folder)
    return folder
