"""Annotators whose tastes a judge of images learns: those of a new judge, or new ones of a trained judge."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmalign.config import ImageJudgeModel, Recipe
from mmalign.config.training import AnnotatorsConfig
from mmalign.data.data_module import Splits
from mmalign.data.formats.files import listed
from mmalign.data.pairs import ImagePair, Pairs
from mmalign.data.splits import split
from mmalign.families.image_judge import ImageJudge
from mmalign.methods import Requirements, requirements_of
from mmalign.modalities.text_to_image import data
from mmalign.rewards._annotators import AnnotatorMixture, load_mixture

logger = logging.getLogger(__name__)


def check_rows(recipe: Recipe) -> None:
    """Check that the method learns from rows that can have an annotator.

    Raises:
        ValueError: it learns from lists.
    """
    model = _model(recipe)
    key = "model.tune: annotators" if model.tune == "annotators" else "model.annotators"
    if _learns(model) and requirements_of(recipe.method).learns_from != "pairs":
        raise ValueError(f"{key}: lists have no annotators; use method.rows: pairs, or leave it out")


def mixture_of(model: ImageJudgeModel) -> AnnotatorMixture:
    """Return the mixture of the judge to which a recipe adds annotators.

    Raises:
        ValueError: the judge has none, or one prototype alone, or its file is damaged.
    """
    mixture = load_mixture(model.path)
    if mixture is None:
        raise ValueError(
            f"model.tune: annotators: the judge {model.path} has no annotators to add any to; name the folder of a "
            "judge that was trained with model.annotators as model.path, or train one first with model.annotators: {}"
        )
    if mixture.prototypes == 1:
        raise ValueError(
            f"model.tune: annotators: the judge {model.path} has one prototype, which everybody shares; expected at "
            "least two; train a judge with model.annotators.prototypes: 2 first"
        )
    return mixture


def open_pairs(recipe: Recipe, needs: Requirements) -> Splits:
    """Return the recipe's pairs; with `tune: annotators` those of new annotators alone, since no others teach anything.

    Raises:
        ValueError: files or columns are missing, no pair remains, or none is of a new annotator.
    """
    model = _model(recipe)
    if model.tune != "annotators":
        return data.open_pairs(recipe, needs)
    whole = recipe.data.model_copy(update={"validation_fraction": 0.0, "limit": None})
    pairs, _ = data.open_pairs(recipe.model_copy(update={"data": whole}), needs)
    new = _new_names(recipe, pairs)
    annotators = pairs.annotators()
    kept = pairs.select(np.flatnonzero([name in new for name in annotators]))
    if left := len(pairs) - len(kept):
        logger.info(
            f"model.tune: annotators: {left:,} of {len(pairs):,} pairs have no annotator to add and are left out"
        )
    return split(kept[: recipe.data.limit], recipe.data.validation_fraction, recipe.train.seed)


def _new_names(recipe: Recipe, pairs: Pairs[ImagePair]) -> Sequence[str]:
    """Return the annotators to add: those that the recipe names, or all of the pairs that the judge does not know.

    Raises:
        ValueError: there is none, or the judge knows one that the recipe names.
    """
    model = _model(recipe)
    known, numbers = mixture_of(model).names, _count(recipe, pairs, "model.tune: annotators")
    named = model.annotators.names if model.annotators is not None else []
    if old := [name for name in named if name in known]:
        raise ValueError(
            f"model.annotators.names: {model.path} has the annotator {listed(old)} already, and tune: annotators "
            "changes nobody's shares; name new annotators, or leave names out to take all"
        )
    _check_names(named, numbers, pairs)
    new = named or [name for name in sorted(numbers) if name not in known]
    if not new:
        raise ValueError(
            f"model.tune: annotators: {pairs.source} has pairs of {listed(sorted(numbers))}, whom {model.path} knows "
            "already; give pairs of somebody new under a name of their own, or train the judge again with "
            "model.annotators"
        )
    return new


def name_annotators(recipe: Recipe, pairs: Pairs[ImagePair]) -> Recipe:
    """Return the recipe with the annotators whose tastes it learns: those that it names, or all of the pairs.

    Raises:
        ValueError: no pair has an annotator, none has one that the recipe names, or the recipe would change the
            prototypes of a trained judge.
    """
    model = _model(recipe)
    if not _learns(model):
        return recipe
    settings = model.annotators or AnnotatorsConfig()
    if model.tune == "annotators":
        settings = _as_trained(settings, model)
    numbers = _count(recipe, pairs, "model.annotators")
    _check_names(settings.names, numbers, pairs)
    names = settings.names or sorted(numbers)
    least, most = (extreme(numbers[name] for name in names) for extreme in (min, max))
    others = len(pairs) - sum(numbers[name] for name in names)
    rest = f"; {others:,} pairs have another annotator or none, and the mean taste" if others else ""
    logger.info(f"model.annotators: {len(names):,} annotators with {least:,} to {most:,} pairs each{rest}")
    settings = settings.model_copy(update={"names": names})
    return recipe.model_copy(update={"model": model.model_copy(update={"annotators": settings})})


def _as_trained(settings: AnnotatorsConfig, model: ImageJudgeModel) -> AnnotatorsConfig:
    """Return the settings with the number of prototypes and the form of the trained judge."""
    mixture = mixture_of(model)
    own = {"prototypes": mixture.prototypes, "form": mixture.form}
    given = settings.model_dump(include={*own} & settings.model_fields_set)
    for key, value in given.items():
        if value != own[key]:
            raise ValueError(
                f"model.annotators.{key}: got {value}; {model.path} has {own[key]}, which tune: annotators keeps; "
                "leave it out"
            )
    return settings.model_copy(update=own)


def add_annotators(family: ImageJudge, recipe: Recipe) -> None:
    """Add the annotators that the recipe names, if it learns their tastes."""
    model = _model(recipe)
    settings = model.annotators
    if settings is None:
        return
    if model.tune == "annotators":
        family.extend_annotators(settings.names)
    else:
        family.add_annotators(
            settings.names, prototypes=settings.prototypes, form=settings.form, seed=recipe.train.seed
        )


def _model(recipe: Recipe) -> ImageJudgeModel:
    assert isinstance(recipe.model, ImageJudgeModel)
    return recipe.model


def _learns(model: ImageJudgeModel) -> bool:
    """Return whether a recipe learns tastes of annotators."""
    return model.annotators is not None or model.tune == "annotators"


def _count(recipe: Recipe, pairs: Pairs[ImagePair], key: str) -> Counter[str]:
    """Return the number of pairs of each annotator.

    Raises:
        ValueError: no pair has an annotator.
    """
    numbers = Counter(pairs.annotators())
    del numbers[""]
    if not numbers:
        column = recipe.data.columns.get("annotator", "annotator")
        idle = f"; nothing reads {listed(pairs.unread)}" if pairs.unread else ""
        raise ValueError(
            f"{key}: no pair of {pairs.source} has a name in the column {column!r}{idle}; map the column with "
            "data.columns, such as {annotator: user_id}, or leave it out (the layout scores has no annotators)"
        )
    return numbers


def _check_names(names: Sequence[str], numbers: Counter[str], pairs: Pairs[ImagePair]) -> None:
    """Check that every annotator that a recipe names has a pair.

    Raises:
        ValueError: one has none.
    """
    if missing := [name for name in names if name not in numbers]:
        raise ValueError(
            f"model.annotators.names: no pair of {pairs.source} has the annotator {listed(missing)} (found "
            f"{listed(sorted(numbers))}); correct the name, or leave names out to take all"
        )
