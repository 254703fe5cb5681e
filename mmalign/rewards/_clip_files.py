"""CLIP models as starting points of a training, and folders in open_clip's format for trained ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmalign.language.tokens import forget_padding
from mmalign.rewards import readable, transformers_clip
from mmalign.rewards._weights import find_optional
from mmalign.rewards.open_clip import ClipParts, load_parts, load_tokenizer, open_clip_name, quiet

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def load_start(path: str, *, random: bool = False) -> ClipParts:
    """Load a CLIP with its config: of open_clip, or of transformers if the folder or Hub id has no open_clip config.

    `random` weights have the same shape, and are the same every time.

    Raises:
        ValueError: `path` is neither, or its weights are missing or do not fit its config.
    """
    about = find_optional(path, CONFIG)
    # Random weights are the same in every call, and the caller's generator stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if about is not None:
            parts = random_parts(path) if random else load_parts(path)
            return parts._replace(config=json.loads(about.read_text(encoding="utf-8")))
        try:
            return transformers_clip.random_parts(path)[1] if random else transformers_clip.load_parts(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; a model of open_clip would have {CONFIG}") from error


def random_parts(path: str) -> ClipParts:
    """Return a model of open_clip with random weights, and without its config.

    Raises:
        ValueError: open_clip cannot read the folder or Hub id.
    """
    import open_clip

    with readable("open_clip", path, "it may be incomplete: copy it again"):
        name = open_clip_name(path)
        with quiet():  # open_clip warns of random weights
            model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
        return ClipParts(model.float(), preprocess, load_tokenizer(name), {})


def write(parts: ClipParts, folder: Path, weights: dict[str, Tensor], name: str = WEIGHTS) -> None:
    """Write config, tokenizer and weights to a folder; under the weights' default name open_clip loads it."""
    from open_clip.tokenizer import HFTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(parts.config, indent=2), encoding="utf-8")
    if isinstance(parts.tokenize, HFTokenizer):  # open_clip's own tokenizer needs no file
        forget_padding(parts.tokenize.tokenizer)
        parts.tokenize.save_pretrained(folder)
    save_file({name: x.detach().contiguous().cpu() for name, x in weights.items()}, folder / name)
