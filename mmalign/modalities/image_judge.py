"""The judge of images: a CLIP trained on preferences, and audited on held-out ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from mmalign.config import EvaluateJudge, ImageJudgeModel, Model, Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.fill import fill
from mmalign.data.data_module import DataModule, Splits, open_loaders, summarize
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import JudgedImages
from mmalign.data.loaders.judged_images import JudgedImageReader, encode_features
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.data.pairs import ImagePair, output_names, stable_hash
from mmalign.doctor.corpus import NotChecked, RecipeInputs
from mmalign.evaluation.benchmarks import judge, judge_annotators, judge_attributes
from mmalign.evaluation.judged_rows import judge_rows
from mmalign.evaluation.metrics import SIDES
from mmalign.families import image_judge
from mmalign.families.image_judge import NOT_COMPILED, ClipScorer, ImageJudge
from mmalign.families.types import Loading
from mmalign.modalities import DataRequest, Measure, Result, annotators, loading, step_judge
from mmalign.modalities.text_to_image import check
from mmalign.pages.examples import DataView, ExampleSide, TrainingExample
from mmalign.policy import Policy
from mmalign.resources import located
from mmalign.rewards import RewardModel
from mmalign.training.processes import current_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

UNREAD = {"resolution", "fit", "crop", "flip"}  # settings of `data`: a judge has its own preprocessing


def check_recipe(recipe: Recipe) -> None:
    """Check the settings that depend on the modality.

    Raises:
        ValueError: the recipe compiles the network, packs responses, or cuts images.
    """
    if recipe.train.compile:
        raise ValueError(NOT_COMPILED)
    assert isinstance(recipe.model, ImageJudgeModel)
    annotators.check_rows(recipe)
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
        ValueError: it is not found, or has no annotators to which the recipe could add any.
    """
    located("model.path", model.path)
    assert isinstance(model, ImageJudgeModel)
    if model.tune == "annotators":
        annotators.mixture_of(model)


def load_family(model: Model, options: Loading) -> ImageJudge:
    """Load the CLIP to train.

    Raises:
        ValueError: it cannot be loaded or trained.
    """
    assert isinstance(model, ImageJudgeModel)
    return image_judge.load(
        model.path,
        options,
        head_only=model.head is not None,
        random=model.weights == "random",
        shares_only=model.tune == "annotators",
        attributes=model.attributes,
    )


def describe_head(model: Model, _: object) -> dict[str, str]:
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


def build_data_module(family: ImageJudge, request: DataRequest) -> DataModule:
    """Return the loaders of the rows, with features from a filled cache if the last layers alone are trained."""
    recipe, splits, accelerator, *_ = request
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
    assert isinstance(recipe.model, ImageJudgeModel)
    names = list(recipe.model.attributes)  # an older judge's have no ratings here
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
    open_pairs=annotators.open_pairs,
    build_data_module=build_data_module,
    show=show_pairs,
    open_benchmark=open_benchmark,
    doctor_inputs=lambda _: RecipeInputs(*[NotChecked("the judge's own tokenizer cuts prompts")] * 3),
    example_evaluation="{benchmark: judge}",
    name_annotators=annotators.name_annotators,
    add_heads=annotators.add_annotators,
)
