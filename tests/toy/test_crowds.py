"""The bundled world for vision-language models: pairs of kinds, pictures of them, and words for them."""

import numpy as np
import pytest

from mmalign.toy import crowds
from mmalign.toy.scenes import BACKGROUND, CANVAS


def together(sampled: list[crowds.Crowd]) -> float:
    """How often the partner of a kind is there too."""
    return float(np.mean([crowds.PARTNERS[kind] in crowd.kinds for crowd in sampled for kind in crowd.kinds]))


def test_partners_differ_in_colour_and_shape() -> None:
    assert len(set(crowds.KINDS)) == len(crowds.KINDS) == 24
    for kind, partner in crowds.PARTNERS.items():
        assert crowds.PARTNERS[partner] == kind
        assert not set(kind.split()) & set(partner.split())


def test_crowd_holds_two_to_five_kinds_in_order() -> None:
    for crowd in crowds.sample("train", 300, 0):
        assert 2 <= len(crowd.kinds) <= 5
        assert list(crowd.kinds) == sorted(set(crowd.kinds), key=crowds.KINDS.index)


def test_partners_are_common_in_training_only() -> None:
    assert together(crowds.sample("train", 1000, 0, together=crowds.TOGETHER)) > 0.9
    assert together(crowds.sample("test", 1000, 0)) < 0.35


def test_the_first_crowds_do_not_depend_on_how_many_there_are() -> None:
    assert crowds.sample("test", 5, 3) == crowds.sample("test", 50, 3)[:5]


@pytest.mark.parametrize("source", [("train", 0), ("test", 1)])
def test_other_splits_and_seeds_hold_other_crowds(source: tuple[crowds.Split, int]) -> None:
    test_crowds, other_crowds = crowds.sample("test", 200, 0), crowds.sample(source[0], 200, source[1])
    assert not {crowd.things for crowd in test_crowds} & {crowd.things for crowd in other_crowds}


def test_objects_are_painted_where_they_are_and_nowhere_else() -> None:
    for crowd in crowds.sample("test", 50, 0):
        pixels = np.asarray(crowds.render(crowd)).astype(int)
        painted = np.abs(pixels - BACKGROUND).sum(-1) > 0
        allowed = np.zeros((CANVAS, CANVAS), dtype=bool)
        for thing in crowd.things:
            assert painted[round(thing.y), round(thing.x)], thing
            rows, columns = (slice(int(at - thing.radius), int(at + thing.radius) + 1) for at in (thing.y, thing.x))
            allowed[rows, columns] = True
        assert not (painted & ~allowed).any()


def test_faint_object_is_nearer_to_the_background() -> None:
    things = [thing for crowd in crowds.sample("test", 500, 0) for thing in crowd.things]
    faint = [thing.pale > 0 for thing in things]
    assert np.mean(faint) == pytest.approx(crowds.FAINT, abs=0.04)
    assert all(0.7 < thing.pale < 0.9 for thing, pale in zip(things, faint, strict=True) if pale)


def test_a_description_names_what_is_there_a_sentence_each() -> None:
    assert crowds.describe(["red circle", "green star"]) == "There is a red circle. There is a green star."


def test_questions_are_answered_by_what_is_there() -> None:
    crowd = crowds.sample("test", 1, 0)[0]
    absent = next(kind for kind in crowds.KINDS if kind not in crowd.kinds)
    assert crowds.ask(absent) == f"Is there a {absent} in the picture?"
    assert (crowds.answer(crowd.kinds[0], crowd), crowds.answer(absent, crowd)) == ("Yes.", "No.")
