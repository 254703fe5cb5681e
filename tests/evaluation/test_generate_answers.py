"""Answers of both models to the same questions, and their cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.commands import train
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import DecodingConfig
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.images import BadImage
from mmalign.evaluation.generate_answers import generate_answers
from mmalign.families.base import VisionLanguage
from mmalign.families.types import GeneratedText
from mmalign.families.vlm.model import ImageTextToText
from mmalign.language.yes_no import final_answer
from mmalign.policy import Policy
from tests.helpers import recipes

GREEDY = DecodingConfig(max_new_tokens=6, batch_size=2)
QUESTIONS = [(f"{n}.png", text) for n in range(3) for text in ("What is it?", "Is there a dog in the image?")]
Spy = list[tuple[bool, int]]


def picture(name: str) -> Image.Image:
    pixels = np.random.default_rng(int(name.split(".")[0])).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def caches(folder: Path) -> tuple[AnswerCache, AnswerCache]:
    folder.mkdir(exist_ok=True)
    return AnswerCache(folder, {"model": "base"}), AnswerCache(folder, {"model": "trained"})


def sampled(temperature: float, batch_size: int) -> DecodingConfig:
    return DecodingConfig(max_new_tokens=6, temperature=temperature, batch_size=batch_size)


def ask(
    policy: Policy[VisionLanguage], folder: Path, questions: Any = QUESTIONS, decoding: DecodingConfig = GREEDY
) -> Any:
    return generate_answers(policy, questions, picture, decoding, seed=0, caches=caches(folder))


@pytest.fixture
def fresh(llava: VisionLanguage) -> Policy[VisionLanguage]:
    """Adapters that have learned nothing: the policy is its base."""
    recipe = load_recipe(recipes.vlm(Path("x"), Path("y"), Path("z"), model={"lora": {"rank": 2}}))
    return train.build_policy(llava, recipe)


@pytest.fixture
def trained(fresh: Policy[VisionLanguage]) -> Policy[VisionLanguage]:
    """Adapters that say something else."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fresh.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return fresh


