"""The command `prepare`: make the preference pairs that a recipe learns from."""

from __future__ import annotations

from pathlib import Path

from mmalign.commands import preflight
from mmalign.config import ImageModel, JudgeModel, PrepareImages, PrepareResponses, Recipe
from mmalign.synthesis.rejected_responses import Writer


def prepare(recipe: Recipe, *, writer: Writer | None = None) -> Path:
    """Generate the pairs that the recipe trains on, and write them to `data.path`.

    A text-to-image model generates images and a reward model ranks them. For a vision-language model, true answers
    get rejected responses.

    Args:
        recipe: the recipe, with a section `prepare`.
        writer: a user function for rejected responses (see `prepare_responses`).

    Raises:
        ValueError: there is no `prepare` section, the file exists, or no pair was found.
    """
    from mmalign.modalities.text_to_image.prepare import prepare_images
    from mmalign.modalities.vision_language.prepare import prepare_responses

    if isinstance(recipe.model, JudgeModel):
        raise ValueError("prepare: a judge draws no pictures; use a recipe whose model does")
    if recipe.prepare is None:
        example = (
            "configs/text_to_image/quickstart.yaml has one with a judge"
            if isinstance(recipe.model, ImageModel)
            else "for example {kind: povid, source: {path: answers.jsonl}}"
        )
        raise ValueError(f"prepare: the recipe has no such section; add one: {example}")
    if writer is not None and not isinstance(recipe.prepare, PrepareResponses):
        raise ValueError("prepare: text-to-image models draw and judge images; they take no function for responses")
    preflight.check(recipe, data=False)
    if isinstance(recipe.prepare, PrepareResponses):
        return prepare_responses(recipe, writer=writer)
    assert isinstance(recipe.prepare, PrepareImages)
    return prepare_images(recipe)
