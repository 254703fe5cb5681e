"""Protocols of a model family, of text-to-image and of vision-language models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.attention.choice import SelectedBackend
from mmalign.diffusion.noise import Schedule
from mmalign.families.types import Conditioning, Decoding, ImageFeatures, ImageView, Moments, Sampling
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.rng import KeyedRNG


class Family(Protocol):
    """What every model is, whatever its modality: a network that learns, and how it is adapted and saved."""

    @property
    def name(self) -> str:
        """The path or Hub id it was loaded from."""

    @property
    def network(self) -> nn.Module:
        """The network that preference optimization changes; everything else of the model stays frozen."""

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """The ends of the names of the layers that adapters are put on, if a recipe does not say which."""

    def add_lora(self, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """Put adapters on the network's linear layers whose names end in `targets`.

        Raises:
            ValueError: no layer of the network has one of these names.
        """

    def unfreeze(self) -> None:
        """Let all of the network learn that preference optimization may change: full fine-tuning."""

    def frozen_copy(self) -> nn.Module:
        """A copy of the network that stays as it is now."""

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass, instead of keeping them."""

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The blocks that `network`, or a copy of it, is made of: what is compiled for `train.compile`.

        Raises:
            ValueError: they are not known.
        """

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Have the network's attention computed as wanted, "auto", "xformers" or "sdpa"; what was chosen, and why.

        `frozen_copy` and `load_trained` give networks that do as it does.

        Raises:
            ValueError: xformers is wanted, and cannot serve.
        """

    def save(self, folder: Path, net: nn.Module) -> None:
        """Write what the model's own library loads: adapters where the network has them, else the whole model."""

    def load_trained(self, folder: Path) -> nn.Module:
        """The network that `save` wrote: `network` itself with the adapters put on, or another one, frozen.

        Raises:
            ValueError: its files are damaged.
        """


class TextToImage(Family, Protocol):
    """A text-to-image model: what methods, evaluation and the loop may ask of it."""

    @property
    def schedule(self) -> Schedule:
        """The noise process it was trained with."""

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square images it was trained on."""

    def encode_images(self, images: Tensor) -> Moments:
        """The posterior of images [N, 3, H, W] in [-1, 1]."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The text's conditioning, a row a prompt; longer prompts are cut at the text encoder's limit."""

    def unconditional(self) -> Conditioning:
        """One row: what classifier-free guidance and caption dropout put in the prompt's place."""

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads."""

    def condition(self, text: Conditioning, sizes: Tensor) -> Conditioning:
        """The whole conditioning: text [N] and sizes [N, 6] (original height, width, crop top, left, target ones)."""

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's answer [N, C, H, W] in its own parameterization."""

    def sample(
        self, net: nn.Module, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> list[Image.Image]:
        """One image a prompt; the starting noise depends on the seed alone."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] of latents in the denoiser's scale."""

    def encoders(self) -> Iterable[tuple[str, nn.Module]]:
        """The frozen networks whose outputs can be cached, by name."""


class PromptProcessor(Protocol):
    """The part of a vision-language model that needs no network: text to tokens, pictures to what the tower takes.

    It can be sent to other processes.
    """

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads, images and response included."""

    def preprocess_image(self, image: Image.Image) -> ImageView:
        """An image as the model takes it; it does not depend on the images beside it."""

    def tokenize_responses(
        self, turns: Sequence[Turn], responses: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenizedResponse]:
        """The prompt with each of the responses, whose tokens begin at the same place; images with their keys.

        Raises:
            ValueError: the placeholders do not match the images.
        """

    def tokenize_prompt(
        self, turns: Sequence[Turn], images: Sequence[tuple[str, ImageView]], start: str = ""
    ) -> TokenizedResponse:
        """The conversation up to where the model answers; what it has said already, `start`, is the row's response.

        Both are tokenised together, as in `rows`, but no token ends the response. White space around `start` is left
        out: what the model says next brings its own.

        Raises:
            ValueError: the placeholders do not match the images.
        """

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Tokens as text, without special tokens; with the space that begins it, if the tokens before it are given."""

    def image_token_positions(self, row: TokenizedResponse) -> tuple[int, ...]:
        """Where a row's tokens stand for features of its images, in order; tags between them are none."""

    def collate(self, rows: Sequence[TokenizedResponse]) -> Tokens:
        """The rows, padded."""


class VisionLanguage(Family, Protocol):
    """A vision-language model: what methods and the loop may ask of it."""

    @property
    def processor(self) -> PromptProcessor:
        """Tokenizer and image processor."""

    def encode_images(self, views: Mapping[str, ImageView]) -> ImageFeatures:
        """The features of images by their keys, without gradients, for policy and reference alike."""

    @property
    def device(self) -> torch.device:
        """Where the language model is."""

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of autocast; None in float32."""

    def features_as_tensors(self, features: ImageFeatures) -> dict[str, dict[str, Tensor]]:
        """Features as tensors by name, of every image by its key; `ImageView.features` takes them back, bit for bit."""

    def encoders(self) -> Iterable[tuple[str, nn.Module]]:
        """The parts that make features and never learn, by name: vision tower and projector."""

    def token_logps(
        self, net: nn.Module, tokens: Tokens, features: ImageFeatures, targets: Tensor | None = None
    ) -> Tensor:
        """The log-probabilities [N, R] of the responses' tokens, float32; 0 where a response has ended.

        Rows that differ in their responses alone share one run of what comes before these, if `packing` says so.

        With `targets` [N, R, K], those of K other tokens in the place of each, all after the responses' own history:
        [N, R, K], by one run of the network.
        """

    def argmax(self, net: nn.Module, tokens: Tokens, features: ImageFeatures) -> Tensor:
        """The most likely token [N, R] at every place of the responses, given the rows' own history before it.

        Where a response has ended it is the row's first token, as in `Tokens.responses`. No gradients.
        """

    @property
    def packing(self) -> str:
        """Whether the responses to a prompt share one run of it, and if not, why: a sentence for people."""

    @property
    def image_masking_unsupported_reason(self) -> str | None:
        """None if `generate` can hide an image's tokens, else a sentence that says why it cannot."""

    def generate(
        self,
        net: nn.Module,
        prompts: Sequence[TokenizedResponse],
        features: ImageFeatures,
        decoding: Decoding,
        *,
        rows: Sequence[int],
        rng: KeyedRNG,
        hidden: Sequence[Tensor] | None = None,
    ) -> list[str]:
        """What a network, with its adapters as they are, says after each prompt of `PromptProcessor.tokenize_prompt`.

        An answer is the same alone and in any company, but for the rounding of its logits. It begins with the space
        that parts it from what was said before, so that `start.strip() + answer` is the whole.

        Args:
            net: the network; a wrapper for distribution has no part in this.
            prompts: up to where an answer begins.
            features: of every image of the prompts.
            decoding: how the next token is chosen, and when an answer ends.
            rows: the key of each prompt's sampling noise; equal keys draw alike. Not used when greedy.
            rng: the seed and the epoch of that noise.
            hidden: for each prompt which of its `PromptProcessor.image_token_positions` nothing attends to, a bool
                tensor; positions stay as they are. None hides nothing.

        Raises:
            ValueError: images are to be hidden, and `hides_images` says that they cannot be.
        """
