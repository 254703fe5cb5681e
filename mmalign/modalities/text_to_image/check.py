"""Checks of a text-to-image recipe that need no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmalign.config import EvaluateImages, ImageData, ImageModel, ImageSize, PrepareImages, Recipe
from mmalign.data.formats import images, prompts
from mmalign.data.formats.prompts import Prompt
from mmalign.methods import requirements_of
from mmalign.modalities.loading import check_reward_model, comparing_parts
from mmalign.modalities.prompts import read_prompt_pairs, read_prompts
from mmalign.modalities.text_to_image.model import check_prompt_sources, source_use
from mmalign.resources import locate


def check(recipe: Recipe) -> None:
    """Check the settings of training that depend on the modality.

    Raises:
        ValueError: a setting does not fit the method.
    """
    check_packing(recipe)
    _check_prompts_only(recipe)
    if isinstance(recipe.model, ImageModel) and recipe.model.offload and recipe.train.sharding != "none":
        raise ValueError("model.offload: moves whole networks, and train.sharding holds shards; leave one of them out")


def check_evaluation(recipe: Recipe) -> None:
    """Check the `evaluate` section.

    Raises:
        ValueError: a file, a reward model or a size is invalid.
    """
    if isinstance(recipe.evaluate, EvaluateImages):
        _check_sampling("evaluate", recipe, recipe.evaluate)


def check_preparation(recipe: Recipe) -> None:
    """Check the `prepare` section.

    Raises:
        ValueError: a file, a reward model or a size is invalid.
    """
    if isinstance(recipe.prepare, PrepareImages):
        _check_sampling("prepare", recipe, recipe.prepare)


def check_packing(recipe: Recipe) -> None:
    """Refuse the packing of responses, since images have none.

    Raises:
        ValueError: `train.pack_responses` is set.
    """
    if recipe.train.pack_responses != "auto":
        raise ValueError(
            f"train.pack_responses: {recipe.train.pack_responses} is for responses that share a prompt, and "
            f"method.name: {recipe.method.name} compares images; leave it out"
        )


def check_data(recipe: Recipe) -> None:
    """Check the pairs' files and columns.

    Raises:
        ValueError: a file or column is missing, padding would be cropped, or the model has no use for sources.
    """
    data, needs, sources = recipe.data, requirements_of(recipe.method), source_use(recipe)
    assert isinstance(data, ImageData)
    if sources == "required" and needs.generates:
        raise ValueError(
            f"method.name: {recipe.method.name} generates images from prompts alone, and {recipe.model.path} edits a "
            "source image; use a method that compares the images of pairs, such as diffusion_dpo"
        )
    if data.has_prompts_only:
        prompts.open_prompts(locate(data.path))
        return
    images.check_source(
        data.format,
        locate(data.path),
        images=data.images,
        split=data.split,
        columns=data.columns,
        group_by=data.group_by,
        sources=sources,
        learning=needs.learning,
        cut_pairs=data.cut_pairs,
    )
    if data.fit == "pad" and data.crop == "random":
        raise ValueError("data.crop: random has no meaning with data.fit: pad, which shows whole images; leave it out")


def _check_prompts_only(recipe: Recipe) -> None:
    """Refuse settings of `data` that a method that generates its images does not read."""
    if not requirements_of(recipe.method).generates:
        return
    # Options that only pairs have, and for a text file those of tables
    data, unread = recipe.data, ["group_by", "max_bad", "num_workers", "fit", "crop", "flip"]
    from_text = isinstance(data, ImageData) and data.has_prompts_only
    unread += ["images", "split", "columns"] if from_text else []
    # Those that differ from their defaults were given
    given = [name for name in unread if getattr(data, name) != type(data).model_fields[name].default]
    if given:
        source = (
            "a text file with one prompt per line (data.format: prompts)" if from_text else "the pairs of data.path"
        )
        raise ValueError(
            f"data.{given[0]}: means nothing here: method.name: {recipe.method.name} generates its own images, and "
            f"takes prompts alone, from {source}; leave {' and '.join(given)} out"
        )


def _check_sampling(name: str, recipe: Recipe, section: EvaluateImages | PrepareImages) -> None:
    """Check a section that generates and scores images: reward model, prompts and image size."""
    if section.reward is not None:
        check_reward_model(f"{name}.reward", section.reward)
    if isinstance(section, EvaluateImages) and section.best_of is not None:
        check_reward_model("evaluate.best_of.reward", section.best_of.reward)
    # Prompts: those of a file, or a number of them
    given = False
    if isinstance(section.prompts, str):
        if isinstance(section, PrepareImages) and section.prompt_pairs:
            read_prompt_pairs(f"{name}.prompts", section.prompts)
        else:
            rows = read_prompts(f"{name}.prompts", section.prompts)
            given = any(row.source for row in rows)
            _check_comparing(name, section, rows)
    elif section.prompts < 1:
        raise ValueError(
            f"{name}.prompts: expected at least 1, or a file with one prompt a line, got {section.prompts}"
        )
    # Whatever generates needs sources for a model that edits
    if isinstance(section, PrepareImages) or section.benchmark != "implicit":
        check_prompt_sources(f"{name}.prompts", recipe.model, given=given)
    resolution = section.sampling.resolution
    if resolution is not None and any(side % 8 for side in ImageSize.parse(resolution)):
        raise ValueError(f"{name}.sampling.resolution: expected multiples of 8 pixels, got {resolution}")


def _check_comparing(name: str, section: EvaluateImages | PrepareImages, prompts: Sequence[Prompt]) -> None:
    """Refuse judges that compare the images of a prompt, if a prompt edits several sources: their edits differ."""
    edits = {(prompt.text, prompt.source.key) for prompt in prompts if prompt.source is not None}
    text, number = next(iter(Counter(text for text, _ in edits).most_common(1)), ("", 0))
    judges = [(name, section.reward, section.combine)]
    if isinstance(section, EvaluateImages) and section.best_of is not None:
        judges.append(("evaluate.best_of", section.best_of.reward, section.best_of.combine))
    for key, reward, combine in judges:
        comparing = comparing_parts(reward, combine) if reward is not None else []
        if comparing and number > 1:
            raise ValueError(
                f"{key}: {comparing[0]} compares all images of a prompt, and {text[:60]!r} edits {number} sources; use "
                "combine: sum and judges that score each image alone, or give each source a prompt of its own"
            )
