"""Evaluation of a base and a trained text-to-image model on images of the same prompts and noise."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmalign import atomic_io
from mmalign.config import EvaluateImages, ImageModel, Recipe, SamplingConfig
from mmalign.config.evaluation import reward_models
from mmalign.data.caches import fingerprint
from mmalign.data.caches.images import ImageCache
from mmalign.data.data_module import Splits
from mmalign.evaluation.benchmarks import diversity, implicit_reward, preference, scenes
from mmalign.evaluation.generate_images import cache_settings, generate_images
from mmalign.evaluation.metrics import SIDES, Metrics, Table, compare
from mmalign.families.base import TextToImage
from mmalign.modalities import Measure, Result, loading
from mmalign.modalities.prompts import load_prompts
from mmalign.modalities.validation import implicit_reward_benchmark
from mmalign.policy import Policy
from mmalign.rewards import RewardModel

logger = logging.getLogger(__name__)


Sample = dict[str, Any]  # prompt, seed, and the measurements of the images before and after


def open_benchmark(recipe: Recipe, device: torch.device, splits: Splits | None) -> Measure:
    """Load the reward model; return the measure of a policy, for the benchmark `implicit` on the validation split.

    Raises:
        ValueError: the reward model cannot be read.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateImages)
    if section.benchmark == "implicit":
        assert splits is not None
        return implicit_reward_benchmark(recipe, splits, implicit_reward.image_scores, section.num_noise_samples)
    reward_model = None
    if section.reward is not None:
        reward_model = loading.build_reward_model(
            section.reward,
            device,
            allow_pickle=recipe.allow_pickle,
            combine=section.combine,
            scores=_folder(recipe, section) / "scores",
        )
    return partial(compare_images, recipe, reward_model)


def compare_images(
    recipe: Recipe,
    reward_model: RewardModel | None,
    policy: Policy[TextToImage],
    folder: Path,
    identity: Mapping[str, Any],
) -> Result:
    """Generate images with base and trained model from the same noise, and measure them.

    Args:
        recipe: the recipe, with a section `evaluate`.
        reward_model: the model that scores the images, if the section names one.
        policy: the trained model, with the base model as reference.
        folder: folder for the images and the gallery's `samples.json`.
        identity: identity of this evaluation, stored in `samples.json`.

    Returns:
        The content of `result.json`, and a table of it.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateImages)
    prompts, seeds = _prompts_and_seeds(section)
    num_truncated = policy.family.count_truncated(prompts)
    if num_truncated:
        logger.warning(f"{num_truncated} of {len(prompts)} prompts exceed the text encoder's limit and are truncated")

    # Images of both models
    caches = _caches(recipe, section, policy, identity)
    images = generate_both(policy, prompts, seeds, section.sampling, caches)
    samples: list[Sample] = [
        {"prompt": prompt, "seed": seed, "before": {}, "after": {}} for prompt, seed in zip(prompts, seeds, strict=True)
    ]

    # Measurements and files
    if reward_model is not None:  # in one call, so that votes compare the two models' images of a prompt
        rewards = reward_model([*images[0], *images[1]], [*prompts, *prompts]).tolist()
        for record, reward in zip((sample[side] for side in SIDES for sample in samples), rewards, strict=True):
            record.update(judged=reward, score=reward, note="")
    for side, side_images in zip(SIDES, images, strict=True):
        _measure(section, side_images, prompts, [sample[side] for sample in samples])
        (folder / side).mkdir()
        for index, image in enumerate(side_images):
            image.save(folder / side / f"{index:05d}.png")
    result, table = _compare(section.benchmark, samples)
    score_name = "share of the prompt's parts that are right"
    if section.benchmark == "preference" and section.reward is not None:
        names = [Path(judge.path).name for judge in reward_models(section.reward)]
        score_name = f"score by the reward model {names[0]}"
        if len(names) > 1:
            score_name = f"score by the reward models {', '.join(names)} ({section.combine})"
    content = {"of": identity, "score": score_name, "table": table, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {"benchmark": section.benchmark, "model": recipe.model.path, "method": recipe.method.name, **result}, table


def _prompts_and_seeds(section: EvaluateImages) -> tuple[list[str], list[int]]:
    """Return the prompt and the seed of every image; all images of a prompt are adjacent."""
    distinct = load_prompts("evaluate.prompts", section.prompts, section.split, section.seed)
    prompts = [prompt for prompt in distinct for _ in range(section.images_per_prompt)]
    return prompts, [section.seed * 1_000_003 + index for index in range(len(prompts))]


def _measure(
    section: EvaluateImages,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> None:
    """Add the measurements of one model's images to their records: distances, and checks of scenes."""
    if section.images_per_prompt > 1:
        for record, distance in zip(records, diversity.pixel_distances(images, prompts), strict=True):
            record["apart"] = distance
    if section.benchmark == "scenes":
        for record, truth in zip(records, scenes.check_scenes(images, prompts), strict=True):
            record.update(score=sum(truth.values()) / len(truth), note=scenes.describe(truth), parts=truth)


