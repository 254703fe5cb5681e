"""The judge of images: a CLIP trained on preferences, and audited on held-out ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.config import EvaluateJudge, ImageJudgeModel, Model, Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.fill import fill
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.data.data_module import DataModule, Splits, open_loaders, summarize
from mmalign.data.formats.files import listed
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import JudgedImages
from mmalign.data.loaders.judged_images import JudgedImageReader, encode_features
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.data.pairs import ImagePair, Pairs, output_names, stable_hash
from mmalign.doctor.corpus import NotChecked, RecipeInputs
from mmalign.evaluation.benchmarks import judge, judge_annotators, judge_attributes
from mmalign.evaluation.judged_rows import judge_rows
from mmalign.evaluation.metrics import SIDES
from mmalign.families import image_judge
from mmalign.families.image_judge import NOT_COMPILED, ClipScorer, ImageJudge
from mmalign.families.types import Loading
from mmalign.methods import Requirements, requirements_of
from mmalign.modalities import Measure, Result, loading, step_judge
from mmalign.modalities.prompts import located
from mmalign.modalities.text_to_image import check
from mmalign.pages.examples import DataView, ExampleSide, TrainingExample
from mmalign.policy import Policy
from mmalign.rewards import RewardModel
from mmalign.training.processes import current_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

UNREAD = {"resolution", "fit", "crop", "flip"}  # settings of `data`: a judge has its own preprocessing


def check_recipe(recipe: Recipe) -> None:
    """Check the settings that depend on the modality.

    Raises:
        ValueError: the recipe compiles the network, packs responses, or cuts images.
    """
    if recipe.train.compile:
        raise ValueError(NOT_COMPILED)
    assert isinstance(recipe.model, ImageJudgeModel)
    if recipe.model.annotators is not None and requirements_of(recipe.method).learns_from != "pairs":
        raise ValueError("model.annotators: lists have no annotators; use method.rows: pairs, or leave it out")
    check.check_packing(recipe)
    given = list(recipe.data.model_dump(include=UNREAD, exclude_defaults=True))
    if given:
        raise ValueError(
            f"data.{given[0]}: means nothing here: a judge's own preprocessing scales and cuts images; leave "
            f"{' and '.join(given)} out"
        )


def check_evaluation(recipe: Recipe) -> None:
    """Check the judge to compare with.

    Raises:
        ValueError: it is missing or invalid.
    """
    section = recipe.evaluate
    if isinstance(section, EvaluateJudge) and section.reward is not None:
        loading.check_reward_model("evaluate.reward", section.reward)


def check_model(model: Model) -> None:
    """Check the model's path.

    Raises:
        ValueError: it is not found.
    """
    located("model.path", model.path)


def load_family(model: Model, options: Loading) -> ImageJudge:
    """Load the CLIP to train.

    Raises:
        ValueError: it cannot be loaded or trained.
    """
    assert isinstance(model, ImageJudgeModel)
    head, random = model.head is not None, model.weights == "random"
    return image_judge.load(model.path, options, head_only=head, random=random, attributes=model.attributes)


def describe_head(model: Model) -> dict[str, str]:
    """Return the part of the network that is trained, if it is not all of it, the attributes and the mixture."""
    assert isinstance(model, ImageJudgeModel)
    parts, mixture = dict[str, str](), model.annotators
    if model.head is not None:
        parts["head"] = model.head
    if model.attributes:
        parts["attributes"] = json.dumps(model.attributes)
    if mixture is not None:
        names = f"{len(mixture.names)} annotators ({stable_hash(*mixture.names):x})"
        parts["annotators"] = f"{mixture.prototypes} prototypes by {mixture.form}, {names}"
    return parts


def name_annotators(recipe: Recipe, pairs: Pairs[ImagePair]) -> Recipe:
    """Return the recipe with the annotators whose tastes it learns: those that it names, or all of the pairs.

    Raises:
        ValueError: no pair has an annotator, or none has one that the recipe names.
    """
    model = recipe.model
    assert isinstance(model, ImageJudgeModel)
    if model.annotators is None:
        return recipe
    numbers = Counter(pairs.annotators())
    unnamed, known = numbers.pop("", 0), sorted(numbers)
    if not known:
        column = recipe.data.columns.get("annotator", "annotator")
        idle = f"; nothing reads {listed(pairs.unread)}" if pairs.unread else ""
        raise ValueError(
            f"model.annotators: no pair of {pairs.source} has a name in the column {column!r}{idle}; map the column "
            "with data.columns, such as {annotator: user_id}, or leave model.annotators out (the layout scores has no "
            "annotators)"
        )
    names = model.annotators.names or known
    if missing := [name for name in names if name not in numbers]:
        raise ValueError(
            f"model.annotators.names: no pair of {pairs.source} has the annotator {listed(missing)} (found "
            f"{listed(known)}); correct the name, or leave names out to take all"
        )
    least, most = (extreme(numbers[name] for name in names) for extreme in (min, max))
    others = unnamed + sum(number for name, number in numbers.items() if name not in names)
    rest = f"; {others:,} pairs have another annotator or none, and the mean taste" if others else ""
    logger.info(f"model.annotators: {len(names):,} annotators with {least:,} to {most:,} pairs each{rest}")
    settings = model.annotators.model_copy(update={"names": names})
    return recipe.model_copy(update={"model": model.model_copy(update={"annotators": settings})})


def add_heads(family: ImageJudge, recipe: Recipe) -> None:
    """Add the mixture of the annotators that the recipe names, if it learns their tastes."""
    assert isinstance(recipe.model, ImageJudgeModel)
    settings = recipe.model.annotators
    if settings is not None:
        family.add_annotators(
            settings.names, prototypes=settings.prototypes, form=settings.form, seed=recipe.train.seed
        )


def build_data_module(
    family: ImageJudge,
    recipe: Recipe,
    splits: Splits,
    accelerator: Accelerator,
    needs: Requirements,
    *,
    spec: PrecomputeSpec | None = None,
    reward_model: Any = None,
) -> DataModule:
    """Return the loaders of the rows, with features from a filled cache if the last layers alone are trained.

    The arguments and errors are those of `DataModuleBuilder`.
    """
    data = recipe.data
    features = None
    if family.head_only and data.cache != "off":
        features = _fill_features(family, recipe, splits, accelerator)

    def encode(batch: JudgedImages) -> JudgedImages:
        return batch.to(family.loading.device)

    loaders = open_loaders(
        JudgedImageReader(family.preprocess, features),
        splits,
        accelerator,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        num_workers=data.num_workers,
        max_bad=data.max_bad,
    )
    return DataModule(encode, *loaders, summarize(splits), latents=features)


def _fill_features(family: ImageJudge, recipe: Recipe, splits: Splits, accelerator: Accelerator) -> ArrayCache:
    """Return the cache of the vision tower's features, filled; the processes share the images."""
    depends = {
        "network": fingerprint.fingerprint_network(family.network),
        "preprocessing": fingerprint.fingerprint_settings(family.parts.config),
        "autocast": str(family.loading.half),
    }
    cache = ArrayCache.open(cache_folder(recipe.data, Path(recipe.output)) / "features", depends)
    images = {ref.key: ref for pairs in splits if pairs is not None for pair in pairs for ref in pair.outputs}
    rank, world_size = accelerator.process_index, accelerator.num_processes
    share = [images[key] for key in cache.share(images, rank=rank, world_size=world_size)]
    steps = encode_features(share, family.preprocess, family.inputs, recipe.data.num_workers)
    fill(cache, steps, len(share), "encode images", accelerator)
    return cache


