"""Data types of model families: conditioning, latents, image features, settings of loading."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmalign.config import ImageSize

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class SavesFiles(Protocol):
    """A tokenizer or processor, of any library, that writes itself to a folder."""

    def save_pretrained(self, folder: str) -> object:
        """Write the files."""


class PromptInputs(NamedTuple):
    """What turns prompts into inputs of the text encoders: tokenizers and processors by name, and settings.

    Settings matter: SDXL's say whether the empty prompt is encoded as zeros or as the text "".
    """

    tokenizers: Mapping[str, SavesFiles]
    settings: Mapping[str, object]


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the denoiser besides x_t and t: named tensors whose first dimension is rows."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device) -> Conditioning:
        """Return a copy on another device."""
        return self._map(lambda x: x.to(device))

    def repeat(self, times: int) -> Conditioning:
        """Repeat all rows `times` times, one copy after the other."""
        return self._map(lambda x: torch.cat([x] * times))

    def cycle(self, number: int) -> Conditioning:
        """Return `number` rows, a multiple of the own ones: all of them again and again."""
        return self if number == len(self) else self.repeat(number // len(self))

    def expand(self, number: int) -> Conditioning:
        """Expand a single row to `number` rows, which share its memory."""
        return self._map(lambda x: x.expand(number, *x.shape[1:]))

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Return own rows where `keep` [N] is true, and those of `other` elsewhere."""
        return Conditioning(
            {k: torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, other.tensors[k]) for k, x in self.tensors.items()}
        )

    def _map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: f(x) for name, x in self.tensors.items()})

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of all parts."""
        return cls({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Moments:
    """Posterior of latents in the denoiser's scale: mean and standard deviation, each [N, C, H, W], float32."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents [N, C, H, W] for standard normal `noise`."""
        return self.mean + self.std * noise


@dataclass(frozen=True)
class ImageView:
    """An image as preprocessed for one model, on the CPU.

    Attributes:
        ids: the tokens that stand for it in a prompt.
        tensors: the inputs of the vision tower.
        features: the cached features, as `VisionLanguage.features_as_tensors` returns them; `tensors` is then empty.
    """

    ids: tuple[int, ...]
    tensors: dict[str, Tensor]
    features: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Outputs of the vision tower and the projector by image key; each image is encoded once.

    Attributes:
        images: the outputs.
        views: images that each pass encodes anew, since adapters change these parts.
    """

    images: dict[str, BaseModelOutputWithPooling] = field(default_factory=dict)
    views: dict[str, ImageView] = field(default_factory=dict)

    def __or__(self, other: ImageFeatures) -> ImageFeatures:
        return ImageFeatures(self.images | other.images, self.views | other.views)


class GeneratedText(NamedTuple):
    """A generated text, whether the limit of new tokens cut it before its end, and its tokens, with one for the end."""

    text: str
    is_cut: bool = False
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """Another network that takes part in generation: tokens come from `softmax((1 - share) own + share other)` logits.

    Attributes:
        on_other: run a function on the other network, without gradients.
        share: weight of its logits.
    """

    on_other: Callable[[Callable[[nn.Module], Tensor]], Tensor | None]
    share: float


@dataclass(frozen=True)
class LoraSettings:
    """Adapters to add to a network.

    Attributes:
        rank: the rank of the matrices.
        alpha: the adapters' scale times their rank.
        targets: ends of the names of the linear layers to adapt.
        seed: the seed of the first matrices.
        dropout: the dropout of the adapters' inputs, in train mode alone.
        dora: True to train the magnitudes of rows too (`mmalign.families.dora`).
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    seed: int
    dropout: float = 0.0
    dora: bool = False


@dataclass(frozen=True)
class Loading:
    """Settings for loading a checkpoint.

    Attributes:
        device: the networks' device.
        half: the dtype of autocast and of frozen weights; None runs everything in float32.
        network_half: True if the network's weights are in `half` too (LoRA); otherwise they are float32 masters.
        vae: a folder or Hub id with another autoencoder.
        vae_dtype: the dtype of the autoencoder.
        revision: the Hub revision.
        size: the size of training images; None is a square of the model's own resolution.
        variant: the variant of the weight files, such as fp16.
        config: for a single file as path, the folder or Hub id of a pipeline with the same layout.
        adapter: existing adapters that are added to the weights.
        allow_pickle: True reads weights from pickles too (see `mmalign.reading.weights`).
        pack_responses: True if a vision-language model runs a prompt once for all of its responses, where supported.
        template_arguments: variables of a vision-language model's chat template, such as `enable_thinking`.
        quantize: the kind of quantized weights of the network, of `mmalign.families.quantize`; None for none.
        offload: True to keep on the CPU the networks of a text-to-image model that a stage does not use.
        tokenizers_only: True to load a text-to-image model without its networks.
    """

    device: torch.device
    half: torch.dtype | None = None
    network_half: bool = False
    vae: str | None = None
    vae_dtype: torch.dtype = torch.float32
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    adapter: str | None = None
    size: ImageSize | None = None
    allow_pickle: bool = False
    pack_responses: bool = True
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    quantize: Literal["int8", "nf4", "fp8"] | None = None
    offload: bool = False
    tokenizers_only: bool = False

    @property
    def shapes_only(self) -> bool:
        """True on the meta device, where networks come from their configurations alone."""
        return self.device.type == "meta"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return autocast to `half`; a context without effect in float32."""
        return contextlib.nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)
