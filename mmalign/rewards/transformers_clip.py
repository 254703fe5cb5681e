"""Reward model from a CLIP in transformers' format, such as PickScore (arXiv:2305.01569), with open_clip's scores.

The weights are loaded into an open_clip network of the same shape. It scores as `open_clip` does, and `step_aware` can
condition it on the timestep. A folder without a tokenizer or a preprocessor uses CLIP's own, as PickScore's model card
does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.resources import resolve_model
from mmalign.rewards import BatchConfig as Config
from mmalign.rewards import check_files, readable
from mmalign.rewards.open_clip import ClipParts, OpenClip, scorer

if TYPE_CHECKING:
    from transformers import CLIPConfig

check = check_files
VOCABULARY = 49_408  # tokens of CLIP's own tokenizer
TOKENIZER = ("tokenizer.json", "vocab.json")  # either file is enough for a tokenizer
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
QUICK = {"gelu": False, "quick_gelu": True}
NAMES = (  # a pattern of transformers' weight names, and its replacement in open_clip's
    (r"^(text|vision)_model\.encoder\.layers", r"\1.transformer.resblocks"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^(text|vision)_model\.embeddings\.position_embedding\.weight", r"\1.positional_embedding"),
    (r"^vision_model\.embeddings\.class_embedding", "vision.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "vision.conv1"),
    (r"^vision_model\.pre_layrnorm", "vision.ln_pre"),
    (r"^vision_model\.post_layernorm", "vision.ln_post"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^visual_projection\.weight", "vision.proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^text\.", ""),  # open_clip's text tower is the model itself
    (r"^vision\.", "visual."),
)


def load(path: str, device: torch.device, cfg: Config) -> OpenClip:
    """Load a model that CLIPModel and its processor saved, from a folder or the Hub.

    Raises:
        ValueError: there is no such model, its weights are missing, or it is not a CLIP.
    """
    return scorer(load_parts(path), device, cfg.batch_size)


def load_parts(path: str) -> ClipParts:
    """Load the weights into an open_clip network.

    Raises:
        ValueError: there is no such model, its weights are missing, or it is not a CLIP.
    """
    from transformers import CLIPModel

    expected = (
        "expected a folder with a CLIPModel of transformers, or a Hub id of one, such as yuvalkirstain/PickScore_v1"
    )
    with readable("transformers_clip", path, expected):
        # An open_clip network of the same shape gets the weights of transformers' model
        _, parts = random_parts(path)
        source, missing = CLIPModel.from_pretrained(resolve_model(path), dtype=torch.float32, output_loading_info=True)
        if missing["missing_keys"] or missing["mismatched_keys"]:
            raise ValueError(f"weights are missing, such as {sorted(map(str, missing['missing_keys']))[:1]}")
        parts.model.load_state_dict(renamed(source.state_dict()))
    return parts


def random_parts(path: str) -> tuple[CLIPConfig, ClipParts]:
    """Return a model's config, and an open_clip network of its shape with random weights; the model's are not read.

    Raises:
        ValueError: it is not a CLIP of a supported form.
        OSError: there is no such model.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import CLIPConfig

    resolved = resolve_model(path)
    folder = _small_files(resolved)
    if not (folder / "config.json").is_file():  # transformers would take the defaults of a CLIPConfig
        raise ValueError("it has no config.json")
    config = CLIPConfig.from_pretrained(folder)
    tokenize = _tokenizer(folder, config)
    network, preprocessing = _network(config, tokenize), _preprocessing(folder)
    preprocess = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    model = open_clip.CLIP(**copy.deepcopy(network))
    return config, ClipParts(model, preprocess, tokenize, {"model_cfg": network, "preprocess_cfg": preprocessing})


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a CLIPModel to open_clip's names and layout.

    Projections are transposed, and the weights of queries, keys and values concatenated.
    """
    weights_renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        new_name = name
        for pattern, by in NAMES:
            new_name = re.sub(pattern, by, new_name)
        weights_renamed[new_name] = weight.T.contiguous() if name.endswith("_projection.weight") else weight
    # Queries, keys and values in one matrix
    for name in [name for name in weights_renamed if ".attn.q_proj." in name]:
        parts = [weights_renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        weights_renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return weights_renamed


def _small_files(resolved: str) -> Path:
    """Return a model's folder; for a Hub id, download its configs and tokenizer alone."""
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved, allow_patterns=["*.json", "*.txt"]))


def _tokenizer(folder: Path, config: CLIPConfig) -> Callable[[list[str]], Tensor]:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length, words = config.text_config.max_position_embeddings, config.text_config.vocab_size
    has_file = any((folder / name).is_file() for name in TOKENIZER)
    if not has_file and words != VOCABULARY:
        raise ValueError(f"it has no tokenizer, and {words} tokens, where CLIP's own has {VOCABULARY}")
    tokenize: Callable[[list[str]], Tensor]
    tokenize = HFTokenizer(str(folder), context_length=length) if has_file else SimpleTokenizer(context_length=length)
    return tokenize


def _network(config: CLIPConfig, tokenize: Callable[[list[str]], Tensor]) -> dict[str, object]:
    """Return open_clip's config of a network of the same shape."""
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act not in QUICK or text.hidden_act != vision.hidden_act:
        raise ValueError(f"its activations are {vision.hidden_act} and {text.hidden_act}; expected gelu or quick_gelu")
    if text.eos_token_id not in (2, text.vocab_size - 1):  # old configs have 2, whatever the token is
        raise ValueError(f"the end of a text is token {text.eos_token_id}; expected the last, {text.vocab_size - 1}")
    # Vision tower, then text tower
    towers: list[dict[str, object]] = [
        {"width": of.hidden_size, "layers": of.num_hidden_layers, "mlp_ratio": of.intermediate_size / of.hidden_size}
        | {"norm_kwargs": {"eps": of.layer_norm_eps}}
        for of in (vision, text)
    ]
    towers[0] |= {"head_width": vision.hidden_size // vision.num_attention_heads}
    towers[0] |= {"patch_size": vision.patch_size, "image_size": vision.image_size}
    towers[1] |= {"heads": text.num_attention_heads, "context_length": text.max_position_embeddings}
    towers[1] |= {"vocab_size": text.vocab_size}
    if hasattr(tokenize, "save_pretrained"):  # not open_clip's own tokenizer
        towers[1] |= {"hf_tokenizer_name": "its own"}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": QUICK[vision.hidden_act],
        "vision_cfg": towers[0],
        "text_cfg": towers[1],
    }


def _preprocessing(folder: Path) -> dict[str, object]:
    """Return open_clip's config of the folder's image preprocessing, or of CLIP's own if the folder has none."""
    from transformers import CLIPImageProcessor

    has_file = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    own = CLIPImageProcessor.from_pretrained(folder) if has_file else CLIPImageProcessor()
    # One square for all: open_clip crops from the size that it resizes to
    side, crop = own.size.get("shortest_edge"), own.crop_size["height"]
    if side != crop or not own.do_center_crop or own.resample not in INTERPOLATION:
        raise ValueError(
            f"its images are resized to {dict(own.size)} and cropped to {dict(own.crop_size)}; expected squares of the "
            "full shorter side"
        )
    return {
        "size": side,
        "mean": list(own.image_mean),
        "std": list(own.image_std),
        "interpolation": INTERPOLATION[own.resample],
        "resize_mode": "shortest",
    }
