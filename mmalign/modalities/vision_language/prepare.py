"""Preparation of response pairs: true answers as chosen responses, and generated rejected ones.

Results are appended to an unfinished file beside the final one, `prepare.save_every` rows at a time. The same command
resumes from it, and writes the same file as an uninterrupted run.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from mmalign.config import (
    AnswerSource,
    CompletionConfig,
    DecodingConfig,
    PrepareBdhs,
    PreparePovid,
    PrepareRealign,
    PrepareResponses,
    Recipe,
    ResponseData,
)
from mmalign.console import tracked
from mmalign.data.caches import fingerprint
from mmalign.data.caches.journal import AppendLog
from mmalign.data.formats.responses import open_responses
from mmalign.data.pairs import Pairs, ResponsePair, SkippedRow, format_rows, stable_hash
from mmalign.families.base import VisionLanguage
from mmalign.language.vocabularies import CROWDS, load_vocabulary
from mmalign.modalities import loading
from mmalign.modalities.vision_language.model import template_arguments
from mmalign.reading.weights import tensors_only
from mmalign.registry import qualified_name, user_function
from mmalign.resources import locate
from mmalign.rewards import open_clip
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import ResponseSampler, require_image_masking
from mmalign.synthesis.corrupt import Companions, Corruptor, companions
from mmalign.synthesis.rejected_responses import (
    CUT,
    CUT_REASON,
    ImageIndex,
    ReAlign,
    RejectedResponse,
    ResponseGenerator,
    Writer,
    hallucinated,
    rule_corrupted,
    self_generated,
)
from mmalign.synthesis.segments import masker
from mmalign.synthesis.similarity import Similarity, is_fallback, load_similarity
from mmalign.synthesis.unfinished import is_written, unfinished, write_final
from mmalign.synthesis.write_responses import SUFFIXES, SynthesizedPair, write_pairs
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)

RULES = "rules"


class Entry(TypedDict):
    """Result for a row: the rejected response with its origin, or the reason `why` there is none (else empty)."""

    why: str
    text: str
    notes: dict[str, Any]
    retrieved: str | None


@dataclass(frozen=True)
class Work:
    """Generator of rejected responses, with its dependencies.

    Attributes:
        generate: the generator.
        dependencies: the model, the similarity measure and user functions: all inputs besides settings and rows.
    """

    generate: ResponseGenerator
    dependencies: dict[str, str]


def prepare(recipe: Recipe, writer: Writer | None = None) -> Path:
    """Generate rejected responses to the answers of `prepare.source`, and write the pairs to `data.path`.

    Args:
        recipe: the recipe, with a section `prepare`.
        writer: a user function that replaces the recipe's `masker` or `corruptor`. It maps a pair, whose chosen
            response is the true answer, to the masked or the untrue answer, or to None if there is none.

    Raises:
        ValueError: the recipe or the source is invalid, the file exists, unfinished work has other settings, or no
            answer gave a pair.
    """
    section, started = recipe.prepare, time.time()
    assert isinstance(section, PrepareResponses) and isinstance(recipe.data, ResponseData)
    # Checks before any model is loaded
    path, processes = _check(recipe, section, writer), current_processes()
    if processes.on_main(partial(is_written, path)):
        return path
    pairs = _open(section.source)
    images = Path(recipe.data.images or path.parent)
    _check_rows(section, pairs, path, images)

    # Rejected responses, in chunks of `save_every` rows
    work = _work(recipe, section, pairs, writer)
    log = AppendLog(unfinished(path), _job(section, pairs, work), list[Entry], is_writer=processes.is_main)
    processes.gather(None)  # nobody writes before all have read
    num_done = len(log.entries) * section.save_every
    if num_done:
        logger.info(f"resuming after {min(num_done, len(pairs)):,} of {len(pairs):,} rows")
    step = section.save_every * processes.size
    for first in tracked(range(num_done, len(pairs), step), "prepare"):
        # A chunk for each process, logged in the chunks' order
        start = first + section.save_every * processes.rank
        chunk = list(pairs[start : start + section.save_every]) if start < len(pairs) else []
        for piece in processes.gather([_log_entry(one) for one in work.generate(chunk)] if chunk else []):
            if piece:
                log.append(piece)

    # The file of pairs
    entries = [one for piece in log.entries for one in piece]
    if len(entries) != len(pairs):
        raise ValueError(f"{log.path}: has {len(entries)} results for {len(pairs)} rows; move it away to start over")
    dropped = [SkippedRow(pairs[n].location, one["why"]) for n, one in enumerate(entries) if one["why"]]
    if len(dropped) == len(entries):
        processes.gather(None)
        if processes.is_main:
            log.remove()
        raise ValueError(
            f"prepare: none of {len(entries):,} answers of {pairs.source} gave a pair: {format_rows(dropped)}"
        )
    final = _synthesized_pairs(section, pairs, entries, work)
    if processes.is_main:
        write_final(path, lambda part: write_pairs(part, final, suffix=path.suffix, images=images))
    processes.gather(None)  # no process ends before the file is there
    if cut := sum(CUT in one["notes"] or one["why"] == CUT_REASON for one in entries):
        left = "and are kept torn" if section.keep_torn else "and end with their last whole sentence"
        logger.warning(f"{cut:,} of {len(entries):,} generated responses are {CUT}, {left}; raise that for whole ones")
    logger.info(f"{path}: {_summary(pairs, entries, dropped, work)}, in {time.time() - started:.0f} s")
    return path


# --------------------------------------------------------------------------------------------------------------- checks


def _check(recipe: Recipe, section: PrepareResponses, writer: Writer | None) -> Path:
    """Return the path of the new file, after checking the recipe."""
    data, path = recipe.data, Path(recipe.data.path)
    assert isinstance(data, ResponseData)
    # The file to write
    layout = "realign" if section.kind == "realign" else "trl"
    if data.format not in (layout, "auto"):
        raise ValueError(f"data.format: kind {section.kind} writes {layout}, got {data.format}; set it to {layout}")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"data.path: expected the file that prepare is to write, *.jsonl or *.parquet, got {path}")
    # Settings that exclude one another
    if data.images is not None and not Path(data.images).is_dir():
        raise ValueError(f"data.images: {data.images} is not a folder; expected the folder of the images' paths")
    if writer is not None and section.kind in ("bdhs", "own"):
        raise ValueError(
            f"prepare: kind {section.kind} neither masks nor corrupts answers; it takes no function for that"
        )
    if section.source.format == "answers":
        _check_kept(section)
    return path


def _check_kept(section: PrepareResponses) -> None:
    """Refuse to keep the rejected responses of rows that have none."""
    if section.bdhs is not None and section.bdhs.keep_rejected:
        raise ValueError(
            "prepare.bdhs.keep_rejected: rows of answers have no rejected responses; set prepare.source.format to a "
            "format of pairs, or leave it out"
        )


def _open(source: AnswerSource) -> Pairs[ResponsePair]:
    try:
        return open_responses(
            source.format,
            locate(source.path),
            images=Path(source.images) if source.images is not None else None,
            split=source.split,
            columns=source.columns,
            limit=source.limit,
            labels=(),
        )
    except ValueError as error:  # the readers' messages name keys of the section `data`
        raise ValueError(
            re.sub(r"\bdata\.(path|format|split|columns|images)\b", r"prepare.source.\1", str(error))
        ) from error


def _check_rows(section: PrepareResponses, pairs: Pairs[ResponsePair], path: Path, images: Path) -> None:
    if not pairs[0].rejected:
        _check_kept(section)
    if path.suffix == ".jsonl" and not all(ref.path for ref in pairs[0].images):
        raise ValueError(
            f"data.path: {path} would name images, and those of {section.source.path} are in its table; name a file "
            "that can hold them, *.parquet"
        )
    if path.suffix == ".jsonl":  # the names that the file gets must be ones that its readers accept
        folder = os.path.abspath(images)
        for ref in (ref for pair in pairs for ref in pair.images):
            if not Path(os.path.abspath(ref.path)).is_relative_to(folder):
                raise ValueError(
                    f"data.images: {ref.path} is outside {folder}; name a folder that holds all images, or write a "
                    "file that holds them itself, *.parquet"
                )


# ----------------------------------------------------------------------------------------------------------------- work


def _work(recipe: Recipe, section: PrepareResponses, pairs: Pairs[ResponsePair], writer: Writer | None) -> Work:
    """Return the generator of rejected responses, with all its models in memory."""
    rng, settings = KeyedRNG(section.seed), _settings(section)
    if isinstance(settings, PreparePovid):
        return _povid(settings, pairs, rng, writer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(settings, PrepareBdhs | PrepareRealign):
        sampler, dependencies = _sampler(recipe, device, rng)
        return Work(partial(self_generated, sampler, settings), dependencies)
    # What may be missing is loaded before the model's gigabytes.
    similarity = _similarity(f"prepare.{section.kind}.similarity", settings, recipe.allow_pickle)
    mask = _mask(settings, writer) if isinstance(settings, PrepareRealign) else None
    sampler, dependencies = _sampler(recipe, device, rng)
    dependencies["similarity by"] = similarity.name
    if not isinstance(settings, PrepareRealign):
        require_image_masking(sampler.family)
        return Work(partial(hallucinated, sampler, settings, similarity), dependencies)
    assert mask is not None
    # Re-Align: answers misled by a similar image
    misled = ReAlign(
        sampler,
        _index(settings, pairs, device, recipe.allow_pickle),
        mask,
        settings,
        similarity,
        max_similarity=settings.max_similarity,
        asking=settings.completion == "ask",
    )
    return Work(misled, {**dependencies, "masker": _named(settings.masker, writer)})


def _sampler(recipe: Recipe, device: torch.device, rng: KeyedRNG) -> tuple[ResponseSampler, dict[str, str]]:
    """Return a sampler of the recipe's model, and the model's path, fingerprint and precision."""
    family: VisionLanguage = loading.load_model(recipe, device)
    dependencies = {
        "model": recipe.model.path,
        "fingerprint": fingerprint.fingerprint_weights(family.network),
        "precision": recipe.train.precision,
        **template_arguments(recipe.model),
    }
    assert isinstance(recipe.prepare, PrepareResponses)
    return ResponseSampler(family, family.network, rng, not recipe.prepare.keep_torn), dependencies


def _similarity(key: str, settings: CompletionConfig, allow_pickle: bool) -> Similarity:
    similarity = load_similarity(key, settings.similarity, allow_pickle=allow_pickle)
    if is_fallback(settings.similarity, similarity):
        logger.warning(f"similarity: {similarity.name}, since no sentence-transformers model is installed")
    return similarity


def _mask(settings: PrepareRealign, writer: Writer | None) -> Writer:
    if writer is not None:
        return writer
    if settings.masker != RULES:
        return _writer("prepare.realign.masker", settings.masker)
    mask = masker(load_vocabulary("prepare.realign.vocabulary", settings.vocabulary))
    return lambda pair: mask(pair.chosen.strip())


def _index(
    settings: PrepareRealign, pairs: Pairs[ResponsePair], device: torch.device, allow_pickle: bool
) -> ImageIndex:
    try:
        with tensors_only(allow_pickle):
            retriever = open_clip.load(settings.retriever, device, open_clip.Config(pretrained=settings.pretrained))
    except ValueError as error:
        raise ValueError(f"prepare.realign.retriever: {str(error).removeprefix('reward open_clip: ')}") from error
    return ImageIndex(tracked(pairs, "compare images"), retriever.embed, settings.candidates)


def _povid(settings: PreparePovid, pairs: Pairs[ResponsePair], rng: KeyedRNG, writer: Writer | None) -> Work:
    if writer is None and settings.corruptor != RULES:
        writer = _writer("prepare.povid.corruptor", settings.corruptor)
    if writer is not None:
        return Work(partial(rule_corrupted, writer), {"corruptor": qualified_name(writer)})
    vocabulary = load_vocabulary("prepare.povid.vocabulary", settings.vocabulary)
    together: Companions
    if settings.vocabulary == CROWDS:
        from mmalign.toy.crowds import PARTNERS

        together = {kind: [partner] for kind, partner in PARTNERS.items()}
    else:
        together = companions((pair.chosen for pair in pairs), vocabulary)
    corrupt = Corruptor(vocabulary, together, settings.share, settings.beside)
    rules = partial(rule_corrupted, lambda pair: corrupt(pair.chosen.strip(), pair.row, rng))
    return Work(rules, {"corruptor": RULES})


def _writer(key: str, name: str) -> Writer:
    """Return the function that the recipe names at `key`."""
    return user_function(key, name, ["pair"], "text, or None", lambda text: text is None or isinstance(text, str))


def _named(name: str, writer: Writer | None) -> str:
    return name if writer is None else qualified_name(writer)


# ------------------------------------------------------------------------------------------------------------ what came


def _settings(section: PrepareResponses) -> PrepareBdhs | PrepareRealign | PreparePovid | DecodingConfig:
    """Return the settings of the section's kind, or their defaults."""
    match section.kind:
        case "realign":
            assert section.realign is not None, "the section has been checked"
            return section.realign
        case "bdhs":
            return section.bdhs or PrepareBdhs()
        case "povid":
            return section.povid or PreparePovid()
        case "own":
            return section.own or DecodingConfig()


