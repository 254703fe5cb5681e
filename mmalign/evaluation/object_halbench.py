"""Object HalBench by rules: how often detailed descriptions invent objects (RLHF-V, arXiv:2312.00849, section 4.1).

    response-level = responses with an invented object / responses that mention any object
    mention-level  = mentions of invented objects / all mentions of objects
    recall         = objects of the images that their responses mention / all objects of the images

Unlike CHAIR_s, a response that names no object is left out of the response-level rate. The benchmark's 300 items are
MSCOCO images with eight ways to ask for a detailed description; bring them as your own file.

In the published tables a language model lists the objects of a response first, each once. Here the words are found in
the text itself, as the release does without that model: `distinct=True` counts each word of a response once, which is
nearer to those tables; by default every mention counts. Either way the numbers are for comparing models measured alike,
not for comparing with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.evaluation.answer_files import Response
from mmalign.evaluation.chair import Truth, tally
from mmalign.evaluation.counts import Metrics, ratio
from mmalign.language.objects import Vocabulary, coco_vocabulary


def score(
    responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary | None = None, *, distinct: bool = False
) -> Metrics:
    """The two rates, recall and the mean length in words (at white space) of N descriptions.

    Args:
        responses: [N], from `answer_files.read_responses`.
        truth: from an image's id to its objects, from `chair.read_coco` or `chair.read_truth`.
        vocabulary: with which `truth` was read; the refined list of MSCOCO's objects if not given.
        distinct: whether a word that a response repeats is one mention.

    Raises:
        ValueError: there is no response, two are to the same image and question, an image has no annotation, or an
            annotated object is not the vocabulary's.
    """
    return Metrics(
        "Object HalBench",
        tuple((response.image, response.question) for response in responses),
        tuple(response.image for response in responses),
        tally(responses, truth, vocabulary or coco_vocabulary("refined"), distinct=distinct),
        {
            "response-level": ratio("inventing responses", "responses with objects"),
            "mention-level": ratio("invented mentions", "mentions"),
            "recall": ratio("found objects", "true objects"),
        },
        ("words per response",),
    )
