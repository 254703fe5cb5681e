"""Reading of judged responses as tokens and preprocessed images, and their encoding.

B rows of at most K responses: [KB], the prompts with the first responses, then with the second ones. Pairs have the
chosen responses first, then the rejected. A row with fewer responses repeats its first one; answers alone come twice.
Prompts alone are B rows with empty responses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.image_features import cached_view
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import EncodedResponses, by_side, collate_labels, pad_scores
from mmalign.data.loaders.loader import Loader
from mmalign.data.pairs import ImageRef, ResponsePair, SkippedRow, pair_key
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.tokens import TokenizedResponse, Tokens, cut_tail
from mmalign.losses.wrappers import Labels
from mmalign.rewards import ResponseJudge


@dataclass(frozen=True)
class ResponseExample:
    """Row with tokenized responses, preprocessed images and the inputs that a method requests."""

    pair: ResponsePair
    responses: list[TokenizedResponse]
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
    scores: Tensor
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
        # Tokens of all responses, each cut to the limit
        try:
            responses, other = self._tokenize(pair, views)
        except ValueError as error:
            return [SkippedRow(pair.location, str(error))]
        # Responses, if any token tells them apart
        if pair.rejected and not pair.scores and responses[0] == responses[1]:
            reason = "the chosen and the rejected response are the same tokens"
            if len(responses[0].ids) == self.max_length:
                reason = f"the responses first differ after data.max_length = {self.max_length:,} tokens"
            return [SkippedRow(pair.location, reason)]
        # A worker sends the pair to another process, so its images lose their loaders
        images = decoded if self.decoded_images else {}
        return ResponseExample(_without_loaders(pair), responses, other, views, images)

    def _tokenize(
        self, pair: ResponsePair, views: dict[str, ImageView]
    ) -> tuple[list[TokenizedResponse], TokenizedResponse | None]:
        """Return the rows of all responses, and with the other images again the chosen one's."""
        responses = tokenize_all(self.processor, pair, views)
        other = _tokenize_with(self.processor, pair, pair.other_images, views)[0] if self.other_images else None
        # Rendered here only to skip the row if the template refuses it
        if pair.hallucinated and (problem := self.processor.template_problem(pair.turns, [pair.hallucinated])):
            raise ValueError(problem)
        responses = [cut_tail(row, self.max_length) for row in responses]
        # The chosen response has equally many tokens in both rows
        if other is not None:
            responses[0], other = _equal_lengths(responses[0], cut_tail(other, self.max_length))
        return responses, other

    def collate(
        self, pairs: Sequence[ResponsePair], examples: Sequence[ResponseExample], weights: Tensor
    ) -> ResponsePairBatch:
        """Return the batch of these examples, their first responses first, with the ids of these rows."""
        others = [example.other for example in examples if example.other is not None]
        return ResponsePairBatch(
            rows=[pair.row for pair in pairs],
            keys=[pair_key(example.pair) for example in examples],
            pairs=[example.pair for example in examples],
            tokens=self.processor.collate(by_side([example.responses for example in examples])),
            other_images=self.processor.collate(others) if others else None,
            views={key: view for example in examples for key, view in example.views.items()},
            decoded_images={key: image for example in examples for key, image in example.decoded_images.items()},
            weights=weights,
            labels=collate_labels(pairs),
            scores=pad_scores([torch.tensor(x.pair.scores or [torch.nan] * len(x.responses)) for x in examples]),
        )


ResponsePairLoader = Loader[ResponsePair, ResponseExample, ResponsePairBatch]


def tokenize_all(
    processor: PromptProcessor, pair: ResponsePair, views: Mapping[str, ImageView]
) -> list[TokenizedResponse]:
    """Return the rows of all responses, uncut, each with its own images; an answer alone comes twice.

    Raises:
        KeyError: an image has no view.
        ValueError: the placeholders do not match the images.
    """
    rows = _tokenize_with(processor, pair, pair.images, views)
    if pair.rejected_images != pair.images:
        rows[1] = _tokenize_with(processor, pair, pair.rejected_images, views)[1]
    return rows


def _tokenize_with(
    processor: PromptProcessor, pair: ResponsePair, images: Sequence[ImageRef], views: Mapping[str, ImageView]
) -> list[TokenizedResponse]:
    """Return the rows of the prompt with these images, once with each response; of an answer alone, twice."""
    named = [(ref.key, views[ref.key]) for ref in images]
    if not pair.responses:
        return [processor.tokenize_prompt(pair.turns, named)]
    responses = pair.responses if pair.scores else (pair.chosen, pair.rejected or pair.chosen)
    return processor.tokenize_responses(pair.turns, list(responses), named)


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
    family: VisionLanguage, batch: ResponsePairBatch, max_length: int = sys.maxsize, judge: ResponseJudge | None = None
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
        scores=batch.scores.to(device),
    )
