"""Batched generation of answers; an answer does not depend on its batch, up to the rounding of its logits.

Prompts are padded on the left and keep their own positions. A sampled token is the argmax of logits / temperature +
Gumbel noise, which is a sample from softmax(logits / temperature). The noise is keyed by prompt and step. Image tokens
are hidden as in BDHS (arXiv:2407.02477, eq. 6): nothing attends to them, and all positions stay the same.

N is the number of prompts of a batch, L the longest prompt's tokens, T an answer's tokens so far, V the size of the
vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.config import DecodingConfig
from mmalign.families.types import GeneratedText, ImageFeatures, Mixture
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.processor import HFProcessor
from mmalign.families.vlm.token_scorer import unwrap
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.policy import eval_mode
from mmalign.rng import KeyedRNG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layer types that read other tokens through attention alone, so that a mask can hide a token from them.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class GenerationPrompt:
    """A prompt to answer.

    Attributes:
        row: the tokens up to the beginning of the answer.
        key: the key of its sampling noise.
        hidden: mask of the image tokens that nothing attends to; None hides none.
    """

    row: TokenizedResponse
    key: int
    hidden: Tensor | None = None


def masking_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return the reason why a mask cannot hide a token from a model's decoder; None if it can."""
    others = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION)
    if not others:
        return None
    return (
        f"a {model.config.model_type} has {' and '.join(others)} layers, which process tokens in turn into one "
        "state, so that a masked token would still change it"
    )


def generate(
    model: PreTrainedModel,
    processor: HFProcessor,
    prompts: Sequence[GenerationPrompt],
    features: ImageFeatures,
    decoding: DecodingConfig,
    rng: KeyedRNG,
    stop: Sequence[str],
    mixture: Mixture | None = None,
) -> list[GeneratedText]:
    """Generate an answer to each prompt with a model that has a head; the model's state is restored afterwards."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].row.ids))  # for less padding
    answers = dict[int, GeneratedText]()
    with _plain_search(model, processor):
        for first in range(0, len(order), decoding.batch_size):
            chunk = order[first : first + decoding.batch_size]
            batch = [prompts[number] for number in chunk]
            generated = _generate_batch(model, processor, batch, features, decoding, rng, stop, mixture)
            answers |= zip(chunk, generated, strict=True)
    return [answers[number] for number in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel,
    processor: HFProcessor,
    prompts: Sequence[GenerationPrompt],
    features: ImageFeatures,
    decoding: DecodingConfig,
    rng: KeyedRNG,
    stop: Sequence[str],
    mixture: Mixture | None,
) -> list[GeneratedText]:
    """Generate the answers to one batch of prompts."""
    # Inputs of left-padded rows
    rows = [prompt.row for prompt in prompts]
    ids, mask, is_said = _left_padded(processor.collate(rows).to(model.get_output_embeddings().weight.device))
    images = [features.images[key] for row in rows for key in row.images]
    inputs = decoder_inputs(model, processor.quirks, ids, mask, is_said, images)
    # The model's own rule covers M-RoPE and positions that start at 1. It takes the mask without holes, because hidden
    # tokens keep their positions.
    inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, inputs)
    inputs["attention_mask"] = _visible_tokens(mask, ids == processor.image_token_id, prompts).long()
    # Logits of both models, then the noise
    processors: list[_Mixed | _Noise] = [] if mixture is None else [_Mixed(mixture, inputs)]
    processors += [_Noise(prompts, rng, ids.shape[1], decoding.temperature)] if decoding.temperature else []
    # Answers, cut after the first stop text
    width = ids.shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        synced_gpus=False,  # processes generate independently; transformers would join those of a sharded network
        logits_processor=processors,
        stopping_criteria=[_Stop(processor, rows, width, stop)] if stop else [],
    )
    # A row ended by an end token, by a stop text, or was cut at the limit; its length counts the end token
    new, ends = output[:, width:], torch.tensor(model.generation_config.eos_token_id, device=output.device)
    is_end = torch.isin(new, ends)
    is_ended = is_end.any(1) if new.shape[1] >= decoding.max_new_tokens else torch.ones(len(new)).bool()
    answers, lengths = _answers(processor, rows, new), (is_end.cumsum(1) - is_end.int() == 0).sum(1)
    return [
        GeneratedText(_until(answer, stop), not ended and not any(text in answer for text in stop), tuple(ids[:length]))
        for answer, ended, ids, length in zip(answers, is_ended.tolist(), new.tolist(), lengths.tolist(), strict=True)
    ]


def _left_padded(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, padding mask and response mask, each [N, L], with the padding moved to the left."""
    length = tokens.ids.shape[1]
    positions = (torch.arange(length, device=tokens.ids.device) - (length - tokens.lengths)[:, None]) % length
    return tokens.ids.gather(1, positions), tokens.mask.gather(1, positions), tokens.is_response.gather(1, positions)


