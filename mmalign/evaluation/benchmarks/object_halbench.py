"""Object HalBench by rules: hallucinated objects in detailed descriptions (RLHF-V, arXiv:2312.00849, section 4.1).

    response-level = responses with an invented object / responses that mention any object
    mention-level  = mentions of invented objects / all mentions of objects
    recall         = objects of the images that their responses mention / all objects of the images

Unlike CHAIR_s, the response-level rate leaves out a response that names no object. The benchmark's 300 items are MSCOCO
images with eight prompts for a detailed description; bring them as your own file.

In the published tables a language model lists the objects of a response first, each once. Here the words are found in
the text itself, as the release does without that model. By default every mention counts; `distinct=True` counts each
word of a response once, which is nearer to those tables. Compare only models measured by the same rule, and never with
published numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.evaluation.annotations import Response
from mmalign.evaluation.benchmarks.chair import Truth, count_mentions, description_metrics
from mmalign.evaluation.metrics import Metrics, ratio
from mmalign.language.objects import Vocabulary, coco_vocabulary


def score(
    responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary | None = None, *, distinct: bool = False
) -> Metrics:
    """Return the two rates, recall and the mean length in words (at white space) of N descriptions.

    Args:
        responses: [N], from `answer_files.read_responses`.
        truth: from an image's id to its objects, from `chair.read_coco` or `chair.read_truth`.
        vocabulary: the vocabulary that `truth` was read with; the refined list of MSCOCO's objects by default.
        distinct: count a word that a response repeats once.

    Raises:
        ValueError: there is no response, two are to the same image and question, an image has no annotation, or an
            annotated object is not the vocabulary's.
    """
    return description_metrics(
        "Object HalBench",
        responses,
        count_mentions(responses, truth, vocabulary or coco_vocabulary("refined"), distinct=distinct),
        {
            "response-level": ratio("inventing responses", "responses with objects"),
            "mention-level": ratio("invented mentions", "mentions"),
        },
    )
