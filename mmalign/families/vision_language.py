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

from mmalign.data.pairs import Turn
from mmalign.families import ImageFeatures, ImageView, Loading, first_line, intact
from mmalign.families.facts import SCALED_LOGITS, Facts, facts
from mmalign.families.lora import add_lora, linear_names
from mmalign.language.scores import log_probabilities
from mmalign.language.tokens import TokenRow, Tokens, common_prefix, expand

IMAGE = "<image>"  # an image's place in a turn's text
ADAPTERS = "adapter_config.json"  # as peft calls the file


@dataclass(frozen=True)
class ProcessorReader:
    """A processor of transformers as a Reader; the protocol says what each call does."""

    processor: Any
    facts: Facts
    image_token_id: int
    max_length: int

    @cached_property
    def placeholder(self) -> str:
        """The text that is an image's place."""
        return str(getattr(self.processor, self.facts.placeholder))

    @cached_property
    def _placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def view(self, image: Image.Image) -> ImageView:
        """See Reader. The image's tokens are what the processor puts between those of the text around it."""
        encoded = self.processor(text=[self.placeholder], images=[[image]], return_tensors="pt")
        around, ids = self._tokenize(self.facts.written(self.processor, self.placeholder)), encoded["input_ids"][0]
        before = around.index(self._placeholder_id)
        after = len(around) - before - 1
        own = ids[before : len(ids) - after].tolist()
        return ImageView(tuple(own), {k: x for k, x in encoded.items() if k not in _TEXT})

    def rows(
        self, turns: Sequence[Turn], responses: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenRow]:
        """See Reader."""
        prompt = self.facts.written(self.processor, self._render(turns))
        texts = [prompt, *(prompt + self._continuation(turns, response) for response in responses)]
        views = [view.ids for _, view in images]
        ids = [expand(self._tokenize(text), self._placeholder_id, views) for text in texts]
        start, keys = common_prefix(ids), tuple(key for key, _ in images)
        return [TokenRow(tuple(row), start, keys) for row in ids[1:]]

    def batch(self, rows: Sequence[TokenRow]) -> Tokens:
        """See Reader."""
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Tokens.of(rows, pad)

    def _tokenize(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # some chat templates write it
        ids: list[int] = tokenizer(text, add_special_tokens=not begun).input_ids
        return ids

    @property
    def _template(self) -> Any:
        return getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )

    def _render(self, turns: Sequence[Turn], response: str | None = None) -> str:
        """The conversation up to where the model answers, or with its answer, in the model's own layout."""
        if not self._template:
            return "\n".join(turn.text for turn in turns).replace(IMAGE, self.placeholder)
        said = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        if response is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        text: str = self.processor.apply_chat_template(
            said, tokenize=False, add_generation_prompt=response is None, chat_template=self._template
        )
        return text

    def _continuation(self, turns: Sequence[Turn], response: str) -> str:
        """What the model is to say: the response as the layout begins it, and the token that ends an answer."""
        tokenizer, response = self.processor.tokenizer, response.strip()
        if not self._template:
            return f"{response}{tokenizer.eos_token}"
        prompt, whole = self._render(turns), self._render(turns, response)
        before, _, after = whole.rpartition(response)
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        ends = [(after.index(token), token) for token in tokenizer.all_special_tokens if token in after]
        return f"{lead}{response}{min(ends)[1] if ends else tokenizer.eos_token}"


# What a processor returns for the text; the rest is the image's.
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's content as chat templates take it: texts, and images between them."""
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if words.strip():
            parts.append({"type": "text", "text": words.strip() if number else words.rstrip()})
    return parts


