"""From pairs of responses to what a decoder eats: tokens, and the features of images, each encoded once for a batch.

B pairs; rows are the prompts with the chosen responses first, then with the rejected ones: [2B].
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.image_features import cached_view
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.sampler import EpochSampler, SkippedRows
from mmalign.data.pairs import ImageRef, Pairs, ResponsePair, SkippedRow, format_rows, stable_hash
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.tokens import TokenizedResponse, Tokens, cut_tail


@dataclass(frozen=True)
class RequestedInputs:
    """What a method asks for besides responses and features.

    Attributes:
        decoded_images: the decoded images, to disturb them.
        other_images: the chosen responses once more, to the pairs' other images.
    """

    decoded_images: bool = False
    other_images: bool = False


NO_EXTRA_INPUTS = RequestedInputs()


@dataclass(frozen=True)
class ResponsePairExample:
    """A pair as a Reader has read it: the prompt with either response, and what else a method wants."""

    pair: ResponsePair
    chosen: TokenizedResponse
    rejected: TokenizedResponse
    other: TokenizedResponse | None
    views: dict[str, ImageView]
    decoded_images: dict[str, Image.Image]


@dataclass(frozen=True)
class ResponsePairBatch:
    """B pairs as they come from the loader, on the CPU; see EncodedResponses. `keys` name all that the pairs are."""

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
        """What the pairs' words and images are [B]: any other has another key."""
        return [response_key(pair) for pair in self.pairs]


def response_key(pair: ResponsePair) -> str:
    """The key of what is made of a pair: its draws, its words, and the content of its images."""
    images = ((ref.key for ref in refs) for refs in (pair.images, pair.rejected_images, pair.other_images))
    texts = (pair.chosen, pair.rejected, pair.hallucinated)
    return f"{pair.row:x}-{stable_hash(repr(pair.turns), *texts, *('|'.join(keys) for keys in images)):x}"


def image_refs(pair: ResponsePair, requested: RequestedInputs) -> list[ImageRef]:
    """The images that a method is shown of a pair, each once."""
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
    """A pair's tokens and prepared images, or why there are none: a bad image, or a prompt that is too long.

    An image whose features are `known` is not prepared, and where no method wants to see it not even decoded.
    """
    if requested.other_images and not pair.other_images:
        return [SkippedRow(pair.location, "has no other image, which the method compares with")]
    decoded, views, skipped = dict[str, Image.Image](), dict[str, ImageView](), list[SkippedRow]()
    for ref in image_refs(pair, requested):
        view = cached_view(known, ref.key)
        try:
            if view is None or requested.decoded_images:
                decoded[ref.key] = decode(ref)
        except BadImage as error:
            skipped.append(SkippedRow(ref.location, str(error).removeprefix(f"{ref.location}: ")))
            continue
        views[ref.key] = view or processor.preprocess_image(decoded[ref.key])
    if skipped:
        return skipped

    def rows(refs: Sequence[ImageRef]) -> list[TokenizedResponse]:
        """The prompt with these images, and with either response."""
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
    """Both rows with as many tokens of the response as the shorter one: a score must not change by a lost tail."""
    length = min(len(first.response), len(second.response))
    return cut_tail(first, first.start + length), cut_tail(second, second.start + length)


def _without_loaders(pair: ResponsePair) -> ResponsePair:
    """The pair without the means to read its images: those of a table would take the table to another process."""

    def named(refs: Sequence[ImageRef]) -> tuple[ImageRef, ...]:
        return tuple(replace(ref, _load=partial(_raise_read_again, ref.location)) for ref in refs)

    images, rejected, others = (named(refs) for refs in (pair.images, pair.rejected_images, pair.other_images))
    return replace(pair, images=images, rejected_images=rejected, other_images=others)


def _raise_read_again(location: str) -> NoReturn:
    raise AssertionError(f"{location}: the image of an encoded pair is in its batch, and is not read again")


