"""Encoded batches, the inputs of methods.

B rows per batch: pairs, thumbs, lists of K outputs, or prompts. The first outputs of all rows come first: [KB]. Pairs
have K = 2, chosen outputs first, then rejected: [2B].
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.label import NO_LABEL
from mmalign.data.pairs import ImagePair, ResponsePair
from mmalign.families.types import Conditioning, ImageFeatures, ImageView, Moments
from mmalign.language.tokens import Tokens
from mmalign.losses.wrappers import Labels
from mmalign.rewards import ResponseJudge, RewardModel

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedResponses:
    """Batch of responses on the model's device.

    Attributes:
        rows: the id of each pair [B].
        tokens: the prompts with responses, [KB] rows.
        features: the features of every image of the batch, by image key.
        weights: [B]; 0 for a padding row.
        pairs: the pairs [B]; their images have been read and cannot be read again.
        decoded_images: the decoded images by key, for methods that request them.
        views: the preprocessed images by key, for further rows about them.
        other_images: the prompts with the pairs' other images and the chosen responses, [B] rows, for methods that
            request them.
        max_length: most tokens of a row, for methods that add rows.
        precomputed: the method's precomputed tensors by name, each [B, ...]; None if there are none.
        labels: the labels of the pairs; None if no pair has one.
        judge: the judge of responses, for methods whose settings name one.
        scores: the score of each response [B, K], NaN where a row has none; pairs have none.
    """

    rows: list[int]
    tokens: Tokens
    features: ImageFeatures
    weights: Tensor
    pairs: list[ResponsePair] = field(default_factory=list)
    decoded_images: Mapping[str, Image.Image] = field(default_factory=dict)
    views: Mapping[str, ImageView] = field(default_factory=dict)
    other_images: Tokens | None = None
    max_length: int = sys.maxsize
    precomputed: dict[str, Tensor] | None = None
    labels: Labels | None = None
    judge: ResponseJudge | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class EncodedPairs:
    """Batch of images on the model's device.

    Attributes:
        rows: the id of each pair [B].
        latents: the posteriors of the images' latents [KB, C, H, W].
        text: the prompts' conditioning [B].
        unconditional: the conditioning of dropped captions [B].
        sizes: the images' micro-conditioning [KB, 6]: original height and width, crop top and left, target height and
            width.
        weights: [B]; 0 for a padding row.
        rejected_text: the conditioning of the rejected images' prompts [B]; None if pairs have one prompt.
        precomputed: the method's precomputed tensors by name, each [B, ...]; None if there are none.
        prompts: the prompts [B].
        reward_model: the reward model that scores images, for methods whose settings name one.
        labels: the labels of the pairs; None if no pair has one.
        scores: the score of each image [B, K], NaN where a row has none; pairs have none.
    """

    rows: list[int]
    latents: Moments
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    weights: Tensor
    rejected_text: Conditioning | None = None
    precomputed: dict[str, Tensor] | None = None
    prompts: Sequence[str] = field(default_factory=list)
    reward_model: RewardModel | None = None
    labels: Labels | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class EncodedPrompts:
    """Batch of prompts on the model's device, for methods that generate their own images.

    Attributes:
        rows: the id of each prompt [B].
        prompts: the prompts [B].
        text: their conditioning [B].
        unconditional: the negative conditioning of guidance [B].
        sizes: the micro-conditioning of the images to generate [B, 6], as in EncodedPairs.
        shape: the shape of a latent: C, H, W.
        weights: [B]; 0 for a padding row.
        reward_model: the reward model that scores the images.
    """

    rows: list[int]
    prompts: Sequence[str]
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    shape: tuple[int, ...]
    weights: Tensor
    reward_model: RewardModel | None

    def __getitem__(self, part: slice) -> EncodedPrompts:
        return replace(
            self,
            rows=self.rows[part],
            prompts=self.prompts[part],
            text=self.text[part],
            unconditional=self.unconditional[part],
            sizes=self.sizes[part],
            weights=self.weights[part],
        )


@dataclass(frozen=True)
class JudgedImages:
    """Batch of images for a judge in training.

    Attributes:
        rows: the id of each row [B].
        prompts: the prompts [B].
        images: the images as the judge's preprocessing returns them [KB, 3, S, S], or their cached features [KB, D].
        weights: [B]; 0 for a padding row.
        scores: the score of each image [B, K], NaN where a row has none; pairs have none.
        labels: the labels of the pairs; None if no pair has one.
        ratings: the ratings of each image [B, K, A], NaN where there is none; None if nothing reads any.
    """

    rows: list[int]
    prompts: list[str]
    images: Tensor
    weights: Tensor
    scores: Tensor
    labels: Labels | None
    ratings: Tensor | None = None

    def to(self, device: torch.device) -> JudgedImages:
        """Return the batch on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        images, weights, scores = self.images.to(device), self.weights.to(device), self.scores.to(device)
        ratings = None if self.ratings is None else self.ratings.to(device)
        return replace(self, images=images, weights=weights, scores=scores, labels=labels, ratings=ratings)


def collate_labels(pairs: Sequence[ImagePair] | Sequence[ResponsePair]) -> Labels | None:
    """Return the labels of pairs as tensors, float32; None if no pair has one."""
    labels = [pair.label for pair in pairs]
    if all(label == NO_LABEL for label in labels):
        return None
    preference, margin, weight = torch.tensor([label[:3] for label in labels]).unbind(1)
    return Labels(preference, margin, weight, [label.annotator for label in labels])


def by_side(rows: Sequence[Sequence[T]]) -> list[T]:
    """Return the outputs of rows [KB]: the first ones, then the second ones; a row with fewer repeats its first."""
    return [row[side if side < len(row) else 0] for side in range(max(map(len, rows))) for row in rows]


def pad_scores(scores: Sequence[Tensor]) -> Tensor:
    """Return the scores [B, K], or ratings [B, K, A], of rows of different lengths, NaN beyond a row's end."""
    return torch.nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=torch.nan)
