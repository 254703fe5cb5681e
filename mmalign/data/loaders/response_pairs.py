"""Deterministic, resumable loader of response pairs, and their encoding to tokens and image features.

B pairs; rows are the prompts with the chosen responses first, then with the rejected ones: [2B].
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.image_features import cached_view
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.sampler import EpochSampler, SkippedRows, batched
from mmalign.data.pairs import ImageRef, Pairs, ResponsePair, SkippedRow, format_rows, stable_hash
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.tokens import TokenizedResponse, Tokens, cut_tail


@dataclass(frozen=True)
class RequestedInputs:
    """Inputs that a method requests besides responses and features.

    Attributes:
        decoded_images: the decoded images, to corrupt them.
        other_images: further rows with the chosen responses and the pairs' other images.
    """

    decoded_images: bool = False
    other_images: bool = False


NO_EXTRA_INPUTS = RequestedInputs()


@dataclass(frozen=True)
class ResponsePairExample:
    """Pair with tokenized responses, preprocessed images and the inputs that a method requests."""

    pair: ResponsePair
    chosen: TokenizedResponse
    rejected: TokenizedResponse
    other: TokenizedResponse | None
    views: dict[str, ImageView]
    decoded_images: dict[str, Image.Image]


@dataclass(frozen=True)
class ResponsePairBatch:
    """Batch of B response pairs on the CPU, not yet encoded; the fields are those of EncodedResponses."""

    rows: list[int]
    pairs: list[ResponsePair]
    tokens: Tokens
    other_images: Tokens | None
    views: dict[str, ImageView]
    decoded_images: dict[str, Image.Image]
    weights: Tensor
    skipped: list[SkippedRow] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Keys of the pairs' content [B], by `response_key`."""
        return [response_key(pair) for pair in self.pairs]


def response_key(pair: ResponsePair) -> str:
    """Return the cache key of a pair: its row id, its texts, and the content of its images."""
    images = ((ref.key for ref in refs) for refs in (pair.images, pair.rejected_images, pair.other_images))
    texts = (pair.chosen, pair.rejected, pair.hallucinated)
    return f"{pair.row:x}-{stable_hash(repr(pair.turns), *texts, *('|'.join(keys) for keys in images)):x}"


def image_refs(pair: ResponsePair, requested: RequestedInputs) -> list[ImageRef]:
    """Return the images of a pair that a method uses, each once."""
    return list(
        dict.fromkeys((*pair.images, *pair.rejected_images, *(pair.other_images if requested.other_images else ())))
    )


def read_example(
    processor: PromptProcessor,
    max_length: int,
    requested: RequestedInputs,
    known: ArrayCache | None,
    pair: ResponsePair,
) -> ResponsePairExample | list[SkippedRow]:
    """Return a pair's tokens and preprocessed images, or the reasons to skip it (bad images, a prompt too long).

    An image with features in `known` is not preprocessed; it is decoded only if the method requests decoded images.
    """
    if requested.other_images and not pair.other_images:
        return [SkippedRow(pair.location, "has no other image, which the method compares with")]
    # Read the images
    decoded, views, skipped = dict[str, Image.Image](), dict[str, ImageView](), list[SkippedRow]()
    for ref in image_refs(pair, requested):
        view = cached_view(known, ref.key)
        try:
            if view is None or requested.decoded_images:
                decoded[ref.key] = decode(ref)
        except BadImage as error:
            skipped.append(error.skipped)
            continue
        views[ref.key] = view or processor.preprocess_image(decoded[ref.key])
    if skipped:
        return skipped

    def rows(refs: Sequence[ImageRef]) -> list[TokenizedResponse]:
        """Tokenize the prompt with these images, once with either response."""
        return processor.tokenize_responses(
            pair.turns, [pair.chosen, pair.rejected], [(ref.key, views[ref.key]) for ref in refs]
        )

    try:
        chosen, rejected = rows(pair.images)
        if pair.rejected_images != pair.images:
            _, rejected = rows(pair.rejected_images)
        other = rows(pair.other_images)[0] if requested.other_images else None
        chosen, rejected = cut_tail(chosen, max_length), cut_tail(rejected, max_length)
        if other is not None:
            chosen, other = _equal_lengths(chosen, cut_tail(other, max_length))
    except ValueError as error:
        return [SkippedRow(pair.location, str(error))]
    if chosen == rejected:
        return [SkippedRow(pair.location, f"the responses first differ after data.max_length = {max_length:,} tokens")]
    return ResponsePairExample(
        _without_loaders(pair), chosen, rejected, other, views, decoded if requested.decoded_images else {}
    )


