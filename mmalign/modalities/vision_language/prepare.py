"""`prepare` for vision-language models: true answers become pairs, whose rejected responses are made here.

A piece of the work is written down as soon as it is done, in a file beside the one that is to come; the same command
goes on from there, and gives the same file as a run that never stopped.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign import atomic_io
from mmalign.atomic_io import written
from mmalign.config import (
    Completing,
    Decoding,
    PrepareBdhs,
    PreparePovid,
    PrepareRealign,
    PrepareResponses,
    Recipe,
    ResponseData,
    Source,
)
from mmalign.console import tracked
from mmalign.data.caches import fingerprint
from mmalign.data.caches.journal import Journal
from mmalign.data.formats.responses import open_responses
from mmalign.data.pairs import Dropped, Pairs, ResponsePair, hashed, listed
from mmalign.families import types
from mmalign.families.base import VisionLanguage
from mmalign.language.vocabularies import CROWDS, load_vocabulary
from mmalign.modalities import loading
from mmalign.registry import find_callable, name_of
from mmalign.resources import locate
from mmalign.rewards import open_clip
from mmalign.rng import Draws
from mmalign.synthesis.bdhs import Speaker, hiding, require_hiding
from mmalign.synthesis.corrupt import Companions, Corruptor, companions
from mmalign.synthesis.rejected_responses import Corrupted, Hallucinated, Index, Made, Maker, Misled, Own, Writer
from mmalign.synthesis.segments import masker
from mmalign.synthesis.similarity import Similarity, is_fallback, load_similarity
from mmalign.synthesis.write_responses import SUFFIXES, MadePair, write_pairs

Say = Callable[[str], None]
RULES = "rules"


@dataclass(frozen=True)
class Work:
    """How rejected responses are made, and what they depend on.

    Attributes:
        make: makes them.
        of: what they depend on besides settings and rows: the model, the measure, functions of one's own.
    """

    make: Maker
    of: dict[str, str]


def prepare_responses(recipe: Recipe, say: Say = print, *, writer: Writer | None = None) -> Path:
    """Make rejected responses for the answers of `prepare.source`, and write the pairs to `data.path`.

    Args:
        recipe: with a section `prepare`.
        say: takes lines of text.
        writer: a function of one's own in the place of the recipe's `masker` or `corruptor`: from a pair, whose chosen
            response is the true answer, to the masked or the untrue answer, or None if there is none.

    Raises:
        ValueError: something in the recipe or the source does not fit, a file is there already, unfinished work is of
            other settings, or no pair could be made.
    """
    section, started = recipe.prepare, time.time()
    assert isinstance(section, PrepareResponses) and isinstance(recipe.data, ResponseData)
    path = _check(recipe, section, writer)
    pairs = _open(section.source)
    _check_rows(section, pairs, path)
    atomic_io.make_folder("data.path", path.parent)
    work = _work(recipe, section, pairs, say, writer)
    journal = Journal(path.with_name(f"{path.name}.unfinished"), _job(section, pairs, work))
    if journal.pieces:
        say(f"going on after {min(len(journal.pieces) * section.save_every, len(pairs)):,} of {len(pairs):,} rows")
    for first in tracked(range(len(journal.pieces) * section.save_every, len(pairs), section.save_every), "prepare"):
        some = pairs[first : first + section.save_every]
        journal.append([_kept(one) for one in work.make(list(some))])
    found = [one for piece in journal.pieces for one in piece]
    dropped = [Dropped(pairs[n].where, one["why"]) for n, one in enumerate(found) if "why" in one]
    if len(dropped) == len(found):
        journal.remove()
        raise ValueError(f"prepare: none of {len(found):,} answers of {pairs.source} gave a pair: {listed(dropped)}")
    with written(path) as part:
        images = Path(recipe.data.images or path.parent)
        write_pairs(part, _made(section, pairs, found, work), suffix=path.suffix, images=images)
    journal.remove()
    say(f"{path}: {_summary(pairs, found, dropped, work)}, in {time.time() - started:.0f} s")
    return path


# --------------------------------------------------------------------------------------------------------------- checks


def _check(recipe: Recipe, section: PrepareResponses, writer: Writer | None) -> Path:
    """Where the pairs will be written, when nothing in the recipe speaks against it."""
    data, path = recipe.data, Path(recipe.data.path)
    assert isinstance(data, ResponseData)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("prepare: several processes were started, and all would write one file; start one")
    layout = "realign" if section.kind == "realign" else "trl"
    if data.format != layout:
        raise ValueError(f"data.format: kind {section.kind} writes {layout}, got {data.format}; set it to {layout}")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"data.path: expected the file that prepare is to write, *.jsonl or *.parquet, got {path}")
    if path.exists():
        raise ValueError(
            f"data.path: {path} is there already; move it away, or name another with --set data.path=...: "
            "prepare replaces nothing"
        )
    if data.images is not None and not Path(data.images).is_dir():
        raise ValueError(f"data.images: {data.images} is no folder; expected the one that the images' paths begin in")
    if writer is not None and section.kind in ("bdhs", "own"):
        raise ValueError(
            f"prepare: kind {section.kind} neither masks nor corrupts answers; it takes no function for that"
        )
    bdhs = section.bdhs
    if bdhs is not None and bdhs.keep_rejected and section.source.format == "answers":
        raise ValueError(
            "prepare.bdhs.keep_rejected: rows of answers have no rejected responses to keep; name pairs by "
            "prepare.source.format, or leave it out"
        )
    return path


def _open(source: Source) -> Pairs[ResponsePair]:
    try:
        return open_responses(
            source.format,
            locate(source.path),
            images=Path(source.images) if source.images is not None else None,
            split=source.split,
            columns=source.columns,
            limit=source.limit,
        )
    except ValueError as error:  # the readers speak of the section `data`, whose keys these are
        raise ValueError(
            re.sub(r"\bdata\.(path|format|split|columns|images)\b", r"prepare.source.\1", str(error))
        ) from error


def _check_rows(section: PrepareResponses, pairs: Pairs[ResponsePair], path: Path) -> None:
    if path.suffix == ".jsonl" and not all(ref.path for ref in pairs[0].images):
        raise ValueError(
            f"data.path: {path} would name images, and those of {section.source.path} are in its table; name a file "
            "that can hold them, *.parquet"
        )


# ----------------------------------------------------------------------------------------------------------------- work


def _work(
    recipe: Recipe, section: PrepareResponses, pairs: Pairs[ResponsePair], say: Say, writer: Writer | None
) -> Work:
    """What makes the rejected responses, with all models in memory that it needs."""
    draws, settings = Draws(section.seed), _settings(section)
    if isinstance(settings, PreparePovid):
        return _povid(settings, pairs, draws, writer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(settings, Decoding):
        speaker, of = _speaker(recipe, device, draws, say)
        how = types.Decoding(**settings.model_dump())
        return Work(Own(speaker, how), of)
    # Before a model of gigabytes: what may be missing.
    similarity = _similarity(f"prepare.{section.kind}.similarity", settings, say)
    mask = _mask(settings, writer) if isinstance(settings, PrepareRealign) else None
    speaker, of = _speaker(recipe, device, draws, say)
    of["similarity by"] = similarity.name
    if not isinstance(settings, PrepareRealign):
        require_hiding(speaker.family)
        return Work(Hallucinated(speaker, hiding(settings), similarity), of)
    assert mask is not None
    misled = Misled(
        speaker,
        _index(settings, pairs, device),
        mask,
        types.Decoding(settings.max_new_tokens, settings.temperature, batch_size=settings.batch_size),
        similarity,
        similar=settings.similar,
        asking=settings.completion == "ask",
    )
    return Work(misled, {**of, "masker": _named(settings.masker, writer)})


def _speaker(recipe: Recipe, device: torch.device, draws: Draws, say: Say) -> tuple[Speaker, dict[str, str]]:
    """The recipe's model, and which one it is."""
    family: VisionLanguage = loading.load_model(recipe, device, say)
    of = {
        "model": recipe.model.path,
        "fingerprint": fingerprint.fingerprint(family.network),
        "precision": recipe.train.precision,
    }
    return Speaker(family, family.network, draws), of


