"""Judge that asks a vision-language model: the log-odds of yes against no, as VQAScore's question (arXiv:2404.01291).

For images the question is whether an image shows its prompt; for responses, whether an answer is right. Any
vision-language model that mmalign trains can judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from PIL import Image
from pydantic import AfterValidator
from torch import Tensor

from mmalign.judges._asking import Asker, AskingConfig, check_question, fill, load_asker
from mmalign.rewards import ResponseJudge, Shown, Truths, check_files

check = check_responses = check_files


class Config(AskingConfig):
    """Options of the judge."""

    of_responses = True

    question: Annotated[str, AfterValidator(lambda text: check_question(text, ["prompt"]))] = (
        'Does this figure show "{prompt}"? Please answer yes or no.'
    )
    """Question about an image."""
    response_question: Annotated[str, AfterValidator(lambda text: check_question(text, ["prompt", "response"]))] = (
        "Question: {prompt}\nAnswer: {response}\nIs this answer right, and does the image show all that it says? "
        "Please answer yes or no."
    )
    """Question about a response."""
    yes: str = "Yes"
    """Answer that counts for an output."""
    no: str = "No"
    """Answer that counts against it."""


@dataclass(frozen=True)
class VlmJudge:
    """Judge of images."""

    asker: Asker
    cfg: Config

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return log-odds [N], float32, on the CPU; `t` is not read."""
        questions = [fill(self.cfg.question, prompt=prompt) for prompt in prompts]
        return self.asker.log_odds(questions, [[image] for image in images], (self.cfg.yes, self.cfg.no))


def load(path: str, device: torch.device, cfg: Config) -> VlmJudge:
    """Load the model; errors are those of `load_asker`."""
    return VlmJudge(load_asker("vlm", path, device, cfg), cfg)


def load_responses(path: str, device: torch.device, cfg: Config) -> ResponseJudge:
    """Load the model as a judge of responses; errors are those of `load_asker`."""
    asker = load_asker("vlm", path, device, cfg)

    def score(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        questions = [
            fill(cfg.response_question, prompt=prompt, response=response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return asker.log_odds(questions, images, (cfg.yes, cfg.no))

    return score
