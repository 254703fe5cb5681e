"""AMBER on descriptions and answers counted by hand, and its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.evaluation.benchmarks import amber
from mmalign.evaluation.benchmarks.amber import (
    Annotations,
    AnyItem,
    DiscriminativeItem,
    GenerativeItem,
    match_objects,
    nouns_by_rule,
)
from mmalign.evaluation.metrics import compare

ASSOCIATES: dict[str, tuple[str, ...]] = {
    "sky": (),
    "man": ("person", "people"),
    "person": ("people", "man", "woman"),
    "tree": ("forest", "bush"),
    "forest": ("tree",),
    "ship": ("boat",),
    "bird": (),
    "sun": (),
    "dog": (),
    "can": (),
    "sign": (),
    "hot": (),
    "television": ("TV",),
}
ITEMS: dict[int, AnyItem] = {
    1: GenerativeItem(("sky", "man", "ship", "ship", "tree"), ("bird", "sun")),
    2: GenerativeItem(("forest", "person"), ("sky",)),
    11: DiscriminativeItem("existence", False),
    12: DiscriminativeItem("existence", False),
    13: DiscriminativeItem("existence", False),
    14: DiscriminativeItem("state", True),
    15: DiscriminativeItem("state", False),
    16: DiscriminativeItem("relation", True),
    17: DiscriminativeItem("relation", False),
}
BENCHMARK = Annotations(ITEMS, ASSOCIATES)
RESPONSES = {
    # people, boat, bird, tree, dog, sign: bird and dog are invented, "sign" is safe, "can" is a verb
    1: "People on a boat can watch birds under trees. A dog by the sign.",
    2: "A forest.",
}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_match_objects_by_hand() -> None:
    """Of sky, man, ship, ship, tree: people cover the man, the boat one ship alone, the trees the tree."""
    match = match_objects(RESPONSES[1], ITEMS[1], BENCHMARK)  # type: ignore[arg-type]
    assert match.mentions == ("people", "boat", "bird", "tree", "dog", "sign")
    assert match.invented == ("bird", "dog")
    assert (match.num_covered, match.num_expected) == (3, 1)


def test_generative_by_hand() -> None:
    metrics = amber.score_generative(RESPONSES, BENCHMARK)
    assert metrics.values == {
        "CHAIR": 2 / 7,
        "Cover": 4 / 7,
        "Hal": 1 / 2,
        "Cog": 1 / 3,
        "words per response": (14 + 2) / 2,
    }


def test_generative_counts_every_mention() -> None:
    metrics = amber.score_generative({1: "A dog and two dogs", 2: ""}, BENCHMARK)
    assert metrics.values["CHAIR"] == 1
    assert metrics.columns["invented mentions"].sum() == 2
    assert metrics.values["Hal"] == 1 / 2


def test_mention_covers_one_object_once() -> None:
    """As in the release the words beside an object are looked at first: a man is the person, and a woman too."""
    both = GenerativeItem(("man", "person"), ())
    assert match_objects("a man", both, BENCHMARK).num_covered == 1
    assert match_objects("a woman and a woman", both, BENCHMARK).num_covered == 1
    assert match_objects("a man and a person", both, BENCHMARK).num_covered == 2


def test_match_objects_by_similar_words() -> None:
    """A tool for which a dog is like a ship finds no invented dog; one for which it is like the sun, one hit more."""
    item = ITEMS[1]
    assert isinstance(item, GenerativeItem)
    near = match_objects(RESPONSES[1], item, BENCHMARK, similar=lambda word, other: (word, other) == ("dog", "ship"))
    assert (near.invented, near.num_covered) == (("bird",), 3)  # the ship is covered already
    near = match_objects(RESPONSES[1], item, BENCHMARK, similar=lambda word, other: (word, other) == ("dog", "sun"))
    assert (near.invented, near.num_expected) == (("bird", "dog"), 2)


def test_expected_word_that_is_true_is_no_hallucination() -> None:
    match = match_objects("A tree", GenerativeItem(("tree",), ("forest",)), BENCHMARK)
    assert (match.invented, match.num_covered, match.num_expected) == ((), 1, 0)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("A can", ("can",)),
        ("You can see two cans", ("can",)),
        ("A hot dog", ("dog",)),  # words of the list are single, and "hot" is no object
        ("A TV in the SKY", ("tv", "sky")),
        ("", ()),
        ("a unicorn", ()),
    ],
)
def test_nouns_by_rule(text: str, mentions: tuple[str, ...]) -> None:
    assert match_objects(text, GenerativeItem((), ()), BENCHMARK).mentions == mentions


def test_nouns_of_another_tool() -> None:
    assert "watch" not in nouns_by_rule("They watch it") and "watch" in nouns_by_rule("Her watch")
    metrics = amber.score_generative(RESPONSES, BENCHMARK, nouns=lambda text: ["Dog", "dogs"] if "boat" in text else [])
    assert metrics.values["CHAIR"] == 1
    assert metrics.columns["mentions"].sum() == 2


ANSWERS = {11: "No", 12: "Yes", 13: "maybe", 14: "Yes", 15: "Yes", 16: "No", 17: "No."}


def test_discriminative_by_hand() -> None:
    """No is the positive class. Existence: one of three true no is said, F1 2 / (1 + 3). State: no is never said.
    Relation: no is said twice, once rightly. All: 3 of 7 right; no said 3 times, 2 rightly, of 5; F1 4 / (3 + 5);
    yes said once of existence (one answer is unclear) and twice of state.
    """
    metrics = amber.score_discriminative(ANSWERS, BENCHMARK).values
    expected = {
        "all": (3 / 7, 2 / 3, 2 / 5, 4 / 8, 3 / 7, 1 / 7),
        "existence": (1 / 3, 1, 1 / 3, 2 / 4, 1 / 3, 1 / 3),
        "attribute": (1 / 2, 0, 0, 0, 1, 0),
        "state": (1 / 2, 0, 0, 0, 1, 0),
        "relation": (1 / 2, 1 / 2, 1, 2 / 3, 0, 0),
    }
    names = ("accuracy", "precision", "recall", "F1", "yes rate", "unclear")
    assert metrics == {
        f"{dimension}: {name}": pytest.approx(value)
        for dimension, values in expected.items()
        for name, value in zip(names, values, strict=True)
    }


def test_published_parser_is_exact() -> None:
    """ "No." is no answer to the release: its relation questions are both wrong then."""
    metrics = amber.score_discriminative(ANSWERS, BENCHMARK, amber.parse_published).values
    assert metrics["relation: accuracy"] == 0
    assert metrics["all: accuracy"] == 2 / 7
    assert metrics["relation: precision"] == 0


@pytest.mark.parametrize("answer", ["", "I am not sure.", "I'm sorry, I cannot answer that.", "There may be one."])
def test_model_that_never_answers_is_wrong(answer: str) -> None:
    metrics = amber.score_discriminative(dict.fromkeys(ANSWERS, answer), BENCHMARK).values
    assert {name: value for name, value in metrics.items() if value} == {
        name: 1 for name in metrics if name.endswith(": unclear")
    }


def test_parser_of_the_whole_benchmark() -> None:
    """ "No." is right to the strict parser alone; an unclear answer is counted by both."""
    strict, published = (amber.score(ANSWERS, BENCHMARK, *parser)[0] for parser in ((), (amber.parse_published,)))
    assert (strict.values["all: accuracy"], published.values["all: accuracy"]) == (3 / 7, 2 / 7)
    assert strict.values["all: unclear"] == published.values["all: unclear"] == 1 / 7
    assert "all: unclear" in strict.headline_names


def test_questions_about_an_image_are_one_group() -> None:
    shared = Annotations(ITEMS, ASSOCIATES, images={number: f"AMBER_{1 + number % 2}.jpg" for number in ITEMS})
    assert len(set(amber.score_discriminative(ANSWERS, shared).groups)) == 2
    assert len(set(amber.score_discriminative(ANSWERS, BENCHMARK).groups)) == 7


def test_scores_of_both_tasks_in_one_file() -> None:
    both = {**RESPONSES, **ANSWERS}
    assert amber.score_generative(both, BENCHMARK).values == amber.score_generative(RESPONSES, BENCHMARK).values
    assert amber.score_discriminative(both, BENCHMARK).keys == tuple(ANSWERS)


def test_amber_score_is_of_both_tasks() -> None:
    """(100 - CHAIR + F1) / 2, as in the paper's table; its interval is over the images, each with its answers."""
    images = {number: f"AMBER_{1 + number % 2}.jpg" for number in ITEMS}
    pictured = Annotations(ITEMS, ASSOCIATES, images=images)
    generative, discriminative, overall = amber.score({**RESPONSES, **ANSWERS}, pictured)
    chair, f1 = generative.values["CHAIR"], discriminative.values["all: F1"]
    assert 0 < chair < 1 and 0 < f1 < 1
    assert overall.values == {"AMBER Score": pytest.approx((1 - chair + f1) / 2)}
    assert set(overall.groups) == set(images.values()) and len(overall.keys) == len(ITEMS)
    interval = overall.intervals["AMBER Score"]
    assert interval.estimate == overall.values["AMBER Score"] and interval.low < interval.estimate < interval.high
    assert [metrics.benchmark for metrics in amber.score(RESPONSES, pictured)] == ["AMBER, generative"]
    assert [metrics.benchmark for metrics in amber.score(ANSWERS, pictured)] == ["AMBER, discriminative"]


