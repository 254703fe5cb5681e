"""From pairs of responses to what a decoder eats: tokens, and the features of images, each encoded once for a batch.

B pairs; rows are the prompts with the chosen responses first, then with the rejected ones: [2B].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.epochs import Epochs, LeftOut
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import Dropped, Pairs, ResponsePair, listed
from mmalign.families import ImageFeatures, ImageView, Reader, VisionLanguage
from mmalign.language.tokens import TokenRow, Tokens, cut_tail


@dataclass(frozen=True)
class EncodedResponses:
    """A batch of pairs as a method gets it, on the model's device.

    Attributes:
        rows: the id of each pair [B].
        tokens: of prompts with responses, [2B] rows.
        features: of every image of the batch, by its key.
        weights: [B]; 0 for a padding row.
    """

    rows: list[int]
    tokens: Tokens
    features: ImageFeatures
    weights: Tensor


@dataclass(frozen=True)
class ReadPair:
    """A pair as a Reader has read it: the prompt with the chosen and with the rejected response, and its images."""

    chosen: TokenRow
    rejected: TokenRow
    views: dict[str, ImageView]


@dataclass(frozen=True)
class ReadBatch:
    """B pairs as they come from the loader, on the CPU."""

    rows: list[int]
    tokens: Tokens
    views: dict[str, ImageView]
    weights: Tensor
    dropped: list[Dropped] = field(default_factory=list)


def read_pair(reader: Reader, max_length: int, pair: ResponsePair) -> ReadPair | list[Dropped]:
    """A pair's tokens and prepared images, or why there are none: a bad image, or a prompt that is too long."""
    views, dropped = dict[str, ImageView](), list[Dropped]()
    for ref in dict.fromkeys((*pair.images, *pair.rejected_images)):
        try:
            views[ref.key] = reader.view(decode(ref))
        except BadImage as error:
            dropped.append(Dropped(ref.where, str(error).removeprefix(f"{ref.where}: ")))
    if dropped:
        return dropped
    images, others = ([(ref.key, views[ref.key]) for ref in refs] for refs in (pair.images, pair.rejected_images))
    try:
        chosen, rejected = reader.rows(pair.turns, [pair.chosen, pair.rejected], images)
        if pair.rejected_images != pair.images:
            _, rejected = reader.rows(pair.turns, [pair.chosen, pair.rejected], others)
        chosen, rejected = cut_tail(chosen, max_length), cut_tail(rejected, max_length)
    except ValueError as error:
        return [Dropped(pair.where, str(error))]
    if chosen == rejected:
        return [Dropped(pair.where, f"the responses first differ after data.max_length = {max_length:,} tokens")]
    return ReadPair(chosen, rejected, views)


class ResponseLoader:
    """Batches of pairs of responses, epoch by epoch.

    A pair that cannot be used keeps its place with weight 0, so that no other pair moves; it is counted and named.

    Args:
        pairs: what to learn from.
        reader: makes tokens and prepared images.
        max_length: tokens of a row; an over-long response loses its tail, a pair with an over-long prompt is left out.
        batch_size: B, pairs of a batch on this process.
        seed: of the order.
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
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int | None = None,
        keep_last: bool = False,
    ) -> None:
        self.pairs, self.reader, self.num_workers = pairs, reader, num_workers
        self.epochs = Epochs(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self._read = partial(read_pair, reader, max_length)
        self._left_out = LeftOut(pairs.source, max_bad)
        self._spare: ReadPair | None = None

    @property
    def dropped(self) -> list[Dropped]:
        """What could not be used so far on this process, each once."""
        return self._left_out.all

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.epochs)

    def check_readable(self) -> ReadPair:
        """Read pairs until one is good, and give it.

        Raises:
            ValueError: none is, or more than `max_bad` are bad; it names the first few.
        """
        for pair in self.pairs if self._spare is None else ():
            found = self._read(pair)
            if isinstance(found, ReadPair):
                self._spare = found
                break
            self._left_out.add(found)
        if self._spare is None:
            raise ValueError(
                f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs can be used "
                f"({listed(self.dropped)}); repair the images, raise data.max_length, or name another source"
            )
        return self._spare

    def batches(self, epoch: int, start: int = 0) -> Iterator[ReadBatch]:
        """The batches of an epoch from number `start` on; those before it are not read.

        Raises:
            ValueError: more than `max_bad` are bad; it names the first few.
        """
        spare = self.check_readable()
        loader = DataLoader(
            _Read(self.pairs, self._read),
            batch_sampler=self.epochs.plan(epoch)[start:],
            collate_fn=partial(_collate, self.reader, spare),
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
    """Pairs to a batch; a good pair stands in for a bad one, with weight 0."""
    read = [one if isinstance(one, ReadPair) else spare for _, _, one in found]
    return ReadBatch(
        rows=[row for row, _, _ in found],
        tokens=reader.batch([*(one.chosen for one in read), *(one.rejected for one in read)]),
        views={key: view for one in read for key, view in one.views.items()},
        weights=torch.tensor([weight if isinstance(one, ReadPair) else 0.0 for _, weight, one in found]),
        dropped=[dropped for _, _, one in found if isinstance(one, list) for dropped in one],
    )


def encode(family: VisionLanguage, batch: ReadBatch) -> EncodedResponses:
    """A batch on the model's device, every distinct image encoded once."""
    device = next(family.network.parameters()).device
    features = family.encode_images(batch.views)
    return EncodedResponses(batch.rows, batch.tokens.to(device), features, batch.weights.to(device))
