"""Modalities: text-to-image, vision-language and judges of images, one object each with all that differs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar

import torch
from annotated_types import Len
from PIL import Image
from torch import nn
from typing_extensions import TypedDict

from mmalign.config import Model, Recipe
from mmalign.config.methods import find_method
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.data.data_module import DataModule, Splits
from mmalign.data.pairs import Pairs
from mmalign.doctor.corpus import RecipeInputs
from mmalign.evaluation.metrics import Metrics, Table
from mmalign.families.base import Family
from mmalign.families.types import Loading
from mmalign.methods import Requirements
from mmalign.pages.examples import DataView
from mmalign.pages.page import GalleryEntry, PageLayout
from mmalign.policy import Policy
from mmalign.reading import read_as
from mmalign.synthesis.rejected_responses import Writer

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLES = "samples.json"  # in the folder of an evaluation
EVALUATE_AGAIN = "run `mmalign evaluate` with this recipe again"

Result = tuple[dict[str, Any], Table]  # the content of result.json, and a table of it
# Measures a policy, with a folder for files and the identity of the evaluation.
Measure = Callable[[Policy[Any], Path, Mapping[str, Any]], Result]
Output = Image.Image | str  # of a model: an image or an answer
Sample = Mapping[str, Any]  # an entry of samples.json
S = TypeVar("S", bound=Sample)


class SamplesFile(TypedDict, Generic[S]):
    """Content of samples.json: the evaluation's identity, the name of its score, a table, and at least one sample."""

    of: dict[str, object]
    score: str
    table: Table
    samples: Annotated[list[S], Len(min_length=1)]


def read_samples(kind: type[SamplesFile[S]], evaluation: Path) -> SamplesFile[S]:
    """Read the samples of an evaluation's folder.

    Raises:
        ValueError: the file cannot be read, or is damaged.
    """
    return read_as(kind, evaluation / SAMPLES, EVALUATE_AGAIN)


@dataclass(frozen=True)
class Samples:
    """Samples of an evaluation, for the commands `gallery` and `compare`.

    Attributes:
        unavailable_reason: the reason why the recipe's evaluation has no samples, or None.
        layout: layout of the page.
        read: read the samples of an evaluation's folder; raises ValueError.
        entries: entries of these samples, given as (index, sample), from the evaluation's folder.
        provenance: settings behind the samples, of which there are so many.
        benchmark_of: the benchmark of a sample, where an evaluation has several; each has a bar on the page.
        metrics: metrics of an evaluated run, before and after alignment.
        outputs: name of the folder in which several runs share the base model's outputs.
        best_of: metrics of the base model's best of n outputs in an evaluated run, by n.
        write_images: write images of runs, given by name, beside the table's file; None for a modality without images.
    """

    unavailable_reason: Callable[[Recipe], str | None]
    layout: PageLayout
    read: Callable[[Path], SamplesFile[Any]]
    entries: Callable[[Recipe, Path, Sequence[tuple[int, Sample]]], list[GalleryEntry]]
    provenance: Callable[[Recipe, int], dict[str, str]]
    metrics: Callable[[Recipe], tuple[list[Metrics], list[Metrics]]]
    outputs: str
    benchmark_of: Callable[[Sample], str] = lambda _: ""
    best_of: Callable[[Recipe], Mapping[int, list[Metrics]]] = lambda _: {}
    write_images: Callable[[Path, Mapping[str, Recipe]], None] | None = None