def _similarity(key: str, settings: Completing, say: Say) -> Similarity:
    found = load_similarity(key, settings.similarity)
    if is_fallback(settings.similarity, found):
        say(f"similarity: {found.name}, since no sentence-transformers model is installed")
    return found


def _mask(settings: PrepareRealign, writer: Writer | None) -> Writer:
    if writer is not None:
        return writer
    if settings.masker != RULES:
        return find_callable("prepare.realign.masker", settings.masker)
    mask = masker(load_vocabulary("prepare.realign.vocabulary", settings.vocabulary))
    return lambda pair: mask(pair.chosen.strip())


def _index(settings: PrepareRealign, pairs: Pairs[ResponsePair], device: torch.device) -> Index:
    try:
        retriever = open_clip.load(settings.retriever, device, open_clip.Config(pretrained=settings.pretrained))
    except ValueError as error:
        raise ValueError(f"prepare.realign.retriever: {str(error).removeprefix('judge open_clip: ')}") from error
    return Index(tracked(pairs, "compare images"), retriever.embed, settings.candidates)


def _povid(settings: PreparePovid, pairs: Pairs[ResponsePair], draws: Draws, writer: Writer | None) -> Work:
    if writer is None and settings.corruptor != RULES:
        writer = find_callable("prepare.povid.corruptor", settings.corruptor)
    if writer is not None:
        return Work(Corrupted(writer), {"corruptor": name_of(writer)})
    vocabulary = load_vocabulary("prepare.povid.vocabulary", settings.vocabulary)
    together: Companions
    if settings.vocabulary == CROWDS:
        from mmalign.toy.crowds import PARTNERS

        together = {kind: [partner] for kind, partner in PARTNERS.items()}
    else:
        together = companions((pair.chosen for pair in pairs), vocabulary)
    corrupt = Corruptor(vocabulary, together, settings.share, settings.beside)
    return Work(Corrupted(lambda pair: corrupt(pair.chosen.strip(), pair.row, draws)), {"corruptor": RULES})


