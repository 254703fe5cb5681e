"""The bundled world's benchmark: its truth is that of the pictures, and answers are counted by hand."""

from collections import Counter

import pytest

from mmalign.data import crowds as world
from mmalign.evaluation import crowds
from mmalign.evaluation.benchmarks import DESCRIPTIONS
from mmalign.evaluation.counts import Metrics
from mmalign.evaluation.pope import SPLITS


@pytest.fixture(scope="module")
def benchmark() -> crowds.Together:
    return crowds.benchmark(40, "test", seed=3)


def kinds() -> dict[str, tuple[str, ...]]:
    return {crowd.name: crowd.kinds for crowd in world.sample("test", 40, 3)}


def said(benchmark: crowds.Together, description: str, answer: str) -> dict[str, Metrics]:
    """What is counted if every picture gets this description and every question this answer."""
    answers = {
        part: [description if part == DESCRIPTIONS else answer] * len(asked) for part, asked in benchmark.parts.items()
    }
    return {counts.benchmark: counts for counts in benchmark.score(answers)}


def perfect(benchmark: crowds.Together) -> dict[str, list[str]]:
    there = kinds()
    answers = {
        split: [benchmark.truth(split, number).capitalize() + "." for number in range(len(benchmark.parts[split]))]
        for split in SPLITS
    }
    return {**answers, DESCRIPTIONS: [world.describe(there[q.image]) for q in benchmark.parts[DESCRIPTIONS]]}


def test_every_picture_is_described_and_asked_about(benchmark: crowds.Together) -> None:
    assert list(benchmark.parts) == [DESCRIPTIONS, *SPLITS]
    assert [q.image for q in benchmark.parts[DESCRIPTIONS]] == list(kinds())
    assert {q.text for q in benchmark.parts[DESCRIPTIONS]} == {world.QUESTION}
    for split in SPLITS:
        assert set(Counter(q.image for q in benchmark.parts[split]).values()) == {4}  # two of either kind


def test_questions_are_true_to_the_pictures(benchmark: crowds.Together) -> None:
    """They are in the words of `crowds.ask`, and the right answer is that of `crowds.answer`."""
    there = {crowd.name: crowd for crowd in world.sample("test", 40, 3)}
    by_text = {world.ask(kind): kind for kind in world.KINDS}
    for split in SPLITS:
        for number, question in enumerate(benchmark.parts[split]):
            kind = by_text[question.text]
            right = benchmark.truth(split, number)
            assert world.answer(kind, there[question.image]).lower().startswith(right)


def test_the_adversary_asks_for_partners(benchmark: crowds.Together) -> None:
    """The absent object after a present one is its partner, wherever that is neither there nor asked for already."""
    there, by_text, partners = kinds(), {world.ask(kind): kind for kind in world.KINDS}, 0
    asked = [(q.image, by_text[q.text]) for q in benchmark.parts["adversarial"]]
    for (image, present), (_, absent) in zip(asked[::2], asked[1::2], strict=True):
        assert present in there[image] and absent not in there[image]
        if world.PARTNERS[present] not in there[image]:
            assert absent == world.PARTNERS[present]
            partners += 1
    assert partners > len(asked) / 4  # most of the world's objects come alone where it is measured


def test_a_perfect_model(benchmark: crowds.Together) -> None:
    chair, pope = benchmark.score(perfect(benchmark))
    lengths = [len(world.describe(some).split()) for some in kinds().values()]
    assert chair.values == {
        "CHAIR_i": 0,
        "CHAIR_s": 0,
        "recall": 1,
        "words per response": pytest.approx(sum(lengths) / 40),
    }
    assert pope.values["mean: accuracy"] == pope.values["mean: F1"] == 1 and pope.values["mean: yes rate"] == 0.5


def test_a_model_that_always_says_the_same(benchmark: crowds.Together) -> None:
    """Two mentions of the red circle and one of an orange heart, which the world has not, in every description."""
    found = said(benchmark, "A red circle, red circles and an orange heart.", "Yes, there is.")
    there = sum("red circle" in some for some in kinds().values())
    assert 0 < there < 40
    assert found["CHAIR"].sums["mentions"] == 120
    assert found["CHAIR"].sums["invented mentions"] == 40 + 2 * (40 - there)
    assert found["CHAIR"].values["CHAIR_s"] == 1
    assert found["CHAIR"].sums["found objects"] == there
    assert found["POPE"].values["mean: accuracy"] == 0.5 and found["POPE"].values["mean: yes rate"] == 1


def test_kinds_are_read_from_any_sentence() -> None:
    text = "There is a Red circle. Two blue crosses, a yellow star; no purple hearts. A red, circle. Bored circles."
    mentions = [mention.object for mention in crowds.words().mentions(text)]
    assert mentions == ["red circle", "blue cross", "yellow star", "purple heart"]


def test_verdicts_are_what_the_counts_are_made_of(benchmark: crowds.Together) -> None:
    """A description's score is what it names less what it invents, and the marks are the words."""
    first = benchmark.parts[DESCRIPTIONS][0]
    there = kinds()[first.image]
    other = next(kind for kind in world.KINDS if kind not in there)
    text = f"There is a {there[0]}. There is a {other}. There is a {other}."
    verdict = benchmark.judge(DESCRIPTIONS, 0, text)
    assert verdict.score == 1 - 2
    assert verdict.note == f"1 of {len(there)} named, 2 invented"
    assert [text[start:end] for start, end in verdict.invented] == [other, other]
    assert benchmark.truth(DESCRIPTIONS, 0) == ", ".join(sorted(there))
    number = next(n for n in range(4) if benchmark.truth("random", n) == "no")
    assert benchmark.judge("random", number, "Yes.").invented == ((0, 4),)
    assert benchmark.judge("random", number, "Yes.").score == 0
    assert benchmark.judge("random", number, "No.") == type(verdict)(1.0, "right")
    assert benchmark.judge("random", number, "A circle.").note == "neither yes nor no"


def test_pictures_are_those_of_the_world(benchmark: crowds.Together) -> None:
    crowd = world.sample("test", 40, 3)[7]
    assert benchmark.images(crowd.name).tobytes() == world.draw(crowd).tobytes()


def test_pictures_that_are_left_out_take_their_questions(benchmark: crowds.Together) -> None:
    gone = benchmark.parts[DESCRIPTIONS][0].image
    less = benchmark.without({gone})
    assert [len(asked) for asked in less.parts.values()] == [39, 156, 156, 156]
    assert all(q.image != gone for asked in less.parts.values() for q in asked)