@dataclass(frozen=True)
class Example:
    """Batches like those of a recipe's training, for a model that has shapes alone.

    Attributes:
        batch: the encoded batch of so many pairs.
        cache_bytes: bytes on the disk by cache.
        leaving: encoders that leave the device once their outputs are cached.
        about: the size of an example, as a noun phrase.
        remedies: assignments that save memory in this modality alone, in the order to try them.
        apart: true if only one network is on the device at a time before training.
    """

    batch: Callable[[int], Any]
    cache_bytes: dict[str, int]
    leaving: Sequence[str]
    about: str
    remedies: tuple[str, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Previews:
    """Few inputs whose outputs are generated again and again while a model trains.

    Attributes:
        titles: the prompts or questions.
        images: the image of each question, or the source of each edit; empty for prompts alone.
        settings: all that the outputs depend on besides weights and titles, as JSON.
        generate: generate an output for each with a network in eval mode, always from the same random numbers.
        are_texts: true if the outputs are texts, false if they are images.
    """

    titles: Sequence[str]
    images: Sequence[Image.Image | None]
    settings: Mapping[str, object]
    generate: Callable[[nn.Module], Sequence[Output]]
    are_texts: bool = False


class DataRequest(NamedTuple):
    """Pairs of a recipe, and all that their loaders and caches depend on.

    Attributes:
        recipe: the recipe; its output folder holds the caches under `data.cache: auto`.
        splits: the result of `Modality.open_pairs`.
        accelerator: the accelerator, for this process's index.
        needs: inputs that the batches must have.
        spec: tensors that are precomputed for the method; the caller fills their cache.
        reward_model: the RewardModel of images, or the ResponseJudge.
    """

    recipe: Recipe
    splits: Splits
    accelerator: Accelerator
    needs: Requirements
    spec: PrecomputeSpec | None = None
    reward_model: Any = None


@dataclass(frozen=True)
class Modality:
    """Functions and texts of one modality.

    Attributes:
        check: check the settings of training without loading a model; raises ValueError.
        check_evaluation: check the section `evaluate`; raises ValueError.
        check_preparation: check the section `prepare`; raises ValueError.
        loading_hint: the call that loads a trained model from its folder in other programs, by `model.tune` and the
            form of an export; an empty form is that of the run itself.
        loaded_by: the package that loads a trained model, by its name on the Hub.
        pipeline_tag: the model's task, by its name on the Hub.
        check_data: check that the pairs' files exist and have their columns; raises ValueError.
        check_model: check the model's paths and class, perhaps with a query to the Hub; raises ValueError.
        load_family: load a model with these options.
        model_dependencies: what a run depends on besides the weights of its network, by key: settings of the model, and
            its other parts as loaded.
        open_pairs: open pairs that meet the requirements, without decoding an image: (training split, validation split
            or None); raises ValueError if files or columns are missing, or no pair is left.
        build_data_module: open caches and loaders of pairs for a model that encodes their batches, and fill the caches
            of latents and text; raises ValueError if files, columns or caches do not fit, or more than `data.max_bad`
            rows are bad, or all.
        encode_example: encode batches like those of training, of pairs that are at hand or of usual ones, on a model
            that has shapes alone; None for a model that cannot be planned.
        show: the numbers of a recipe's pairs and so many examples as the model will see them, without its networks;
            raises ValueError if the model's configurations are not at hand.
        check_samples: check `train.samples`, where `train.sample_every` is given; raises ValueError.
        open_previews: open the inputs of `train.samples`, before encoders may leave the device; None for a model that
            generates nothing.
        open_benchmark: open a recipe's benchmark before any model is loaded; the result measures a policy. A benchmark
            on the validation split gets both splits.
        score_files: score existing answers that a section names without a model; None where it names none.
        doctor_inputs: inputs of data checks that the recipe names: its evaluation's prompts and images, the tokenizers.
        samples: samples of an evaluation; None for a modality that has only numbers.
        prepare: write preference pairs to `data.path`, perhaps with a user function for rejected responses; None for a
            model that generates nothing.
        example_evaluation: an `evaluate` section, for error messages.
        example_preparation: a `prepare` section, for error messages.
        name_annotators: name the annotators of the training pairs in a recipe that learns their tastes; raises
            ValueError if no pair has one.
        add_heads: add to a model's network what such a recipe learns of each annotator.
    """

    loading_hint: Callable[[str, Path, str], str]
    loaded_by: str
    pipeline_tag: str
    check_data: Callable[[Recipe], None]
    check_model: Callable[[Model], None]
    load_family: Callable[[Model, Loading], Family]
    model_dependencies: Callable[[Model, Any], dict[str, str]]
    open_pairs: Callable[[Recipe, Requirements], Splits]
    build_data_module: Callable[[Any, DataRequest], DataModule]
    show: Callable[[Recipe, Splits, int], DataView]
    check_samples: Callable[[Recipe], None]
    open_benchmark: Callable[[Recipe, torch.device, Splits | None], Measure]
    doctor_inputs: Callable[[Recipe], RecipeInputs]
    example_evaluation: str
    check: Callable[[Recipe], None] = lambda _: None
    check_evaluation: Callable[[Recipe], None] = lambda _: None
    check_preparation: Callable[[Recipe], None] = lambda _: None
    encode_example: Callable[[Any, Recipe, Requirements, Splits | None], Example] | None = None
    open_previews: Callable[[Any, Recipe, Splits], Previews] | None = None
    score_files: Callable[[Recipe], Result | None] = lambda _: None
    samples: Samples | None = None
    prepare: Callable[[Recipe, Writer | None], Path] | None = None
    example_preparation: str = ""
    name_annotators: Callable[[Recipe, Pairs[Any]], Recipe] = lambda recipe, _: recipe
    add_heads: Callable[[Any, Recipe], None] = lambda *_: None


def modality_of(recipe: Recipe) -> Modality:
    """Return the modality of the recipe's method."""
    name, _ = find_method(recipe.method.name)
    modality: Modality = importlib.import_module(f"{__name__}.{name}").MODALITY
    return modality
