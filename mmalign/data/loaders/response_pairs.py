"""Reading of response pairs as tokens and preprocessed images, and their encoding.

B pairs; rows are the prompts with the chosen responses first, then with the rejected ones: [2B].
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.image_features import cached_view
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import EncodedResponses, collate_labels
from mmalign.data.loaders.loader import Loader
from mmalign.data.pairs import ImageRef, ResponsePair, SkippedRow, pair_key
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.tokens import TokenizedResponse, Tokens, cut_tail
from mmalign.losses.wrappers import Labels
from mmalign.rewards import ResponseJudge


@dataclass(frozen=True)
class ResponseExample:
    """Pair with tokenized responses, preprocessed images and the inputs that a method requests."""

    pair: ResponsePair
    chosen: TokenizedResponse
    rejected: TokenizedResponse
    other: TokenizedResponse | None
    views: dict[str, ImageView]
    decoded_images: dict[str, Image.Image]


@dataclass(frozen=True)
class ResponsePairBatch:
    """Batch of B response pairs on the CPU, not yet encoded.

    The fields are those of EncodedResponses, and the keys of the pairs' content [B].
    """

    rows: list[int]
    keys: list[str]
    pairs: list[ResponsePair]
    tokens: Tokens
    other_images: Tokens | None
    views: dict[str, ImageView]
    decoded_images: dict[str, Image.Image]
    weights: Tensor
    labels: Labels | None = None


@dataclass(frozen=True)
class ResponsePairReader:
    """Reader of response pairs.

    Attributes:
        processor: the tokenizer and image preprocessor.
        max_length: most tokens of a row; longer responses are cut, pairs with longer prompts are skipped.
        decoded_images: the method requests the decoded images, to corrupt them.
        other_images: the method requests further rows with the chosen responses and the pairs' other images; a pair
            without other images is skipped.
        features: the cache of image features.
    """

    processor: PromptProcessor
    max_length: int
    decoded_images: bool = False
    other_images: bool = False
    features: ArrayCache | None = None

    def images_of(self, pair: ResponsePair) -> list[ImageRef]:
        """Return the images of a pair that the method uses, each once."""
        others = pair.other_images if self.other_images else ()
        return list(dict.fromkeys((*pair.images, *pair.rejected_images, *others)))

    def read(self, pair: ResponsePair, epoch: int) -> ResponseExample | list[SkippedRow]:
        """Return a pair's tokens and preprocessed images, or the reasons to skip it (bad images, a prompt too long).

        An image with cached features is not preprocessed; it is decoded only if the method requests decoded images.
        """
        if self.other_images and not pair.other_images:
            return [SkippedRow(pair.location, "has no other image, which the method compares with")]
        # Images, from the cache where it has them
        decoded, views, skipped = dict[str, Image.Image](), dict[str, ImageView](), list[SkippedRow]()
        for ref in self.images_of(pair):
            view = cached_view(self.features, ref.key)
            try:
                if view is None or self.decoded_images:
                    decoded[ref.key] = decode(ref)
                views[ref.key] = view or self.processor.preprocess_image(decoded[ref.key])
            except BadImage as error:
                skipped.append(error.skipped)
            except ValueError as error:
                skipped.append(SkippedRow(ref.location, str(error)))
        if skipped:
            return skipped
        try:
            chosen, rejected, other = self._tokenize(pair, views)
        except ValueError as error:
            return [SkippedRow(pair.location, str(error))]
        # Responses, if any token tells them apart
        if pair.rejected and chosen == rejected:
            reason = "the chosen and the rejected response are the same tokens"
            if len(chosen.ids) == self.max_length:
                reason = f"the responses first differ after data.max_length = {self.max_length:,} tokens"
            return [SkippedRow(pair.location, reason)]
        images = decoded if self.decoded_images else {}
        return ResponseExample(_without_loaders(pair), chosen, rejected, other, views, images)

    def _tokenize(
        self, pair: ResponsePair, views: dict[str, ImageView]
    ) -> tuple[TokenizedResponse, TokenizedResponse, TokenizedResponse | None]:
        """Return the rows of the chosen, the rejected, and with the other images again the chosen response."""
        chosen, rejected = tokenize_sides(self.processor, pair, views)
        other = _tokenize_with(self.processor, pair, pair.other_images, views)[0] if self.other_images else None
        if pair.hallucinated and (problem := self.processor.template_problem(pair.turns, [pair.hallucinated])):
            raise ValueError(problem)
        chosen, rejected = cut_tail(chosen, self.max_length), cut_tail(rejected, self.max_length)
        if other is not None:
            chosen, other = _equal_lengths(chosen, cut_tail(other, self.max_length))
        return chosen, rejected, other

    def collate(
        self, pairs: Sequence[ResponsePair], examples: Sequence[ResponseExample], weights: Tensor
    ) -> ResponsePairBatch:
        """Return the batch of these examples, chosen responses first, with the ids of these pairs."""
        others = [example.other for example in examples if example.other is not None]
        sides = [*(example.chosen for example in examples), *(example.rejected for example in examples)]
        return ResponsePairBatch(
            rows=[pair.row for pair in pairs],
            keys=[pair_key(example.pair) for example in examples],
            pairs=[example.pair for example in examples],
            tokens=self.processor.collate(sides),
            other_images=self.processor.collate(others) if others else None,
            views={key: view for example in examples for key, view in example.views.items()},
            decoded_images={key: image for example in examples for key, image in example.decoded_images.items()},
            weights=weights,
            labels=collate_labels(pairs),
        )


ResponsePairLoader = Loader[ResponsePair, ResponseExample, ResponsePairBatch]


def tokenize_sides(
    processor: PromptProcessor, pair: ResponsePair, views: Mapping[str, ImageView]
) -> tuple[TokenizedResponse, TokenizedResponse]:
    """Return the rows of the chosen and of the rejected response, uncut, each with its own images.

    Raises:
        KeyError: an image has no view.
        ValueError: the placeholders do not match the images.
    """
    chosen, rejected = _tokenize_with(processor, pair, pair.images, views)
    if pair.rejected_images != pair.images:
        _, rejected = _tokenize_with(processor, pair, pair.rejected_images, views)
    return chosen, rejected


def _tokenize_with(
    processor: PromptProcessor, pair: ResponsePair, images: Sequence[ImageRef], views: Mapping[str, ImageView]
) -> list[TokenizedResponse]:
    """Return the rows of the prompt with these images, once with either response; of an answer alone, twice."""
    named = [(ref.key, views[ref.key]) for ref in images]
    return processor.tokenize_responses(pair.turns, [pair.chosen, pair.rejected or pair.chosen], named)


def _equal_lengths(first: TokenizedResponse, second: TokenizedResponse) -> tuple[TokenizedResponse, TokenizedResponse]:
    """Cut both rows to the shorter response, so that scores compare the same tokens."""
    length = min(len(first.response), len(second.response))
    return cut_tail(first, first.start + length), cut_tail(second, second.start + length)


def _without_loaders(pair: ResponsePair) -> ResponsePair:
    """Return the pair with images that cannot be read again."""
    sides = (pair.images, pair.rejected_images, pair.other_images)
    images, rejected, others = (tuple(ref.without_loader() for ref in refs) for refs in sides)
    return replace(pair, images=images, rejected_images=rejected, other_images=others)


def encode(
    family: VisionLanguage,
    batch: ResponsePairBatch,
    max_length: int = sys.maxsize,
    judge: ResponseJudge | None = None,
) -> EncodedResponses:
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
        labels=None if batch.labels is None else batch.labels.to(device),
        judge=judge,
    )
