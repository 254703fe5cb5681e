"""Reward model from any open_clip model: the cosine of image and prompt times the learned scale (PickScore).

The tokenizer cuts prompts longer than the text tower's context, as in CLIP's training. A model's logit bias (SigLIP) is
left out: it is the same for every pair. N is the number of images, E the width of the embedding.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmalign.resources import resolve_model
from mmalign.rewards import BatchConfig, check_files, in_batches, readable
from mmalign.rewards._annotators import AnnotatorMixture, load_mixture
from mmalign.rewards._attributes import AttributeHeads, load_heads
from mmalign.rewards._weights import find_optional

if TYPE_CHECKING:
    from open_clip import CLIP

check = check_files
KNOWN = 8192  # prompts in the cache of text features
LISTED = 10  # annotators that a message names
TOKENIZER = ["open_clip_config.json", "*token*", "vocab*", "merges*", "*.model"]  # files of a repository


class Config(BatchConfig):
    """Options of the reward model."""

    pretrained: str | None = None
    """Tag or file of the weights, if `path` is an architecture of open_clip such as `ViT-B-32`."""

    attribute: str | None = None
    """Attribute that is the score, of a judge trained with `model.attributes`; its preference by default."""

    annotator: str | int | None = None
    """Annotator whose taste is the score, of a judge trained with `model.annotators`; by default the mean taste."""


class ClipParts(NamedTuple):
    """An open_clip model with its preprocessing and tokenizer.

    Attributes:
        model: the network, on the CPU, in float32.
        preprocess: a function from an image to [3, S, S].
        tokenize: a function from prompts to token ids [N, context]; longer prompts are cut.
        config: the content of an open_clip config file; empty if it was not read.
    """

    model: CLIP
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    config: Mapping[str, object]


@dataclass(frozen=True)
class TextFeatures:
    """Cache of prompts' features, such as unit vectors.

    Each prompt is encoded by a call of its own: in a batch, rounding would depend on the other prompts.
    """

    encode: Callable[[Tensor], Tensor]  # from tokens [1, L] to features [1, E]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    _known: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the features [N, E], float32."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                self._known[prompt] = self.encode(self.tokenize([prompt]).to(self.device))[0].float()
        features = torch.stack([self._known[prompt] for prompt in prompts])
        # Drop the oldest prompts beyond the cache's size
        for oldest in list(self._known)[: max(0, len(self._known) - KNOWN)]:
            del self._known[oldest]
        return features


def unit_vectors(model: CLIP) -> Callable[[Tensor], Tensor]:
    """Return the function from tokens [N, L] to the unit vectors [N, E] of a CLIP, a CustomTextCLIP or a CoCa."""

    def encode(tokens: Tensor) -> Tensor:
        vectors: Tensor = model.encode_text(tokens, normalize=True)
        return vectors

    return encode


def scaled(cosines: Tensor, scale: Tensor) -> Tensor:
    """Return cosines [N] times the learned scale []."""
    return scale * cosines


@dataclass(frozen=True)
class OpenClip:
    """Loaded reward model, in float32 and eval mode.

    Attributes:
        model: the network.
        preprocess: a function from an image to [3, H, W].
        text: the unit vectors of prompts.
        device: the network's device.
        batch_size: images that go through the network at once.
        score: a function from the cosines [N] and the learned scale [] to scores [N].
        prefix: text before every prompt.
        head: a function from unit vectors of images and prompts to scores [N]; None for the cosine.
    """

    model: CLIP
    preprocess: Callable[[Image.Image], Tensor]
    text: TextFeatures
    device: torch.device
    batch_size: int
    score: Callable[[Tensor, Tensor], Tensor] = scaled
    prefix: str = ""
    head: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the device of the model; `t` is not read."""
        return in_batches(
            lambda rows: self._score(images[rows], prompts[rows]), len(images), self.batch_size, self.device
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors [N, E] of images, float32, in one forward pass; their cosines are similarities."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        features: Tensor = self.model.encode_image(pixels, normalize=True)
        return features.float()

    @torch.no_grad()
    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        vectors, words = self.embed(images), self.text([self.prefix + prompt for prompt in prompts])
        if self.head is not None:
            return self.head(vectors, words)
        cosines = (vectors * words).sum(-1)
        return self.score(cosines, self.model.logit_scale.exp()).float()


def load(path: str, device: torch.device, cfg: Config) -> OpenClip:
    """Load a model from a folder in open_clip's format (config, weights, tokenizer), the Hub, or a known architecture.

    Raises:
        ValueError: there is no such model, its weights are missing or do not fit its config, or it has no such
            attribute or annotator.
    """
    judge = scorer(load_parts(path, cfg.pretrained), device, cfg.batch_size)
    if cfg.attribute is not None and cfg.annotator is not None:
        raise ValueError("reward open_clip: annotator: an attribute is the same for all; leave one of them out")
    # An architecture of open_clip has no folder
    trained = cfg.pretrained is None
    if cfg.attribute is not None:
        return replace(judge, head=_attribute(path, load_heads(path) if trained else None, cfg.attribute, device))
    return replace(judge, head=_taste(path, load_mixture(path) if trained else None, cfg.annotator, judge))


def _attribute(
    path: str, heads: AttributeHeads | None, name: str, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the head of an attribute of a trained judge."""
    known = list(heads.scales) if heads is not None else []
    if heads is None or name not in known:
        raise ValueError(
            f"reward open_clip: attribute: {path} has no {name!r} (it has {', '.join(known) or 'none'}); name one of "
            "its attributes, or leave it out"
        )
    placed = heads.to(device)
    return lambda images, prompts: placed(images, prompts)[:, known.index(name)]


def _taste(
    path: str, mixture: AnnotatorMixture | None, name: str | int | None, judge: OpenClip
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the score by a trained judge's mixture, of an annotator or of all; None for a judge without a mixture."""
    known = mixture.names if mixture is not None else ()
    if name is not None and str(name) not in known:
        listed = ", ".join(known[:LISTED]) + (f" and {len(known) - LISTED} more" if len(known) > LISTED else "")
        raise ValueError(
            f"reward open_clip: annotator: {path} has no {str(name)!r} (it has {listed or 'none'}); name one of its "
            "annotators, or leave it out for the mean taste"
        )
    if mixture is None:
        return None
    placed = mixture.requires_grad_(False).to(judge.device)
    # The place of the annotator; an unknown one stands for the mean of all
    place, scale = placed.places([str(name)] if name is not None else [""]), judge.model.logit_scale.exp()

    def score(images: Tensor, prompts: Tensor) -> Tensor:
        return placed.score(images, placed(prompts, place.expand(len(prompts))), scale).float()

    return score


def scorer(
    parts: ClipParts,
    device: torch.device,
    batch_size: int,
    score: Callable[[Tensor, Tensor], Tensor] = scaled,
    prefix: str = "",
) -> OpenClip:
    """Return the reward model of a network, which moves to the device."""
    model = parts.model.eval().requires_grad_(False).to(device)
    text = TextFeatures(unit_vectors(model), parts.tokenize, device)
    return OpenClip(model, parts.preprocess, text, device, batch_size, score, prefix)


def load_parts(path: str, pretrained: str | None = None) -> ClipParts:
    """Load a model without its config.

    Raises:
        ValueError: there is no such model, or its weights are missing or do not fit its config.
    """
    import open_clip

    expected = (
        "expected a folder with open_clip_config.json, weights and tokenizer, a Hub id of such a folder, or an "
        "architecture of open_clip with `pretrained`"
    )
    with readable("open_clip", path, expected):
        name = open_clip_name(path, pretrained)
        # `create_model` would return random weights if it finds none.
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, precision="fp32")
        tokenize = load_tokenizer(name)
    return ClipParts(model, preprocess, tokenize, {})


def load_tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    """Return the tokenizer of a model by open_clip's name; its own files, if it has any, come first.

    Of models on the Hub open_clip reads the tokenizer that the config names, which for a trained judge is that of the
    model before training, and may be a local one.
    """
    import open_clip
    from huggingface_hub import snapshot_download

    model = name.removeprefix("hf-hub:")
    if name != model and find_optional(model, "tokenizer_config.json") is not None:
        name = f"local-dir:{snapshot_download(model, allow_patterns=TOKENIZER)}"
    tokenize: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(name)
    return tokenize


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's warning of random weights, which the caller replaces."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def open_clip_name(path: str, pretrained: str | None = None) -> str:
    """Return open_clip's name of a model: with a schema for folders and Hub ids, bare for its own architectures."""
    if pretrained is not None:
        # open_clip refuses a folder or Hub id under its bare name, as it should: these have weights
        return path.removeprefix("hf-hub:").removeprefix("local-dir:")
    resolved = resolve_model(path)
    return f"local-dir:{resolved}" if Path(resolved).exists() else f"hf-hub:{resolved}"
