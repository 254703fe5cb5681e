"""Answers of a model of transformers, many at a time, each as it would be alone.

Prompts are padded on the left and keep their own positions. A sampled token is the argmax of logits / temperature +
Gumbel noise, which is a draw from their softmax, and the noise is keyed by prompt and step. An image's tokens are
hidden as BDHS hides them (arXiv:2407.02477, eq. 6): nothing attends to them, and everything stays where it is.

N prompts of a batch, L tokens of the longest, T tokens of an answer so far, V the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.families.types import Decoding, ImageFeatures
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.processor import HFProcessor
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.rng import KeyedRNG

# Layers that know other tokens through attention alone, so that a mask can hide a token from them.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class GenerationPrompt:
    """What is to be answered.

    Attributes:
        row: up to where the answer begins.
        key: of its sampling noise.
        hidden: which of its image tokens nothing attends to; None hides none.
    """

    row: TokenizedResponse
    key: int
    hidden: Tensor | None = None


def masking_unsupported_reason(model: Any) -> str | None:
    """Why a mask cannot hide a token from a model's decoder; None if it can."""
    others = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION)
    if not others:
        return None
    return (
        f"a {model.config.model_type} has {' and '.join(others)} layers, which do not attend to tokens but read them "
        "in turn into one state, where a hidden one would still fade what was read before"
    )


def generate(
    model: Any,
    processor: HFProcessor,
    prompts: Sequence[GenerationPrompt],
    features: ImageFeatures,
    decoding: Decoding,
    rng: KeyedRNG,
) -> list[str]:
    """An answer to each prompt, of a model with a head; the model is afterwards as it was."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].row.ids))  # less padding
    answers: dict[int, str] = {}
    with _plain_search(model, processor):
        for first in range(0, len(order), decoding.batch_size):
            chunk = order[first : first + decoding.batch_size]
            batch = [prompts[number] for number in chunk]
            answers |= zip(chunk, _generate_batch(model, processor, batch, features, decoding, rng), strict=True)
    return [answers[number] for number in range(len(prompts))]


def _generate_batch(
    model: Any,
    processor: HFProcessor,
    prompts: Sequence[GenerationPrompt],
    features: ImageFeatures,
    decoding: Decoding,
    rng: KeyedRNG,
) -> list[str]:
    """The answers to one batch."""
    rows = [prompt.row for prompt in prompts]
    ids, mask, is_said = _left_padded(processor.collate(rows).to(model.get_output_embeddings().weight.device))
    images = [features.images[key] for row in rows for key in row.images]
    inputs = decoder_inputs(model, processor.quirks, ids, mask, is_said, images)
    # The model's own rule, which knows of positions in rows and columns and of those from 1 on; made of the mask
    # without holes, because hidden tokens keep their places.
    inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, inputs)
    inputs["attention_mask"] = _visible_tokens(mask, ids == processor.image_token_id, prompts).long()
    width = ids.shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        logits_processor=[_Noise(prompts, rng, width, decoding.temperature)] if decoding.temperature else [],
        stopping_criteria=[_Stop(processor, rows, width, decoding.stop)] if decoding.stop else [],
    )
    return [_until(answer, decoding.stop) for answer in _answers(processor, rows, output[:, width:])]


def _left_padded(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, which of them are no padding, and which the model has said already: each [N, L], flush right."""
    length = tokens.ids.shape[1]
    positions = (torch.arange(length, device=tokens.ids.device) - (length - tokens.lengths)[:, None]) % length
    return tokens.ids.gather(1, positions), tokens.mask.gather(1, positions), tokens.is_response.gather(1, positions)


def _visible_tokens(mask: Tensor, is_image: Tensor, prompts: Sequence[GenerationPrompt]) -> Tensor:
    """Which tokens are attended to, [N, L]."""
    seen = mask.clone()
    for row, image, prompt in zip(seen, is_image, prompts, strict=True):
        if prompt.hidden is not None:
            row[image] = ~prompt.hidden.to(row.device)
    return seen


@contextlib.contextmanager
def _plain_search(model: Any, processor: HFProcessor) -> Iterator[None]:
    """Greedy search with a key-value cache, and none of the checkpoint's own habits, such as penalties.

    In eval mode: in train mode recomputed activations would do without the cache.
    """
    from transformers import GenerationConfig

    own, training = model.generation_config, [part for part in model.modules() if part.training]
    eos_ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {*processor.ends, *eos_ids} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=processor.pad, use_cache=True)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        for part in training:
            part.training = True


class _Noise:
    """Makes logits [N, V] such that their argmax is a draw; as a LogitsProcessor of transformers."""

    def __init__(self, prompts: Sequence[GenerationPrompt], rng: KeyedRNG, width: int, temperature: float) -> None:
        self.keys, self.rng = [prompt.key for prompt in prompts], rng
        self.width, self.temperature = width, temperature

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        noise = self.rng.gumbel(self.keys, logits.shape[1:], "answer", ids.shape[1] - self.width)
        return logits / self.temperature + noise.to(logits.device)


class _Stop:
    """Ends the answers [N, L + T] that have said one of some texts; as a StoppingCriteria of transformers."""

    def __init__(
        self, processor: HFProcessor, rows: Sequence[TokenizedResponse], width: int, texts: Sequence[str]
    ) -> None:
        self.processor, self.rows, self.width, self.texts = processor, rows, width, texts

    def __call__(self, ids: Tensor, scores: object) -> Tensor:
        answers = _answers(self.processor, self.rows, ids[:, self.width :])
        return torch.tensor([any(text in answer for text in self.texts) for answer in answers], device=ids.device)


def _answers(processor: HFProcessor, rows: Sequence[TokenizedResponse], ids: Tensor) -> list[str]:
    """The texts of answers [N, T]; the token that ends one and the padding after it are special, so no text."""
    return [processor.decode(said, row.ids) for row, said in zip(rows, ids.tolist(), strict=True)]


def _until(answer: str, texts: Sequence[str]) -> str:
    """The answer up to the first of the texts, which belongs to it."""
    ends = [answer.index(text) + len(text) for text in texts if text in answer]
    return answer[: min(ends)] if ends else answer
