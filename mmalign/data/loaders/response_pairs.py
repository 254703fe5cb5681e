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
from mmalign.data.caches.image_features import known_view
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.sampler import Epochs, LeftOut
from mmalign.data.pairs import Dropped, ImageRef, Pairs, ResponsePair, hashed, listed
from mmalign.families.base import Reader, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.tokens import TokenRow, Tokens, cut_tail


@dataclass(frozen=True)
class Wants:
    """What a method asks for besides responses and features.

    Attributes:
        pictures: the decoded images, to disturb them.
        others: the chosen responses once more, to the pairs' other images.
    """

    pictures: bool = False
    others: bool = False


NOTHING = Wants()


@dataclass(frozen=True)
class ReadPair:
    """A pair as a Reader has read it: the prompt with either response, and what else a method wants."""

    pair: ResponsePair
    chosen: TokenRow
    rejected: TokenRow
    other: TokenRow | None
    views: dict[str, ImageView]
    pictures: dict[str, Image.Image]


@dataclass(frozen=True)
class ReadBatch:
    """B pairs as they come from the loader, on the CPU; see EncodedResponses. `keys` name all that the pairs are."""

    rows: list[int]
    pairs: list[ResponsePair]
    tokens: Tokens
    others: Tokens | None
    views: dict[str, ImageView]
    pictures: dict[str, Image.Image]
    weights: Tensor
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """What the pairs' words and images are [B]: any other has another key."""
        return [response_key(pair) for pair in self.pairs]


def response_key(pair: ResponsePair) -> str:
    """The key of what is made of a pair: its draws, its words, and the content of its images."""
    images = ((ref.key for ref in refs) for refs in (pair.images, pair.rejected_images, pair.other_images))
    said = (pair.chosen, pair.rejected, pair.hallucinated)
    return f"{pair.row:x}-{hashed(repr(pair.turns), *said, *('|'.join(keys) for keys in images)):x}"


def images_of(pair: ResponsePair, wants: Wants) -> list[ImageRef]:
    """The images that a method is shown of a pair, each once."""
    return list(dict.fromkeys((*pair.images, *pair.rejected_images, *(pair.other_images if wants.others else ()))))


def read_pair(
    reader: Reader, max_length: int, wants: Wants, known: ArrayCache | None, pair: ResponsePair
) -> ReadPair | list[Dropped]:
    """A pair's tokens and prepared images, or why there are none: a bad image, or a prompt that is too long.

    An image whose features are `known` is not prepared, and where no method wants to see it not even decoded.
    """
    if wants.others and not pair.other_images:
        return [Dropped(pair.where, "has no other image, which the method compares with")]
    pictures, views, dropped = dict[str, Image.Image](), dict[str, ImageView](), list[Dropped]()
    for ref in images_of(pair, wants):
        found = known_view(known, ref.key)
        try:
            if found is None or wants.pictures:
                pictures[ref.key] = decode(ref)
        except BadImage as error:
            dropped.append(Dropped(ref.where, str(error).removeprefix(f"{ref.where}: ")))
            continue
        views[ref.key] = found or reader.view(pictures[ref.key])
    if dropped:
        return dropped

    def rows(refs: Sequence[ImageRef]) -> list[TokenRow]:
        """The prompt with these images, and with either response."""
        return reader.rows(pair.turns, [pair.chosen, pair.rejected], [(ref.key, views[ref.key]) for ref in refs])

    try:
        chosen, rejected = rows(pair.images)
        if pair.rejected_images != pair.images:
            _, rejected = rows(pair.rejected_images)
        other = rows(pair.other_images)[0] if wants.others else None
        chosen, rejected = cut_tail(chosen, max_length), cut_tail(rejected, max_length)
        if other is not None:
            chosen, other = _alike(chosen, cut_tail(other, max_length))
    except ValueError as error:
        return [Dropped(pair.where, str(error))]
    if chosen == rejected:
        return [Dropped(pair.where, f"the responses first differ after data.max_length = {max_length:,} tokens")]
    return ReadPair(_spent(pair), chosen, rejected, other, views, pictures if wants.pictures else {})


def _alike(one: TokenRow, other: TokenRow) -> tuple[TokenRow, TokenRow]:
    """Both rows with as many tokens of the response as the shorter one: a score must not change by a lost tail."""
    kept = min(len(one.response), len(other.response))
    return cut_tail(one, one.start + kept), cut_tail(other, other.start + kept)


def _spent(pair: ResponsePair) -> ResponsePair:
    """The pair without the means to read its images: those of a table would take the table to another process."""

    def named(refs: Sequence[ImageRef]) -> tuple[ImageRef, ...]:
        return tuple(replace(ref, _load=partial(_read_again, ref.where)) for ref in refs)

    images, rejected, others = (named(refs) for refs in (pair.images, pair.rejected_images, pair.other_images))
    return replace(pair, images=images, rejected_images=rejected, other_images=others)


def _read_again(where: str) -> NoReturn:
    raise AssertionError(f"{where}: the image of an encoded pair is in its batch, and is not read again")


