"""What a training would otherwise work out again and again, worked out once and stored: `mmalign cache RECIPE`.

Latents and text, or images' features; then what the method keeps: the reference's scores among it. All of it is for the
pairs that the recipe's training meets, shared by the processes of a launch, and what is stored is never made again: who
is stopped goes on, and `mmalign train` does the same before its first update.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import atomic_io, methods
from mmalign.commands import preflight
from mmalign.config import ImageData, Recipe, ResponseData
from mmalign.console import bar_of, silent
from mmalign.data.caches import fingerprint, image_features
from mmalign.data.caches.array_cache import folder_of
from mmalign.data.caches.precompute import asked, met
from mmalign.data.data_module import Feed, Opened
from mmalign.data.loaders.prompts import PromptLoader
from mmalign.data.loaders.response_pairs import ResponseLoader, images_of
from mmalign.data.pairs import ImageRef
from mmalign.families.vlm.image_features import executor, move
from mmalign.modalities import loading
from mmalign.modalities.data import open_data, open_feed
from mmalign.policy import FrozenCopy, Policy
from mmalign.rewards import Judge
from mmalign.rng import Draws
from mmalign.training.loop import EMPTY
from mmalign.training.run import HELD_OUT_BATCHES, Say, require_all


def cache(recipe: Recipe, say: Say = print) -> Path:
    """Fill the caches that the recipe's training reads from, and say what was written.

    Returns:
        The folder.

    Raises:
        ValueError: something in the recipe or the data does not fit, nothing is to be cached, or processes were
            started that do not know of one another.
    """
    from accelerate import Accelerator

    if recipe.data.cache == "off":
        raise ValueError("data.cache: off keeps nothing; leave it out, or name a folder")
    if isinstance(recipe.data, ImageData) and recipe.data.crop == "random":
        raise ValueError(
            "data.crop: random is never the same twice, so that there is nothing to keep; use crop: center, or train "
            "without a cache"
        )
    begun = time.time()
    preflight.check(recipe, training=True)
    opened = open_data(recipe.data, recipe.train.seed, methods.find(recipe.method.name))
    atomic_io.make_folder("output", Path(recipe.output))
    accelerator = Accelerator()
    require_all(accelerator)
    tell = say if accelerator.is_main_process else silent
    family = loading.load_to_train(recipe, accelerator.device, tell)
    feed = open_filled(recipe, family, accelerator=accelerator, say=tell, opened=opened)
    folder = folder_of(recipe.data, Path(recipe.output))
    if accelerator.is_main_process:
        say(f"cache: {folder}: {_written(folder, {cache.folder for cache in feed.caches}, begun)}")
    accelerator.end_training()
    return folder


def open_filled(
    recipe: Recipe, family: Any, *, accelerator: Any, say: Say, opened: Opened, judge: Judge | None = None
) -> Feed:
    """The recipe's pairs in batches, with everything stored that is kept of those that its training meets.

    Args:
        recipe: what to train on.
        family: the model as it was loaded: its network is the reference.
        accelerator: says which process this is.
        say: takes a line of text.
        opened: what `open_data` has given.
        judge: what scores images, for methods whose settings name one.

    Raises:
        ValueError: as `open_feed`.
    """
    options, method = recipe.train, methods.find(recipe.method.name)
    run = {"precision": options.precision, "executor": executor(family.network), "pack": options.pack}
    run |= {"compile": "on"} if options.compile else {}  # it rounds otherwise
    keep = asked(method, recipe.method, **run)
    if keep is not None and recipe.data.cache != "off":
        keep = replace(keep, settings={**keep.settings, "model": fingerprint.of_network(family.network)})
    feed = open_feed(
        family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=options.batch_size,
        seed=options.seed,
        accelerator=accelerator,
        say=say,
        method=method,
        config=recipe.method,
        opened=opened,
        keep=keep,
        judge=judge,
    )
    batches = options.steps * options.accumulate
    if feed.features is not None and not _fill_features(feed, recipe, family, batches, accelerator):
        say(
            f"the images' features would take more than half of the free disk of {feed.features.folder} and are not "
            "kept; name another data.cache to keep them"
        )
        feed = replace(feed, features=None)
    if feed.kept is not None:
        _fill_kept(feed, recipe, family, batches, accelerator)
        if replaces_reference(feed):
            needed = _without_pictures(feed, recipe) or recipe.model.tune == "full"
            feed = replace(feed, kept=replace(feed.kept, needed=needed))
    return feed


def _without_pictures(feed: Feed, recipe: Recipe) -> bool:
    """Have no picture decoded any more that was there for the reference alone; whether there were such pictures."""
    if _needs_tower(recipe):
        return False
    loaders = [one for one in (feed.train, feed.held) if isinstance(one, ResponseLoader) and one.wants.pictures]
    for loader in loaders:
        loader.without_pictures()
    return bool(loaders)


def _needs_tower(recipe: Recipe) -> bool:
    """Whether the training looks at pictures that no file has."""
    method = methods.find(recipe.method.name)
    return hasattr(method, "needs_tower") and bool(method.needs_tower(recipe.method))


def replaces_reference(feed: Feed) -> bool:
    """Whether all that the method needs of a reference is kept."""
    return feed.kept is not None and feed.kept.keep.scores


def put_away(feed: Feed, recipe: Recipe, family: Any) -> None:
    """Move the vision tower off the GPU, if the training does not need it: its features are kept."""
    if feed.features is not None and not _needs_tower(recipe):
        for _, net in family.encoders():
            move(net, torch.device("cpu"))


def _fill_features(feed: Feed, recipe: Recipe, family: Any, batches: int, accelerator: Any) -> bool:
    """Make what the cache of features lacks; False if the disk has no room for it."""
    assert feed.features is not None and isinstance(recipe.data, ResponseData)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    images = (image for loader, number in _loaders(feed, batches) for image in _images(loader, number))
    steps = image_features.fill(family, images, feed.features, num_workers=recipe.data.workers, **share)
    with bar_of(accelerator) as bar:
        total = next(steps)
        task = bar.add_task("encode images", total=total)
        stored = 0
        for step in steps:
            stored += step
            bar.advance(task)
    short = torch.tensor([int(stored < total)], device=accelerator.device)
    short = accelerator.reduce(short, reduction="sum")
    feed.features.refresh()
    return not bool(short)


def _images(loader: ResponseLoader, batches: int) -> Iterator[ImageRef]:
    """The images of the pairs in the first batches, each once, and of the one that stands in for bad ones."""
    yield from images_of(loader.check_readable(), loader.wants)
    numbers = dict.fromkeys(number for _, some in met(loader, batches) for number in some)
    for number in numbers:
        yield from images_of(loader.pairs[number], loader.wants)


def _fill_kept(feed: Feed, recipe: Recipe, family: Any, batches: int, accelerator: Any) -> None:
    """Work out what the method keeps, by the network as it was loaded, and store what is not there yet, with a bar."""
    assert feed.kept is not None
    method, net = methods.find(recipe.method.name), family.network
    base = Policy(family, net, net, FrozenCopy(net))

    @torch.no_grad()
    def work_out(batch: Any, epoch: int) -> dict[str, Tensor]:
        draws = Draws(recipe.train.seed, epoch)
        return methods.worked_out(method, base, feed.encode(batch), recipe.method, draws)

    def fill(loader: Any, number: int) -> None:
        assert feed.kept is not None
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        steps = feed.kept.fill(loader, number, work_out, shared=loader is feed.train, **share)
        with bar_of(accelerator) as bar:
            task = bar.add_task("work out what is kept", total=next(steps))
            for _ in steps:
                bar.advance(task)
        accelerator.wait_for_everyone()
        feed.kept.cache.refresh()

    for loader, number in _loaders(feed, batches):
        fill(loader, number)
    # A batch of bad pairs makes no update, and the training goes on to a further one.
    planned = batches
    while feed.kept.keep.scores and planned < (wanted := batches + _useless(feed, planned, accelerator)):
        planned = wanted
        if feed.features is not None:
            _fill_features(feed, recipe, family, planned, accelerator)
        fill(feed.train, planned)


def _useless(feed: Feed, batches: int, accelerator: Any) -> int:
    """How many batches no process can use, at most; no more than a training meets before it gives up."""
    assert feed.kept is not None and not isinstance(feed.train, PromptLoader)
    found = torch.tensor([feed.kept.useless(feed.train, batches)], device=accelerator.device)
    return min(int(accelerator.gather(found).min()), EMPTY * batches)


def _loaders(feed: Feed, batches: int) -> list[tuple[Any, int]]:
    """The loaders of a training, and how many of their batches it takes."""
    held = [(feed.held, min(HELD_OUT_BATCHES, len(feed.held)))] if feed.held is not None else []
    return [(feed.train, batches), *held]


def _written(folder: Path, used: set[Path], begun: float) -> str:
    """What is in a recipe's caches, by kind, how much of it is new, and what other settings have left beside it."""
    files = {path: path.stat() for path in sorted(folder.rglob("*.safetensors"))}
    ours = {path: file for path, file in files.items() if path.parent in used}
    kinds = dict.fromkeys(path.relative_to(folder).parts[0] for path in ours)
    sizes = {kind: sum(file.st_size for path, file in ours.items() if folder / kind in path.parents) for kind in kinds}
    told = ", ".join(f"{kind} {_size(size)}" for kind, size in sizes.items()) or "nothing"
    new = sum(file.st_size for file in ours.values() if file.st_mtime >= begun)
    told += f"; {_size(sum(sizes.values()))} in all, {_size(new)} of it new"
    others = [path for path in files if path not in ours]
    if not others:
        return told
    folders = dict.fromkeys(str(path.parent.relative_to(folder)) for path in others)
    size = sum(files[path].st_size for path in others)
    return f"{told}; of no use to this recipe: {_size(size)} of other settings in {', '.join(folders)}"


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"
