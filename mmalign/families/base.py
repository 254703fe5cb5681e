"""Protocols of model families: text-to-image models, vision-language models, prompt processors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.config import DecodingConfig, SamplingConfig
from mmalign.diffusion.noise import Schedule
from mmalign.families.editing import Editing
from mmalign.families.types import (
    Conditioning,
    GeneratedText,
    ImageFeatures,
    ImageView,
    LoraSettings,
    Mixture,
    Moments,
    PromptInputs,
)
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.policy.sharding import ShardPlan
from mmalign.rng import KeyedRNG

if TYPE_CHECKING:  # its kernels import torch.compile's machinery, which takes a second
    from mmalign.attention.choice import SelectedBackend


class Family(Protocol):
    """A model of any modality: a trained network, and the calls that adapt, load and save it."""

    @property
    def name(self) -> str:
        """The path or Hub id that the model was loaded from."""

    @property
    def network(self) -> nn.Module:
        """The network that preference optimization trains; all other parts of the model stay frozen."""

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """The ends of the names of the layers that get adapters, if a recipe does not name any."""

    @property
    def linear_layers(self) -> Sequence[str]:
        """The ends of the names of all linear layers that can be adapted."""

    def add_lora(self, settings: LoraSettings) -> None:
        """Add adapters to the network's linear layers whose names end in the settings' targets.

        Raises:
            ValueError: no layer of the network has one of these names.
        """

    def continue_adapter(self, path: str) -> None:
        """Add existing adapters to the network, trainable.

        Raises:
            ValueError: they cannot be read, or are another model's.
        """

    def unfreeze(self) -> None:
        """Unfreeze all parameters that preference optimization may change (full fine-tuning)."""

    def frozen_copy(self) -> nn.Module:
        """Return a frozen copy of the network as it is now."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """Return the blocks of `network`, or of a copy of it, which `train.compile` compiles.

        Raises:
            ValueError: the blocks are not known.
        """

    def shard_plan(self, net: nn.Module) -> ShardPlan:
        """Return the division of `network`, or of a copy of it, into shards (`train.sharding`).

        Raises:
            ValueError: the network cannot be sharded.
        """

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Set the backend of the network's attention, "auto", "xformers" or "sdpa"; return the choice and its reason.

        `frozen_copy` and `load_trained` return networks with the same backend.

        Raises:
            ValueError: `wanted` is "xformers", which does not support the network here.
        """

    @property
    def packing(self) -> str | None:
        """A sentence for the log: the responses to a prompt share one run of it, or the reason why they do not.

        None for a model without responses.
        """

    def save(self, folder: Path, net: nn.Module) -> None:
        """Write a folder for the model's own library: adapters if the network has them, else the whole model."""

    def export(self, folder: Path, net: nn.Module, form: str, dtype: torch.dtype | None) -> None:
        """Write the network to an empty folder in a form of other programs, read it back by theirs, and compare.

        Args:
            folder: an existing empty folder.
            net: the trained network, with its adapters if it has any.
            form: diffusers, peft, kohya, comfyui or merged (docs/outputs.md).
            dtype: the dtype of the weights; None keeps that of the base model's files, or float32 for adapters.

        Raises:
            ValueError: the family or the network has no such form, or other weights were read back.
        """

    def load_trained(self, folder: Path) -> nn.Module:
        """Load the network that `save` wrote: `network` itself with the adapters added, or another one, frozen.

        Raises:
            ValueError: the files are damaged.
        """


class TextToImage(Family, Protocol):
    """A text-to-image model, as methods, evaluation and the training loop call it."""

    @property
    def schedule(self) -> Schedule:
        """The noise process that the model was trained with."""

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square images that the model was trained on."""

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of an image are multiples of."""

    def encode_images(self, images: Tensor) -> Moments:
        """Return the latent posterior of images [N, 3, H, W] in [-1, 1]."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning, one row per prompt; prompts are truncated at the text encoder's limit."""

    def unconditional(self) -> Conditioning:
        """Return one row: the conditioning of classifier-free guidance and of dropped captions."""

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """Count the prompts that are longer than the text encoder's limit."""

    @property
    def editing(self) -> Editing | None:
        """The use of a source image; None for a model that generates from prompts alone."""

    def encode_edits(self, prompts: Sequence[str], sources: Tensor) -> Conditioning:
        """Return the text conditioning of prompts with source images [N, 3, H, W] in [-1, 1], one row each.

        The sources' latents are no part of it; `SOURCE` names them in a whole conditioning.
        """

    def unconditional_edits(self, sources: Tensor) -> Conditioning:
        """Return the text conditioning of each source without a prompt."""

    def condition(self, text: Conditioning, sizes: Tensor) -> Conditioning:
        """Return the whole conditioning: text [N] and sizes [N, 6].

        A row of sizes has the original height and width, the crop's top and left, the target height and width.
        """

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's prediction [N, C, H, W] in its own parameterization."""

    def sample(
        self,
        net: nn.Module,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        sources: Tensor | None = None,
    ) -> list[Image.Image]:
        """Generate one image per prompt; the initial noise depends on the seed alone.

        Models that edit take source images [N, 3, H, W] in [-1, 1], of the size of the images to generate.

        Raises:
            ValueError: the model needs sources, or does not edit.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents in the denoiser's scale to images [N, 3, H, W] in [-1, 1]."""

    def encoders(self) -> Iterable[tuple[str, nn.Module]]:
        """Return the frozen networks whose outputs can be cached, by name."""

    def prompt_inputs(self) -> PromptInputs:
        """Return the tokenizers and the settings that encoded prompts depend on, beside the text encoders."""

    def place(self, *used: nn.Module) -> None:
        """With `model.offload`, move these networks to the device, and the model's others to the CPU."""


