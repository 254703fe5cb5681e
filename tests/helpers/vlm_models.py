"""Random vision-language models of the real classes at tiny sizes, each with a processor of its own class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GemmaConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.helpers.vlm_tokenizers import IDEFICS_CHAT, LLAVA_CHAT, QWEN_CHAT, QWEN_MARKS, QWEN_TOKENS, tokenizer

Sizes = dict[str, Any]  # sizes of a network by configuration key
TEXT: Sizes = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
VISION: Sizes = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _ids(tok: Any) -> dict[str, int]:
    return {"pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}


def _llama(tok: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(tok), **TEXT, **_ids(tok))


def llava(text: Sizes = TEXT, vision: Sizes = VISION, tok: Any = None) -> tuple[Any, Any]:
    """Return a LLaVA-1.5: one-dimensional positions, a fixed number of tokens per image."""
    tok, side = tok or tokenizer(["<image>"], begin=True), vision["image_size"]
    square = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = _llava_processor(LlavaProcessor, square, tok, vision)
    return LlavaForConditionalGeneration(_llava_config(LlavaConfig, text, vision, tok)), processor


def llava_next() -> tuple[Any, Any]:
    """Return a LLaVA-Next: a number of tiles that depends on the image."""
    tok, grid = tokenizer(["<image>"], begin=True), {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
    tiles = LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **grid)
    processor = _llava_processor(LlavaNextProcessor, tiles, tok, VISION)
    return LlavaNextForConditionalGeneration(_llava_config(LlavaNextConfig, TEXT, VISION, tok, **grid)), processor


def _llava_processor(kind: Any, images: Any, tok: Any, vision: Sizes) -> Any:
    """Return a processor of the LLaVA family, without the tower's class token at every size."""
    return kind(
        images,
        tok,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )


def _llava_config(kind: Any, text: Sizes, vision: Sizes, tok: Any, **more: Any) -> Any:
    return kind(
        vision_config=CLIPVisionConfig(**{"projection_dim": 16, **vision}),
        text_config=LlamaConfig(**{"vocab_size": len(tok), **text}, **_ids(tok)),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **more,
    )


def idefics3() -> tuple[Any, Any]:
    """Return an Idefics3: tiles with text tags between them."""
    tags = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tok = tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tags])
    tiles = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(tiles, tok, image_seq_len=1, chat_template=IDEFICS_CHAT)
    config = Idefics3Config(
        vision_config=VISION,
        text_config=_llama(tok).to_dict(),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """Return a SmolVLM: as Idefics3, with its own processor."""
    model, idefics = idefics3()
    tiles = SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = SmolVLMProcessor(
        tiles, idefics.tokenizer, SmolVLMVideoProcessor(), image_seq_len=1, chat_template=IDEFICS_CHAT
    )
    config = model.config.to_dict()
    config["vision_config"] = VISION
    del config["model_type"]
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**config)), processor


QWEN_SIDES: dict[str, Any] = {
    "patch_size": 8,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
}
QWEN_VISION: Sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
QWEN2_5_VISION: Sizes = {
    **QWEN_VISION,
    "intermediate_size": 24,
    "out_hidden_size": 16,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}


def _qwen(text: Sizes | None = None, tok: Any = None, **rope: Any) -> tuple[Any, dict[str, Any]]:
    """Return a tokenizer of Qwen's and the common configuration of its models; positions in rows and columns."""
    tok = tok or tokenizer(QWEN_TOKENS, end="<|im_end|>")
    positions = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, **rope}
    text = {"vocab_size": len(tok), "rope_parameters": positions, **(text or TEXT), **_ids(tok)}
    return tok, {"text_config": text, **{name: tok.convert_tokens_to_ids(mark) for name, mark in QWEN_MARKS.items()}}


