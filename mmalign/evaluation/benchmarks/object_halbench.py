"""Object HalBench, rule-based: hallucinated objects in detailed descriptions (RLHF-V, arXiv:2312.00849, section 4.1).

    response-level = responses with an invented object / responses that mention any object
    mention-level  = mentions of invented objects / all mentions of objects
    recall         = objects of the images that their responses mention / all objects of the images

Unlike CHAIR_s, the response-level rate leaves out a response that names no object. The benchmark's 300 items are MSCOCO
images with eight prompts for a detailed description; supply them as your own file.

For the published tables a language model first lists the objects of a response, each once. Here the words are matched
in the text, as the release does without that model. By default all mentions are counted. `distinct=True` counts each
word of a response once, which is closer to those tables. Compare only models measured by the same rule, and never with
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
        responses: [N] the descriptions, from `annotations.read_responses`.
        truth: the objects of each image, from `chair.read_coco` or `chair.read_truth`.
        vocabulary: the vocabulary that `truth` was read with; the refined list of MSCOCO's objects by default.
        distinct: True to count each word of a response once.

    Raises:
        ValueError: there is no response, two answer the same question on one image, an image has no annotation, or an
            annotated object is not in the vocabulary.
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