def _visible_tokens(mask: Tensor, is_image: Tensor, prompts: Sequence[GenerationPrompt]) -> Tensor:
    """Return the mask of the tokens that are attended to, [N, L]."""
    seen = mask.clone()
    for row, image, prompt in zip(seen, is_image, prompts, strict=True):
        if prompt.hidden is not None:
            row[image] = ~prompt.hidden.to(row.device)
    return seen


@contextlib.contextmanager
def _plain_search(model: PreTrainedModel, processor: HFProcessor) -> Iterator[None]:
    """Set greedy search with a key-value cache, without the checkpoint's own generation settings, such as penalties.

    The model is in eval mode: in train mode gradient checkpointing would turn the cache off.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    eos_ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {*processor.ends, *eos_ids} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=processor.pad, use_cache=True)
    try:
        with eval_mode(model):
            yield
    finally:
        model.generation_config = own


class _Mixed:
    """Logits processor that mixes in the logits of another network, with a key-value cache of its own."""

    def __init__(self, mixture: Mixture, inputs: Mapping[str, object]) -> None:
        self.mixture, self.is_first = mixture, True
        self.inputs: dict[str, Any] = {name: x for name, x in inputs.items() if name != "input_ids"}
        self.inputs["use_cache"] = True

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        other = self.mixture.on_other(lambda net: unwrap(net).run(partial(self._logits, ids=ids)))
        assert other is not None, "there is another network"
        return (1 - self.mixture.share) * logits + self.mixture.share * other.to(logits)

    def _logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return the logits [N, V] after the tokens, as transformers' own loop computes them."""
        # After the first call only the last token is new to the cache
        new = {} if self.is_first else {"next_sequence_length": 1}
        given = model.prepare_inputs_for_generation(ids, is_first_iteration=self.is_first, **new, **self.inputs)
        output = model(**given, return_dict=True)
        self.inputs = model._update_model_kwargs_for_generation(output, self.inputs)
        self.is_first = False
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _Noise:
    """Logits processor of transformers that adds Gumbel noise, so that the argmax of logits [N, V] is a sample."""

    def __init__(self, prompts: Sequence[GenerationPrompt], rng: KeyedRNG, width: int, temperature: float) -> None:
        self.keys, self.rng = [prompt.key for prompt in prompts], rng
        self.width, self.temperature = width, temperature

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        noise = self.rng.gumbel(self.keys, logits.shape[1:], "answer", ids.shape[1] - self.width)
        return logits / self.temperature + noise.to(logits.device)


class _Stop:
    """Stopping criterion of transformers: a row of [N, L + T] ends when its answer contains one of the texts."""

    def __init__(
        self, processor: HFProcessor, rows: Sequence[TokenizedResponse], width: int, texts: Sequence[str]
    ) -> None:
        self.processor, self.rows, self.width, self.texts = processor, rows, width, texts

    def __call__(self, ids: Tensor, scores: object) -> Tensor:
        answers = _answers(self.processor, self.rows, ids[:, self.width :])
        return torch.tensor([any(text in answer for text in self.texts) for answer in answers], device=ids.device)


def _answers(processor: HFProcessor, rows: Sequence[TokenizedResponse], ids: Tensor) -> list[str]:
    """Decode answers [N, T]; the token that ends an answer and the padding after it are special and give no text."""
    return [processor.decode(said, row.ids) for row, said in zip(rows, ids.tolist(), strict=True)]


def _until(answer: str, texts: Sequence[str]) -> str:
    """Cut the answer after the first occurrence of any of the texts."""
    ends = [answer.index(text) + len(text) for text in texts if text in answer]
    return answer[: min(ends)] if ends else answer
