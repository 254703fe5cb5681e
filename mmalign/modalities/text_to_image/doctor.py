"""Inputs of the data doctor from a text-to-image recipe: evaluation prompts, the text encoder's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmalign.config import EvaluateImages, Recipe
from mmalign.doctor.corpus import EvaluationInputs, NotChecked, RecipeInputs
from mmalign.families.loading import load_tokenizers
from mmalign.modalities.loading import disable_progress_bars, find_local
from mmalign.modalities.prompts import load_prompts
from mmalign.modalities.text_to_image.model import pipeline_path


def doctor_inputs(recipe: Recipe) -> RecipeInputs:
    """Return the prompts of the recipe's evaluation, and the count of prompts that its text encoder cuts."""
    no_responses = NotChecked("the pairs have no responses")
    count = count_truncated(pipeline_path(recipe.model), recipe.model.revision, recipe.model.family)
    return RecipeInputs(_evaluation(recipe), count, no_responses)


def count_truncated(
    name: str, revision: str | None, outside: str | None = None
) -> Callable[[Sequence[str]], int] | NotChecked:
    """Return a function that counts the prompts that a pipeline's text encoder cuts, if the pipeline is local."""
    try:
        disable_progress_bars()
        return load_tokenizers(find_local(name, revision), revision, outside).count_truncated
    except ValueError as error:
        return NotChecked(str(error))


def _evaluation(recipe: Recipe) -> EvaluationInputs | NotChecked:
    section = recipe.evaluate
    if not isinstance(section, EvaluateImages):
        return NotChecked("the recipe has no validation split and no evaluation with prompts")
    if section.benchmark == "implicit":
        return EvaluationInputs()
    try:
        prompts = load_prompts("evaluate.prompts", section.prompts, section.split, section.seed)
        return EvaluationInputs([prompt.text for prompt in prompts])
    except ValueError as error:
        return NotChecked(str(error))
