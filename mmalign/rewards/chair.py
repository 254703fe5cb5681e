"""Judge of responses by the data's own true answers: objects named less objects invented, or the right yes or no.

    descriptions:  (named objects - penalty * invented mentions) / objects of the image
    yes or no:     1 if the response says what the true answer says, else 0

A row's objects are those that its true answer mentions: a list of names, or a description. Every mention of another
object is invented, as in CHAIR (arXiv:1809.02156); thoughts are not read. A description of all objects and no other
scores 1. `path` is the vocabulary: refined or published (MSCOCO), crowds, or a JSON file. It judges no images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from mmalign.language.objects import Vocabulary
from mmalign.language.vocabularies import load_vocabulary
from mmalign.language.yes_no import final_answer, parse_strict
from mmalign.rewards import JudgeConfig, ResponseJudge, Shown, Truths

_VERDICT = re.compile(r"\W*(yes|no)\s*([.,:;!]|$)", re.IGNORECASE)  # "No people are visible." is a description


class Config(JudgeConfig):
    """Options of the judge."""

    of_images = False
    of_responses = True
    needs_truths = True

    penalty: NonNegativeFloat = 1.0
    """Cost of an invented mention, in objects named."""


def check_responses(key: str, path: str) -> None:
    """Check the vocabulary.

    Raises:
        ValueError: there is none.
    """
    load_vocabulary(key, path)


def load_responses(path: str, device: torch.device, cfg: Config) -> ResponseJudge:
    """Load the vocabulary.

    Raises:
        ValueError: there is none. When called: a row has no true answer.
    """
    vocabulary = load_vocabulary("reward.path", path)

    def score(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        scores = list[float]()
        for prompt, response, truth in zip(prompts, responses, truths or [()] * len(prompts), strict=True):
            if not any(text.strip() for text in truth):
                raise ValueError(
                    f"reward chair: the question {prompt[:80]!r} has no true answer; give the data a column truth "
                    "(the names of the image's objects, a description, yes or no), or use another judge"
                )
            scores.append(reward(response, truth, vocabulary, cfg.penalty))
        return torch.tensor(scores, dtype=torch.float32)

    return score


def reward(response: str, truth: Sequence[str], vocabulary: Vocabulary, penalty: float) -> float:
    """Return the reward of a response, given the texts of the true answer."""
    # A yes or no is compared with the reading of the response
    verdict = _VERDICT.match(truth[0])
    if verdict is not None and len(truth) == 1:
        return float(parse_strict(response) is (verdict[1].lower() == "yes"))
    # Objects of the truth, against those that the response names after its thoughts
    objects = {mention.object for text in truth for mention in vocabulary.mentions(text)}
    named = [mention.object for mention in vocabulary.mentions(final_answer(response))]
    invented = sum(name not in objects for name in named)
    return (len(objects & {*named}) - penalty * invented) / max(len(objects), 1)
