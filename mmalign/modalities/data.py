"""Open a recipe's training data and put it into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config import Data, ImageData, ResponseData
from mmalign.data.caches.array_cache import ArrayCache, folder_of
from mmalign.data.caches.image_features import depends as feature_dependencies
from mmalign.data.caches.image_features import words_depend
from mmalign.data.caches.precompute import Keep, Kept
from mmalign.data.data_module import Feed, Loader, Opened
from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.image_pairs import PairLoader
from mmalign.data.loaders.prompts import PromptLoader
from mmalign.data.loaders.response_pairs import ResponseLoader
from mmalign.data.loaders.response_pairs import encode as encode_responses
from mmalign.data.pairs import Pairs, hold_out
from mmalign.families.base import TextToImage
from mmalign.families.step_judge import StepJudge
from mmalign.modalities.text_to_image.data import _open_images, _prepare, _prompt_encoder
from mmalign.modalities.vision_language.data import _wants
from mmalign.resources import locate
from mmalign.rewards import Judge


def open_data(data: Data, seed: int, method: Any = None) -> Opened:
    """The recipe's pairs: (to train on, held out or None). No image is decoded.

    Args:
        data: the recipe's section.
        seed: of the hold-out.
        method: the module of mmalign.methods that the pairs are for; None if it is enough that there are some.

    Raises:
        ValueError: files or columns are missing, no pair is left, or none has what the method compares with.
    """
    common: dict[str, Any] = {
        "split": data.split,
        "columns": data.columns,
        "group_by": data.group_by,
        "limit": data.limit,
    }
    pairs: Pairs[Any]
    if isinstance(data, ResponseData):
        images = Path(data.images) if data.images is not None else None
        pairs = open_responses(data.format, locate(data.path), images=images, **common)
        if getattr(method, "needs_others", False) and not any(pair.other_images for pair in pairs):
            raise ValueError(
                f"data.path: {pairs.source} has no other images, and method.name: {method.__name__.split('.')[-1]} "
                "compares what is said of an image with the same words about another; use data.format: realign, whose "
                "rows have a retrieved_image"
            )
    else:
        assert isinstance(data, ImageData)
        pairs = _open_images(data, common, method)
    return hold_out(pairs, data.hold_out, seed) if data.hold_out else (pairs, None)


def open_feed(
    family: Any,
    data: Data,
    *,
    output: Path,
    batch_size: int,
    seed: int,
    accelerator: Any,
    say: Any,
    method: Any = None,
    config: Any = None,
    opened: Opened | None = None,
    keep: Keep | None = None,
    judge: Judge | None = None,
) -> Feed:
    """Open the recipe's pairs, and where the data are pictures to learn from, fill the caches of the frozen encoders.

    Args:
        family: a TextToImage for ImageData, or a StepJudge with one; a VisionLanguage for ResponseData.
        data: the recipe's section.
        output: the run's folder, where `data.cache: auto` keeps the caches.
        batch_size: pairs of a batch on each process.
        seed: of order, crops, flips and the hold-out.
        accelerator: says which process this is.
        say: takes a line of text.
        method: the module of mmalign.methods that the batches are for; None if it asks for nothing but pairs.
        config: the method's settings, where there is one.
        opened: what `open_data` has given, for those who must know that it is sound before they have a family.
        keep: what the method would like to have kept, by `precompute.asked`; the command `cache` fills it.
        judge: what scores images, for methods whose settings name one.

    Raises:
        ValueError: files, columns or caches do not fit, or more than `data.max_bad` images are bad, or all pairs.
    """
    train, held = opened or open_data(data, seed, method)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    common |= {"num_workers": data.workers, "max_bad": data.max_bad}
    about = train.summary() + (f" {len(held):,} more are held out." if held is not None else "")
    make: Callable[..., Loader]
    encode: Callable[[Any], Any]
    kept = features = None
    caches = list[ArrayCache]()
    together = {"seed": seed, "batch_size": batch_size, "processes": share["world_size"], "pairs": len(train)}
    if isinstance(data, ResponseData):
        longest = min(family.reader.max_length, data.max_length or family.reader.max_length)
        if data.cache != "off":
            folder = folder_of(data, output)
            of_features = feature_dependencies(family)
            features = ArrayCache.open(folder / "features", of_features)
            caches.append(features)
            if keep is not None:
                settings = {**of_features, **words_depend(family), **keep.settings, **together, "max_length": longest}
                kept = Kept(ArrayCache.open(folder / keep.folder, settings), keep)
        wants = _wants(method, config)
        make = partial(ResponseLoader, reader=family.reader, max_length=longest, wants=wants, known=features, **common)
        encode = partial(encode_responses, family, max_length=longest)
    else:
        assert isinstance(data, ImageData)
        sources = [train] if held is None else [train, held]
        painter: TextToImage = family.denoiser if isinstance(family, StepJudge) else family
        if getattr(method, "learns_from", "pairs") == "prompts":
            about = f"{len(train):,} prompts from {train.source}."
            make = partial(PromptLoader, batch_size=batch_size, seed=seed)
            encoder, encode = _prompt_encoder(painter, sources, data, output, accelerator, say, judge)
        else:
            decodes = getattr(method, "needs_decoder", False)
            view, latents, encoder, depends = _prepare(painter, sources, data, output, accelerator, say, decodes)
            make = partial(PairLoader, view=view, cache=latents, repeat=keep.draws if keep else None, **common)
            caches += [latents] if latents is not None else []
            if keep is not None and latents is not None:
                settings = {**depends, **keep.settings, "flip": data.flip, **(together if keep.scores else {})}
                where = folder_of(data, output) / keep.folder
                kept = Kept(ArrayCache.open(where, {**settings, "seed": seed}), keep)
            encode = replace(encoder, judge=judge, two_prompts=getattr(method, "needs_two_prompts", False)).encode
        caches += [encoder.text] if encoder.text is not None else []
    caches += [kept.cache] if kept is not None else []
    loader = make(pairs=train, **share)
    # Every process scores all held-out pairs, so that all know the same number.
    scored = make(pairs=held, keep_last=True) if held is not None else None
    for checked in (loader, scored):
        if checked is not None:
            checked.check_readable()
    return Feed(encode, loader, scored, about, kept, features, tuple(caches))
