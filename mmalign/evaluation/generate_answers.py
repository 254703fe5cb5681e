"""Generation of a model's and its base model's answers to the same questions, with a cache.

For best of n the base model also answers n times.

Each model has a cache file with one line for each answer, written batch by batch. A stopped run therefore resumes after
its last batch. All benchmarks and runs share the answers, so no question is asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from mmalign.config import DecodingConfig
from mmalign.console import tracked
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.pairs import SkippedRow, stable_hash
from mmalign.evaluation.benchmarks.base import Images
from mmalign.families.base import VisionLanguage
from mmalign.families.types import GeneratedText, ImageFeatures, ImageView
from mmalign.language.chat import IMAGE, Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.language.yes_no import begun_thought
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG
from mmalign.training.processes import current_processes

_TAIL = 16  # tokens of a prompt in which it may begin a thought
QuestionKey = tuple[str, str]  # the name of an image, and a question about it
AnswersByQuestion = dict[QuestionKey, str]
GeneratedAnswers = dict[QuestionKey, GeneratedText]
RunOnModel = Callable[[Callable[[nn.Module], GeneratedAnswers]], GeneratedAnswers | None]


@dataclass(frozen=True)
class Answers:
    """Answers of the reference and of the policy to each question, and the images whose questions are left out.

    `num_cut` has for both models the number of answers that were cut at the limit of new tokens. `candidates` are
    further answers of the reference to each question.
    """

    before: AnswersByQuestion
    after: AnswersByQuestion
    skipped: Mapping[str, SkippedRow]
    num_cut: tuple[int, int] = (0, 0)
    candidates: Sequence[AnswersByQuestion] = ()


@dataclass(frozen=True)
class Asking:
    """One answer of a model to each question.

    Attributes:
        run: run a function on the model's network.
        cache: the answers so far.
        decoding: the settings that choose the next token.
        candidate: number of the answer among several that one model samples; 0 for its only one.
    """

    run: RunOnModel
    cache: AnswerCache
    decoding: DecodingConfig
    candidate: int = 0


def generate_answers(
    policy: Policy[VisionLanguage],
    questions: Sequence[QuestionKey],
    images: Images,
    decoding: DecodingConfig,
    *,
    seed: int,
    caches: tuple[AnswerCache, AnswerCache],
    candidates: Sequence[AnswerCache] = (),
    sampling: DecodingConfig | None = None,
) -> Answers:
    """Ask the reference and the policy the same questions, with the same random numbers if they sample.

    Questions are batched in their order, without repetition. A batch takes as long as its longest answer, so questions
    of one kind should be adjacent. Every image of a batch is encoded once for both models. If an image is unreadable or
    a prompt too long, all questions about that image are left out for both models. Random numbers are keyed by the
    question.

    A question is the name of an image with a text. `caches` have the answers of the reference and of the policy so far,
    `candidates` the reference's further answers, sampled by the settings `sampling`.
    """
    sampled = sampling or decoding
    # One answer of either model to each question, and n more of the reference
    askings = [
        Asking(policy.on_reference, caches[0], decoding),
        Asking(partial(_on_policy, policy), caches[1], decoding),
        *(Asking(policy.on_reference, cache, sampled, number) for number, cache in enumerate(candidates, start=1)),
    ]
    keys = list(dict.fromkeys(questions))
    missing = [key for key in keys if any(key not in asking.cache.answers for asking in askings)]
    processes, left_out = current_processes(), dict[str, SkippedRow]()
    batches = [missing[start : start + decoding.batch_size] for start in range(0, len(missing), decoding.batch_size)]
    for first in tracked(range(0, len(batches), processes.size), "answer"):
        # A batch for each process; all take up the answers of all, in the batches' order
        own, new = batches[first : first + processes.size][processes.rank : processes.rank + 1], _New([], left_out)
        for batch in own:
            new = _answer_batch(policy.family, askings, batch, images, left_out, seed)
        for generated, skipped in processes.gather(new):
            left_out |= skipped
            for asking, answers in zip(askings, generated, strict=bool(generated)):
                if answers:
                    asking.cache.add(answers)
    # Both models are compared on the questions that could be asked
    answerable = [key for key in keys if key[0] not in left_out]
    before, after, *more = ({key: asking.cache.answers[key] for key in answerable} for asking in askings)
    cut_before, cut_after = (sum(key in cache.cut for key in answerable) for cache in caches)
    return Answers(before, after, left_out, (cut_before, cut_after), more)


class _New(NamedTuple):
    """New answers of every asking, none at all without a batch, and the images that were left out so far."""

    answers: list[GeneratedAnswers]
    left_out: dict[str, SkippedRow]


def _answer_batch(
    family: VisionLanguage,
    askings: Sequence[Asking],
    batch: Sequence[QuestionKey],
    images: Images,
    left_out: Mapping[str, SkippedRow],
    seed: int,
) -> _New:
    """Return the answers to a batch that the askings' caches lack."""
    # A copy: what is left out is shared when all processes gather
    new = _New([], dict(left_out))
    prompts, views = _prepare(family, batch, images, new.left_out)
    features = family.encode_images(views)
    for asking in askings:
        new_prompts = {key: prompt for key, prompt in prompts.items() if key not in asking.cache.answers}
        generate = partial(_generate, family, new_prompts, features, asking.decoding, seed, asking.candidate)
        generated = asking.run(generate) if new_prompts else {}
        assert generated is not None
        new.answers.append(generated)
    return new


