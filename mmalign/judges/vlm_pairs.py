"""Judge that asks a vision-language model which of two outputs is better, in both orders, and takes the mean.

For images the model sees two images of a prompt; for responses it reads two answers. The score of an output is its mean
log-odds against all outputs of the prompt, the least-squares solution of `score_i - score_j = log-odds_ij`. The log
reports the position consistency: the share of pairs whose verdict is the same in both orders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated

import torch
from PIL import Image
from pydantic import AfterValidator
from torch import Tensor

from mmalign.judges._asking import Asker, AskingConfig, check_question, fill, load_asker
from mmalign.rewards import ResponseJudge, Shown, Truths, check_files
from mmalign.rewards._combine import groups_of, question_keys

logger = logging.getLogger(__name__)

check = check_responses = check_files


class Config(AskingConfig):
    """Options of the judge."""

    of_responses = True
    compares = True

    question: Annotated[str, AfterValidator(lambda text: check_question(text, ["prompt"]))] = (
        'Which of the two images shows "{prompt}" better, the first or the second? Please answer 1 or 2.'
    )
    """Question about two images."""
    response_question: Annotated[
        str, AfterValidator(lambda text: check_question(text, ["prompt", "first", "second"]))
    ] = (
        "Question: {prompt}\nAnswer 1: {first}\nAnswer 2: {second}\nWhich answer is right and says only what the image "
        "shows? Please answer 1 or 2."
    )
    """Question about two responses."""
    one: str = "1"
    """Answer for the first output."""
    two: str = "2"
    """Answer for the second output."""


@dataclass(frozen=True)
class Comparer:
    """Comparison of two outputs in both orders; `counts` has the pairs so far."""

    asker: Asker
    cfg: Config
    counts: dict[str, int] = field(default_factory=lambda: {"consistent": 0, "pairs": 0})

    def log_odds(
        self, questions: Sequence[tuple[str, str]], images: Sequence[Sequence[Sequence[Image.Image]]]
    ) -> Tensor:
        """Return the mean log-odds [N] of the first output over both orders.

        Args:
            questions: the question in each order, [N].
            images: the images in each order, [N].
        """
        flat = [question for both in questions for question in both]
        shown = [one for both in images for one in both]
        odds = self.asker.log_odds(flat, shown, (self.cfg.one, self.cfg.two)).view(-1, 2)
        self._report(int((odds[:, 0].sign() == -odds[:, 1].sign()).sum()), len(odds))
        return (odds[:, 0] - odds[:, 1]) / 2

    def _report(self, num_consistent: int, num_pairs: int) -> None:
        """Log the consistency of all pairs so far, whenever their number reaches a power of two."""
        before = self.counts["pairs"]
        self.counts["consistent"] += num_consistent
        self.counts["pairs"] += num_pairs
        if self.counts["pairs"].bit_length() > before.bit_length():
            share = self.counts["consistent"] / self.counts["pairs"]
            logger.info(f"vlm_pairs: {share:.0%} of {self.counts['pairs']} pairs have the same verdict in both orders")


@dataclass(frozen=True)
class PairJudge:
    """Judge of images, which compares those of one prompt."""

    comparer: Comparer

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; an image alone has the score 0. `t` is not read."""

        def odds(pairs: Sequence[tuple[int, int]]) -> Tensor:
            questions = [fill(self.comparer.cfg.question, prompt=prompts[i]) for i, _ in pairs]
            shown = [([images[i], images[j]], [images[j], images[i]]) for i, j in pairs]
            return self.comparer.log_odds([(question, question) for question in questions], shown)

        return mean_log_odds(prompts, odds)


def mean_log_odds(keys: Sequence[Hashable], log_odds: Callable[[Sequence[tuple[int, int]]], Tensor]) -> Tensor:
    """Return each row's mean log-odds [N] against all rows of its key; of a row alone 0.

    Args:
        keys: the keys [N]; rows of one key are compared.
        log_odds: the log-odds [P] of the first row of each of P pairs of rows.
    """
    groups = groups_of(keys)
    # Every two rows of a key, each with the size of its group
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    sizes = [len(group) for group in groups for _ in combinations(group, 2)]
    scores = torch.zeros(len(keys))
    for (i, j), size, value in zip(pairs, sizes, log_odds(pairs), strict=True):
        scores[i] += value / size
        scores[j] -= value / size
    return scores


def load(path: str, device: torch.device, cfg: Config) -> PairJudge:
    """Load the model; errors are those of `load_asker`."""
    return PairJudge(Comparer(load_asker("vlm_pairs", path, device, cfg), cfg))


def load_responses(path: str, device: torch.device, cfg: Config) -> ResponseJudge:
    """Load the model as a judge of responses; errors are those of `load_asker`."""
    comparer = Comparer(load_asker("vlm_pairs", path, device, cfg), cfg)

    def score(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        def question(row: int, left: int, right: int) -> str:
            texts = {"prompt": prompts[row], "first": responses[left], "second": responses[right]}
            return fill(cfg.response_question, **texts)

        # Both rows of a pair have one question and its images; it is asked in both orders
        def odds(pairs: Sequence[tuple[int, int]]) -> Tensor:
            questions = [(question(i, i, j), question(i, j, i)) for i, j in pairs]
            return comparer.log_odds(questions, [(images[i], images[i]) for i, _ in pairs])

        return mean_log_odds(question_keys(images, prompts), odds)

    return score
