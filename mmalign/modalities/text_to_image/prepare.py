"""Preparation of image pairs from the model's own images and a reward model.

Every image is saved at once in an unfinished folder beside the final file. The same command resumes from it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from mmalign.config import ImageModel, PrepareImages, Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.images import ImageCache
from mmalign.data.formats.prompts import Prompt, sources_of
from mmalign.evaluation.generate_images import cache_settings, generate_images
from mmalign.modalities import loading
from mmalign.modalities.prompts import load_prompt_pairs, load_prompts
from mmalign.rewards import RewardModel
from mmalign.synthesis.rejected_responses import Writer
from mmalign.synthesis.unfinished import is_written, unfinished
from mmalign.synthesis.write_image_pairs import best_of_each, write_pairs, write_prompt_pairs
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, writer: Writer | None = None) -> Path:
    """Generate images, score them with the reward model, and write the pairs to `data.path`.

    A pair is the best and the worst image of one prompt. It is written if the preference probability (the logistic
    function of the difference of rewards) reaches `prepare.min_confidence`. With `prepare.prompt_pairs` a pair is the
    best images of two prompts; under each prompt its own image must reach that probability. The file has the layout of
    Pick-a-Pic v2. With `prepare.keep_all` it has lists of all images with their scores, in the layout of rankings.

    Raises:
        ValueError: a function for responses is given, the file exists, or no pair is sure enough; the next run then
            reuses the images.
    """
    if writer is not None:
        raise ValueError("prepare: text-to-image models generate images; they take no function for responses")
    section = recipe.prepare
    assert isinstance(section, PrepareImages)
    path = Path(recipe.data.path)
    if path.is_dir():
        raise ValueError(f"data.path: {path} is a folder; expected the name of the parquet file that prepare writes")
    processes = current_processes()
    if processes.on_main(partial(is_written, path)):
        return path

    # Images and rewards
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.time()
    family = loading.load_to_generate(recipe, device)
    reward_model = loading.build_reward_model(
        section.reward,
        device,
        allow_pickle=recipe.allow_pickle,
        combine=section.combine,
        scores=unfinished(path) / "scores",
    )
    # The images of a prompt are adjacent
    repeated = [prompt for prompt in _requested_prompts(section) for _ in range(section.images_per_prompt)]
    prompts, sources = [prompt.text for prompt in repeated], sources_of(repeated)
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    assert isinstance(recipe.model, ImageModel)
    settings = cache_settings(family, recipe.model, recipe.train.precision, section.sampling)
    cache = ImageCache(unfinished(path), {**settings, "model": fingerprint.fingerprint_weights(family.network)})
    images = generate_images(family, family.network, prompts, seeds, section.sampling, cache, sources)
    scores = reward_model(images, prompts).tolist()
    couples = _judge_couples(section, reward_model, prompts, images, scores) if section.prompt_pairs else None

    if not processes.is_main:
        processes.gather(None)  # no process ends before the file is there
        return path

    num_kept, num_groups = _write_sure(path, section, repeated, images, scores, couples)
    processes.gather(None)
    source, result = "prompt pairs" if section.prompt_pairs else "prompts", "lists" if section.keep_all else "pairs"
    seconds = f"{time.time() - started:.0f} s"
    logger.info(f"{path}: {num_kept} {result} of {num_groups} {source}, from {len(images)} images in {seconds}")
    return path


class Couples(NamedTuple):
    """Best image of each prompt, with its scores by its own prompt and by the other prompt of the couple [2N]."""

    prompts: Sequence[str]
    images: Sequence[Image.Image]
    own: Sequence[float]
    crossed: Sequence[float]


def _judge_couples(
    section: PrepareImages,
    reward_model: RewardModel,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    scores: Sequence[float],
) -> Couples:
    """Judge the best image of each prompt by both prompts of its couple."""
    asked_for = prompts[:: section.images_per_prompt]
    shown = [images[i] for i in best_of_each(scores, section.images_per_prompt)]
    # The other prompt of the couple: 0 and 1, 2 and 3, ...
    swapped = [asked_for[i ^ 1] for i in range(len(asked_for))]
    # In one call, so that votes compare the two images of a prompt
    own, crossed = reward_model([*shown, *shown], [*asked_for, *swapped]).view(2, -1).tolist()
    return Couples(asked_for, shown, own, crossed)


def _write_sure(
    path: Path,
    section: PrepareImages,
    prompts: Sequence[Prompt],
    images: Sequence[Image.Image],
    scores: Sequence[float],
    couples: Couples | None,
) -> tuple[int, int]:
    """Write the pairs that the reward model is sure of; return their number, and that of all prompts or couples."""
    least, sources = section.min_confidence, sources_of(prompts)
    if couples is not None:
        return write_prompt_pairs(path, *couples, min_confidence=least)
    read, texts = [source.read() for source in sources] if sources is not None else None, [x.text for x in prompts]
    number, keep_all = section.images_per_prompt, section.keep_all
    return write_pairs(path, texts, images, scores, group=number, min_confidence=least, sources=read, keep_all=keep_all)


def _requested_prompts(section: PrepareImages) -> list[Prompt]:
    """Return the prompts to generate images for; the two prompts of a pair are adjacent."""
    if section.prompt_pairs:
        couples = load_prompt_pairs("prepare.prompts", section.prompts, section.seed)
        return [Prompt(text) for couple in couples for text in couple]
    return load_prompts("prepare.prompts", section.prompts, "train", section.seed)