class PromptProcessor(Protocol):
    """The preprocessing of a vision-language model: text to tokens, images to the vision tower's inputs.

    It needs no network and can be sent to other processes.
    """

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a row, images and response included."""

    def preprocess_image(self, image: Image.Image) -> ImageView:
        """Preprocess an image; the result does not depend on the prompt's other images."""

    def tokenize_responses(
        self, turns: Sequence[Turn], responses: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenizedResponse]:
        """Tokenize the prompt with each response; all responses begin at the same index. Images come with their keys.

        Raises:
            ValueError: the placeholders do not match the images.
        """

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to a row, special tokens included."""

    def tokenize_prompt(
        self, turns: Sequence[Turn], images: Sequence[tuple[str, ImageView]], start: str = ""
    ) -> TokenizedResponse:
        """Tokenize the conversation up to the answer, with `start`, the answer's beginning, as the row's response.

        Both are tokenized together, as in `tokenize_responses`, but no token ends the response. White space around
        `start` is dropped: the rest of the answer begins with its own.

        Raises:
            ValueError: the placeholders do not match the images.
        """

    def template_problem(self, turns: Sequence[Turn], responses: Sequence[str]) -> str | None:
        """Return what keeps the responses from being trained as they are, after one prompt; None if nothing does.

        The chat template may change a response or the prompt before it, and a response may hold special tokens.
        """

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Decode tokens to text without special tokens.

        The text has its leading space only if `after` has the tokens before it.
        """

    def image_token_positions(self, row: TokenizedResponse) -> tuple[int, ...]:
        """Return the indices of the tokens that stand for image features, in order, without the tags between them."""

    def collate(self, rows: Sequence[TokenizedResponse]) -> Tokens:
        """Collate the rows into one padded batch."""


class VisionLanguage(Family, Protocol):
    """A vision-language model, as methods and the training loop call it."""

    @property
    def processor(self) -> PromptProcessor:
        """Tokenizer and image processor."""

    def adapts_images(self, targets: Sequence[str], adapter: str | None) -> bool:
        """Return whether adapters of these targets, or existing ones to continue, change image features.

        Raises:
            ValueError: the existing adapters cannot be read.
        """

    def encode_images(self, views: Mapping[str, ImageView]) -> ImageFeatures:
        """Encode images by key, without gradients; policy and reference share the features.

        If the network has adapters that change features, each pass encodes the images, with gradients.
        """

    @property
    def device(self) -> torch.device:
        """The language model's device."""

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of autocast; None in float32."""

    def features_as_tensors(self, features: ImageFeatures) -> dict[str, dict[str, Tensor]]:
        """Return each image's features as named tensors, by image key; `ImageView.features` restores them exactly."""

    def encoders(self) -> Iterable[tuple[str, nn.Module]]:
        """Return the parts that compute features and are never trained, by name: vision tower and projector."""

    def token_logps(
        self, net: nn.Module, tokens: Tokens, features: ImageFeatures, targets: Tensor | None = None
    ) -> Tensor:
        """Return the log-probabilities [N, R] of the responses' tokens, float32; 0 after a response's end.

        Rows with the same prompt share one run of it, if `packing` says so.

        With `targets` [N, R, K], return those of K alternative tokens at each position, [N, R, K]. The history is
        still the response's own, and the network runs once.
        """

    def argmax(self, net: nn.Module, tokens: Tokens, features: ImageFeatures, avoided: Tensor | None = None) -> Tensor:
        """Return the most likely token [N, R] at every response position, given the row's own history.

        With `avoided` [N, R], it is the most likely token other than the avoided one. After a response's end it is the
        row's first token, as in `Tokens.responses`. There are no gradients.
        """

    @property
    def image_masking_unsupported_reason(self) -> str | None:
        """The reason why `generate` cannot hide an image's tokens, as a sentence; None if it can."""

    def generate(
        self,
        net: nn.Module,
        prompts: Sequence[TokenizedResponse],
        features: ImageFeatures,
        decoding: DecodingConfig,
        *,
        rows: Sequence[int],
        rng: KeyedRNG,
        hidden: Sequence[Tensor] | None = None,
        stop: Sequence[str] = (),
        mixture: Mixture | None = None,
    ) -> list[GeneratedText]:
        """Generate an answer to each prompt of `PromptProcessor.tokenize_prompt`; adapters stay on or off as they are.

        An answer does not depend on its batch, up to the rounding of its logits. It includes the leading space that
        separates it from `start`, so that `start.strip() + answer` is the whole answer.

        Args:
            net: the network; a wrapper for distributed training is bypassed.
            prompts: the prompts' tokens, up to the beginning of an answer.
            features: the features of every image of the prompts.
            decoding: the settings that choose the next token.
            rows: the key of each prompt's sampling noise; equal keys give equal noise. Greedy decoding ignores them.
            rng: the seed and the epoch of that noise.
            hidden: for each prompt a bool tensor over its `PromptProcessor.image_token_positions`, True where nothing
                attends to the token; position ids do not change. None hides nothing.
            stop: texts that end an answer; the first one belongs to it.
            mixture: another network whose logits are mixed in; None for none.

        Raises:
            ValueError: `hidden` is given, and `image_masking_unsupported_reason` is not None.
        """
