"""Checks on worked examples: texts, cycles, lengths."""

from collections.abc import Sequence
from functools import partial

import pytest

from mmalign.data.pairs import ImagePair, ImageRef, ResponsePair
from mmalign.doctor.checks.preferences import contradictions, cycles, identical, near_identical
from mmalign.doctor.checks.sizes import length_bias
from mmalign.doctor.corpus import Case, Corpus, NotChecked, RecipeInputs, Side, examine, nearly_same_text, normalize
from mmalign.language.chat import Turn

NONE = NotChecked("")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A dog.", "a dog"),
        ("A dog runs.", "A  dog, runs!"),
        ("The dog runs.", "A dog runs."),
        ("A red umbrella.", "A red umbrela."),
        ("The bridge at night.", "The brigde at night."),
        ("\uff21 dog", "a dog"),  # full-width letter
    ],
)
def test_texts_without_a_difference_are_nearly_the_same(first: str, second: str) -> None:
    assert nearly_same_text(first, second) and nearly_same_text(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("There is a horse.", "There is a house."),
        ("There is a cat.", "There is a hat."),
        ("There is a light.", "There are lights."),
        ("Two lights.", "Two light."),
        ("In 1999.", "In 199."),
        ("Yes.", "No."),
        ("A dog.", "A dog and a cat."),
        ("\U0001f600", "\U0001f622"),  # texts without words
    ],
)
def test_texts_that_say_something_else_differ(first: str, second: str) -> None:
    assert not nearly_same_text(first, second)


def test_texts_without_words_stay() -> None:
    assert normalize(" !? ") == "!?" and normalize("A  Dog!") == "a dog"


def corpus(*preferences: tuple[str, str], prompt: str = "?", groups: Sequence[str] | None = None) -> Corpus:
    """Return a corpus of (chosen, rejected) responses about one image; a case's location is its number."""
    image = ImageRef("image", partial(str, "image"), bytes)
    cases = []
    for number, (chosen, rejected) in enumerate(preferences):
        group = groups[number] if groups else str(number)
        turns = (Turn("user", prompt),)
        pair = ResponsePair(number, turns, chosen, rejected, (image,), (image,), (), str(number), group)
        cases.append(Case(pair, "training", prompt, Side(chosen, (image,)), Side(rejected, (image,)), True))
    return Corpus("response pairs", cases, [], {}, [], [], RecipeInputs(NONE, NONE, NONE))


def located(preferences: str) -> tuple[list[str], list[str]]:
    """Return the locations of contradictions and of cycles of "ab bc", in which a is preferred to b and b to c."""
    data = corpus(*((a, b) for a, b in preferences.split()))
    return [p.location for p in contradictions(data)], [f"{p.location} {p.detail}" for p in cycles(data)]


def test_preferences_are_ordered() -> None:
    assert located("ab bc ac ab") == ([], [])
    assert located("ab bc ba") == (["0"], [])
    assert located("ab bc ca") == ([], ["0 cycle of 3 with 1, 2"])
    assert located("ab bc ca ba") == (["0"], ["0 cycle of 3 with 1, 2"])
    assert located("ab bc cd da") == ([], ["0 cycle of 4 with 1, 2, 3"])
    assert located("ab bc ca xy yz zx") == ([], ["0 cycle of 3 with 1, 2", "3 cycle of 3 with 4, 5"])
    assert located("ab bc ca cd da") == ([], ["0 cycle of 3 with 1, 2", "3 cycle of 4 with 4, 0, 1"])


def test_other_prompts_make_no_cycle() -> None:
    first, second = corpus(("a", "b"), ("b", "c")), corpus(("c", "a"), ("b", "a"), prompt="!?")
    both = Corpus("response pairs", [*first.cases, *second.cases], [], {}, [], [], first.inputs)
    assert not contradictions(both) and not cycles(both)


def test_length_bias_needs_a_clear_majority() -> None:
    longer, shorter = ("long text", "text"), ("text", "long text")
    for preferences, words in (
        ([longer] * 40, "longer response is chosen in 100.0 ["),
        ([shorter, shorter, shorter, longer] * 30, "shorter response is chosen in 75.0 ["),
    ):
        (place,) = length_bias(corpus(*preferences))  # type: ignore[misc]
        assert words in place.detail
    assert length_bias(corpus(*[longer, shorter] * 40)) == []
    # A majority that chance explains, one too small to matter, and one group of many rows
    assert length_bias(corpus(*[longer] * 7, *[shorter] * 5)) == []
    assert length_bias(corpus(*[longer] * 2600, *[shorter] * 2400)) == []
    assert length_bias(corpus(*[longer] * 30, groups=["one"] * 30)) == NotChecked(
        "1 groups of pairs are too few; 10 are needed"
    )


def test_a_response_alone_has_no_length_to_compare() -> None:
    alone = corpus(*[("a long text", "")] * 20)
    assert length_bias(alone) == NotChecked("0 groups of pairs are too few; 10 are needed")


@pytest.mark.parametrize(("responses", "number"), [(("", ""), 0), (("yes", ""), 0), (("yes", "yes"), 1)])
def test_prompts_and_single_outputs_have_no_equal_sides(responses: tuple[str, str], number: int) -> None:
    rows = corpus(responses)
    assert len(identical(rows)) == number
    assert not near_identical(rows) and not contradictions(rows)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_source_of_an_edit_is_no_side_and_every_image_of_a_list_is_examined(number: int) -> None:
    names = ["best", "second", "worst"][:number]
    outputs, source = [ImageRef(name, partial(str, name), bytes) for name in names], ImageRef("source", str, bytes)
    scores = () if number == 2 else tuple(float(number - n) for n in range(number))
    pair = ImagePair(0, "p", tuple(outputs), partial(str, "row 1"), "g", source=source, scores=scores)
    case, _ = examine("training", pair)
    assert case.rejected.images == tuple(outputs[1:][-1:])
    assert case.images == (*outputs, source)
