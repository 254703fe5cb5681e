"""True answers made untrue: what comes in is not in the answer, and nothing else changes."""

import pytest

from mmalign.language.objects import coco_vocabulary, singular, vocabulary
from mmalign.rng import KeyedRNG
from mmalign.synthesis.corrupt import Corruptor, companions, plural
from mmalign.synthesis.segments import COLOURS

COCO = coco_vocabulary()
DRAWS = KeyedRNG(0)
ROWS = range(200)


def corrupted(answer: str, share: float = 0.0, **together: list[str]) -> set[str | None]:
    """What becomes of an answer in many rows; with share 0 one thing is changed."""
    corruptor = Corruptor(COCO, together, share)
    return {corruptor(answer, row, DRAWS) for row in ROWS}


def test_companions_come_by_how_often_they_are_named_together() -> None:
    """dog: person in two answers, then by name car and frisbee in one each."""
    answers = ["A dog and a man.", "A dog, a woman, a frisbee.", "Dogs and a car.", "A cat.", "A dog, a dog."]
    result = companions(answers, COCO)
    assert result == {
        "dog": ["person", "car", "frisbee"],
        "person": ["dog", "frisbee"],
        "frisbee": ["dog", "person"],
        "car": ["dog"],
    }


def test_an_object_gives_way_to_a_companion_or_gets_it_beside() -> None:
    assert corrupted("There is a dog.", dog=["person"]) == {"There is a person.", "There is a dog and a person."}
    assert corrupted("An elephant.", elephant=["zebra"]) == {"A zebra.", "An elephant and a zebra."}
    assert corrupted("A dog.", dog=["umbrella"]) == {"An umbrella.", "A dog and an umbrella."}
    for beside, only in ((0.0, "There is a person."), (1.0, "There is a dog and a person.")):
        corruptor = Corruptor(COCO, {"dog": ["person"]}, 1.0, beside)
        assert {corruptor("There is a dog.", row, DRAWS) for row in ROWS} == {only}
    assert corrupted("Dogs run.", dog=["knife"]) == {"Knives run.", "Dogs and a knife run."}


def test_a_companion_that_is_named_already_does_not_come_in() -> None:
    for text in corrupted("A dog and a cat.", dog=["cat", "person"], cat=["dog", "person"]):
        assert text is not None
        assert [m.object for m in COCO.mentions(text)].count("person") == 1


def test_an_object_without_companions_takes_any() -> None:
    result = corrupted("A dog.")
    assert len(result) > 40 and "A dog." not in result


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is grey.", {f"It is {colour}." for colour in COLOURS if colour not in ("grey", "gray")}),
        ("There are two of them.", {"There are three of them.", "There are four of them."}),
        ("Ten of them.", {"Eight of them.", "Nine of them.", "11 of them.", "12 of them."}),
        ("There are 3.", {"There are 2.", "There are 4.", "There are 5."}),
        ("It stands behind it.", {"It stands in front of it."}),
        ("It is to the left of it.", {"It is to the right of it."}),
        ("Yes.", {"No."}),
        ("No, none.", {"Yes, none."}),
        ("Nice weather.", {None}),
        ("", {None}),
    ],
)
def test_colours_counts_relations_and_verdicts_become_others(answer: str, expected: set[str | None]) -> None:
    assert corrupted(answer) == expected


def test_articles_follow_the_colour() -> None:
    assert {"It is an orange one.", "It is a red one."} <= corrupted("It is a blue one.")


def test_share_says_how_much_is_changed_and_something_always_is() -> None:
    """Three verdict-free counts: all of them with share 1, one with share 0."""
    answer = "It has two, five, nine."
    words = answer.removesuffix(".").replace(",", "").split()
    changes = {
        share: [
            sum(a != b for a, b in zip(text.removesuffix(".").replace(",", "").split(), words, strict=True))
            for text in corrupted(answer, share)
            if text is not None
        ]
        for share in (0.0, 0.5, 1.0)
    }
    assert set(changes[0.0]) == {1} and set(changes[1.0]) == {3} and set(changes[0.5]) == {1, 2, 3}


def test_the_same_row_is_changed_alike() -> None:
    corruptor = Corruptor(COCO, {}, 0.5)
    answer = "Two red dogs sit on a couch next to a black cat."
    assert corruptor(answer, 7, DRAWS) == corruptor(answer, 7, DRAWS)
    assert len({corruptor(answer, row, DRAWS) for row in ROWS}) > 150
    assert corruptor(answer, 7, KeyedRNG(1)) != corruptor(answer, 7, DRAWS)


def test_a_world_of_one_object_has_no_other() -> None:
    assert Corruptor(vocabulary({"dog": []}), {}, 1.0)("A dog.", 0, DRAWS) == "A dog."


def test_every_object_of_coco_has_a_plural_that_is_read_back() -> None:
    for name in COCO.objects:
        last = plural(name).split()[-1]
        assert singular(last) == name.split()[-1] or last in ("skis", "scissors"), name
        assert [mention.object for mention in COCO.mentions(f"two {plural(name)}")] == [name]