@torch.no_grad()
def _on_policy(policy: Policy[VisionLanguage], run: Callable[[nn.Module], GeneratedAnswers]) -> GeneratedAnswers:
    return run(policy.unwrapped)


def _generate(
    family: VisionLanguage,
    prompts: Mapping[QuestionKey, TokenizedResponse],
    features: ImageFeatures,
    decoding: DecodingConfig,
    seed: int,
    candidate: int,
    net: nn.Module,
) -> GeneratedAnswers:
    """Return a network's answers to prompts, by question."""
    number = [str(candidate)] if candidate else []
    rows = [stable_hash(*key, *number) for key in prompts]
    answers = family.generate(net, list(prompts.values()), features, decoding, rows=rows, rng=KeyedRNG(seed))
    return {
        # A thought that the prompt begins is the answer's, so that nobody takes its text for an answer
        key: answer._replace(text=f"{begun_thought(family.processor.decode(prompt.ids[-_TAIL:]))}{answer.text.strip()}")
        for (key, prompt), answer in zip(prompts.items(), answers, strict=True)
    }


def _prepare(
    family: VisionLanguage, questions: Sequence[QuestionKey], images: Images, left_out: dict[str, SkippedRow]
) -> tuple[dict[QuestionKey, TokenizedResponse], dict[str, ImageView]]:
    """Return the prompts and preprocessed images of questions; add the images that fail to `left_out`."""
    prompts, views = dict[QuestionKey, TokenizedResponse](), dict[str, ImageView]()
    for image, text in questions:
        if image in left_out:
            continue
        try:
            if image not in views:
                views[image] = family.processor.preprocess_image(images(image))
            prompt = family.processor.tokenize_prompt([Turn("user", f"{IMAGE}{text}")], [(image, views[image])])
            if len(prompt.ids) >= family.processor.max_length:
                raise ValueError(
                    f"the prompt has {len(prompt.ids):,} tokens, its image's included, and the model reads "
                    f"{family.processor.max_length:,}"
                )
        except ValueError as error:  # BadImage is a ValueError
            left_out[image] = SkippedRow(image, str(error).removeprefix(f"{image}: "))
            continue
        prompts[image, text] = prompt
    # An image left out later takes its earlier questions with it
    return {key: prompt for key, prompt in prompts.items() if key[0] not in left_out}, views
