"""Questions to a vision-language model with two possible answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from mmalign.families.base import VisionLanguage
from mmalign.families.loading import load_vision_language
from mmalign.families.precision import warn_if_emulated
from mmalign.families.types import ImageView, Loading
from mmalign.language.chat import IMAGE, Turn
from mmalign.language.tokens import TokenizedResponse, common_prefix
from mmalign.reading.weights import pickles_allowed
from mmalign.resources import resolve_model
from mmalign.rewards import BatchConfig, in_batches


class AskingConfig(BatchConfig):
    """Options of a judge that asks a vision-language model."""

    batch_size: PositiveInt = 8
    """Questions that go through the network at once."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and computation."""


@dataclass(frozen=True)
class Asker:
    """A vision-language model that chooses between two answers.

    Attributes:
        judge: the judge's kind, for messages.
        family: the model.
        batch_size: questions that go through the network at once.
    """

    judge: str
    family: VisionLanguage
    batch_size: int

    @torch.no_grad()
    def log_odds(
        self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]], answers: tuple[str, str]
    ) -> Tensor:
        """Return the log-odds [N] of the first answer against the second, float32, on the CPU.

        They compare the two tokens in which the answers first differ, after the same history. Each question follows
        its images.

        Raises:
            ValueError: a question is too long, or the model does not take so many images.
        """
        return in_batches(
            lambda rows: self._log_odds(questions[rows], images[rows], answers), len(questions), self.batch_size
        )

    def _log_odds(
        self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]], answers: tuple[str, str]
    ) -> Tensor:
        """Return the log-odds of one batch."""
        # Each image once, each question with the first answer
        processor, views, rows, places = self.family.processor, dict[str, ImageView](), list[TokenizedResponse](), []
        for question, shown in zip(questions, images, strict=True):
            for image in shown:
                if str(id(image)) not in views:
                    views[str(id(image))] = processor.preprocess_image(image.convert("RGB"))
            row, place, ids = self._tokenized(question, [(str(id(x)), views[str(id(x))]) for x in shown], answers)
            rows.append(row)
            places.append((place, ids))
        # Both answers' tokens at the place where they differ
        tokens = processor.collate(rows).to(self.family.device)
        targets = tokens.responses[..., None].repeat(1, 1, 2)
        for number, (place, ids) in enumerate(places):
            targets[number, place] = torch.tensor(ids, device=targets.device)
        logps = self.family.token_logps(self.family.network, tokens, self.family.encode_images(views), targets)
        odds = [logps[number, place, 0] - logps[number, place, 1] for number, (place, _) in enumerate(places)]
        return torch.stack(odds).float().cpu()

    def _tokenized(
        self, question: str, images: Sequence[tuple[str, ImageView]], answers: tuple[str, str]
    ) -> tuple[TokenizedResponse, int, tuple[int, int]]:
        """Return the question with the first answer, the place where the answers differ, and their tokens there."""
        # A placeholder inside the question would stand for another image
        turns = [Turn("user", IMAGE * len(images) + question.replace(IMAGE, " "))]
        try:
            first, second = self.family.processor.tokenize_responses(turns, answers, images)
        except ValueError as error:
            raise ValueError(
                f"reward {self.judge}: {self.family.name} cannot read a question about {len(images)} images ({error}); "
                "use another model"
            ) from error
        # The answers are compared at the first token in which they differ
        place = common_prefix([first.response, second.response])
        if place >= min(len(first.response), len(second.response)):
            raise ValueError(f"reward {self.judge}: the answers {answers} begin alike; name two that differ")
        longest = self.family.processor.max_length
        if len(first.ids) > longest:
            raise ValueError(
                f"reward {self.judge}: a question has {len(first.ids):,} tokens, its images included, and "
                f"{self.family.name} reads {longest:,}; shorten it: {question[:80]!r}"
            )
        return first, place, (first.response[place], second.response[place])


def load_asker(judge: str, path: str, device: torch.device, cfg: AskingConfig) -> Asker:
    """Load the model of a judge from a folder or the Hub.

    Raises:
        ValueError: there is no such model, or it is not supported.
    """
    warn_if_emulated(f"reward {judge}: precision", cfg.precision, device)
    half = torch.bfloat16 if cfg.precision == "bfloat16" else None
    try:
        family = load_vision_language(
            resolve_model(path), Loading(device, half=half, network_half=True, allow_pickle=pickles_allowed())
        )
    except ValueError as error:
        raise ValueError(f"reward {judge}: {str(error).removeprefix('model.path: ')}") from error
    return Asker(judge, family, cfg.batch_size)


def check_question(question: str, names: Sequence[str]) -> str:
    """Return a question with places for all of the names, such as {prompt}.

    Raises:
        ValueError: a place is missing.
    """
    missing = [name for name in names if f"{{{name}}}" not in question]
    if missing:
        raise ValueError(f"has no {{{missing[0]}}}, which stands for the text that is judged")
    return question


def fill(question: str, **texts: str) -> str:
    """Put texts in the places of a question; a place that a text itself names, such as {second}, stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), question)
