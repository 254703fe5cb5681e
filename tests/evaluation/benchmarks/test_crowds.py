"""The bundled world's benchmark: its truth is that of the pictures, and answers are counted by hand."""

from collections import Counter

import pytest

from mmalign.evaluation.annotations import Question
from mmalign.evaluation.benchmarks import crowds
from mmalign.evaluation.benchmarks.base import CAPTIONS, Benchmark, RatedAnswer
from mmalign.evaluation.benchmarks.pope import SPLITS
from mmalign.toy import crowds as world


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return crowds.benchmark(40, "test", seed=3)


def kinds() -> dict[str, tuple[str, ...]]:
    return {crowd.name: crowd.kinds for crowd in world.sample("test", 40, 3)}


def questions(benchmark: Benchmark, part: str) -> list[Question]:
    return [item.question for item in benchmark.parts[part]]


def test_benchmark_describes_every_picture_and_asks_about_it(benchmark: Benchmark) -> None:
    assert list(benchmark.parts) == [CAPTIONS, *SPLITS]
    assert [question.image for question in questions(benchmark, CAPTIONS)] == list(kinds())
    assert {question.text for question in questions(benchmark, CAPTIONS)} == {world.QUESTION}
    for split in SPLITS:  # two questions of either kind
        assert set(Counter(question.image for question in questions(benchmark, split)).values()) == {4}


def test_benchmark_agrees_with_the_world(benchmark: Benchmark) -> None:
    """Questions are in the words of `crowds.ask`, and the truth is that of `crowds.answer`."""
    crowds_by_name = {crowd.name: crowd for crowd in world.sample("test", 40, 3)}
    by_text = {world.ask(kind): kind for kind in world.KINDS}
    for item in (item for split in SPLITS for item in benchmark.parts[split]):
        answer = world.answer(by_text[item.question.text], crowds_by_name[item.question.image])
        assert answer.lower().startswith(item.truth)
    crowd = world.sample("test", 40, 3)[7]
    assert benchmark.images(crowd.name).tobytes() == world.render(crowd).tobytes()


def test_adversarial_split_asks_for_partners(benchmark: Benchmark) -> None:
    """The absent object after a present one is its partner, wherever that is neither there nor asked for already."""
    present_kinds, by_text, num_partners = kinds(), {world.ask(kind): kind for kind in world.KINDS}, 0
    asked = [(question.image, by_text[question.text]) for question in questions(benchmark, "adversarial")]
    for (image, present), (_, absent) in zip(asked[::2], asked[1::2], strict=True):
        assert present in present_kinds[image] and absent not in present_kinds[image]
        if world.PARTNERS[present] not in present_kinds[image]:
            assert absent == world.PARTNERS[present]
            num_partners += 1
    assert num_partners > len(asked) / 4  # most of the world's objects come alone in the test split


def test_score_of_a_perfect_model(benchmark: Benchmark) -> None:
    answers = {split: [f"{item.truth.capitalize()}." for item in benchmark.parts[split]] for split in SPLITS}
    captions = [world.describe(some) for some in kinds().values()]
    chair, pope = benchmark.score({**answers, CAPTIONS: captions})
    assert chair.values == {
        "CHAIR_i": 0,
        "CHAIR_s": 0,
        "recall": 1,
        "words per response": pytest.approx(sum(len(caption.split()) for caption in captions) / 40),
    }
    assert pope.values["mean: accuracy"] == pope.values["mean: F1"] == 1 and pope.values["mean: yes rate"] == 0.5


def test_score_of_a_model_that_always_says_the_same(benchmark: Benchmark) -> None:
    """Two mentions of the red circle and one of an orange heart, which the world has not, in every description."""
    caption, answer = "A red circle, red circles and an orange heart.", "Yes, there is."
    texts = {part: [caption if part == CAPTIONS else answer] * len(items) for part, items in benchmark.parts.items()}
    chair, pope = benchmark.score(texts)
    num_with_circle = sum("red circle" in some for some in kinds().values())
    assert 0 < num_with_circle < 40
    assert chair.columns["mentions"].sum() == 120
    assert chair.columns["invented mentions"].sum() == 40 + 2 * (40 - num_with_circle)
    assert chair.values["CHAIR_s"] == 1
    assert chair.columns["found objects"].sum() == num_with_circle
    assert pope.values["mean: accuracy"] == 0.5 and pope.values["mean: yes rate"] == 1


def test_vocabulary_finds_kinds_in_any_sentence() -> None:
    text = "There is a Red circle. Two blue crosses, a yellow star; no purple hearts. A red, circle. Bored circles."
    mentions = [mention.object for mention in crowds.words().mentions(text)]
    assert mentions == ["red circle", "blue cross", "yellow star", "purple heart"]


def test_verdicts_mark_inventions(benchmark: Benchmark) -> None:
    """A description's score is what it names less what it invents, and the marks are the words."""
    item = benchmark.parts[CAPTIONS][0]
    present = kinds()[item.question.image]
    absent = next(kind for kind in world.KINDS if kind not in present)
    text = f"There is a {present[0]}. There is a {absent}. There is a {absent}."
    verdict = item.rate(text)
    assert (verdict.score, verdict.note) == (1 - 2, f"1 of {len(present)} named, 2 invented")
    assert [text[start:end] for start, end in verdict.invented] == [absent, absent]
    assert item.truth == ", ".join(sorted(present))
    no_item = next(item for item in benchmark.parts["random"] if item.truth == "no")
    assert no_item.rate("Yes.") == RatedAnswer("Yes.", 0.0, "wrong", ((0, 4),))
    assert no_item.rate("No.") == RatedAnswer("No.", 1.0, "right")
    assert no_item.rate("A circle.").note == "unclear"


def test_benchmark_without_an_image(benchmark: Benchmark) -> None:
    image = benchmark.parts[CAPTIONS][0].question.image
    smaller = benchmark.without_images({image})
    assert [len(items) for items in smaller.parts.values()] == [39, 156, 156, 156]
    assert image not in {question.image for question in smaller.questions}
    answers = {part: ["No."] * len(items) for part, items in smaller.parts.items()}
    assert [len(metrics.keys) for metrics in smaller.score(answers)] == [39, 3 * 156]
