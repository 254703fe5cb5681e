"""Checks for prompts and images that training shares with evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from mmalign.data.images import BadImage
from mmalign.data.pairs import ImageRef
from mmalign.doctor.corpus import TRAINING, VALIDATION, Corpus, EvaluationInputs, NotChecked, Prompt, normalize
from mmalign.doctor.findings import Place
from mmalign.doctor.pictures import CHROMA, describe, is_plain, look, nearly_equal, thumbnail


def shared_prompts(corpus: Corpus) -> list[Place] | NotChecked:
    """Return the training prompts that evaluation has too, up to case and punctuation."""
    evaluation = _evaluation(corpus)
    if isinstance(evaluation, NotChecked):
        return evaluation
    held = [prompt for prompt in corpus.prompts if prompt.split == VALIDATION]
    held += [Prompt(text, "evaluation", "evaluate.prompts") for text in evaluation.prompts]
    if not held:
        return NotChecked("the evaluation has no prompts of its own")
    # Reversed, so that the first place of a prompt remains
    known = {normalize(prompt.text): prompt for prompt in reversed(held)}
    pairs = [(prompt, known.get(normalize(prompt.text))) for prompt in corpus.prompts if prompt.split == TRAINING]
    return [
        Place(prompt.location, f"also in the {other.split}: {other.location}", (("prompt", prompt.text),))
        for prompt, other in pairs
        if other is not None
    ]


def shared_images(corpus: Corpus) -> list[Place] | NotChecked:
    """Return the training images that evaluation has too, up to compression and scaling."""
    evaluation = _evaluation(corpus)
    if isinstance(evaluation, NotChecked):
        return evaluation
    # Images of the validation split, and those of the recipe's evaluation
    held = [
        _Held(ref.location, VALIDATION, small, ref) for ref in _images(corpus, VALIDATION) if (small := look(ref)[1])
    ]
    for name, load in evaluation.images:
        try:
            held.append(_Held(name, "evaluation", thumbnail(load())))
        except BadImage:
            continue
    if not held:
        return NotChecked("the evaluation has no images of its own")
    training = [ref for ref in _images(corpus, TRAINING) if not corpus.pictures[ref.key].problem]
    return _matches(training, [corpus.pictures[ref.key].descriptor for ref in training], held)


class _Held(NamedTuple):
    """Image of an evaluation: its location, its split, its thumbnail, and the image to show if it is a pair's."""

    location: str
    split: str
    small: Image.Image
    ref: ImageRef | None = None


def _matches(training: list[ImageRef], descriptors: list[NDArray[np.float32]], held: list[_Held]) -> list[Place]:
    """Return the training images that nearly equal one of the evaluation; plain ones must equal it exactly."""
    if not training:
        return []
    # Nearly equal images have descriptors that differ by at most the tolerance, and the rounding of thumbnails
    tree = cKDTree(np.stack([describe(image.small) for image in held]))
    near = tree.query_ball_point(np.stack(descriptors), r=CHROMA + 2, p=np.inf)
    places = []
    for ref, candidates in zip(training, near, strict=True):
        small = look(ref)[1] if candidates else None
        match = next((held[n] for n in candidates if small is not None and _same(ref, small, held[n])), None)
        if match is not None:
            shown = [("training", ref), *([("evaluation", match.ref)] if match.ref is not None else [])]
            places.append(Place(ref.location, f"also in the {match.split}: {match.location}", images=tuple(shown)))
    return places


def _same(ref: ImageRef, small: Image.Image, held: _Held) -> bool:
    if held.ref is not None and held.ref.key == ref.key:
        return True
    return not is_plain(small) and nearly_equal(small, held.small)


def _images(corpus: Corpus, split: str) -> list[ImageRef]:
    """Return the images of a split, each once."""
    return list(dict.fromkeys(ref for case in corpus.cases if case.split == split for ref in case.images))


def _evaluation(corpus: Corpus) -> EvaluationInputs | NotChecked:
    """Return the inputs of the recipe's evaluation; none beside a validation split if they are not known."""
    evaluation = corpus.inputs.evaluation
    has_split = VALIDATION in {*(case.split for case in corpus.cases), *(prompt.split for prompt in corpus.prompts)}
    return EvaluationInputs() if has_split and isinstance(evaluation, NotChecked) else evaluation
