"""Judging of the answers that a model gave to prompts with images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from mmalign.data.pairs import ResponsePair
from mmalign.language.chat import as_text
from mmalign.rewards import ResponseJudge


def judge_answers(
    judge: ResponseJudge,
    pairs: Sequence[ResponsePair],
    images: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
) -> Tensor:
    """Return the judge's scores [N] of answers.

    Args:
        judge: the judge; it gets the true answers that the data have.
        pairs: the prompt of each answer [N].
        images: the images of each prompt [N].
        texts: the answers [N].
    """
    return judge(images, [as_text(pair.turns) for pair in pairs], texts, [pair.truth for pair in pairs])
