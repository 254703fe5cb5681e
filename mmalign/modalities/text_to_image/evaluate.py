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
from mmalign.config import EvaluateImages, ImageModel, Recipe, Rewards, SamplingConfig
from mmalign.config.evaluation import Combine, reward_models
from mmalign.data.caches import fingerprint
from mmalign.data.caches.images import ImageCache
from mmalign.data.data_module import Splits
from mmalign.data.formats.image_layouts import SOURCE
from mmalign.data.formats.prompts import Prompt, sources_of
from mmalign.data.pairs import ImageRef
from mmalign.evaluation import best_of
from mmalign.evaluation.benchmarks import diversity, implicit_reward, preference, scenes
from mmalign.evaluation.generate_images import cache_settings, generate_images, read_sources
from mmalign.evaluation.metrics import SIDES, Metrics, Table, compare
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.modalities import Measure, Result, loading
from mmalign.modalities.prompts import load_prompts
from mmalign.modalities.validation import implicit_reward_benchmark
from mmalign.policy import Policy
from mmalign.rewards import RewardModel

logger = logging.getLogger(__name__)


Sample = dict[str, Any]  # prompt, seed, measurements before and after; of an edit, its source and group too


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

    def load(reward: Rewards, combine: Combine) -> RewardModel:
        scores, allow_pickle = _folder(recipe, section) / "scores", recipe.allow_pickle
        return loading.build_reward_model(reward, device, allow_pickle=allow_pickle, combine=combine, scores=scores)

    reward_model = load(section.reward, section.combine) if section.reward is not None else None
    chooser = load(section.best_of.reward, section.best_of.combine) if section.best_of is not None else None
    return partial(compare_images, recipe, reward_model, chooser)


def compare_images(
    recipe: Recipe,
    reward_model: RewardModel | None,
    chooser: RewardModel | None,
    policy: Policy[TextToImage],
    folder: Path,
    identity: Mapping[str, Any],
) -> Result:
    """Generate images with base and trained model from the same noise, and measure them.

    The folder gets the images and the gallery's `samples.json`, with the evaluation's identity.

    Returns:
        The content of `result.json`, and a table of it.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateImages)
    wanted, seeds = _prompts_and_seeds(section)
    prompts, sources = [prompt.text for prompt in wanted], sources_of(wanted)
    num_truncated = policy.family.count_truncated(prompts)
    if num_truncated:
        logger.warning(f"{num_truncated} of {len(prompts)} prompts exceed the text encoder's limit and are truncated")

    # Images of both models
    caches = _caches(recipe, section, policy, identity)
    images = dict(zip(SIDES, generate_both(policy, prompts, seeds, section.sampling, caches, sources), strict=True))
    if chooser is not None and section.best_of is not None:
        best = choose_best(policy, prompts, seeds, images["before"], section, chooser, caches[0], sources)
        images |= {f"best-of-{n}": chosen for n, chosen in best.items()}

    # Measurements and files; images of one prompt are compared if they edit one source
    groups = prompts if sources is None else [f"{p} ({ref.key})" for p, ref in zip(prompts, sources, strict=True)]
    records = _measure(section, images, groups, prompts, reward_model)
    for side, side_images in images.items():
        (folder / side).mkdir()
        for index, image in enumerate(side_images):
            image.save(folder / side / f"{index:05d}.png")
    numbers = sorted(section.best_of.n) if section.best_of is not None else []
    samples: list[Sample] = [
        {"prompt": prompt, "seed": seed, **{side: records[side][i] for side in SIDES}}
        | ({"best_of": {str(n): records[f"best-of-{n}"][i] for n in numbers}} if numbers else {})
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if sources is not None:
        _write_sources(policy.family, sources, section.sampling, folder / SOURCE)
        for sample, source, group in zip(samples, sources, groups, strict=True):
            sample |= {SOURCE: source.location, "group": group}
    result, table = _compare(section.benchmark, samples)
    content = {"of": identity, "score": _score_name(section), "table": table, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {"benchmark": section.benchmark, "model": recipe.model.path, "method": recipe.method.name, **result}, table


def _score_name(section: EvaluateImages) -> str:
    """Return the meaning of an image's score."""
    if section.benchmark != "preference" or section.reward is None:
        return "share of the prompt's parts that are right"
    names = [Path(judge.path).name for judge in reward_models(section.reward)]
    if len(names) == 1:
        return f"score by the reward model {names[0]}"
    return f"score by the reward models {', '.join(names)} ({section.combine})"


def _write_sources(family: TextToImage, sources: Sequence[ImageRef], sampling: SamplingConfig, folder: Path) -> None:
    """Write the source images as the model sees them."""
    folder.mkdir()
    for index, source in enumerate(sources):
        (image,) = to_pil(read_sources(family, [source], sampling))
        image.save(folder / f"{index:05d}.png")


def _prompts_and_seeds(section: EvaluateImages) -> tuple[list[Prompt], list[int]]:
    """Return the prompt and the seed of every image; all images of a prompt are adjacent."""
    distinct = load_prompts("evaluate.prompts", section.prompts, section.split, section.seed)
    prompts = [prompt for prompt in distinct for _ in range(section.images_per_prompt)]
    # Sections with other seeds have other images
    return prompts, [section.seed * 1_000_003 + index for index in range(len(prompts))]


