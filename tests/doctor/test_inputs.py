"""Checks of what a vision-language model reads."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.doctor.checks.inputs import over_budget, template
from mmalign.doctor.corpus import Case, Corpus, NotChecked, RecipeInputs, ResponseTokens, Side
from mmalign.doctor.pictures import Picture
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse

IMAGE, NONE = ImageRef("image", partial(str, "image"), bytes), NotChecked("")
PAIR = ResponsePair(0, (Turn("user", "?"),), "aaab", "aaac", (IMAGE,), (IMAGE,), (), "row", "g")


def tokenized(_: object, responses: Sequence[str], __: object) -> list[TokenizedResponse]:
    return [TokenizedResponse((0, *map(ord, text)), 1) for text in responses]


def problem(_: object, responses: Sequence[str]) -> str | None:
    return next((f"{text} is changed" for text in responses if "<" in text), None)


def corpus(pair: ResponsePair) -> Corpus:
    processor: Any = SimpleNamespace(
        preprocess_image=lambda _: "view", tokenize_responses=tokenized, template_problem=problem
    )
    sides = (Side(text, (IMAGE,)) for text in (pair.chosen, pair.rejected))
    inputs = RecipeInputs(NONE, NONE, ResponseTokens(processor, 3))
    cases = [Case(pair, "training", "?", *sides, True)]
    return Corpus("response pairs", cases, [], {"image": Picture((8, 8))}, [], [], inputs)


def details(check: Any, pair: ResponsePair) -> list[str]:
    return [place.detail for place in check(corpus(pair))]


def test_lists_with_a_long_start_in_common_are_cut_not_skipped() -> None:
    """As their loader does: a third response may tell them apart."""
    assert "the pair is skipped" in details(over_budget, PAIR)[0]
    (of_list,) = details(over_budget, replace(PAIR, others=("d",), scores=(2.0, 1.0, 0.0)))
    assert of_list.endswith("the end is cut")


def test_a_second_rejected_response_is_rendered_too() -> None:
    assert details(template, PAIR) == []
    assert details(template, replace(PAIR, hallucinated="<x>")) == ["<x> is changed"]
