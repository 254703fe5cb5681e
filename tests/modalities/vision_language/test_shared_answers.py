"""Answers that several parts of a benchmark share, and what cached answers depend on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmalign.config import EvaluateResponses
from mmalign.evaluation.annotations import Question
from mmalign.evaluation.benchmarks.base import Benchmark, Item, RatedAnswer
from mmalign.modalities.vision_language import evaluate as evaluate_answers
from mmalign.modalities.vision_language.evaluate import judge_answers


def test_a_question_of_several_parts_is_judged_once() -> None:
    """Its answers would otherwise be compared with themselves."""

    def item(number: int, text: str) -> Item:
        return Item(Question(number, "a.png", text, None), "", lambda answer: RatedAnswer(answer, 0.0, ""))

    parts = {"random": [item(0, "a dog?"), item(1, "a cat?")], "popular": [item(0, "a dog?")]}
    benchmark = Benchmark(parts, lambda _: Image.new("RGB", (2, 2)), "", lambda *_: [])
    said, seen = [{"random": [side, "?"], "popular": [side]} for side in ("yes", "no")], list[tuple[str, str]]()

    def judge(images: Any, prompts: Any, responses: Any, truths: Any = None) -> torch.Tensor:
        seen.extend(zip(prompts, responses, strict=True))
        return torch.arange(float(len(prompts)))

    scores = judge_answers(benchmark, said, judge)
    assert seen == [("a dog?", "yes"), ("a cat?", "?"), ("a dog?", "no"), ("a cat?", "?")]
    assert scores == [{"random": [0, 1], "popular": [0]}, {"random": [2, 3], "popular": [2]}]


def test_answers_depend_on_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose chat template was changed since answers again."""
    opened = list[dict[str, Any]]()

    def record(_: object, settings: dict[str, Any], **__: object) -> None:
        opened.append(settings)
        if len(opened) % 2 == 0:
            raise InterruptedError

    class Processor:
        def __init__(self, template: str) -> None:
            self.template = template

        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "chat_template.jinja").write_text(self.template)

    monkeypatch.setattr(evaluate_answers, "AnswerCache", record)
    section, network = EvaluateResponses(benchmark="crowds"), nn.Linear(1, 1)
    recipe: Any = SimpleNamespace(output=str(tmp_path), train=SimpleNamespace(precision="float32"))
    for template in ("a", "a", "b"):
        processor = SimpleNamespace(processor=Processor(template), template_arguments={})
        policy: Any = SimpleNamespace(unwrapped=network, family=SimpleNamespace(network=network, processor=processor))
        identity = {"trained": {"identity": {"model": "base"}}}
        with pytest.raises(InterruptedError):
            evaluate_answers._ask(recipe, section, policy, None, identity)  # type: ignore[arg-type]
    assert opened[:2] == opened[2:4] and opened[0] != opened[4] and opened[1] != opened[5]
