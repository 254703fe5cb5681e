"""Answers cut open: sentences, pivots, verdicts, masks; all of it by hand."""

from collections import Counter

import pytest

from mmalign.families.types import GeneratedText
from mmalign.rng import KeyedRNG
from mmalign.synthesis.sentence_cuts import (
    MASK,
    WHOLE,
    Opening,
    contradicts,
    joined,
    masked_openings,
    openings,
    opposite,
    sentences,
)

DRAWS = KeyedRNG(0)
ANSWER = "Yes, there is a dog. It sits on a mat! Is it red?"


def cuts(answer: str, number: int = 400) -> list[Opening]:
    """The openings of an answer's first sentence in many rows."""
    first = [openings(answer, row, DRAWS)[0] for row in range(number)]
    assert all(isinstance(one, Opening) for one in first)
    return [one for one in first if isinstance(one, Opening)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, ["Yes, there is a dog. ", "It sits on a mat! ", "Is it red?"]),
        ("It is 3.5 m long. Wow", ["It is 3.5 m long. ", "Wow"]),
        ("Mr. Smith waits, e.g. here. Yes.", ["Mr. Smith waits, e.g. here. ", "Yes."]),
        ('He says "No." Then (at last.) he goes', ['He says "No." ', "Then (at last.) ", "he goes"]),
        ("1. A dog\n2. A cat.\n\nThat is all", ["1. A dog\n", "2. A cat.\n\n", "That is all"]),
        ("Really?! ...  ", ["Really?! ...  "]),
        ("yes", ["yes"]),
        ("1. 2.", ["1. 2."]),
        (" \n", [" \n"]),
        ("", []),
        ("图中有一只狗。它在草地上\uff01是吗\uff1f", ["图中有一只狗。", "它在草地上\uff01", "是吗\uff1f"]),
        ("彼は「犬です。」と言う。 次", ["彼は「犬です。」", "と言う。 ", "次"]),
        ("هل هذا كلب؟ نعم.", ["هل هذا كلب؟ ", "نعم."]),
        ("यह एक कुत्ता है। वह बैठा है।", ["यह एक कुत्ता है। ", "वह बैठा है।"]),
    ],
)
def test_sentences_are_pieces_that_join_to_the_text(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected
    assert "".join(sentences(text)) == text


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Yes, it is.", "No, it is."),
        (" no.", " yes."),
        ("No", "Yes"),
        ("Not at all.", None),
        ("North of it.", None),
        ("YES!", None),
        ("Oh yes.", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_whole_word_at_the_beginning(sentence: str, expected: str | None) -> None:
    assert opposite(sentence) == expected


def test_answers_contradict_each_other_by_their_first_words() -> None:
    assert contradicts("Yes.", "no, there is none") and not contradicts("Yes.", "yes!")
    assert not contradicts("Yes.", "There is no dog.") and not contradicts("Nothing.", "Yes.")


def test_a_sentence_is_cut_at_the_end_of_one_of_its_words() -> None:
    """Each of the four beginnings a quarter of the time: 400 draws, 100 +- 9 each."""
    heads = Counter(one.head for one in cuts("There is dog-food."))
    assert heads.keys() == {"", "There", "There is"}
    heads = Counter(one.head for one in cuts("A dog, two cats."))
    assert heads.keys() == {"", "A", "A dog", "A dog, two"}
    assert all(64 <= number <= 136 for number in heads.values())  # four standard deviations


def test_half_of_the_verdicts_are_exchanged() -> None:
    heads = Counter(one.head.split(",")[0] for one in cuts("Yes, there is a dog."))
    assert 160 <= heads.pop("No") <= 240 and heads.keys() == {"", "Yes"}
    one_word = Counter(one.head for one in cuts("No."))
    assert one_word.keys() == {"", "Yes"} and 160 <= one_word["Yes"] <= 240


def test_every_sentence_begins_after_the_true_ones() -> None:
    result = [one for one in openings(ANSWER, 3, DRAWS) if isinstance(one, Opening)]
    assert [one.history for one in result] == ["", "Yes, there is a dog. ", "Yes, there is a dog. It sits on a mat! "]
    assert [one.tail for one in result] == [" ", " ", ""]
    for opening, true in zip(result[1:], sentences(ANSWER)[1:], strict=True):
        assert true.startswith(opening.head) and opening.start == opening.history + opening.head


def test_cuts_depend_on_row_seed_epoch_and_try_alone() -> None:
    again = [openings(ANSWER, 5, KeyedRNG(0), 2) for _ in range(2)]
    assert again[0] == again[1]
    longer = openings(f"{ANSWER} And more.", 5, KeyedRNG(0), 2)
    other_cuts = [
        openings(ANSWER * 4, row, rng, attempt)
        for row, rng, attempt in (
            (5, KeyedRNG(0), 2),
            (6, KeyedRNG(0), 2),
            (5, KeyedRNG(1), 2),
            (5, KeyedRNG(0, 1), 2),
            (5, KeyedRNG(0), 3),
        )
    ]
    assert len(longer) == 4 and all(one != other_cuts[0] for one in other_cuts[1:])


def test_what_a_model_says_takes_the_place_of_the_rest() -> None:
    """Words after a space, punctuation at once, and after an empty head the history's own white space."""
    parts = [
        Opening("", "There is a", " "),
        Opening("There is a dog. ", "", "\n\n"),
        Opening("There is a dog. It sits.\n\n", "Two cats", ""),
        "The end.",
    ]
    responses = [GeneratedText(text) for text in (" frisbee.", " It runs. ", ", or three.")]
    assert joined(parts, responses) == "There is a frisbee. It runs.\n\nTwo cats, or three.The end."
    assert joined(WHOLE, [GeneratedText("  A dog.\n")]) == "A dog."
    assert joined(["Yes."], []) == "Yes."


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A dog. It sits on", "A dog."),
        ("A dog. It sits.", "A dog. It sits."),
        ("A dog. It costs 3.", "A dog. It costs 3."),
        ("A dog and", ""),
        ("图中有一只狗。它在草", "图中有一只狗。"),
        ("1. A dog.\n2. A c", "1. A dog."),
    ],
)
def test_a_torn_end_is_left_out_where_whole_sentences_are_asked_for(text: str, whole: str) -> None:
    assert joined(WHOLE, [GeneratedText(text, True)], whole=True) == whole
    assert joined(WHOLE, [GeneratedText(text, True)]) == text == joined(WHOLE, [GeneratedText(text)], whole=True)
    parts = [Opening("", "There", " "), "It is red."]
    assert joined(parts, [GeneratedText(" is a", True)], whole=True) == "It is red."


def test_each_character_of_chinese_and_japanese_is_a_word() -> None:
    heads = {opening.head for opening in cuts("图中有狗。")}
    assert heads == {"", "图", "图中", "图中有"}
    assert {opening.head for opening in cuts("犬の dog だ。")} == {"", "犬", "犬の", "犬の dog"}


def test_masked_answer_is_cut_before_each_first_mask() -> None:
    answer = "A red dog sits. Nice. Two cats!"
    masked = f"A {MASK} sits. Nice. {MASK} cats!"
    assert masked_openings(answer, masked) == [
        Opening("", "A", " "),
        "Nice. ",
        Opening("A red dog sits. Nice. ", "", ""),
    ]
    with pytest.raises(ValueError, match="the masked answer has 1 sentences, and the answer has 3"):
        masked_openings(answer, f"A {MASK}")


@pytest.mark.parametrize("answer", ["", " ", "...", "Yes", "?!"])
def test_an_answer_of_a_word_or_of_none_can_be_cut(answer: str) -> None:
    parts = openings(answer, 0, DRAWS)
    assert len(parts) == len(sentences(answer))
    assert joined(parts, [GeneratedText("it.")] * len(parts)).endswith("it." if parts else "")