def _named(name: str, writer: Writer | None) -> str:
    return name if writer is None else name_of(writer)


# ------------------------------------------------------------------------------------------------------------ what came


def _settings(section: PrepareResponses) -> PrepareBdhs | PrepareRealign | PreparePovid | Decoding:
    """What is set for this kind, or its defaults."""
    match section.kind:
        case "realign":
            assert section.realign is not None, "the section has been checked"
            return section.realign
        case "bdhs":
            return section.bdhs or PrepareBdhs()
        case "povid":
            return section.povid or PreparePovid()
        case "own":
            return section.own or Decoding()


def _job(section: PrepareResponses, pairs: Pairs[ResponsePair], work: Work) -> dict[str, Any]:
    """What a row's result depends on; work that was begun under another one is not gone on with."""
    rows = hashed(*(str(pair.row) for pair in pairs))
    common = {"kind": section.kind, "seed": section.seed, "save_every": section.save_every, "rows": rows}
    return {**_settings(section).model_dump(), **common, **work.of}


def _kept(one: Made | str) -> dict[str, Any]:
    """A result as the journal keeps it."""
    if isinstance(one, str):
        return {"why": one}
    retrieved = one.retrieved.where if one.retrieved is not None else None
    return {"text": one.text, "notes": dict(one.notes), "retrieved": retrieved}


def _made(
    section: PrepareResponses, pairs: Pairs[ResponsePair], found: Sequence[dict[str, Any]], work: Work
) -> Iterator[MadePair]:
    """The pairs that are written."""
    images = {ref.where: ref for pair in pairs for ref in pair.images} if section.kind == "realign" else {}
    settings = {name: value for name, value in _settings(section).model_dump().items() if name not in work.of}
    common = {"kind": section.kind, "seed": section.seed, **work.of, "settings": settings}
    beside = section.bdhs is not None and section.bdhs.keep_rejected
    for number, one in enumerate(found):
        if "why" not in one:
            pair = pairs[number]
            rejected, hallucinated = (pair.rejected, one["text"]) if beside else (one["text"], "")
            retrieved = images[one["retrieved"]] if one["retrieved"] else None
            yield MadePair(pair, rejected, hallucinated, retrieved, {**one["notes"], **common})


def _summary(
    pairs: Pairs[ResponsePair], found: Sequence[dict[str, Any]], dropped: Sequence[Dropped], work: Work
) -> str:
    text = f"{len(found) - len(dropped):,} pairs of {len(found):,} answers"
    if pairs.dropped:
        text += f"; {len(pairs.dropped):,} rows of the source cannot be used ({listed(pairs.dropped)})"
    if dropped:
        text += f"; {len(dropped):,} left out ({listed(dropped)})"
    tries = Counter(one["notes"]["tries"] for one in found if "tries" in one.get("notes", {}))
    if tries:
        text += "; taken at try " + ", ".join(f"{tried}: {number:,}" for tried, number in sorted(tries.items()))
    if "similarity by" in work.of:
        text += f"; similarity by {work.of['similarity by']}"
    return text