def _measure(
    section: EvaluateImages,
    images: Mapping[str, Sequence[Image.Image]],
    groups: Sequence[str],
    prompts: Sequence[str],
    reward_model: RewardModel | None,
) -> dict[str, list[Sample]]:
    """Return the measurements of the images of every side: rewards, distances in a group, and checks of scenes."""
    records: dict[str, list[Sample]] = {side: [{} for _ in prompts] for side in images}
    if reward_model is not None:  # in one call, so that votes compare all images of a prompt
        judged = [image for side_images in images.values() for image in side_images]
        rewards = reward_model(judged, list(prompts) * len(images)).tolist()
        for record, reward in zip((x for side in images for x in records[side]), rewards, strict=True):
            record.update(judged=reward, score=reward, note="")
    for side, side_images in images.items():
        if section.images_per_prompt > 1:
            for record, distance in zip(records[side], diversity.pixel_distances(side_images, groups), strict=True):
                record["apart"] = distance
        if section.benchmark == "scenes":
            for record, truth in zip(records[side], scenes.check_scenes(side_images, prompts), strict=True):
                record.update(score=sum(truth.values()) / len(truth), note=scenes.describe(truth), parts=truth)
    return records


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
    # Best of n against the base model
    (before, _), chosen = measure_samples(samples), measure_best(samples)
    numbers, rows = best_of.report(before, chosen, ("images", str(len(samples))))
    return result | ({"best_of": numbers} if chosen else {}), table + rows


def measure_samples(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of an evaluation's samples, before and after alignment.

    The bundled world gives the accuracy. A reward model gives the win rate over the base model and the mean score.
    Several images of a prompt give their diversity.
    """
    before, after = (_measure_side(samples, [sample[side] for sample in samples]) for side in SIDES)
    return before, after


def measure_best(samples: Sequence[Mapping[str, Any]]) -> dict[int, list[Metrics]]:
    """Return the metrics of the base model's best of n images, by n; empty if the evaluation chose none."""
    numbers = sorted(map(int, samples[0].get("best_of", {})))
    return {n: _measure_side(samples, [sample["best_of"][str(n)] for sample in samples]) for n in numbers}


def _measure_side(samples: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[Metrics]:
    """Return the metrics of one image of each sample, from its record.

    Images of one prompt, or of one edit of a source, depend on each other.
    """
    groups = tuple(sample.get("group", sample["prompt"]) for sample in samples)
    keys = tuple((sample["prompt"], sample["seed"]) for sample in samples)
    metrics = list[Metrics]()
    if "parts" in records[0]:
        metrics.append(scenes.measure_scenes([record["parts"] for record in records], keys, groups))
    if "judged" in records[0]:
        # A win is over the base model's image
        rewards = [record["judged"] for record in records], [sample["before"]["judged"] for sample in samples]
        metrics.append(preference.measure_scores(*rewards, keys, groups))
    if "apart" in records[0]:
        metrics.append(diversity.measure_distances([record["apart"] for record in records], keys, groups))
    return metrics


def choose_best(
    policy: Policy[TextToImage],
    prompts: Sequence[str],
    seeds: Sequence[int],
    first: Sequence[Image.Image],
    section: EvaluateImages,
    chooser: RewardModel,
    cache: ImageCache,
    sources: Sequence[ImageRef] | None = None,
) -> dict[int, list[Image.Image]]:
    """Return the base model's best image of each prompt and seed, for every n of `best_of`.

    Its images at hand, `first`, are the first candidates.
    """
    assert section.best_of is not None
    # The images at hand are candidate 0
    more = best_of.candidate_seeds(seeds, max(section.best_of.n))[1:]

    def run(net: nn.Module) -> list[Image.Image]:
        repeated, flat = [*prompts] * len(more), [seed for row in more for seed in row]
        shown = [*sources] * len(more) if sources is not None else None
        return generate_images(policy.family, net.eval(), repeated, flat, section.sampling, cache, shown)

    generated = policy.on_reference(run)
    assert generated is not None
    images = [*first, *generated]
    # Candidate k for prompt i is image k * size + i
    size = len(prompts)
    scores = chooser(images, [*prompts] * (len(more) + 1)).view(-1, size).tolist()
    return {
        n: [images[number * size + i] for i, number in enumerate(best_of.best_candidates(scores, n))]
        for n in section.best_of.n
    }


def generate_both(
    policy: Policy[TextToImage],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    caches: tuple[ImageCache, ImageCache],
    sources: Sequence[ImageRef] | None = None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Generate images of the reference and of the policy, each pair from the same starting noise."""

    def run(net: nn.Module, cache: ImageCache) -> list[Image.Image]:
        return generate_images(policy.family, net.eval(), prompts, seeds, sampling, cache, sources)

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
    # The base model is the one that the training began with
    models = identity["trained"]["identity"]["model"], fingerprint.fingerprint_weights(policy.unwrapped)
    assert isinstance(recipe.model, ImageModel)
    settings = cache_settings(policy.family, recipe.model, recipe.train.precision, section.sampling)
    before, after = (ImageCache(folder, {**settings, "model": model}) for model in models)
    return before, after
