"""Random vision-language models of the real classes at tiny sizes, written to a folder as the Hub would have them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
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
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

WORDS = [
    "USER: What is in this image? Describe it. ASSISTANT: There is a red cube and a green ball on the table.",
    "Is there a dog in the image? Yes, there is. No, there is no dog. Two cats sit on a blue mat near a car.",
]
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
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
IDEFICS_CHAT = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(
    extra: Sequence[str], begin: bool = False, end: str = "</s>", named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level pieces of a few sentences; `begin` puts <s> before every text, as Llama's tokenizer does."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *extra]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(WORDS * 8, trainer)
    if begin:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=list(extra),
        model_specific_special_tokens=named or {},
    )


def _ids(tok: Any) -> dict[str, int]:
    return {"pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}


def _llama(tok: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(tok), **TEXT, **_ids(tok))


def llava() -> tuple[Any, Any]:
    """LLaVA-1.5: one-dimensional positions, a fixed number of tokens an image."""
    tok = tokenizer(["<image>"], begin=True)
    square = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        square,
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=_llama(tok),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    """LLaVA-Next: an image in tiles of its own number."""
    tok, grid = tokenizer(["<image>"], begin=True), [[16, 32], [32, 16], [32, 32]]
    tiles = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        tiles,
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=_llama(tok),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_grid_pinpoints=grid,
    )
    return LlavaNextForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics3: tiles with tags in text between them."""
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


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: positions in rows and columns, as many tokens as the image has patches."""
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tok = tokenizer(marks, end="<|im_end|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    sides = {"patch_size": 8, "merge_size": 2, "size": size}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sides), tok, Qwen2VLVideoProcessor(**sides), chat_template=QWEN_CHAT
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "vocab_size": len(tok), "rope_parameters": rope, **_ids(tok)},
        **{name: tok.convert_tokens_to_ids(mark) for name, mark in zip(names, marks, strict=False)},
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: as Qwen2.5-VL, and features of inner layers of the tower enter the decoder's first layers."""
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tok = tokenizer(marks, end="<|im_end|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    sides = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sides), tok, Qwen3VLVideoProcessor(patch_size=8, merge_size=2), chat_template=QWEN_CHAT
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config={**TEXT, "head_dim": 8, "vocab_size": len(tok), "rope_parameters": rope, **_ids(tok)},
        **{name: tok.convert_tokens_to_ids(mark) for name, mark in zip(names, marks, strict=False)},
    )
    return Qwen3VLForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """InternVL: the image's tokens stand between tags that its processor writes."""
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
    """PaliGemma: the prompt's tokens see one another in both directions, positions begin at 1, no chat template."""
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


STANDING: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
}
BUILDERS = {**STANDING, "idefics3": idefics3, "qwen3_vl": qwen3_vl, "internvl": internvl}


def write(name: str, folder: Path, seed: int = 0, builders: Any = BUILDERS) -> Path:
    """A tiny model of that type with its processor, in a folder."""
    torch.manual_seed(seed)
    model, processor = builders[name]()
    for weight in model.parameters():  # far enough from each other that every token matters
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


OBJECTS = ["red cube", "green ball", "dog", "cat", "blue mat", "car"]


def pairs(folder: Path, number: int = 8, layout: str = "trl") -> Path:
    """Rows of one of the layouts with pictures beside them; the rejected response names one object more."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(number):
        name = f"{n // 2}.png"  # two questions an image
        (folder / name).write_bytes(tiny.picture(n // 2, 16 + 8 * (n % 3)))
        asked = "What is in this image?" if n % 2 else "Describe it."
        said = f"There is a {OBJECTS[n % 6]}."
        texts = {"chosen": said, "rejected": f"There is a {OBJECTS[n % 6]} and a {OBJECTS[(n + 1) % 6]}."}
        turns = {
            side: [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": text}]
            for side, text in texts.items()
        }
        layouts: dict[str, dict[str, Any]] = {
            "trl": {"images": [name], "prompt": asked, **texts},
            "rlhfv": {"image": name, "question": asked, **texts},
            "mdpo": {"img_path": name, "prompt": f"USER: <image>\n{asked} ASSISTANT:", **texts},
            "povid": {
                "image": name,
                "conversations": turns["chosen"],
                "rejected_conversations": turns["rejected"],
            },
            "realign": {"image": name, "retrieved_image": f"{(n // 2 + 1) % (number // 2)}.png", **turns},
        }
        rows.append(layouts[layout])
    path = folder / f"{layout}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def recipe(model: Path, rows: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a tiny model; `train={...}` and so on add to its sections, `method={...}` takes its place."""
    base: dict[str, dict[str, Any]] = {
        "method": {"name": "dpo"},
        "model": {"path": str(model), "tune": "lora", "lora": {"rank": 2}},
        "data": {"format": "trl", "path": str(rows)},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-2, "save_every": 2, "log_every": 1, "trackers": []},
    }
    for name, section in sections.items():
        base[name] = section if name == "method" else {**base.get(name, {}), **section}
    return {**base, "output": str(output)}
