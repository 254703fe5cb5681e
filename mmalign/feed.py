"""The training data of a recipe, opened, encoded and in batches: what stands between files and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mmalign import methods
from mmalign.data.cache import ArrayCache
from mmalign.data.epochs import check_bad
from mmalign.data.loader import PairLoader, View
from mmalign.data.pairs import Dropped, Pairs, hold_out, listed
from mmalign.data.prompts import PromptBatch, PromptLoader, open_prompts, prompts_of
from mmalign.data.responses import open_responses
from mmalign.data.sources import open_pairs
from mmalign.encode import Encoder, fill_latents, fill_text, text_key
from mmalign.encode_responses import ResponseLoader, Wants
from mmalign.encode_responses import encode as encode_responses
from mmalign.families import TextToImage, identity
from mmalign.families.step_judge import StepJudge
from mmalign.features import depends as feature_dependencies
from mmalign.features import words_depend
from mmalign.kept import Kept
from mmalign.methods import Keep
from mmalign.rewards import Judge
from mmalign.sections import Data, ImageData, ResponseData
from mmalign.share import locate

Opened = tuple[Pairs[Any], Pairs[Any] | None]  # to train on, and held out; of prompts alone, too
Loader = PairLoader | ResponseLoader | PromptLoader


@dataclass(frozen=True)
class Feed:
    """Pairs of a recipe as a method takes them, of one modality or the other.

    Attributes:
        encode: makes what a method takes of a loader's batch.
        train: the loader of the pairs to learn from.
        held: the loader of those held out; None if there are none.
        about: one sentence on what there is, for people.
        kept: where the method's own arrays are kept; None if it has none, or nothing is cached.
        features: where images' features are kept; None if nothing is cached.
        caches: all that is read from, the two above among them.
    """

    encode: Callable[[Any], Any]
    train: Loader
    held: Loader | None
    about: str
    kept: Kept | None = None
    features: ArrayCache | None = None
    caches: tuple[ArrayCache, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The training batches of an epoch, from number `start` on."""
        return self._encoded(self.train, epoch, start)

    def held_out(self) -> Iterator[Any]:
        """The held-out batches, always in the same order; none if nothing is held out."""
        return self._encoded(self.held, 0, 0) if self.held else iter(())

    def _encoded(self, loader: Loader, epoch: int, start: int) -> Iterator[Any]:
        for batch in loader.batches(epoch, start):
            encoded = self.encode(batch)
            if self.kept is not None and not isinstance(batch, PromptBatch):
                encoded = replace(encoded, kept=self.kept.find(batch, epoch, encoded.weights.device))
            yield encoded

    def places(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a training batch lie, for people."""
        return self.train.places(epoch, number)

    def dropped(self) -> list[Dropped]:
        """What could not be used in the batches so far."""
        return self.train.dropped + (self.held.dropped if self.held else [])


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


def _open_images(data: ImageData, common: dict[str, Any], method: Any) -> Pairs[Any]:
    """Pairs of images, or prompts for a method that draws its own: a file of them, or those of pairs."""
    if getattr(method, "learns_from", "pairs") == "prompts":
        if data.format == "prompts":
            return open_prompts(locate(data.path), data.limit)
        return prompts_of(open_pairs(data.format, locate(data.path), **{**common, "limit": None}), data.limit)
    if data.format == "prompts":
        raise ValueError(
            "data.format: prompts has no images, and the method compares those of pairs; expected pick_a_pic, folder "
            "or rankings (spo draws its own images)"
        )
    return open_pairs(data.format, locate(data.path), two_prompts=_two_prompts(method), **common)


def _wants(method: Any, config: Any) -> Wants:
    """What a method asks for besides responses: its module says so."""
    pictures = hasattr(method, "needs_pictures") and method.needs_pictures(config)
    return Wants(pictures, getattr(method, "needs_others", False))


def _two_prompts(method: Any) -> str | None:
    """Who needs pairs with two prompts, and who does not, if it is this method; else None."""
    if not getattr(method, "needs_two_prompts", False):
        return None
    found = {name: methods.find(name) for name in methods.names()}
    others = [
        name
        for name, module in found.items()
        if module.modality == method.modality and not hasattr(module, "needs_two_prompts")
    ]
    name = method.__name__.split(".")[-1]
    return f"method.name: {name} compares two images under two prompts; {', '.join(others)} take rows of one prompt"


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
        keep: what the method would like to have kept, by `mmalign.kept.asked`; mmalign.caching fills the place for it.
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


def folder_of(data: Data, output: Path) -> Path:
    """Where a recipe's caches are, if it has any; `output` is the recipe's."""
    return output / "cache" if data.cache == "auto" else Path(data.cache)


def bar_of(accelerator: Any) -> Progress:
    """A bar of the main process, where there is a terminal."""
    console = Console(stderr=True)
    return Progress(transient=True, console=console, disable=not (accelerator.is_main_process and console.is_terminal))


def _prompt_encoder(
    family: TextToImage,
    sources: Sequence[Pairs[Any]],
    data: ImageData,
    output: Path,
    accelerator: Any,
    say: Any,
    judge: Judge | None,
) -> tuple[Encoder, Callable[[Any], Any]]:
    """What encodes batches of prompts, for images of the recipe's size; the cache of their text is filled.

    Gives the encoder, and its call for a batch.
    """
    side = data.resolution or family.resolution
    shape = tuple(family.encode_images(torch.zeros(1, 3, side, side)).mean.shape[1:])
    encoder = Encoder(family, family.unconditional(), None, judge=judge)
    if data.cache != "off":
        networks = {name: net for name, net in family.encoders() if name != "vae"}
        text = ArrayCache.open(folder_of(data, output) / "text", _text_depends(family))
        for pairs in sources:
            share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
            for _ in fill_text(family, sorted(set(pairs.prompts())), text, **share):
                pass
            accelerator.wait_for_everyone()
            text.refresh()
        for net in networks.values():
            net.to("cpu")
        encoder = replace(encoder, text=text)
    _say_cut(family, sources, say)
    return encoder, partial(encoder.encode_prompts, side=side, shape=shape)


def _text_depends(family: TextToImage) -> dict[str, str | int | float]:
    """What prompts' embeddings depend on besides the words: text encoders and tokenizers."""
    encoders = {name: identity.of_network(net) for name, net in family.encoders() if name != "vae"}
    return {**encoders, "tokenizers": identity.of_words(family)}


def _say_cut(family: TextToImage, sources: Sequence[Pairs[Any]], say: Any) -> None:
    """Say how many prompts are longer than the text encoder reads."""
    prompts = sorted({prompt for pairs in sources for prompt in pairs.prompts()})
    cut = family.count_cut(prompts)
    if cut:
        say(f"{cut:,} of {len(prompts):,} prompts are longer than the text encoder reads, and are cut")


def _prepare(
    family: TextToImage,
    sources: Sequence[Pairs],
    data: ImageData,
    output: Path,
    accelerator: Any,
    say: Any,
    decodes: bool = False,
) -> tuple[View, ArrayCache | None, Encoder, dict[str, str | int | float]]:
    """How images become squares, the cache of their latents, what encodes the rest, and what all that depends on.

    The caches are filled. The encoders leave the GPU then, but for the autoencoder where the method `decodes`.
    """
    view = View(data.resolution or family.resolution, data.crop, data.flip)
    latents, text, bad = None, None, list[Dropped]()
    depends: dict[str, str | int | float] = {}
    unconditional = family.unconditional()
    if data.cache != "off" and data.crop == "center":
        of_text = _text_depends(family)
        of_images: dict[str, str | int | float] = {"resolution": view.resolution}
        of_images["vae"] = identity.of_network(dict(family.encoders())["vae"])
        depends |= {**of_text, **of_images, "schedule": identity.of_schedule(family.schedule)}
        latents = ArrayCache.open(folder_of(data, output) / "latents", of_images)
        text = ArrayCache.open(folder_of(data, output) / "text", of_text)
        bad = _fill(family, sources, view, latents, text, data, accelerator)
        for name, net in family.encoders():
            if not (decodes and name == "vae"):
                net.to("cpu")  # they have done their work, and on a GPU would take gigabytes from the training
    if bad:
        say(f"{len(bad)} images cannot be read, and their pairs are left out: {listed(bad)}")
    _say_cut(family, sources, say)
    return view, latents, Encoder(family, unconditional, text), depends


def _fill(
    family: TextToImage,
    sources: Sequence[Pairs],
    view: View,
    latents: ArrayCache,
    text: ArrayCache,
    data: ImageData,
    accelerator: Any,
) -> list[Dropped]:
    """Encode what the caches lack, each process its share, with a bar; gives the images that cannot be read."""
    from accelerate.utils import gather_object

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    bad: list[Dropped] = []
    with bar_of(accelerator) as bar:
        for pairs in sources:
            task = bar.add_task("encode images", total=None)
            for found in fill_latents(family, pairs, view, latents, num_workers=data.workers, **share):
                if isinstance(found, Dropped):
                    bad.append(found)
                    check_bad(bad, data.max_bad, pairs.source)
                bar.advance(task)
            prompts = sorted(set(pairs.prompts()))
            task = bar.add_task("encode prompts", total=len(text.share(map(text_key, prompts), **share)))
            for number in fill_text(family, prompts, text, **share):
                bar.advance(task, number)
            accelerator.wait_for_everyone()
            latents.refresh()
            text.refresh()
    bad = gather_object(bad)  # each process has met those of its share
    check_bad(bad, data.max_bad, sources[0].source)
    return bad