def _compare(benchmark: str, samples: Sequence[Sample]) -> tuple[dict[str, Any], Table]:
    """Return the result and table of the benchmark and of all other metrics of the same images."""
    metrics = {before.benchmark: (before, after) for before, after in zip(*measure_samples(samples), strict=True)}
    compare_own = scenes.compare_scenes if benchmark == "scenes" else preference.compare_scores
    result, table = compare_own(*metrics.pop(benchmark))
    if metrics and benchmark != "scenes":  # the table of scenes has these columns already
        table.append(("", "images", "before", "after", "change [95 % interval]"))
    for name, sides in metrics.items():
        comparison = compare(*sides)
        result[name] = comparison.as_dict()
        table += [(label, str(len(samples)), *cells) for label, *cells in comparison.table()[1:]]
    return result, table


def measure_samples(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of an evaluation's samples, before and after alignment.

    The bundled world gives the accuracy. A reward model gives the win rate over the base model and the mean score.
    Several images of a prompt give their diversity.
    """
    prompts = tuple(sample["prompt"] for sample in samples)
    keys = tuple((sample["prompt"], sample["seed"]) for sample in samples)

    def values(side: str, name: str) -> list[Any]:
        return [sample[side][name] for sample in samples]

    metrics: dict[str, list[Metrics]] = {side: [] for side in SIDES}
    for side in SIDES:
        if "parts" in samples[0][side]:
            metrics[side].append(scenes.measure_scenes(values(side, "parts"), keys, prompts))
        if "judged" in samples[0][side]:
            rewards = values(side, "judged"), values("before", "judged")
            metrics[side].append(preference.measure_scores(*rewards, keys, prompts))
        if "apart" in samples[0][side]:
            metrics[side].append(diversity.measure_distances(values(side, "apart"), keys, prompts))
    return metrics["before"], metrics["after"]


def generate_both(
    policy: Policy[TextToImage],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    caches: tuple[ImageCache, ImageCache],
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Generate images of the reference and of the policy, each pair from the same starting noise."""

    def run(net: nn.Module, cache: ImageCache) -> list[Image.Image]:
        return generate_images(policy.family, net.eval(), prompts, seeds, sampling, cache)

    before = policy.on_reference(partial(run, cache=caches[0]))
    assert before is not None
    return before, run(policy.unwrapped, caches[1])


def _folder(recipe: Recipe, section: EvaluateImages) -> Path:
    """Return the folder of generated images and of their scores."""
    return Path(recipe.output) / "drawings" if section.cache == "auto" else Path(section.cache)


def _caches(
    recipe: Recipe, section: EvaluateImages, policy: Policy[TextToImage], identity: Mapping[str, Any]
) -> tuple[ImageCache, ImageCache]:
    """Return the image caches of the base and the trained model."""
    folder = _folder(recipe, section)
    atomic_io.make_folder("evaluate.cache", folder)
    models = identity["trained"]["identity"]["model"], fingerprint.fingerprint_weights(policy.unwrapped)
    assert isinstance(recipe.model, ImageModel)
    settings = cache_settings(recipe.model, recipe.train.precision, section.sampling)
    before, after = (ImageCache(folder, {**settings, "model": model}) for model in models)
    return before, after