def test_amber_score_of_two_models_is_a_paired_difference() -> None:
    before, after = ({**RESPONSES, **ANSWERS}, {**RESPONSES, **ANSWERS, 1: "People on a boat."})
    base, changed = (amber.score(responses, BENCHMARK) for responses in (before, after))
    difference = compare(base[2], changed[2]).differences["AMBER Score"].estimate
    assert difference == pytest.approx((base[0].values["CHAIR"] - changed[0].values["CHAIR"]) / 2)


def test_score_refuses() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 responses have an id without annotation \(99\); .* 1 to 17"):
        amber.score_generative({1: "", 99: ""}, BENCHMARK)
    with pytest.raises(ValueError, match="AMBER, generative: no responses"):
        amber.score_generative(ANSWERS, BENCHMARK)
    with pytest.raises(ValueError, match="AMBER, discriminative: no responses"):
        amber.score_discriminative(RESPONSES, BENCHMARK)


RECORDS: list[dict[str, Any]] = [
    {"id": 1, "type": "generative", "truth": ["sky", "man"], "hallu": ["bird"]},
    {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 3, "type": "discriminative-attribute-number", "truth": "yes"},
    {"id": 4, "type": "relation", "truth": "no"},
    {"id": 5, "type": "discriminative-relation", "truth": "yes"},
]