def test_thought_that_the_prompt_begins_is_no_answer(
    fresh: Policy[VisionLanguage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thinking templates end in the tag: cut before its end, all that the model says is thought."""
    processor: Any = fresh.family.processor
    render, plain = processor.processor.apply_chat_template, ask(fresh, tmp_path / "plain").after

    def thinking(*arguments: Any, **options: Any) -> str:
        return str(render(*arguments, **options)) + "<think>" * bool(options.get("add_generation_prompt"))

    monkeypatch.setattr(processor.processor, "apply_chat_template", thinking)
    thought = ask(fresh, tmp_path / "thought").after
    assert any(map(final_answer, plain.values())) and not any(map(final_answer, thought.values()))
    assert all(text.startswith("<think>") for text in thought.values())


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """How many prompts each call of a model was given."""
    calls: Spy = []
    generate = ImageTextToText.generate

    def counted(self: Any, net: Any, prompts: Any, *arguments: Any, **options: Any) -> list[str]:
        calls.append((net is self.network, len(prompts)))
        return generate(self, net, prompts, *arguments, **options)

    monkeypatch.setattr(ImageTextToText, "generate", counted)
    return calls


def test_untrained_adapters_answer_like_the_base(fresh: Policy[VisionLanguage], tmp_path: Path) -> None:
    """Greedily and with drawn tokens: the draws are keyed by the question, so that they are the same for both."""
    for temperature in (0.0, 1.5):
        responses = ask(fresh, tmp_path / str(temperature), decoding=sampled(temperature, 4))
        assert set(responses.before) == set(QUESTIONS) and responses.before == responses.after
        assert any(responses.before.values()) and not responses.skipped


def test_trained_adapters_are_active_for_one_side(trained: Policy[VisionLanguage], tmp_path: Path) -> None:
    responses = ask(trained, tmp_path / "both")
    assert responses.before != responses.after
    with torch.no_grad():
        for parameter in trained.trainable():
            parameter.zero_()
    assert ask(trained, tmp_path / "base").after == responses.before


def test_answers_do_not_depend_on_the_batch(trained: Policy[VisionLanguage], tmp_path: Path) -> None:
    together = ask(trained, tmp_path / "together", decoding=sampled(1.0, 6))
    for question in QUESTIONS:
        alone = ask(trained, tmp_path / "-".join(question), [question], sampled(1.0, 1))
        assert (alone.before[question], alone.after[question]) == (together.before[question], together.after[question])


def test_repeated_questions_are_asked_once(fresh: Policy[VisionLanguage], spied: Spy, tmp_path: Path) -> None:
    ask(fresh, tmp_path / "kept", [*QUESTIONS, *QUESTIONS[:2]])
    assert sum(number for _, number in spied) == 2 * len(QUESTIONS)
    assert {number for _, number in spied} == {GREEDY.batch_size}


def test_stopped_run_asks_only_what_is_missing(
    trained: Policy[VisionLanguage], spied: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second batch, between the two models; then the same command."""
    whole = ask(trained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        add = AnswerCache.add

        def killed(book: AnswerCache, answers: Any) -> None:
            add(book, answers)
            if len(book.answers) == 4:
                raise KeyboardInterrupt

        patch.setattr(AnswerCache, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(trained, tmp_path / "stopped")
    spied.clear()
    again = ask(trained, tmp_path / "stopped")
    assert (again.before, again.after) == (whole.before, whole.after)
    assert sum(number for _, number in spied) == 2 * len(QUESTIONS) - 4 - 2
    spied.clear()
    ask(trained, tmp_path / "stopped")
    assert not spied


def test_cache_ignores_a_truncated_line(tmp_path: Path) -> None:
    of = {"model": "base"}
    book = AnswerCache(tmp_path, of)
    book.add({("a", "What?"): GeneratedText("A dog.", True), ("b", "What?"): GeneratedText("")})
    (file,) = tmp_path.iterdir()
    with file.open("a") as end:
        end.write('[["c", "What?", "A c')
    assert AnswerCache(tmp_path, of).answers == {("a", "What?"): "A dog.", ("b", "What?"): ""}
    assert AnswerCache(tmp_path, of).cut == {("a", "What?")}
    AnswerCache(tmp_path, of).add({("c", "What?"): GeneratedText("A cat.")})
    assert AnswerCache(tmp_path, of).answers["c", "What?"] == "A cat."


def test_other_settings_have_their_own_cache(tmp_path: Path) -> None:
    AnswerCache(tmp_path, {"model": "base", "decoding": {"temperature": 0.0}}).add({("a", "?"): GeneratedText("yes")})
    assert not AnswerCache(tmp_path, {"model": "trained", "decoding": {"temperature": 0.0}}).answers
    assert not AnswerCache(tmp_path, {"model": "base", "decoding": {"temperature": 1.0}}).answers
    heads = [json.loads(file.read_text().splitlines()[0]) for file in sorted(tmp_path.iterdir())]
    assert {head["model"] for head in heads} == {"base", "trained"}


def test_unreadable_image_is_left_out_for_both_models(trained: Policy[VisionLanguage], tmp_path: Path) -> None:
    def broken(name: str) -> Image.Image:
        if name == "1.png":
            raise BadImage("1.png", "has zero bytes")
        return picture(name)

    responses = generate_answers(trained, QUESTIONS, broken, GREEDY, seed=0, caches=caches(tmp_path / "kept"))
    assert set(responses.before) == set(responses.after) == {q for q in QUESTIONS if q[0] != "1.png"}
    assert [str(dropped) for dropped in responses.skipped.values()] == ["1.png: has zero bytes"]
    whole = ask(trained, tmp_path / "whole")
    assert all(responses.after[q] == whole.after[q] for q in responses.after)


def test_prompt_that_is_too_long_is_left_out(trained: Policy[VisionLanguage], tmp_path: Path) -> None:
    long = ("2.png", "What? " * 400)
    responses = ask(trained, tmp_path / "kept", [*QUESTIONS, long])
    assert set(responses.skipped) == {"2.png"}
    assert "tokens, its image's included, and the model reads 256" in str(responses.skipped["2.png"])
    assert {image for image, _ in responses.before} == {"0.png", "1.png"}
