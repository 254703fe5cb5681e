"""The training data of a recipe, opened, encoded and in batches: what stands between files and the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmalign.data.cache import ArrayCache, fingerprint_tensors
from mmalign.data.loader import PairLoader, View, check_bad
from mmalign.data.pairs import Dropped, Pairs, hold_out, listed
from mmalign.data.sources import open_pairs
from mmalign.encode import EncodedPairs, Encoder, fill_latents, fill_text, text_key
from mmalign.families import TextToImage
from mmalign.recipe import Data
from mmalign.share import locate

Opened = tuple[Pairs, Pairs | None]  # to train on, and held out


@dataclass(frozen=True)
class Feed:
    """Pairs of a recipe as a method takes them.

    Attributes:
        encoder: makes batches of latents and embeddings.
        train: the loader of the pairs to learn from.
        held: the loader of those held out; None if there are none.
        about: one sentence on what there is, for people.
    """

    encoder: Encoder
    train: PairLoader
    held: PairLoader | None
    about: str

    def batches(self, epoch: int, start: int = 0) -> Iterator[EncodedPairs]:
        """The training batches of an epoch, from number `start` on."""
        return self.encoder.batches(self.train, epoch, start)

    def held_out(self) -> Iterator[EncodedPairs]:
        """The held-out batches, always in the same order; none if nothing is held out."""
        return self.encoder.batches(self.held, 0) if self.held else iter(())

    def places(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a training batch lie, for people."""
        return self.train.places(epoch, number)

    def dropped(self) -> list[Dropped]:
        """The images that could not be read in the batches so far."""
        return self.train.dropped + (self.held.dropped if self.held else [])


def open_data(data: Data, seed: int) -> Opened:
    """The recipe's pairs: (to train on, held out or None). No image is read.

    Raises:
        ValueError: files or columns are missing, or no pair is left.
    """
    pairs = open_pairs(
        data.format, locate(data.path), split=data.split, columns=data.columns, group_by=data.group_by, limit=data.limit
    )
    return hold_out(pairs, data.hold_out, seed) if data.hold_out else (pairs, None)


def open_feed(
    family: TextToImage,
    data: Data,
    *,
    output: Path,
    batch_size: int,
    seed: int,
    accelerator: Any,
    say: Any,
    opened: Opened | None = None,
) -> Feed:
    """Open the recipe's pairs and fill its caches with what the frozen encoders make of them.

    Args:
        family: the model whose encoders are used.
        data: the recipe's section.
        output: the run's folder, where `data.cache: auto` keeps the caches.
        batch_size: pairs of a batch on each process.
        seed: of order, crops, flips and the hold-out.
        accelerator: says which process this is.
        say: takes a line of text.
        opened: what `open_data` has given, for those who must know that it is sound before they have a family.

    Raises:
        ValueError: files, columns or caches do not fit, or more than `data.max_bad` images are bad, or all pairs.
    """
    train, held = opened or open_data(data, seed)
    sources = [train] if held is None else [train, held]
    view = View(data.resolution or family.resolution, data.crop, data.flip)
    latents, text, bad = None, None, list[Dropped]()
    unconditional = family.unconditional()
    if data.cache != "off" and data.crop == "center":
        folder = output / "cache" if data.cache == "auto" else Path(data.cache)
        encoders = {name: fingerprint_tensors(net.state_dict()) for name, net in family.encoders()}
        latents = ArrayCache.open(folder / "latents", {"vae": encoders.pop("vae"), "resolution": view.resolution})
        text = ArrayCache.open(folder / "text", encoders)
        bad = _fill(family, sources, view, latents, text, data, accelerator)
        for _, net in family.encoders():
            net.to("cpu")  # they have done their work, and on a GPU would take gigabytes from the training
    common: dict[str, Any] = {
        "seed": seed,
        "view": view,
        "cache": latents,
        "num_workers": data.workers,
        "max_bad": data.max_bad,
    }
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = PairLoader(train, batch_size=batch_size, rank=rank, world_size=world, **common)
    # Every process scores all held-out pairs, so that all know the same number.
    scored = PairLoader(held, batch_size=batch_size, keep_last=True, **common) if held is not None else None
    for checked in (loader, scored):
        if checked is not None:
            checked.check_readable()
    if bad:
        say(f"{len(bad)} images cannot be read, and their pairs are left out: {listed(bad)}")
    prompts = sorted({prompt for pairs in sources for prompt in pairs.prompts()})
    cut = family.count_cut(prompts)
    if cut:
        say(f"{cut:,} of {len(prompts):,} prompts are longer than the text encoder reads, and are cut")
    about = train.summary() + (f" {len(held):,} more are held out." if held is not None else "")
    return Feed(Encoder(family, unconditional, text), loader, scored, about)


def _fill(
    family: TextToImage,
    sources: Sequence[Pairs],
    view: View,
    latents: ArrayCache,
    text: ArrayCache,
    data: Data,
    accelerator: Any,
) -> list[Dropped]:
    """Encode what the caches lack, each process its share, with a bar; gives the images that cannot be read."""
    from accelerate.utils import gather_object

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    bad: list[Dropped] = []
    console = Console(stderr=True)
    shown = accelerator.is_main_process and console.is_terminal
    with Progress(transient=True, console=console, disable=not shown) as bar:
        for pairs in sources:
            task = bar.add_task("encode images", total=None)
            for found in fill_latents(family, pairs, view, latents, num_workers=data.workers, **share):
                if isinstance(found, Dropped):
                    bad.append(found)
                    check_bad(bad, data.max_bad, pairs.source)
                bar.advance(task)
            prompts = sorted(set(pairs.prompts()))
            task = bar.add_task("encode prompts", total=len(text.missing(map(text_key, prompts))))
            for number in fill_text(family, prompts, text, **share):
                bar.advance(task, number)
            accelerator.wait_for_everyone()
            latents.refresh()
            text.refresh()
    bad = gather_object(bad)  # each process has met those of its share
    check_bad(bad, data.max_bad, sources[0].source)
    return bad
