"""What an answer says of a picture, found by rule."""

from itertools import pairwise

import pytest

from mmalign.language.objects import coco_vocabulary, vocabulary
from mmalign.synthesis.segments import masker, segments

COCO = coco_vocabulary()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Two red dogs sit on a couch next to a black cat.",
            [
                *("number two", "colour red", "object dog", "relation on"),
                *("object couch", "relation next to", "colour black", "object cat"),
            ],
        ),
        ("Yes, there is a car to the left of it.", ["verdict yes", "object car", "relation to the left of"]),
        # The fruit and the colour; what is based on something; a light that is on.
        ("An orange cat and an orange.", ["colour orange", "object cat", "object orange"]),
        ("The story is based on the light that is on.", []),
        # Times, measures, prices and names are no counts.
        ("At 10:30, 5% of 3.5 m and $4 for 12 cups of 7up.", ["number 12", "object cup"]),
        ("A truck is on top of a car.", ["object truck", "relation on top of", "object car"]),
        ("Nice weather.", []),
        # Marks of a numbered list are no counts.
        (
            "1. A dog.\n2. 3 cats.\n 3) A car\n(4) It is 5.",
            ["object dog", "number 3", "object cat", "object car", "number 5"],
        ),
        ("- 2. A dog\n3: A cat\n4、A car. I see 2. Yes", ["object dog", "object cat", "object car", "number 2"]),
        ("", []),
    ],
)
def test_segments(text: str, expected: list[str]) -> None:
    result = segments(text, COCO)
    assert [f"{one.kind} {one.word}" for one in result] == expected
    assert all(one.end <= other.start for one, other in pairwise(result))


def test_an_object_of_several_words_is_one() -> None:
    own = vocabulary({"red circle": [], "blue star": []})
    result = segments("There is a red circle. There are two blue stars, and a green one.", own)
    assert [(one.kind, one.word) for one in result] == [
        ("object", "red circle"),
        ("number", "two"),
        ("object", "blue star"),
        ("colour", "green"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two red dogs sit on a couch.", "[MASK] sit [MASK] a [MASK]."),
        ("Yes, it is a dog, a cat.", "Yes, it is a [MASK], a [MASK]."),
        ("Nice weather.", "Nice weather."),
    ],
)
def test_segments_side_by_side_are_under_one_mask(text: str, expected: str) -> None:
    assert masker(COCO)(text) == expected
