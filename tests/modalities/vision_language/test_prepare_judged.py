"""A judge ranks the model's own answers to prompts; the best and the worst become a pair, or all become a list."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.labels import Margins
from mmalign.data.formats.responses import open_responses
from mmalign.synthesis.bdhs import ResponseSampler
from tests.helpers import Folders, recipes
from tests.helpers.preparation import answers, prepared, refused, text

JUDGES = """
import math

def vowels(images, prompts, responses):
    assert all(prompt == "What is it?" and len(shown) == 1 for prompt, shown in zip(prompts, images))
    return [sum(letter in "aeiou" for letter in text) for text in responses]

def consonants(images, prompts, responses):
    return [-score for score in vowels(images, prompts, responses)]

def equal(images, prompts, responses):
    return [1.0] * len(responses)

def nothing(images, prompts, responses):
    return [math.nan] * len(responses)
"""
Recipe = Callable[..., dict[str, Any]]


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


@pytest.fixture
def judged(vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that samples three answers of four tokens to three prompts without answers."""
    (tmp_path / "answer_tastes.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    source = answers(tmp_path / "source", ["A.", "B.", "C."])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text("\n".join(json.dumps({name: row[name] for name in ("image", "prompt")}) for row in rows))

    def recipe(judge: str = "vowels", name: str = "made.jsonl", /, **settings: Any) -> dict[str, Any]:
        ranking = {
            "reward": {"name": "function", "path": f"answer_tastes:{judge}"},
            "responses_per_prompt": 3,
            "max_new_tokens": 4,
            "min_confidence": 0.5,
            **settings,
        }
        section = {"kind": "judged", "source": {"path": str(source)}, "keep_torn": True, "save_every": 2}
        section["judged"] = ranking
        layout = {"format": "rankings" if settings.get("keep_all") else "trl"}
        return recipes.vlm(vlm_folders("llava"), tmp_path / name, tmp_path / "out", prepare=section, data=layout)

    return recipe


def test_the_best_and_the_worst_answer_are_a_pair(judged: Recipe, tmp_path: Path) -> None:
    """The list of the same run has the same answers with their scores, and the pair is its two ends."""
    pairs, lines = prepared(judged())
    assert lines[-1].startswith(f"{tmp_path / 'made.jsonl'}: 3 pairs of 3 prompts, in ")
    lists, lines = prepared(judged("vowels", "lists.jsonl", keep_all=True))
    assert lines[-1].startswith(f"{tmp_path / 'lists.jsonl'}: 3 lists of 3 prompts, in ")
    for pair, row in zip(pairs, lists, strict=True):
        assert row["scores"] == [vowels(response) for response in row["responses"]]
        assert len(set(row["responses"])) == len(row["responses"]) <= 3
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(row["scores"]), min(row["scores"]))
        assert vowels(text(pair["chosen"])) == pair["score_chosen"] > vowels(text(pair["rejected"]))
        assert pair["images"] == row["images"] and pair["provenance"]["kind"] == "judged"
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "keep_all"), [("dpo", False), ("lipo", True)])
def test_what_was_prepared_trains(method: str, keep_all: bool, judged: Recipe) -> None:
    content = judged(keep_all=keep_all) | {"method": {"name": method}}
    mmalign.prepare(load_recipe(content))
    assert mmalign.train(load_recipe(content, ["train.steps=2", "train.save_every=2"])).steps == 2


def test_margins_come_from_the_scores(judged: Recipe, tmp_path: Path) -> None:
    rows, _ = prepared(judged())
    pairs = open_responses("trl", str(tmp_path / "made.jsonl"), margins=Margins("score"))
    assert [pair.label.margin for pair in pairs] == [row["score_chosen"] - row["score_rejected"] for row in rows]


def test_confidence_is_the_logistic_function_of_the_difference(judged: Recipe) -> None:
    """The scores are small integers: a difference of 1 has the probability 0.731, one of 2 has 0.881."""
    lists, _ = prepared(judged("vowels", "all.jsonl", keep_all=True))
    gaps = [max(row["scores"]) - min(row["scores"]) for row in lists]
    least = 1 / (1 + math.exp(-max(gaps))) - 1e-6
    sure, lines = prepared(judged("vowels", "sure.jsonl", min_confidence=least))
    assert len(sure) == gaps.count(max(gaps)) < 3
    assert f"the judge is less than {least:.0%} sure (prepare.judged.min_confidence)" in lines[-1]


def test_another_judge_ranks_the_same_answers(judged: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without any pair keeps its answers, so the next one generates none."""
    message = refused(judged("equal"))
    assert message.startswith("prepare: none of 3 prompts of ") and "gave all answers the same score" in message
    assert (tmp_path / "made.jsonl.unfinished" / "rows.jsonl").is_file()
    whole, _ = prepared(judged("consonants", "whole.jsonl"))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to generate")

    monkeypatch.setattr(ResponseSampler, "sample", fail)
    rows, _ = prepared(judged("consonants"))
    assert rows == whole and not list(tmp_path.glob("*unfinished*"))


def test_a_score_that_is_no_number_is_refused(judged: Recipe) -> None:
    message = refused(judged("nothing"))
    assert "answer_tastes:nothing" in message and "returned nan for the prompt 'What is it?'" in message


def test_equal_answers_are_no_pair(judged: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ResponseSampler.sample

    def same(self: ResponseSampler, *args: Any, **options: Any) -> Any:
        return [said._replace(text=" A dog.") for said in sample(self, *args, **options)]

    monkeypatch.setattr(ResponseSampler, "sample", same)
    assert "has 1 different answers of 3; raise prepare.judged.temperature" in refused(judged())


def test_a_judge_by_true_answers_takes_rows_that_have_one(judged: Recipe, tmp_path: Path) -> None:
    reward = {"name": "chair", "path": "refined"}
    assert "has no true answer" in refused(judged(reward=reward))
    source = answers(tmp_path / "true", ["A dog.", "A cat.", ""])
    content = judged(reward=reward)
    content["prepare"]["source"] = {"path": str(source)}
    _, lines = prepared(content)
    assert " of 2 prompts; 1 rows of the source cannot be used (answers.jsonl: line 3: has no true answer" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"combine": "vote"}, "combine: vote needs two or more reward models"),
        ({"responses_per_prompt": 1}, "prepare.judged.responses_per_prompt"),
        ({"temperature": 0}, "prepare.judged.temperature"),
        ({"reward": [{"path": "a"}, {"path": "b"}], "combine": "zscore"}, "use sum, group_zscore or vote"),
        ({"reward": {"path": "models/tiny_clip"}}, "reward: open_clip judges images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str, judged: Recipe) -> None:
    assert sentence in refused(judged(**settings)).replace("'", "")


def test_a_judge_is_asked_for(judged: Recipe) -> None:
    content = judged()
    del content["prepare"]["judged"]
    assert "kind judged needs a judge of responses; add judged.reward" in refused(content)
    content = judged(keep_all=True)
    content["data"]["format"] = "trl"
    assert "kind judged writes rankings, got trl" in refused(content)


def test_a_function_has_nothing_to_write(judged: Recipe) -> None:
    def write(pair: object) -> Sequence[str]:
        raise AssertionError

    assert "kind judged neither masks nor corrupts answers" in refused(judged(), writer=write)
