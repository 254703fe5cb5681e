"""ImageReward (arXiv:2304.05977): BLIP reads the prompt with attention to the image, and linear layers give a score.

`path` is the authors' repository THUDM/ImageReward or a folder with their file. It is a pickle, which `allow_pickle`
reads for tensors alone. Scores have mean 0 and deviation 1 on the authors' data.

The networks are transformers' BLIP classes. Their sizes follow from the weights: 224 pixels, ViT-L/16 and a BERT base
with cross-attention in the release. Prompts are cut after 35 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.resources import resolve_model
from mmalign.rewards import BatchConfig, check_files, in_batches, readable
from mmalign.rewards._weights import check_shapes, find_file, read_tensors
from mmalign.rewards.aesthetic import regression_head

check = check_files
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' data
LENGTH = 35  # tokens of a prompt
HEAD_WIDTH = 64  # of an attention head, in both towers
UNREAD = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")  # weights that no score depends on
REMEDY = "expected the file of an ImageReward model"
NAMES = (  # a pattern of the release's names, and its replacement in transformers'
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^blip\.visual_encoder\.blocks", "vision.encoder.layers"),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^mlp\.layers\.", "head."),
)


class Config(BatchConfig):
    """Options of the reward model."""

    weights: str = "ImageReward.pt"
    """File of the weights."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's tokenizer: a folder or a Hub id."""


@dataclass(frozen=True)
class ImageReward:
    """Loaded reward model, in float32 and eval mode.

    Attributes:
        nets: the modules `vision`, `text` and `head`.
        preprocess: a function from an image to [3, H, W].
        tokenize: BERT's tokenizer.
        device: the networks' device.
        batch_size: images that go through the networks at once.
    """

    nets: nn.ModuleDict
    preprocess: Any
    tokenize: Any
    device: torch.device
    batch_size: int

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the device of the model; `t` is not read."""
        return in_batches(
            lambda rows: self._score(images[rows], prompts[rows]), len(images), self.batch_size, self.device
        )

    @torch.no_grad()
    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        tokens = self.tokenize(list(prompts), **options).to(self.device)
        # States of the patches [N, P, D], all of which the text attends to
        seen = self.nets["vision"](pixels).last_hidden_state
        read = self.nets["text"](
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        # The score is read at the first token, and standardized as in the release
        scores: Tensor = (self.nets["head"](read[:, 0])[:, 0] - MEAN) / STD
        return scores


def load(path: str, device: torch.device, cfg: Config) -> ImageReward:
    """Load the published weights.

    Raises:
        ValueError: a file is missing, is a pickle that the recipe does not allow, or does not fit.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import AutoTokenizer

    file = find_file("image_reward", path, cfg.weights)
    published = read_tensors("image_reward", file, "blip.")
    # Names of transformers; the sizes follow from the weights' shapes
    weights = {_renamed(name): x.float() for name, x in published.items() if not UNREAD.match(name)}
    nets = _networks(str(file), weights)
    check_shapes("image_reward", file, weights, {name: x.shape for name, x in nets.state_dict().items()}, REMEDY)
    nets.load_state_dict(weights)
    with readable("image_reward", cfg.tokenizer, "expected options.tokenizer with a folder or Hub id of BERT's"):
        tokenize = AutoTokenizer.from_pretrained(resolve_model(cfg.tokenizer))
    # open_clip's defaults are CLIP's: bicubic to the shorter side, center crop, CLIP's mean and deviation
    vision: Any = nets["vision"]
    preprocess = image_transform_v2(PreprocessCfg(size=vision.config.image_size), is_train=False)
    return ImageReward(nets.eval().requires_grad_(False).to(device), preprocess, tokenize, device, cfg.batch_size)


def _renamed(name: str) -> str:
    for pattern, by in NAMES:
        name = re.sub(pattern, by, name)
    return name


def _networks(file: str, weights: Mapping[str, Tensor]) -> nn.ModuleDict:
    """Return networks of the weights' sizes, with random weights.

    Raises:
        ValueError: weights that tell the sizes are missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def layers(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    with readable("image_reward", file, REMEDY):
        # Weights whose shapes tell several sizes
        patch, positions = (
            weights[f"vision.embeddings.{name}"] for name in ("patch_embedding.weight", "position_embedding")
        )
        words = weights["text.embeddings.word_embeddings.weight"]
        vision_width, text_width = patch.shape[0], words.shape[1]
        vision = BlipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=layers(r"vision\.encoder\.layers\.(\d+)\."),
            num_attention_heads=vision_width // HEAD_WIDTH,
            patch_size=patch.shape[-1],
            # Positions: one for each patch of the square image, and one for the class token
            image_size=round((positions.shape[1] - 1) ** 0.5) * patch.shape[-1],
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=len(words),
            hidden_size=text_width,
            encoder_hidden_size=vision_width,
            intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=layers(r"text\.encoder\.layer\.(\d+)\."),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
        )
        nets = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
        return nn.ModuleDict({**nets, "head": regression_head(text_width)})
