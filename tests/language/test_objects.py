"""Object words: plurals, phrases, synonyms, and what hides a word, each on a sentence read by hand."""

import pytest

from mmalign.language.objects import coco_vocabulary, singular, vocabulary

PUBLISHED, REFINED = coco_vocabulary("published"), coco_vocabulary("refined")


def objects(text: str) -> list[str]:
    return [mention.object for mention in REFINED.mentions(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two hot dogs", ["hot dog"]),  # and no dog
        ("It is hot. Dogs bark", ["dog"]),  # a phrase does not reach across a full stop
        ("a dog, two dogs and a puppy", ["dog", "dog", "dog"]),
        ("Knives, wine glasses, mice; women", ["knife", "wine glass", "mouse", "person"]),
        ("a bus and a glass", ["bus"]),
        ("skis and ties", ["skis", "tie"]),
        ("a man's bow tie", ["person", "tie"]),
        ("a baby elephant beside a baby", ["elephant", "person"]),
        ("a passenger train on train tracks", ["train"]),
        ("home plates", []),
        ("the seat of the toilet", ["toilet"]),
        ("the seat of the car", ["chair", "car"]),
        ("a toilet seat", ["toilet"]),
        ("a dog-friendly park", []),
        ("DOGS", ["dog"]),
        ("a dining table", ["dining table"]),
        ("a traffic light under a street light", ["traffic light", "traffic light"]),
        ("", []),
        ("...", []),
    ],
)
def test_what_a_sentence_mentions(text: str, expected: list[str]) -> None:
    assert objects(text) == expected


def test_a_mention_has_its_place() -> None:
    text = "Two hot dogs and a Puppy."
    first, second = REFINED.mentions(text)
    assert (first.object, first.word, text[first.start : first.end]) == ("hot dog", "hot dog", "hot dogs")
    assert (second.object, second.word, text[second.start : second.end]) == ("dog", "puppy", "Puppy")


def test_the_list_has_the_categories_of_mscoco() -> None:
    assert len(PUBLISHED.objects) == len(REFINED.objects) == 80
    assert {"person", "stop sign", "hair drier", "toothbrush", "tv", "potted plant"} < set(REFINED.objects)


@pytest.mark.parametrize(
    ("text", "published", "refined"),
    [
        ("a motor bike", [], ["motorcycle"]),  # merged into a phrase that begins with a space in the list
        ("a cheesecake", [], ["cake"]),
        ("an iPhone", [], ["cell phone"]),
        ("a stove top oven", ["oven", "oven"], ["oven"]),
        ("a pedestrian and his brother", [], ["person", "person"]),
        ("a coffee table", ["dining table"], ["dining table"]),
        ("a remote control", ["remote"], ["remote"]),
    ],
)
def test_the_two_variants(text: str, published: list[str], refined: list[str]) -> None:
    assert [mention.object for mention in PUBLISHED.mentions(text)] == published
    assert objects(text) == refined


def test_any_vocabulary() -> None:
    shapes = vocabulary({"red circle": ["red disc"], "blue circle": [], "circle": ["disc"]})
    result = shapes.mentions("Three red circles, a blue circle, a red disc and a disc; a red square")
    assert [mention.object for mention in result] == ["red circle", "blue circle", "red circle", "circle"]
    assert shapes.object_of("Red  discs") == "red circle"


def test_a_word_as_it_stands_comes_before_its_singular() -> None:
    result = vocabulary({"spectacles": ["glasses"], "glass": []}).mentions("glasses and a glass")
    assert [mention.object for mention in result] == ["spectacles", "glass"]


def test_a_phrase_that_is_listed_in_the_plural() -> None:
    assert objects("two sports balls and a sport ball") == ["sports ball", "sports ball"]
    assert objects("scissors") == ["scissors"]


def test_refuses() -> None:
    with pytest.raises(ValueError, match="no objects"):
        vocabulary({})
    with pytest.raises(ValueError, match="'disc' is a word for 'circle' and for 'plate'"):
        vocabulary({"circle": ["disc"], "plate": ["disc"]})
    with pytest.raises(ValueError, match="' ' is not a word"):
        vocabulary({"circle": [" "]})
    with pytest.raises(ValueError, match="'unicorn' is not a word of the vocabulary, which has 80 objects"):
        REFINED.object_of("unicorn")
    with pytest.raises(ValueError, match="'home plate' is not a word"):
        REFINED.object_of("home plate")  # read as itself, but no object
    with pytest.raises(ValueError, match="'both' is not a variant"):
        coco_vocabulary("both")


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        *[
            ("knives", "knife"),
            ("policemen", "policeman"),
            ("children", "child"),
            ("buses", "bus"),
            ("people", "person"),
        ],
        *[("couches", "couch"), ("potatoes", "potato"), ("canoes", "canoe"), ("horses", "horse"), ("houses", "house")],
        *[("puppies", "puppy"), ("ties", "tie"), ("magpies", "magpie"), ("gloves", "glove"), ("leaves", "leaf")],
        *[
            ("glasses", "glass"),
            ("viruses", "virus"),
            ("vases", "vase"),
            ("taxis", "taxi"),
            ("horseshoes", "horseshoe"),
        ],
        *[(word, word) for word in ("bus", "glass", "tennis", "sheep", "series", "specimen", "dog", "gas", "")],
    ],
)
def test_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected


def test_finds_singular_and_plural_of_every_word() -> None:
    for word, name in REFINED.meanings.items():
        assert [mention.object for mention in REFINED.mentions(f"one {word}.")] == [name], word
        if word in ("skis", "scissors", "people", "children", "cattle", "oxen") or word.endswith("man"):
            continue  # plurals already, or with one of its own
        if word.endswith("y") and word[-2] not in "aeiou":
            plural = f"{word[:-1]}ies"
        else:
            plural = f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"
        assert [mention.object for mention in REFINED.mentions(f"two {plural}.")] == [name], plural