class ResponsePairLoader:
    """Batches of pairs of responses, epoch by epoch.

    A pair that cannot be used keeps its place with weight 0, so that no other pair moves; it is counted and named.

    Args:
        pairs: what to learn from.
        processor: makes tokens and prepared images.
        max_length: tokens of a row; an over-long response loses its tail, a pair with an over-long prompt is left out.
        batch_size: B, pairs of a batch on this process.
        seed: of the order.
        requested: what else the method asks for; a pair without the other images that it asks for is left out.
        known: images' features that are kept already.
        num_workers: processes that read; 0 reads in this one.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        max_bad_images: stop if more images and prompts than this are bad.
        keep_last: fill up the last batch with pairs of weight 0 instead of leaving it out, as evaluation wants.
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
        self._first = 0  # of the pairs, all before it being bad
        self._keys = dict[int, str]()

    @property
    def skipped(self) -> list[SkippedRow]:
        """What could not be used so far on this process, each once."""
        return self._skipped.rows

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def check_readable(self) -> ResponsePair:
        """Read pairs until one is good, and give it: it stands in where all of a batch are bad.

        Raises:
            ValueError: none is, or more than `max_bad_images` are bad; it names the first few.
        """
        self._stand_in()
        return self.pairs[self._first]

    def _stand_in(self) -> ResponsePairExample:
        """The first good pair, read now: its features may be known by now."""
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
        """Give no decoded images from now on, whatever was asked for at first."""
        self.requested = replace(self.requested, decoded_images=False)

    @property
    def _read(self) -> partial[ResponsePairExample | list[SkippedRow]]:
        return partial(read_example, self.processor, self._max_length, self.requested, self._feature_cache)

    def batches(self, epoch: int, start: int = 0) -> Iterator[ResponsePairBatch]:
        """The batches of an epoch from number `start` on; those before it are not read.

        Raises:
            ValueError: more than `max_bad_images` are bad; it names the first few.
        """
        return self._batches(self.sampler.plan(epoch)[start:])

    def select_batches(self, epoch: int, numbers: Sequence[int]) -> Iterator[ResponsePairBatch]:
        """Some of the batches of an epoch, by number."""
        plan = self.sampler.plan(epoch)
        return self._batches([plan[number] for number in numbers])

    def key(self, number: int) -> str:
        """The key of a pair, by number; see ResponsePairBatch."""
        if number not in self._keys:
            self._keys[number] = response_key(self.pairs[number])
        return self._keys[number]

    def _batches(self, plan: list[list[tuple[int, float]]]) -> Iterator[ResponsePairBatch]:
        loader = DataLoader(
            _Examples(self.pairs, self._read),
            batch_sampler=plan,
            collate_fn=partial(_collate, self.processor, self._stand_in()),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would draw from, and move, the global one
        )
        for batch in loader:
            self._skipped.add(batch.skipped)
            yield batch

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a batch of an epoch lie, for people."""
        return [self.pairs[pair].location for pair, weight in self.sampler.plan(epoch)[number] if weight]


_NumberedExample = tuple[int, float, ResponsePairExample | list[SkippedRow]]  # row id, weight, what was read


class _Examples(Dataset[_NumberedExample]):
    """Pairs by (number, weight), read."""

    def __init__(self, pairs: Pairs[ResponsePair], read: partial[ResponsePairExample | list[SkippedRow]]) -> None:
        self.pairs, self.read = pairs, read

    def __getitem__(self, number_and_weight: tuple[int, float]) -> _NumberedExample:
        number, weight = number_and_weight
        pair = self.pairs[number]
        return pair.row, weight, self.read(pair)


def _collate(
    processor: PromptProcessor, spare: ResponsePairExample, examples: Sequence[_NumberedExample]
) -> ResponsePairBatch:
    """Pairs to a batch; a good one of it stands in for a bad one, with weight 0, and `spare` where none is good."""
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
    """A batch on the model's device, every distinct image encoded once; its rows have at most `max_length` tokens."""
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