def qwen2_vl() -> tuple[Any, Any]:
    """Return a Qwen2-VL: positions in rows and columns, as many tokens as the image has patches."""
    tok, same = _qwen()
    image, video = Qwen2VLImageProcessor(**QWEN_SIDES), Qwen2VLVideoProcessor(**QWEN_SIDES)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2, "num_heads": 2, "patch_size": 8}
    config = Qwen2VLConfig(vision_config=vision, **same)
    processor = Qwen2VLProcessor(image, tok, video, chat_template=QWEN_CHAT)
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(
    text: Sizes | None = None, vision: Sizes = QWEN2_5_VISION, tok: Any = None, sides: Sizes = QWEN_SIDES
) -> tuple[Any, Any]:
    """Return a Qwen2.5-VL: as Qwen2-VL, with windows in its tower."""
    tok, same = _qwen(text, tok)
    image, video = Qwen2VLImageProcessor(**sides), Qwen2VLVideoProcessor(**sides)
    config = Qwen2_5_VLConfig(vision_config=vision, **same)
    processor = Qwen2_5_VLProcessor(image, tok, video, chat_template=QWEN_CHAT)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3(kind: Any, model: Any, vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    tok, same = _qwen(mrope_interleaved=True, **text.pop("rope", {}))
    same["text_config"] |= {"head_dim": 8, **text}
    image, video = Qwen2VLImageProcessor(**QWEN_SIDES), Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    tower = {**QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 16, "num_position_embeddings": 16, **vision}
    processor = Qwen3VLProcessor(image, tok, video, chat_template=QWEN_CHAT)
    return model(kind(vision_config=tower, **same)), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Return a Qwen3-VL: as Qwen2.5-VL, with features of inner tower layers entering the decoder's first layers."""
    return _qwen3(Qwen3VLConfig, Qwen3VLForConditionalGeneration, {"deepstack_visual_indexes": [0]}, {})


def qwen3_5() -> tuple[Any, Any]:
    """Return a Qwen3.5: a layer with linear attention, which an attention mask does not reach."""
    heads = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    linear = {**heads, **{f"linear_num_{part}_heads": 2 for part in ("key", "value")}}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "rope": {"partial_rotary_factor": 1.0}}
    return _qwen3(Qwen3_5Config, Qwen3_5ForConditionalGeneration, {}, {**linear, **kinds})


def internvl() -> tuple[Any, Any]:
    """Return an InternVL: image tokens between tags that its processor writes."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named = {**marks, "video_token": "<video>"}
    tok = tokenizer([*named.values(), "<|im_start|>", "<|im_end|>"], end="<|im_end|>", named=named)
    square = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=False)
    chat = QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    processor = InternVLProcessor(square, tok, InternVLVideoProcessor(), image_seq_length=1, chat_template=chat)
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        text_config=Qwen2Config(vocab_size=len(tok), **TEXT, **_ids(tok)).to_dict(),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
    )
    return InternVLForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """Return a PaliGemma: bidirectional attention in the prompt, positions from 1, no chat template."""
    tok = tokenizer(["<image>"])
    square = SiglipImageProcessor(size={"height": 16, "width": 16})
    square.image_seq_length = 4
    processor = PaliGemmaProcessor(square, tok)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, projection_dim=16, vision_use_head=False),
        projection_dim=16,
        text_config=GemmaConfig(vocab_size=len(tok), head_dim=8, **TEXT, **_ids(tok)),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
    )
    return PaliGemmaForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """Return a LLaVA-OneVision: a number of tiles that depends on the image."""
    tok, grid = tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"], end="<|im_end|>"), [[16, 32], [32, 16]]
    tiles = LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=grid)
    processor = LlavaOnevisionProcessor(
        tiles,
        tok,
        LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(vocab_size=len(tok), **TEXT, **_ids(tok)),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def gemma4() -> tuple[Any, Any]:
    """Return a Gemma 4: windows of attention, embeddings for each layer, logits with a soft cap."""
    marks = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "video_token": "<|video|>",
    }
    tok = tokenizer([*marks.values(), "<|im_start|>", "<|im_end|>"], end="<|im_end|>", named=marks)
    tiles = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        tiles,
        tok,
        Gemma4VideoProcessor(),
        chat_template=QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>"),
        image_seq_length=70,
    )
    text = {
        **TEXT,
        "vocab_size": len(tok),
        "vocab_size_per_layer_input": len(tok),
        "hidden_size_per_layer_input": 4,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
        **_ids(tok),
    }
    vision = {
        **{k: v for k, v in VISION.items() if k != "image_size"},
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    ids = {
        f"{kind}_token_id": tok.convert_tokens_to_ids(marks[f"{kind}_token"]) for kind in ("image", "video", "audio")
    }
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, **ids)), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
}
# Types that run on the same code, with one image per row.
NEWER = {"qwen3_5": qwen3_5, "gemma4": gemma4, "llava_onevision": llava_onevision}
ALL = [*BUILDERS, *NEWER]


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of that type with its processor to a folder."""
    torch.manual_seed(seed)
    model, processor = {**BUILDERS, **NEWER}[name]()
    for weight in model.parameters():  # weights differ enough for every token to matter
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