def folder(place: Path, records: Any = RECORDS) -> Path:
    written(place / "annotations.json", records)
    written(place / "relation.json", ASSOCIATES)
    (place / "safe_words.txt").write_text("sign\nline")
    return place


def test_read_amber(tmp_path: Path) -> None:
    annotations = amber.read_amber(folder(tmp_path))
    assert annotations.items == {
        1: GenerativeItem(("sky", "man"), ("bird",)),
        2: DiscriminativeItem("existence", False),
        3: DiscriminativeItem("number", True),
        4: DiscriminativeItem("relation", False),
        5: DiscriminativeItem("relation", True),
    }
    assert annotations.associates == ASSOCIATES
    assert (annotations.safe_words, annotations.images) == ({"sign", "line"}, {})
    written(tmp_path / "query" / "query_all.json", [{"id": 2, "image": "AMBER_1.jpg", "query": "Is there a dog?"}])
    assert amber.read_amber(tmp_path).images == {2: "AMBER_1.jpg"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"truth": ["unicorn"]}, "entry 1: 'unicorn' is not in relation.json"),
        ({"truth": "sky"}, 'truth is "sky"; expected a list of names'),
        (
            {"type": "discriminative-colour", "truth": "no"},
            'type is "discriminative-colour", truth "no"; expected yes or no',
        ),
        ({"type": "relation", "truth": "No"}, 'truth "No"; expected yes or no'),
        ({"id": "one"}, 'id is "one"; expected a whole number'),
        ({"id": "2"}, "entry 2: duplicate id 2"),
        ({"id": 2}, "entry 2: duplicate id 2"),
    ],
)
def test_read_amber_refuses_bad_annotations(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        amber.read_amber(folder(tmp_path, [{**RECORDS[0], **change}, *RECORDS[1:]]))


def test_read_amber_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file or folder"):
        amber.read_amber(tmp_path / "none")
    (folder(tmp_path) / "safe_words.txt").unlink()
    with pytest.raises(ValueError, match=r"safe_words\.txt"):
        amber.read_amber(tmp_path)


def test_read_responses(tmp_path: Path) -> None:
    file = written(tmp_path / "r.json", [{"id": 1, "response": "A sky."}, {"id": 2, "response": "No"}])
    assert amber.read_responses(file) == {1: "A sky.", 2: "No"}
    thought = [{"id": 1, "response": "<think>A bird?</think>\nA sky."}, {"id": 2, "response": "<think>Yes, I"}]
    assert amber.read_responses(written(tmp_path / "r.json", thought)) == {1: "A sky.", 2: ""}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], "is empty; expected records"),
        ([{"id": 1, "response": ""}, {"id": 1, "response": ""}], "entry 2: duplicate id 1"),
        ([{"id": 1, "said": ""}], "expected 'response' or 'text' or 'answer'"),
        ([{"id": 1, "response": ["No"]}], r'response or text or answer is \["No"\]; expected a string'),
        ([{"response": ""}], "expected 'id'"),
    ],
)
def test_read_responses_refuses_bad_records(content: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        amber.read_responses(written(tmp_path / "r.json", content))
