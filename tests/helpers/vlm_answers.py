"""Questions to tiny vision-language models, and their answers."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign.config import DecodingConfig
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.rng import KeyedRNG
from tests.helpers.vlm_reference import PICTURES

QUESTION = "<image>What is it?"


GREEDY, SAMPLED = DecodingConfig(max_new_tokens=8), DecodingConfig(max_new_tokens=8, temperature=0.8)


DRAWS = KeyedRNG(seed=3)


@dataclass(frozen=True)
class Asked:
    """A question to a model; the key is of its sampling noise."""

    images: tuple[str, ...] = ("wide",)
    question: str = QUESTION
    start: str = ""
    key: int = 1


def prompt(family: Any, asked: Asked) -> TokenizedResponse:
    views = [(key, family.processor.preprocess_image(PICTURES[key])) for key in asked.images]
    row: TokenizedResponse = family.processor.tokenize_prompt([Turn("user", asked.question)], views, asked.start)
    return row


def answers(
    family: Any,
    requests: Sequence[Asked],
    decoding: DecodingConfig = GREEDY,
    hidden: Sequence[Tensor] | None = None,
    rng: KeyedRNG = DRAWS,
    net: Any = None,
    stop: Sequence[str] = (),
) -> list[str]:
    views = {key: family.processor.preprocess_image(PICTURES[key]) for asked in requests for key in asked.images}
    rows, keys = [prompt(family, asked) for asked in requests], [asked.key for asked in requests]
    results = family.generate(
        net or family.network, rows, family.encode_images(views), decoding, rows=keys, rng=rng, hidden=hidden, stop=stop
    )
    return [answer.text for answer in results]


@contextlib.contextmanager
def head(family: Any, end: int | None = None) -> Iterator[list[Tensor]]:
    """The logits [V] of each step, from the head itself, which from the third step on says nothing but `end`."""
    steps = list[Tensor]()

    def hook(module: Any, given: Any, logits: Tensor) -> Tensor:
        steps.append(logits[0, -1].clone())
        if end is not None and len(steps) > 2:
            logits[..., end] += 1e4
        return logits

    handle = family.network.model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield steps
    finally:
        handle.remove()
