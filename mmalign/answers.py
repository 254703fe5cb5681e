"""What a model and its base say to the same questions, written down as they say it.

Answers are kept in a file for each model, a line each: whoever is stopped goes on where it was, and what was answered
once is not asked again, whichever benchmark or run wants to know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mmalign.data.journal import Journal
from mmalign.data.pairs import Dropped, Turn, hashed
from mmalign.data.responses import IMAGE
from mmalign.draws import Draws
from mmalign.evaluation.benchmarks import Images
from mmalign.families import Decoding, ImageFeatures, ImageView, VisionLanguage
from mmalign.language.tokens import TokenRow
from mmalign.policy import Policy
from mmalign.report import tracked

Asked = tuple[str, str]  # the name of an image, and a question about it
Answered = dict[Asked, str]
OnSide = Callable[[Callable[[nn.Module], Answered]], Answered | None]  # runs something on one of the two models


@dataclass(frozen=True)
class Said:
    """What was answered.

    Attributes:
        before: the reference's answer to each question that could be asked.
        after: the policy's.
        left_out: the images about which nothing could be asked, and why.
    """

    before: Answered
    after: Answered
    left_out: Mapping[str, Dropped]


class Book:
    """The answers of one model, in memory and in a file.

    Args:
        folder: where the files of answers are.
        of: what an answer depends on besides its question: the model's weights, how it decodes, where the images are;
            JSON. Other answers are in other files.
    """

    def __init__(self, folder: Path, of: Mapping[str, object]) -> None:
        name = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).hexdigest()
        self._journal = Journal(folder / f"{name}.jsonl", of)
        self.answers = {(image, text): said for piece in self._journal.pieces for image, text, said in piece}

    def add(self, answers: Answered) -> None:
        """Write these down, too."""
        self._journal.append([[*asked, said] for asked, said in answers.items()])
        self.answers.update(answers)


def ask_both(
    policy: Policy[VisionLanguage],
    questions: Sequence[Asked],
    images: Images,
    decoding: Decoding,
    *,
    seed: int,
    books: tuple[Book, Book],
) -> Said:
    """Ask the reference and the policy the same questions, with the same draws where tokens are drawn.

    Every image of a batch is encoded once for both. An image that cannot be read, or a prompt that is too long, takes
    its questions with it, for both models alike.

    Args:
        policy: the trained model, with its base as reference.
        questions: what to ask, in batches in this order: a batch takes as long as its longest answer, so questions
            of one kind stand together. One that comes twice is asked once.
        images: an image by its name.
        decoding: how they answer.
        seed: of the draws, which are keyed by the question.
        books: where answers of reference and policy are written, and may be already.
    """
    sides: tuple[OnSide, OnSide] = (policy.on_reference, partial(_on_policy, policy))
    distinct = list(dict.fromkeys(questions))
    missing = [asked for asked in distinct if any(asked not in book.answers for book in books)]
    starts, left_out = range(0, len(missing), decoding.batch_size), dict[str, Dropped]()
    for at in tracked(starts, "answer"):
        prompts, views = _read(policy.family, missing[at : at + decoding.batch_size], images, left_out)
        features = policy.family.encode_images(views)
        for book, on_side in zip(books, sides, strict=True):
            new = {asked: prompt for asked, prompt in prompts.items() if asked not in book.answers}
            if new:
                said = on_side(partial(_answer, policy.family, new, features, decoding, seed))
                assert said is not None
                book.add(said)
    known = [asked for asked in distinct if asked[0] not in left_out]
    before, after = ({asked: book.answers[asked] for asked in known} for book in books)
    return Said(before, after, left_out)


@torch.no_grad()
def _on_policy(policy: Policy[VisionLanguage], run: Callable[[nn.Module], Answered]) -> Answered:
    return run(policy.unwrapped)


def _answer(
    family: VisionLanguage,
    prompts: Mapping[Asked, TokenRow],
    features: ImageFeatures,
    decoding: Decoding,
    seed: int,
    net: nn.Module,
) -> Answered:
    """What a network says after each prompt; the same question always draws alike."""
    rows = [hashed(*asked) for asked in prompts]
    said = family.generate(net, list(prompts.values()), features, decoding, rows=rows, draws=Draws(seed))
    return {asked: text.strip() for asked, text in zip(prompts, said, strict=True)}


def _read(
    family: VisionLanguage, questions: Sequence[Asked], images: Images, left_out: dict[str, Dropped]
) -> tuple[dict[Asked, TokenRow], dict[str, ImageView]]:
    """Questions as prompts, and their images as the model takes them; adds to `left_out` the images that fail."""
    prompts, views = dict[Asked, TokenRow](), dict[str, ImageView]()
    for image, text in questions:
        if image in left_out:
            continue
        try:
            if image not in views:
                views[image] = family.reader.view(images(image))
            prompt = family.reader.prompt([Turn("user", f"{IMAGE}{text}")], [(image, views[image])])
            if len(prompt.ids) >= family.reader.max_length:
                raise ValueError(
                    f"the prompt has {len(prompt.ids):,} tokens, its image's included, and the model reads "
                    f"{family.reader.max_length:,}"
                )
        except ValueError as error:  # a BadImage is one
            left_out[image] = Dropped(image, str(error).removeprefix(f"{image}: "))
            continue
        prompts[image, text] = prompt
    return {asked: prompt for asked, prompt in prompts.items() if asked[0] not in left_out}, views