class ResponseLoader:
    """Batches of pairs of responses, epoch by epoch.

    A pair that cannot be used keeps its place with weight 0, so that no other pair moves; it is counted and named.

    Args:
        pairs: what to learn from.
        reader: makes tokens and prepared images.
        max_length: tokens of a row; an over-long response loses its tail, a pair with an over-long prompt is left out.
        batch_size: B, pairs of a batch on this process.
        seed: of the order.
        wants: what else the method asks for; a pair without the other images that it asks for is left out.
        known: images' features that are kept already.
        num_workers: processes that read; 0 reads in this one.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        max_bad: stop if more images and prompts than this are bad.
        keep_last: fill up the last batch with pairs of weight 0 instead of leaving it out, as evaluation wants.
    """

    def __init__(
        self,
        pairs: Pairs[ResponsePair],
        reader: Reader,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        wants: Wants = NOTHING,
        known: ArrayCache | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int | None = None,
        keep_last: bool = False,
    ) -> None:
        self.pairs, self.reader, self.num_workers, self.wants = pairs, reader, num_workers, wants
        self.epochs = Epochs(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self._max_length, self._known = max_length, known
        self._left_out = LeftOut(pairs.source, max_bad)
        self._first = 0  # of the pairs, all before it being bad
        self._keys = dict[int, str]()

    @property
    def dropped(self) -> list[Dropped]:
        """What could not be used so far on this process, each once."""
        return self._left_out.all

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.epochs)

    def check_readable(self) -> ResponsePair:
        """Read pairs until one is good, and give it: it stands in where all of a batch are bad.

        Raises:
            ValueError: none is, or more than `max_bad` are bad; it names the first few.
        """
        self._stand_in()
        return self.pairs[self._first]

    def _stand_in(self) -> ReadPair:
        """The first good pair, read now: its features may be known by now."""
        for number in range(self._first, len(self.pairs)):
            found = self._read(self.pairs[number])
            if isinstance(found, ReadPair):
                self._first = number
                return found
            self._left_out.add(found)
        raise ValueError(
            f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs can be used "
            f"({listed(self.dropped)}); repair the images, raise data.max_length, or name another source"
        )

    def without_pictures(self) -> None:
        """Give no decoded images from now on, whatever was asked for at first."""
        self.wants = replace(self.wants, pictures=False)

    @property
    def _read(self) -> partial[ReadPair | list[Dropped]]:
        return partial(read_pair, self.reader, self._max_length, self.wants, self._known)

    def batches(self, epoch: int, start: int = 0) -> Iterator[ReadBatch]:
        """The batches of an epoch from number `start` on; those before it are not read.

        Raises:
            ValueError: more than `max_bad` are bad; it names the first few.
        """
        return self._batches(self.epochs.plan(epoch)[start:])

    def pick(self, epoch: int, numbers: Sequence[int]) -> Iterator[ReadBatch]:
        """Some of the batches of an epoch, by number."""
        plan = self.epochs.plan(epoch)
        return self._batches([plan[number] for number in numbers])

    def key(self, number: int) -> str:
        """The key of a pair, by number; see ReadBatch."""
        if number not in self._keys:
            self._keys[number] = response_key(self.pairs[number])
        return self._keys[number]

    def _batches(self, plan: list[list[tuple[int, float]]]) -> Iterator[ReadBatch]:
        loader = DataLoader(
            _Read(self.pairs, self._read),
            batch_sampler=plan,
            collate_fn=partial(_collate, self.reader, self._stand_in()),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would draw from, and move, the global one
        )
        for batch in loader:
            self._left_out.add(batch.dropped)
            yield batch

    def places(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a batch of an epoch lie, for people."""
        return [self.pairs[pair].where for pair, weight in self.epochs.plan(epoch)[number] if weight]


_Found = tuple[int, float, ReadPair | list[Dropped]]  # row id, weight, what was read


class _Read(Dataset[_Found]):
    """Pairs by (number, weight), read."""

    def __init__(self, pairs: Pairs[ResponsePair], read: partial[ReadPair | list[Dropped]]) -> None:
        self.pairs, self.read = pairs, read

    def __getitem__(self, at: tuple[int, float]) -> _Found:
        number, weight = at
        pair = self.pairs[number]
        return pair.row, weight, self.read(pair)


def _collate(reader: Reader, spare: ReadPair, found: Sequence[_Found]) -> ReadBatch:
    """Pairs to a batch; a good one of it stands in for a bad one, with weight 0, and `spare` where none is good."""
    stand_in = next((one for _, _, one in found if isinstance(one, ReadPair)), spare)
    read = [one if isinstance(one, ReadPair) else stand_in for _, _, one in found]
    others = [one.other for one in read if one.other is not None]
    return ReadBatch(
        rows=[row for row, _, _ in found],
        pairs=[one.pair for one in read],
        tokens=reader.batch([*(one.chosen for one in read), *(one.rejected for one in read)]),
        others=reader.batch(others) if others else None,
        views={key: view for one in read for key, view in one.views.items()},
        pictures={key: picture for one in read for key, picture in one.pictures.items()},
        weights=torch.tensor([weight if isinstance(one, ReadPair) else 0.0 for _, weight, one in found]),
        dropped=[dropped for _, _, one in found if isinstance(one, list) for dropped in one],
    )


def encode(family: VisionLanguage, batch: ReadBatch, max_length: int = sys.maxsize) -> EncodedResponses:
    """A batch on the model's device, every distinct image encoded once; its rows have at most `max_length` tokens."""
    device = family.device
    return EncodedResponses(
        rows=batch.rows,
        tokens=batch.tokens.to(device),
        features=family.encode_images(batch.views),
        weights=batch.weights.to(device),
        pairs=batch.pairs,
        pictures=batch.pictures,
        views=batch.views,
        others=None if batch.others is None else batch.others.to(device),
        max_length=min(max_length, family.reader.max_length),
    )