def show_pairs(recipe: Recipe, splits: Splits, number: int) -> DataView:
    """Return the first examples, before the judge's own preprocessing."""
    train = splits[0]
    order = EpochSampler(len(train), 1, recipe.train.seed).order(0)
    facts = [f"{len(set(train.prompts())):,} different prompts"]
    return DataView(facts, [_example(train[place]) for place in order[:number]])


def _example(pair: ImagePair) -> TrainingExample:
    try:
        images = [decode(ref) for ref in pair.outputs]
    except BadImage as error:
        return TrainingExample(pair.location, pair.prompt, skipped=[str(error)])
    names = output_names(len(images), pair.scores)
    sides = [
        ExampleSide(name, f"{image.width}x{image.height}", images={"before preprocessing": image})
        for name, image in zip(names, images, strict=True)
    ]
    return TrainingExample(pair.location, pair.prompt, sides)


def open_benchmark(recipe: Recipe, device: torch.device, splits: Splits | None) -> Measure:
    """Load the judge to compare with, if there is one; return the audit on the validation split.

    Raises:
        ValueError: the judge cannot be loaded.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateJudge) and splits is not None and splits[1] is not None
    pairs, batch_size, other = splits[1], recipe.train.batch_size, None
    if section.reward is not None:
        # Scores of several processes are not stored: each judges images of its own
        scores = Path(recipe.output) / "scores" if current_processes().size == 1 else None
        allow_pickle = recipe.allow_pickle
        other = loading.build_reward_model(section.reward, device, allow_pickle=allow_pickle, scores=scores)
        if loading.comparing_parts(section.reward):
            batch_size = 1  # its scores compare the images of a call

    def measure(policy: Policy[ImageJudge], *_: object) -> Result:
        rows = judge_rows(pairs, partial(_scores, policy, other), batch_size=batch_size)
        comparisons = judge.compare_images(pairs, rows)
        result, table = judge.audit(comparisons, section.bins)
        mixture = _network(policy).annotators
        if mixture is not None:
            shares = dict(zip(mixture.names, mixture.shares().tolist(), strict=False))  # the last row is the mean
            result["annotators"], lines = judge_annotators.audit(pairs, comparisons, shares)
            table += lines
        names = list(policy.family.network.attributes.scales) if policy.family.network.attributes is not None else []
        errors, lines = judge_attributes.audit(pairs, rows, names)
        return {**result, **({"attributes": errors} if names else {})}, table + lines

    return measure


def _network(policy: Policy[ImageJudge]) -> ClipScorer:
    """Return the trained network."""
    assert isinstance(policy.unwrapped, ClipScorer)
    return policy.unwrapped


@torch.no_grad()
def _scores(
    policy: Policy[ImageJudge],
    other: RewardModel | None,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    annotators: Sequence[str],
) -> dict[str, Tensor]:
    """Return the scores [N] of images by the judge before and after training, for their annotators, and by another."""
    family, mixture = policy.family, _network(policy).annotators
    places = mixture.places(annotators) if mixture is not None else None
    inputs = family.inputs(torch.stack([family.preprocess(image) for image in images]))
    run: Callable[..., Tensor] = partial(family.score, images=inputs, text=family.text_inputs(prompts))
    before, values = (
        policy.on_reference(run),
        family.judge(policy.unwrapped, inputs, family.text_inputs(prompts), places),
    )
    assert before is not None
    scores = dict(zip(SIDES, (before, values[:, 0]), strict=True))
    if mixture is not None:
        scores[judge_annotators.MEAN] = run(policy.unwrapped)
    if family.network.attributes is not None:
        columns = map(judge_attributes.column, family.network.attributes.scales)
        scores |= dict(zip(columns, values[:, 1:].T, strict=True))
    return scores if other is None else {**scores, judge.OTHER: other(images, prompts)}


MODALITY = replace(
    step_judge.MODALITY,
    check=check_recipe,
    check_evaluation=check_evaluation,
    loading_hint=lambda _, folder, __: f"reward: {{name: open_clip, path: {folder}}}",
    loaded_by="open_clip",
    pipeline_tag="zero-shot-image-classification",
    check_model=check_model,
    load_family=load_family,
    model_dependencies=describe_head,
    build_data_module=build_data_module,
    show=show_pairs,
    open_benchmark=open_benchmark,
    doctor_inputs=lambda _: RecipeInputs(*[NotChecked("the judge's own tokenizer cuts prompts")] * 3),
    example_evaluation="{benchmark: judge}",
    name_annotators=name_annotators,
    add_heads=add_heads,
)
