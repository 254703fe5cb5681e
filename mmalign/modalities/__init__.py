"""Modalities: text-to-image, vision-language and the step judge, one object each with all that differs between them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.config import Data, Model, Recipe
from mmalign.config.methods import find_method
from mmalign.data.data_module import DataModule, Splits
from mmalign.evaluation.metrics import Metrics, Table
from mmalign.families.base import Family
from mmalign.families.types import Loading
from mmalign.pages.page import GalleryEntry, PageLayout
from mmalign.policy import Policy
from mmalign.synthesis.rejected_responses import Writer

Result = tuple[dict[str, Any], Table]  # the content of result.json, and a table of it
# Measures a policy, with a folder for files and the identity of the evaluation.
Measure = Callable[[Policy[Any], Path, Mapping[str, Any]], Result]
Sample = Mapping[str, Any]  # an entry of samples.json


@dataclass(frozen=True)
class Samples:
    """Samples of an evaluation, for the commands `gallery` and `compare`.

    Attributes:
        unavailable_reason: the reason why the recipe's evaluation has no samples, or None.
        layout: layout of the page.
        entries: entries of these samples, given as (index, sample), from the evaluation's folder.
        provenance: settings behind the samples, of which there are so many.
        metrics: metrics of an evaluated run, before and after alignment.
        outputs: name of the folder in which several runs share the base model's outputs.
        write_images: write images of runs, given by name, beside the table's file; None for a modality without images.
    """

    unavailable_reason: Callable[[Recipe], str | None]
    layout: PageLayout
    entries: Callable[[Recipe, Path, Sequence[tuple[int, Sample]]], list[GalleryEntry]]
    provenance: Callable[[Recipe, int], dict[str, str]]
    metrics: Callable[[Recipe], tuple[list[Metrics], list[Metrics]]]
    outputs: str
    write_images: Callable[[Path, Mapping[str, Recipe]], None] | None = None


@dataclass(frozen=True)
class Modality:
    """Functions and texts of one modality.

    Attributes:
        check: check the recipe's sections without loading a model; raises ValueError.
        check_data: check that the pairs' files exist and have their columns; raises ValueError.
        check_model: check the model's paths and class, perhaps with a query to the Hub; raises ValueError.
        uncacheable_reason: the reason why nothing of this data can be cached, or None.
        load_family: load a model with these options.
        frozen_models: paths of the models besides `model.path` that a run depends on, by key.
        open_pairs: open the pairs without decoding an image: training split and validation split or None.
        build_data_module: open pairs, caches and loaders for a family.
        unusable_rows: the noun phrase for rows that no process can use.
        open_benchmark: open a recipe's benchmark before any model is loaded; the result measures a policy.
        score_files: score existing answers that a section names without a model; None where it names none.
        samples: samples of an evaluation; None for a modality that has only numbers.
        prepare: write preference pairs to `data.path`; None for a model that generates nothing.
        takes_writer: True if `prepare` takes a user function for rejected responses.
        example_evaluation: an `evaluate` section, for error messages.
        example_preparation: a `prepare` section, for error messages.
    """

    check: Callable[[Recipe], None]
    check_data: Callable[[Data], None]
    check_model: Callable[[Model], None]
    uncacheable_reason: Callable[[Data], str | None]
    load_family: Callable[[Model, Loading], Family]
    frozen_models: Callable[[Model], dict[str, str]]
    open_pairs: Callable[..., Splits]
    build_data_module: Callable[..., DataModule]
    unusable_rows: str
    open_benchmark: Callable[[Recipe, torch.device], Measure]
    score_files: Callable[[Recipe], Result | None]
    samples: Samples | None
    prepare: Callable[[Recipe, Writer | None], Path] | None
    takes_writer: bool
    example_evaluation: str
    example_preparation: str


def modality_of(recipe: Recipe) -> Modality:
    """Return the modality of the recipe's method."""
    name, _ = find_method(recipe.method.name)
    modality: Modality = importlib.import_module(f"{__name__}.{name}").MODALITY
    return modality