class TokenScorer(nn.Module):
    """A model of transformers that answers with log-probabilities of tokens instead of logits.

    The whole of the work is in `forward`, so that a wrapper for distribution sees it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, at: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """The log-probabilities [M] of tokens `targets` [M] after the places `at` [M] of the flattened rows."""
        hidden = self.model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
        text = self.model.config.get_text_config()
        return log_probabilities(
            hidden.flatten(0, 1)[at],
            self.model.get_output_embeddings(),
            targets,
            vocabulary=text.vocab_size,
            softcap=getattr(text, "final_logit_softcapping", None),
        )


@dataclass(frozen=True)
class ImageTextToText:
    """Adapts a model and its processor; the protocol VisionLanguage says what each call does."""

    name: str
    network: TokenScorer
    reader: ProcessorReader
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
        return ImageFeatures({key: self._encode(view) for key, view in views.items()})

    def _encode(self, view: ImageView) -> Any:
        model, known = self._model, inspect.signature(self._model.get_image_features).parameters
        given = {k: x.to(self.loading.device) for k, x in view.tensors.items() if k in known}
        with _autocast(self.loading):
            found = model.get_image_features(**given, return_dict=True)
        pooled = found.pooler_output
        number = sum(x.shape[-2] for x in pooled)
        expected = view.ids.count(self.reader.image_token_id)
        if number != expected:
            raise ValueError(
                f"model.path: the processor of {self.name} makes {expected} tokens of an image of which the model "
                f"makes {number} features; it belongs to another model: copy the processor's files anew"
            )
        found.grid = given.get("image_grid_thw")
        # The towers' own states are not needed any more, and take more memory than what is.
        found.last_hidden_state = found.hidden_states = found.attentions = None
        return found

    def token_logps(self, net: nn.Module, tokens: Tokens, features: ImageFeatures) -> Tensor:
        """See VisionLanguage. Only the rows of hidden states before a response's tokens reach the head."""
        at = tokens.is_response.flatten().nonzero()[:, 0]
        with _autocast(self.loading):
            logps = net(at - 1, tokens.ids.flatten()[at], **self._inputs(tokens, features))
        return torch.zeros(tokens.response_mask.shape, device=logps.device).masked_scatter(tokens.response_mask, logps)

    def _inputs(self, tokens: Tokens, features: ImageFeatures) -> dict[str, Any]:
        """What the model's forward pass takes."""
        inputs: dict[str, Any] = {"input_ids": tokens.ids, "attention_mask": tokens.mask.long()}
        found = [features.images[key] for row in tokens.images for key in row]
        if found:
            inputs["mm_encoder_outputs"] = {"image": _joined(found)}
            if found[0].grid is not None:  # positions in rows and columns (M-RoPE) are made of it
                inputs["image_grid_thw"] = torch.cat([one.grid for one in found])
        known = inspect.signature(self._model.base_model.forward).parameters
        if "mm_token_type_ids" in known:
            inputs["mm_token_type_ids"] = (tokens.ids == self.reader.image_token_id).int()
        if self.reader.facts.prefix_attention:
            places = torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
            inputs["token_type_ids"] = (places >= tokens.starts[:, None]).long()
        return inputs

    @property
    def usual_targets(self) -> Sequence[str]:
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

    def checkpoint_activations(self) -> None:
        """See Family."""
        self._model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def save(self, folder: Path, net: nn.Module) -> None:
        """As transformers and peft load it: adapters where the network has them, else the model with its processor."""
        model: Any = net.model
        model.save_pretrained(folder)
        if not getattr(model, "peft_config", None):
            self.reader.processor.save_pretrained(folder)

    def load_trained(self, folder: Path) -> nn.Module:
        """See Family."""
        with intact("output", folder, "a trained model", "`mmalign train` writes it anew"):
            if (folder / ADAPTERS).is_file():
                self._model.load_adapter(str(folder))
                return self.network
            model = type(self._model).from_pretrained(folder, dtype=self._model.dtype)
        return TokenScorer(model.to(self.loading.device).requires_grad_(False).eval())


def _joined(found: Sequence[Any]) -> Any:
    """The features of several images as the model would have made of them together."""
    whole = copy.copy(found[0])
    pooled = [one.pooler_output for one in found]
    whole.pooler_output = torch.cat(pooled) if isinstance(pooled[0], Tensor) else [x for one in pooled for x in one]
    if getattr(whole, "deepstack_features", None) is not None:  # Qwen3-VL: of several layers, each by image
        layers = zip(*(one.deepstack_features for one in found), strict=True)
        whole.deepstack_features = [[x for one in layer for x in one] for layer in layers]
    return whole


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
    _check(path, model_type, model, processor)
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", sys.maxsize)  # a model without positions reads on
    reader = ProcessorReader(processor, facts(model_type), model.config.image_token_id, longest)
    _without_dropout(model)
    network = TokenScorer(model.to(loading.device).requires_grad_(False).eval())
    family = ImageTextToText(path, network, reader, loading)
    _try(family)
    return family


def _without_dropout(model: nn.Module) -> None:
    """A policy must differ from its reference by what it has learned, never by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _try(family: ImageTextToText) -> None:
    """Take one picture through processor and tower: a processor of another model can fit in all that can be compared.

    Raises:
        ValueError: the picture's tokens do not match its features, or the tower cannot take what the processor makes.
    """
    try:
        family.encode_images({"a picture": family.reader.view(Image.new("RGB", (96, 64), "gray"))})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what fails, and how, depends on both
        if isinstance(error, ValueError) and str(error).startswith("model.path"):
            raise
        raise ValueError(
            f"model.path: the processor of {family.name} belongs to another model, which cannot read a picture as it "
            f"prepares one ({first_line(error)}); copy the processor's files anew"
        ) from error


def _check(path: str, model_type: str, model: Any, processor: Any) -> None:
    """That the adapter's rule holds for the type, and that the processor is the model's own."""
    text = model.config.get_text_config()
    lacking = [name for name in ("get_image_features", "get_decoder") if not hasattr(model, name)]
    if not model._supports_mm_encoder_outputs():
        lacking.append("mm_encoder_outputs")
    lacking += [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1, 1.0)]
    if not hasattr(model.config, "image_token_id"):
        lacking.append("image_token_id")
    if lacking:
        raise ValueError(
            f"model.path: {path} is a {model_type}, which cannot be aligned here ({', '.join(lacking)}); use a type "
            "such as llava, llava_next, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl, paligemma or internvl"
        )
    tokenizer: Any = getattr(processor, "tokenizer", None)
    token = getattr(processor, "image_token", None)
    known = tokenizer is not None and token is not None
    if not known or tokenizer.convert_tokens_to_ids(token) != model.config.image_token_id:
        came = f"{token} is token {tokenizer.convert_tokens_to_ids(token)}" if known else "it has no image token"
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model ({came}, and the model's image token is "
            f"{model.config.image_token_id}); copy the processor's files anew"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"model.path: the processor of {path} belongs to another model (it has {len(tokenizer):,} tokens, and the "
            f"model {model.get_input_embeddings().num_embeddings:,}); copy the processor's files anew"
        )
