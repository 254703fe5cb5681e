"""Inputs of the data doctor from a vision-language recipe: evaluation images, the model's tokenizer."""

from __future__ import annotations

from functools import partial

from mmalign.config import EvaluateResponses, Recipe, ResponseData, ResponseModel
from mmalign.doctor.corpus import EvaluationInputs, NotChecked, RecipeInputs, ResponseTokens
from mmalign.methods import requirements_of
from mmalign.modalities.vision_language.benchmark import read_benchmark
from mmalign.modalities.vision_language.model import load_local_processor, token_limit


def doctor_inputs(recipe: Recipe) -> RecipeInputs:
    """Return the images of the recipe's evaluation, and the model's tokenizer if the model is local."""
    return RecipeInputs(_evaluation(recipe), NotChecked("responses have no captions"), _tokens(recipe))


def _tokens(recipe: Recipe) -> ResponseTokens | NotChecked:
    assert isinstance(recipe.data, ResponseData) and isinstance(recipe.model, ResponseModel)
    try:
        processor = load_local_processor(recipe.model)
    except ValueError as error:
        return NotChecked(str(error))
    # What the method generates needs room after the prompt
    return ResponseTokens(processor, token_limit(processor, recipe.data) - requirements_of(recipe.method).new_tokens)


def _evaluation(recipe: Recipe) -> EvaluationInputs | NotChecked:
    section = recipe.evaluate
    if section is None:
        return NotChecked("the recipe has no validation split and no evaluation")
    assert isinstance(section, EvaluateResponses)
    if section.benchmark == "implicit":
        return EvaluationInputs()
    if section.answers is not None and section.images is None:
        return NotChecked("evaluate.answers are scored without images")
    try:
        benchmark = read_benchmark(section)
    except ValueError as error:
        return NotChecked(str(error))
    # Each image once, however many questions ask about it
    names = dict.fromkeys(question.image for question in benchmark.questions)
    return EvaluationInputs(images=[(name, partial(benchmark.images, name)) for name in names])