def _job(section: PrepareResponses, pairs: Pairs[ResponsePair], work: Work) -> dict[str, Any]:
    """Return all that a row's result depends on; work of another job is not resumed."""
    rows = stable_hash(*(str(pair.row) for pair in pairs))
    common = {"kind": section.kind, "seed": section.seed, "save_every": section.save_every, "rows": rows}
    common["keep_torn"] = section.keep_torn
    return {**_settings(section).model_dump(), **common, **work.dependencies}


def _log_entry(result: RejectedResponse | str) -> Entry:
    """Return a result as an entry of the log."""
    if isinstance(result, str):
        return Entry(why=result, text="", notes={}, retrieved=None)
    retrieved = result.retrieved.location if result.retrieved is not None else None
    return Entry(why="", text=result.text, notes=dict(result.metadata), retrieved=retrieved)


def _synthesized_pairs(
    section: PrepareResponses, pairs: Pairs[ResponsePair], entries: Sequence[Entry], work: Work
) -> Iterator[SynthesizedPair]:
    """Yield the pairs to write."""
    images = {ref.location: ref for pair in pairs for ref in pair.images} if section.kind == "realign" else {}
    settings = {name: value for name, value in _settings(section).model_dump().items() if name not in work.dependencies}
    common = {"kind": section.kind, "seed": section.seed, **work.dependencies, "settings": settings}
    beside = section.bdhs is not None and section.bdhs.keep_rejected
    for number, entry in enumerate(entries):
        if not entry["why"]:
            pair = pairs[number]
            rejected, hallucinated = (pair.rejected, entry["text"]) if beside else (entry["text"], "")
            retrieved = images[entry["retrieved"]] if entry["retrieved"] else None
            yield SynthesizedPair(pair, rejected, hallucinated, retrieved, {**entry["notes"], **common})


def _summary(pairs: Pairs[ResponsePair], entries: Sequence[Entry], dropped: Sequence[SkippedRow], work: Work) -> str:
    text = f"{len(entries) - len(dropped):,} pairs of {len(entries):,} answers"
    if pairs.skipped:
        text += f"; {len(pairs.skipped):,} rows of the source cannot be used ({format_rows(pairs.skipped)})"
    if dropped:
        text += f"; {len(dropped):,} left out ({format_rows(dropped)})"
    tries = Counter(one["notes"]["tries"] for one in entries if "tries" in one["notes"])
    if tries:
        text += "; taken at try " + ", ".join(f"{attempt}: {number:,}" for attempt, number in sorted(tries.items()))
    if "similarity by" in work.dependencies:
        text += f"; similarity by {work.dependencies['similarity by']}"
    return text
