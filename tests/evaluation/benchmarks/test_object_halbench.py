"""Object HalBench by rules, on descriptions counted by hand."""

from mmalign.evaluation.annotations import Response
from mmalign.evaluation.benchmarks import chair, object_halbench
from mmalign.language.objects import coco_vocabulary, vocabulary

TRUTH = {
    "1": frozenset({"person", "dog"}),
    "2": frozenset({"hot dog", "dining table"}),
    "3": frozenset[str](),
    "4": frozenset({"bus"}),
}
RESPONSES = [
    Response("1", "A man and his puppy. Two dogs and a cat."),
    Response("2", "Hot dogs on a table."),
    Response("3", "A chair, another chair"),
    Response("4", "It rains."),  # names no object, so the response-level rate leaves it out
]


def test_score_by_hand() -> None:
    """2 of the 3 responses that name an object, 3 of 8 mentions, 4 of 5 objects, 10 + 5 + 4 + 2 words."""
    rates = {"response-level": 2 / 3, "mention-level": 3 / 8, "recall": 4 / 5, "words per response": 21 / 4}
    assert object_halbench.score(RESPONSES, TRUTH).values == rates
    assert chair.score(RESPONSES, TRUTH, coco_vocabulary("refined")).values["CHAIR_s"] == 2 / 4
    # Words man, puppy, dog, cat; hot dog, table; chair: two of seven invented.
    assert object_halbench.score(RESPONSES, TRUTH, distinct=True).values == {**rates, "mention-level": 2 / 7}


def test_score_of_responses_without_objects() -> None:
    metrics = object_halbench.score([Response("1", ""), Response("4", "Rain.")], TRUTH)
    assert metrics.values == {"response-level": 0, "mention-level": 0, "recall": 0, "words per response": 0.5}


def test_score_uses_the_refined_vocabulary_or_another() -> None:
    metrics = object_halbench.score([Response("1", "A pedestrian."), Response("4", "A cheesecake.")], TRUTH)
    assert (metrics.values["mention-level"], metrics.values["recall"]) == (1 / 2, 1 / 3)
    shapes = vocabulary({"circle": [], "star": []})
    assert object_halbench.score([Response("1", "A star.")], {"1": ["circle"]}, shapes).values["response-level"] == 1
