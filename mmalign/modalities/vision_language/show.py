"""Response pairs as the model will see them: tokens with the scored ones marked, and the numbers of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from mmalign.config import Recipe, ResponseData, ResponseModel
from mmalign.data.data_module import Splits
from mmalign.data.loaders.response_pairs import ResponseExample, ResponsePairReader
from mmalign.data.loaders.sampler import Balance, EpochSampler
from mmalign.data.pairs import ResponsePair, output_names
from mmalign.families.base import PromptProcessor
from mmalign.language.tokens import TokenizedResponse
from mmalign.methods import requirements_of
from mmalign.modalities.vision_language.model import load_local_processor, token_limit
from mmalign.pages.examples import DataView, ExampleSide, TextSpan, TrainingExample

PROMPT = "prompt"  # name of a row without a response
NUM_MEASURED = 256  # pairs, evenly spaced, whose tokens are counted


def show(recipe: Recipe, splits: Splits, number: int) -> DataView:
    """Return the lengths of the recipe's rows, and its first examples; only the tokenizer is loaded.

    Raises:
        ValueError: the tokenizer is not on this machine.
    """
    data, needs, train = recipe.data, requirements_of(recipe.method), splits[0]
    assert isinstance(data, ResponseData) and isinstance(recipe.model, ResponseModel)
    processor = load_local_processor(recipe.model)
    # What the method generates needs room after the prompt
    longest = token_limit(processor, data) - needs.new_tokens
    reader = ResponsePairReader(processor, longest, decoded_images=True, other_images=needs.other_images)
    # Numbers of evenly spaced pairs, and as examples the first of the first epoch
    measured = [reader.read(train[n], 0) for n in range(0, len(train), max(1, len(train) // NUM_MEASURED))]
    balance = Balance.of(train, needs.liked_share)
    order = EpochSampler(len(train), 1, recipe.train.seed, balance=balance).order(0)
    return DataView(list(_facts(measured, longest)), [_example(reader, processor, train[n]) for n in order[:number]])


def _facts(measured: Sequence[Any], longest: int) -> Iterator[str]:
    """Yield sentences on the tokens of some pairs."""
    usable = [example for example in measured if isinstance(example, ResponseExample)]
    of = f"of {len(measured):,} pairs"
    if usable:
        sides = [side for example in usable for side in _sides(example)]
        rows = [len(row.ids) for _, row in sides]
        cut = sum(length == longest for length in rows)
        yield f"tokens of a row, {of}: {_range(rows)}; the limit is {longest:,}, and {cut:,} rows reach it"
        for name in dict.fromkeys(name for name, _ in sides if name != PROMPT):
            responses = [len(row.response) for side, row in sides if side == name]
            yield f"tokens of a {name} response, {of}: {_range(responses)}"
    if len(usable) < len(measured):
        yield f"{len(measured) - len(usable):,} {of} will be skipped"


def _range(lengths: Sequence[int]) -> str:
    return f"{min(lengths):,} to {max(lengths):,}, median {median(lengths):,.0f}"


def _example(reader: ResponsePairReader, processor: PromptProcessor, pair: ResponsePair) -> TrainingExample:
    title = "\n".join(f"{turn.role}: {turn.text}" for turn in pair.turns)
    example = reader.read(pair, 0)
    if not isinstance(example, ResponseExample):
        return TrainingExample(pair.location, title, skipped=[str(row) for row in example])
    sides = [
        ExampleSide(
            name,
            f"{len(row.ids):,} tokens, {len(row.response):,} scored",
            _spans(processor, row),
            {f"image {n}": example.decoded_images[key] for n, key in enumerate(row.images, start=1)},
        )
        for name, row in _sides(example)
    ]
    return TrainingExample(pair.location, title, sides)


def _sides(example: ResponseExample) -> list[tuple[str, TokenizedResponse]]:
    """Return the rows by name; answers alone have no rejected one, prompts alone no response."""
    names = output_names(len(example.pair.responses), example.pair.scores) or [PROMPT]
    return list(zip(names, example.responses, strict=False))


def _spans(processor: PromptProcessor, row: TokenizedResponse) -> list[TextSpan]:
    """Return the row's text: its prompt with runs of equal image tokens shortened, and each scored token."""
    spans, prompt = list[TextSpan](), processor.token_texts(row.ids)
    start = 0
    # Equal tokens in a row are those of an image
    while start < row.start:
        stop = start + 1
        while stop < row.start and row.ids[stop] == row.ids[start]:
            stop += 1
        repeated = f"{prompt[start]}({stop - start:,} times)"
        spans.append(TextSpan(repeated if stop - start > 2 else "".join(prompt[start:stop]), False))
        start = stop
    return [*spans, *(TextSpan(text, True) for text in prompt[row.start :])]
