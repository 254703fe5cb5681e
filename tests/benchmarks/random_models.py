"""Models of random weights in the shapes of real ones, written to a folder as on the Hub.

The cost of a step depends on shapes alone, so no checkpoint is needed. models.yaml lists the sizes. Diffusion models
have the tokenizer of models/tiny_sd; a token of a decoder is a byte. Networks are built on the default device: on
"meta" they have only shapes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml

from mmalign.resources import resolve_model

Sizes = dict[str, Any]  # sizes by configuration key

MODELS: dict[str, Sizes] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
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


def resized(name: str, **changes: Sizes) -> Sizes:
    """Return a model's sizes with changes by part."""
    sizes = copy.deepcopy(MODELS[name])
    for part, change in changes.items():
        sizes.get("networks", sizes)[part].update(change)
    return sizes


def write(name: str, folder: Path, device: torch.device, sizes: Sizes | None = None) -> None:
    """Write a model to a folder, on a GPU in half the bytes; weights come from a fixed seed.

    Args:
        name: a key of `MODELS`.
        folder: the folder for the model and its other files.
        device: the device that draws the weights.
        sizes: the sizes, instead of those of `MODELS`.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = sizes or MODELS[name]
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        parts = networks(name, sizes)
    if device.type == "cuda":
        parts = {part: net.to(torch.bfloat16) for part, net in parts.items()}
    if "pipeline" in sizes:
        _pipeline(sizes, parts).save_pretrained(folder)
        return
    parts["model"].save_pretrained(folder)
    (_qwen_processor() if name.startswith("qwen") else _llava_processor(sizes["tower"])).save_pretrained(folder)


def networks(name: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """Return the networks of a model by part; a vision-language model has one, "model"."""
    import diffusers
    import transformers

    sizes = sizes or MODELS[name]
    if "pipeline" not in sizes:
        return {"model": _qwen(sizes) if name.startswith("qwen") else _llava(sizes)}
    parts = {}
    for part, given in sizes["networks"].items():
        kind, options = given["class"], {key: value for key, value in given.items() if key != "class"}
        if kind.startswith("CLIP"):
            tokens = _word_tokenizer()
            config = transformers.CLIPTextConfig(**{"vocab_size": len(tokens), **_ids(tokens), **options})
            parts[part] = getattr(transformers, kind)(config)
            continue
        if part == "vae":
            number = len(options["block_out_channels"])
            options |= {"down_block_types": ("DownEncoderBlock2D",) * number, "sample_size": 128}
            options |= {"up_block_types": ("UpDecoderBlock2D",) * number}
        parts[part] = getattr(diffusers, kind)(**options)
    return parts


def _pipeline(sizes: Sizes, parts: dict[str, Any]) -> Any:
    import diffusers

    schedule = sizes["schedule"]
    if sizes["scheduler"] == "DDIMScheduler":
        schedule = {**schedule, "clip_sample": False, "set_alpha_to_one": False}
    more = {"requires_safety_checker": False} if "safety_checker" in sizes["absent"] else {}
    tokenizers = {part.replace("text_encoder", "tokenizer"): _word_tokenizer() for part in parts if "text" in part}
    scheduler = getattr(diffusers, sizes["scheduler"])(**schedule)
    absent = dict.fromkeys(sizes["absent"])
    return getattr(diffusers, sizes["pipeline"])(**parts, **tokenizers, **absent, **more, scheduler=scheduler)


def _llava(sizes: Sizes) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokens = _byte_tokenizer(LLAVA_MARKS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes["tower"]),
        text_config=LlamaConfig(**sizes["text"], **_ids(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _llava_processor(tower: Sizes) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = tower["image_size"]
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        _byte_tokenizer(LLAVA_MARKS),
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )


def _qwen(sizes: Sizes) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = _qwen_tokenizer()
    marks = {name: tokens.convert_tokens_to_ids(mark) for name, mark in QWEN_MARKS.items()}
    config = Qwen2_5_VLConfig(vision_config=sizes["tower"], text_config={**sizes["text"], **_ids(tokens)}, **marks)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_processor() -> Any:
    """Return a processor with a token for every 28 pixels by 28."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    image, video = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    return Qwen2_5_VLProcessor(image, _qwen_tokenizer(), video, chat_template=QWEN_CHAT)


def _word_tokenizer() -> Any:
    """Return the bundled tokenizer, padded to as many tokens per text as Stable Diffusion's."""
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(Path(resolve_model("models/tiny_sd")) / "tokenizer")
    tokens.model_max_length = 77
    return tokens


def _qwen_tokenizer() -> Any:
    return _byte_tokenizer([*QWEN_MARKS.values(), "<|im_start|>", "<|im_end|>"], end="<|im_end|>")


def _ids(tokens: Any) -> dict[str, int]:
    return {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _byte_tokenizer(special: list[str], end: str = "</s>") -> Any:
    """Return a tokenizer whose tokens are bytes and these special ones; it puts <s> before every text."""
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
