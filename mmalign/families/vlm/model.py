"""Vision-language models of transformers: one adapter for every type; what differs between them is in facts.py.

B pairs, N rows, L tokens of the longest row, R of the longest response, n an image's tokens, D the decoder's width.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.attention import decoders
from mmalign.attention.choice import SelectedBackend, select_backend
from mmalign.families.loading import first_line, intact
from mmalign.families.lora import add_lora, linear_names
from mmalign.families.types import Decoding, ImageFeatures, ImageView, Loading
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.generation import GenerationPrompt, generate, masking_unsupported_reason
from mmalign.families.vlm.image_features import frozen_parts, move_parameters, pack_features, unpack_features
from mmalign.families.vlm.packing import build_packed_mask, enable_packing, packed_inputs, unpacked_reason
from mmalign.families.vlm.processor import HFProcessor
from mmalign.families.vlm.quirks import SCALED_LOGITS, quirks_of
from mmalign.language.scores import log_probabilities, most_likely
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.rng import KeyedRNG

ADAPTERS = "adapter_config.json"  # as peft calls the file


class TokenScorer(nn.Module):
    """A model of transformers that answers with log-probabilities of tokens instead of logits.

    The whole of the work is in `forward`, so that a wrapper for distribution sees it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """The log-probabilities of tokens `targets`, [M] or [M, K], after the places `positions` [M] of the flattened
        rows.
        """
        text = self.model.config.get_text_config()
        return log_probabilities(
            self._hidden(positions, inputs),
            self.model.get_output_embeddings(),
            targets,
            vocabulary=text.vocab_size,
            softcap=getattr(text, "final_logit_softcapping", None),
        )

    @torch.no_grad()
    def argmax(self, positions: Tensor, **inputs: Any) -> Tensor:
        """The most likely tokens [M] after the places `positions` [M] of the flattened rows; a soft cap keeps their
        order.
        """
        head, text = self.model.get_output_embeddings(), self.model.config.get_text_config()
        return most_likely(self._hidden(positions, inputs), head, vocabulary=text.vocab_size)

    def _hidden(self, positions: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states [M, D] at places of the flattened rows."""
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
        return hidden.flatten(0, 1)[positions]


@dataclass(frozen=True)
class ImageTextToText:
    """Adapts a model and its processor; the protocol VisionLanguage says what each call does."""

    name: str
    network: TokenScorer
    processor: HFProcessor
    loading: Loading

    @property
    def _model(self) -> Any:
        return self.network.model

    @property
    def _decoder(self) -> str:
        """The name of the language model in the network."""
        decoder = self._model.get_decoder()
        return next(str(name) for name, module in self.network.named_modules() if module is decoder)

    @torch.no_grad()
    def encode_images(self, views: Mapping[str, ImageView]) -> ImageFeatures:
        """See VisionLanguage. One at a time: in other company an image would round otherwise.

        Raises:
            ValueError: the model makes another number of features than the processor makes tokens.
        """
        if any(view.features is None for view in views.values()):
            for _, part in self.encoders():
                move_parameters(part, self.device)  # it may have been put away
        return ImageFeatures(
            {
                key: self._encode(view) if view.features is None else unpack_features(view.features, self.device)
                for key, view in views.items()
            }
        )

    @property
    def device(self) -> torch.device:
        """See VisionLanguage."""
        return self.loading.device

    @property
    def half(self) -> torch.dtype | None:
        """See VisionLanguage."""
        return self.loading.half

    def features_as_tensors(self, features: ImageFeatures) -> dict[str, dict[str, Tensor]]:
        """See VisionLanguage."""
        return {key: pack_features(found) for key, found in features.images.items()}

    def encoders(self) -> Sequence[tuple[str, nn.Module]]:
        """See VisionLanguage."""
        return self._encoders

    @cached_property
    def _encoders(self) -> Sequence[tuple[str, nn.Module]]:
        learning = (self._model.get_decoder(), self._model.get_output_embeddings())
        return tuple(frozen_parts(self.network, {id(p) for part in learning for p in part.parameters()}))

    def _encode(self, view: ImageView) -> Any:
        model, known = self._model, inspect.signature(self._model.get_image_features).parameters
        given = {k: x.to(self.loading.device) for k, x in view.tensors.items() if k in known}
        with _autocast(self.loading):
            output = model.get_image_features(**given, return_dict=True)
        pooled = output.pooler_output
        number = sum(x.shape[-2] for x in pooled)
        expected = view.ids.count(self.processor.image_token_id)
        if number != expected:
            raise ValueError(
                f"model.path: the processor of {self.name} makes {expected} tokens of an image of which the model "
                f"makes {number} features; it belongs to another model: copy the processor's files anew"
            )
        output.grid = given.get("image_grid_thw")
        # Without the towers' own states, which take more memory than what a decoder reads.
        return unpack_features(pack_features(output), self.loading.device)

    def token_logps(
        self, net: nn.Module, tokens: Tokens, features: ImageFeatures, targets: Tensor | None = None
    ) -> Tensor:
        """See VisionLanguage. Only the rows of hidden states before a response's tokens reach the head."""
        mask, wanted = tokens.response_mask, tokens.responses if targets is None else targets
        positions, inputs = self._inputs(tokens, features)
        with _autocast(self.loading):
            logps = net(positions, wanted[mask], **inputs)
        filled = mask.view(*mask.shape, *[1] * (wanted.dim() - 2))
        return torch.zeros(wanted.shape, device=logps.device).masked_scatter(filled, logps)

    def _inputs(self, tokens: Tokens, features: ImageFeatures) -> tuple[Tensor, dict[str, Any]]:
        """Where each response's tokens are predicted, row by row, and what the model's forward pass takes."""
        model, quirks = self._model, self.processor.quirks
        packed_mask = build_packed_mask(tokens, quirks)
        # Where nothing is shared, and no padding to be saved, rows stay as they are.
        if packed_mask.length < tokens.ids.numel() and not self._unpacked_reason(packed_mask.longest):
            return packed_inputs(model, quirks, tokens, packed_mask, features)
        images = [features.images[key] for row in tokens.images for key in row]
        positions = tokens.is_response.flatten().nonzero()[:, 0]
        return positions - 1, decoder_inputs(model, quirks, tokens.ids, tokens.mask, tokens.is_response, images)

    def _unpacked_reason(self, longest: int) -> str | None:
        """Why responses in rows of up to that many tokens run apart; None if they do not."""
        return (
            unpacked_reason(self._model.get_decoder(), longest)
            if self.loading.pack_responses
            else "train.pack_responses is off"
        )

    @property
    def packing(self) -> str:
        """See VisionLanguage."""
        why = self._unpacked_reason(self.processor.max_length)
        if why and self._unpacked_reason(0):
            return f"packing: off, each response runs with its own prompt and images, since {why}"
        unless = f", unless rows are too long: {why}" if why else ""
        return f"packing: the responses to a prompt share one run of it and its images{unless}"

    def argmax(self, net: nn.Module, tokens: Tokens, features: ImageFeatures) -> Tensor:
        """See VisionLanguage."""
        positions, inputs = self._inputs(tokens, features)
        with _autocast(self.loading):
            tokens_found = _unwrap(net).argmax(positions, **inputs)
        return tokens.responses.masked_scatter(tokens.response_mask, tokens_found)

    @property
    def image_masking_unsupported_reason(self) -> str | None:
        """See VisionLanguage."""
        return masking_unsupported_reason(self._model)

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
        """See VisionLanguage."""
        if hidden is not None and self.image_masking_unsupported_reason:
            raise ValueError(f"model.path: {self.name}: {self.image_masking_unsupported_reason}; use another model")
        masks = [None] * len(prompts) if hidden is None else hidden
        asked = [GenerationPrompt(*one) for one in zip(prompts, rows, masks, strict=True)]
        with _autocast(self.loading):
            return generate(_unwrap(net).model, self.processor, asked, features, decoding, rng)

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """All linear layers of the decoder."""
        return linear_names(self._model, self._decoder.removeprefix("model."))

    def add_lora(self, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """See Family. Never outside the decoder: vision tower and projector stay as they are."""
        within = self._decoder.removeprefix("model.")
        add_lora(self._model, rank=rank, alpha=alpha, targets=targets, seed=seed, within=within)

    def unfreeze(self) -> None:
        """The decoder and its head; the vision tower and the projector stay, so that images are encoded once."""
        self._model.get_decoder().requires_grad_(True)
        self._model.get_output_embeddings().requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """See Family. What never learns is shared with the original, not copied."""
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        learns = {id(p) for part in (decoder, head) for p in part.parameters()}
        shared = {id(p): p for p in self.network.parameters() if id(p) not in learns}
        return copy.deepcopy(self.network, shared).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        """See Family."""
        self._model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def blocks(self, net: Any) -> Sequence[nn.Module]:
        """See Family. The decoder's layers."""
        layers: nn.ModuleList = net.model.get_decoder().layers
        return list(layers)

    def use_attention(self, wanted: str) -> SelectedBackend:
        """See Family. The decoder's; the vision tower stays as it is, and with sdpa the decoder too."""
        decoder = self._model.get_decoder()
        dtype = self.loading.half or torch.float32
        against = decoders.xformers_unsupported_reason(decoder)
        choice = select_backend(wanted, self.loading.device, dtype, decoders.head_sizes(decoder), against)
        if choice.backend != "sdpa":
            decoders.install(decoder, choice.backend)
        return choice

    def save(self, folder: Path, net: nn.Module) -> None:
        """As transformers and peft load it: adapters where the network has them, else the model with its processor."""
        model: Any = net.model
        model.save_pretrained(folder)
        if not getattr(model, "peft_config", None):
            self.processor.processor.save_pretrained(folder)

    def load_trained(self, folder: Path) -> nn.Module:
        """See Family."""
        with intact("output", folder, "a trained model", "`mmalign train` writes it anew"):
            if (folder / ADAPTERS).is_file():
                self._model.load_adapter(str(folder))
                return self.network
            model = type(self._model).from_pretrained(folder, dtype=self._model.dtype)
        if (executor := decoders.installed(self._model.get_decoder())) is not None:
            decoders.install(model.get_decoder(), executor)
        return TokenScorer(model.to(self.loading.device).requires_grad_(False).eval())


def _unwrap(net: nn.Module) -> TokenScorer:
    """The network itself, which may be wrapped for distribution."""
    return next(part for part in net.modules() if isinstance(part, TokenScorer))


def _autocast(loading: Loading) -> contextlib.AbstractContextManager[Any]:
    if loading.half is None:
        return contextlib.nullcontext()
    return torch.autocast(loading.device.type, loading.half)


def load(path: str, model_type: str, loading: Loading) -> ImageTextToText:
    """Load a folder or Hub id with a model that AutoModelForImageTextToText knows, frozen, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, the processor is another model's, or the model cannot be trained here.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = loading.half if loading.half is not None and loading.network_half else torch.float32
    with intact("model.path", path, f"a vision-language model ({model_type})"):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, revision=loading.revision)
    with intact("model.path", path, f"the processor of a {model_type}"):
        processor = AutoProcessor.from_pretrained(path, revision=loading.revision)
    _check_type(path, model_type, model, processor)
    _check_processor(path, model, processor)
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", sys.maxsize)  # a model without positions reads on
    prompt_processor = HFProcessor(processor, quirks_of(model_type), model.config.image_token_id, longest)
    _without_dropout(model)
    if loading.pack_responses:
        enable_packing(model.get_decoder())
    network = TokenScorer(model.to(loading.device).requires_grad_(False).eval())
    family = ImageTextToText(path, network, prompt_processor, loading)
    _check_one_image(family)
    return family


def _without_dropout(model: nn.Module) -> None:
    """A policy must differ from its reference by what it has learned, never by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _check_one_image(family: ImageTextToText) -> None:
    """Take one picture through processor and tower: a processor of another model can fit in all that can be compared.

    Raises:
        ValueError: the picture's tokens do not match its features, or the tower cannot take what the processor makes.
    """
    try:
        family.encode_images({"a picture": family.processor.preprocess_image(Image.new("RGB", (96, 64), "gray"))})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what fails, and how, depends on both
        if isinstance(error, ValueError) and str(error).startswith("model.path"):
            raise
        raise ValueError(
            f"model.path: the processor of {family.name} belongs to another model, which cannot read a picture as it "
            f"prepares one ({first_line(error)}); copy the processor's files anew"
        ) from error


def _check_type(path: str, model_type: str, model: Any, processor: Any) -> None:
    """That the adapter's rule holds for the type.

    Raises:
        ValueError: what it lacks.
    """
    lacking = [name for name in ("get_image_features", "get_decoder") if not hasattr(model, name)]
    if not model._supports_mm_encoder_outputs():
        lacking.append("mm_encoder_outputs")
    text, image = model.config.get_text_config(), getattr(model.config, "image_token_id", None)
    lacking += [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1, 1.0)]
    place = _image_place(processor)
    if image is None:
        lacking.append("image_token_id")
    elif place and place[1] != image and image in processor.image_token_ids:
        lacking.append(f"an image's place in a prompt is {place[0]}, and its features have other tokens")
    if lacking:
        raise ValueError(
            f"model.path: {path} is a {model_type}, which cannot be aligned here ({', '.join(lacking)}); use a type "
            "such as llava, llava_next, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl, paligemma or internvl"
        )


def _check_processor(path: str, model: Any, processor: Any) -> None:
    """That the processor is the model's own.

    Raises:
        ValueError: what is another model's about it.
    """
    image, place = model.config.image_token_id, _image_place(processor)
    if not place or place[1] != image:
        came = f"{place[0]} is token {place[1]}" if place else "it has no image token"
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model ({came}, and the model's image token is "
            f"{image}); copy the processor's files anew"
        )
    here, there = len(processor.tokenizer), model.get_input_embeddings().num_embeddings
    if here > there:
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model (it has {here:,} tokens, and the model "
            f"{there:,}); copy the processor's files anew"
        )


def _image_place(processor: Any) -> tuple[str, int] | None:
    """The token that stands for an image in a prompt's text, with its number; None if there is none."""
    tokenizer, token = getattr(processor, "tokenizer", None), getattr(processor, "image_token", None)
    return None if tokenizer is None or token is None else (str(token), tokenizer.convert_tokens_to_ids(token))