def _equal_lengths(first: TokenizedResponse, second: TokenizedResponse) -> tuple[TokenizedResponse, TokenizedResponse]:
    """Cut both rows to the shorter response, so that scores compare the same tokens."""
    length = min(len(first.response), len(second.response))
    return cut_tail(first, first.start + length), cut_tail(second, second.start + length)


def _without_loaders(pair: ResponsePair) -> ResponsePair:
    """Return the pair with images that cannot be read again."""
    sides = (pair.images, pair.rejected_images, pair.other_images)
    images, rejected, others = (tuple(ref.without_loader() for ref in refs) for refs in sides)
    return replace(pair, images=images, rejected_images=rejected, other_images=others)


class ResponsePairLoader:
    """Loader of response pairs, epoch by epoch.

    An unusable pair stays in its batch with weight 0, so that no other pair moves. It is counted and named.

    Args:
        pairs: the pairs to load.
        processor: the tokenizer and image preprocessor.
        max_length: most tokens of a row; longer responses are cut, pairs with longer prompts are skipped.
        batch_size: B, pairs per batch on this process.
        seed: the seed of the order.
        requested: further inputs for the method; a pair without the requested other images is skipped.
        known: the cache of image features.
        num_workers: number of processes that read; 0 reads in this one.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        max_bad_images: most bad images and prompts that a run may meet; None allows any number.
        keep_last: pad the last batch with pairs of weight 0 instead of dropping it, as evaluation needs.
    """

    def __init__(
        self,
        pairs: Pairs[ResponsePair],
        processor: PromptProcessor,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        requested: RequestedInputs = NO_EXTRA_INPUTS,
        known: ArrayCache | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_images: int | None = None,
        keep_last: bool = False,
    ) -> None:
        self.pairs, self.processor, self.num_workers, self.requested = pairs, processor, num_workers, requested
        self.sampler = EpochSampler(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self._max_length, self._feature_cache = max_length, known
        self._skipped = SkippedRows(pairs.source, max_bad_images)
        self._first = 0  # number of the first pair that is not known to be bad
        self._keys = dict[int, str]()

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows skipped so far on this process, each once."""
        return self._skipped.rows

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.sampler)

    def check_readable(self) -> ResponsePair:
        """Return the first usable pair, which replaces the pairs of an entirely bad batch.

        Raises:
            ValueError: no pair is usable, or more than `max_bad_images` rows are bad; the message names the first few.
        """
        self._stand_in()
        return self.pairs[self._first]

    def _stand_in(self) -> ResponsePairExample:
        """Read the first usable pair again: its features may be cached by now."""
        for number in range(self._first, len(self.pairs)):
            example = self._read(self.pairs[number])
            if isinstance(example, ResponsePairExample):
                self._first = number
                return example
            self._skipped.add(example)
        raise ValueError(
            f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs can be used "
            f"({format_rows(self.skipped)}); repair the images, raise data.max_length, or name another source"
        )

    def stop_decoding_images(self) -> None:
        """Drop decoded images from later batches, even if they were requested."""
        self.requested = replace(self.requested, decoded_images=False)

    @property
    def _read(self) -> partial[ResponsePairExample | list[SkippedRow]]:
        return partial(read_example, self.processor, self._max_length, self.requested, self._feature_cache)

    def batches(self, epoch: int, start: int = 0) -> Iterator[ResponsePairBatch]:
        """Yield the batches of an epoch from number `start`, without reading earlier ones.

        Raises:
            ValueError: more than `max_bad_images` rows are bad; the message names the first few.
        """
        return self._batches(self.sampler.plan(epoch)[start:])

    def read_pairs(self, epoch: int, numbers: Sequence[int]) -> Iterator[ResponsePairBatch]:
        """Yield batches of the pairs with these numbers, in this order; they are the same in every epoch."""
        return self._batches(batched(numbers, self.sampler.batch_size))

    def key(self, number: int) -> str:
        """Return the key of a pair's content, by number."""
        if number not in self._keys:
            self._keys[number] = response_key(self.pairs[number])
        return self._keys[number]

    def _batches(self, plan: list[list[tuple[int, float]]]) -> Iterator[ResponsePairBatch]:
        loader = DataLoader(
            _Examples(self.pairs, self._read),
            batch_sampler=plan,
            collate_fn=partial(_collate, self.processor, self._stand_in()),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would advance the global generator
        )
        for batch in loader:
            self._skipped.add(batch.skipped)
            yield batch

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Return the locations of a batch's pairs, for messages."""
        return [self.pairs[pair].location for pair, weight in self.sampler.plan(epoch)[number] if weight]


_NumberedExample = tuple[int, float, ResponsePairExample | list[SkippedRow]]  # row id, weight, example or reasons


class _Examples(Dataset[_NumberedExample]):
    """Dataset of examples by (number, weight)."""

    def __init__(self, pairs: Pairs[ResponsePair], read: partial[ResponsePairExample | list[SkippedRow]]) -> None:
        self.pairs, self.read = pairs, read

    def __getitem__(self, number_and_weight: tuple[int, float]) -> _NumberedExample:
        number, weight = number_and_weight
        pair = self.pairs[number]
        return pair.row, weight, self.read(pair)


def _collate(
    processor: PromptProcessor, spare: ResponsePairExample, examples: Sequence[_NumberedExample]
) -> ResponsePairBatch:
    """Collate examples to a batch; a good one, or `spare`, replaces a bad one, with weight 0."""
    stand_in = next((one for _, _, one in examples if isinstance(one, ResponsePairExample)), spare)
    read = [one if isinstance(one, ResponsePairExample) else stand_in for _, _, one in examples]
    others = [one.other for one in read if one.other is not None]
    return ResponsePairBatch(
        rows=[row for row, _, _ in examples],
        pairs=[one.pair for one in read],
        tokens=processor.collate([*(one.chosen for one in read), *(one.rejected for one in read)]),
        other_images=processor.collate(others) if others else None,
        views={key: view for one in read for key, view in one.views.items()},
        decoded_images={key: picture for one in read for key, picture in one.decoded_images.items()},
        weights=torch.tensor([weight if isinstance(one, ResponsePairExample) else 0.0 for _, weight, one in examples]),
        skipped=[dropped for _, _, one in examples if isinstance(one, list) for dropped in one],
    )


def encode(family: VisionLanguage, batch: ResponsePairBatch, max_length: int = sys.maxsize) -> EncodedResponses:
    """Encode a batch on the model's device, each distinct image once.

    Rows that a method adds have at most `max_length` tokens, or the processor's limit if that is lower.
    """
    device = family.device
    return EncodedResponses(
        rows=batch.rows,
        tokens=batch.tokens.to(device),
        features=family.encode_images(batch.views),
        weights=batch.weights.to(device),
        pairs=batch.pairs,
        decoded_images=batch.decoded_images,
        views=batch.views,
        other_images=None if batch.other_images is None else batch.other_images.to(device),
        max_length=min(max_length, family.processor.max_length),
    )
