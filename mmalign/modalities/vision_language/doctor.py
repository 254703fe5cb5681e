"""Inputs of the data doctor from a vision-language recipe: evaluation images, the model's tokenizer."""

from __future__ import annotations

from functools import partial

from mmalign.config import EvaluateResponses, Recipe, ResponseData, ResponseModel
from mmalign.doctor.corpus import EvaluationInputs, NotChecked, RecipeInputs, ResponseTokens
from mmalign.families.loading import load_processor
from mmalign.modalities.loading import disable_progress_bars, find_local
from mmalign.modalities.vision_language.benchmark import read_benchmark


def doctor_inputs(recipe: Recipe) -> RecipeInputs:
    """Return the images of the recipe's evaluation, and the model's tokenizer if the model is local."""
    return RecipeInputs(_evaluation(recipe), NotChecked("responses have no captions"), _tokens(recipe))


def _tokens(recipe: Recipe) -> ResponseTokens | NotChecked:
    assert isinstance(recipe.data, ResponseData) and isinstance(recipe.model, ResponseModel)
    model = recipe.model
    try:
        disable_progress_bars()
        folder = find_local(model.path, model.revision)
        processor = load_processor(folder, model.revision, model.template_arguments)
    except ValueError as error:
        return NotChecked(str(error))
    return ResponseTokens(processor, min(processor.max_length, recipe.data.max_length or processor.max_length))


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
