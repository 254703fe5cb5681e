"""Preparation of response pairs: true answers with generated rejected ones, or the model's answers ranked by a judge.

Results are appended to an unfinished file beside the final one, `prepare.save_every` rows at a time. The same command
resumes from it, and writes the same file as an uninterrupted run. Another judge ranks the same answers.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from mmalign.atomic_io import make_folder
from mmalign.config import PrepareResponses, Recipe, ResponseData
from mmalign.config.preparation import JudgedOutputs
from mmalign.console import tracked
from mmalign.data.caches.journal import AppendLog
from mmalign.data.formats.responses import open_responses
from mmalign.data.images import decode
from mmalign.data.pairs import Pairs, ResponsePair, SkippedRow, format_rows, stable_hash
from mmalign.language.chat import as_text
from mmalign.modalities import loading
from mmalign.modalities.vision_language.generators import Work, load_work, settings_of
from mmalign.resources import locate
from mmalign.rewards import ResponseJudge
from mmalign.synthesis.confidence import is_sure
from mmalign.synthesis.rejected_responses import CUT, CUT_REASON, Candidates, RejectedResponse, Writer
from mmalign.synthesis.unfinished import discard, is_written, unfinished, write_final
from mmalign.synthesis.write_responses import SUFFIXES, SynthesizedPair, write_pairs
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)


class Entry(TypedDict):
    """Result for a row: the rejected response or candidates, or the reason `why` there is none (else empty)."""

    why: str
    texts: list[str]
    notes: dict[str, Any]
    retrieved: str | None


def prepare(recipe: Recipe, writer: Writer | None = None) -> Path:
    """Generate rejected responses to the answers of `prepare.source`, and write the pairs to `data.path`.

    Kind `judged` takes the prompts of `prepare.source` alone, and ranks several answers to each by the judge.

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
    pairs = _open(section)
    images = Path(recipe.data.images or path.parent)
    _check_rows(section, pairs, path, images)

    # Responses, and a judge's scores of them
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = load_work(recipe, section, pairs, writer, device)
    judge = _load_judge(recipe, path, device)
    entries = _generate(path, section, pairs, work)
    scores = _judge(section, pairs, entries, judge) if judge is not None else [list[float]() for _ in entries]
    reasons = [one["why"] or _unsure(section, own) for one, own in zip(entries, scores, strict=True)]
    dropped = [SkippedRow(pairs[n].location, reason) for n, reason in enumerate(reasons) if reason]
    if len(dropped) == len(entries):
        processes.gather(None)
        if processes.is_main and judge is None:  # answers wait for another judge
            discard(path)
        noun = _nouns(section)[0]
        raise ValueError(
            f"prepare: none of {len(entries):,} {noun} of {pairs.source} gave a pair: {format_rows(dropped)}"
        )
    # The file of pairs
    kept = [number for number, reason in enumerate(reasons) if not reason]
    final = _synthesized_pairs(section, pairs, {n: (entries[n], scores[n]) for n in kept}, work)
    if processes.is_main:
        write_final(path, lambda part: write_pairs(part, final, suffix=path.suffix, images=images))
    processes.gather(None)  # no process ends before the file is there
    _warn_of_cut(section, entries)
    logger.info(f"{path}: {_summary(section, pairs, entries, dropped, work)}, in {time.time() - started:.0f} s")
    return path


def _generate(path: Path, section: PrepareResponses, pairs: Pairs[ResponsePair], work: Work) -> list[Entry]:
    """Return the result of each row, in chunks of `save_every` that the processes share."""
    processes = current_processes()
    make_folder("data.path", unfinished(path))
    log = AppendLog(
        unfinished(path) / "rows.jsonl", _job(section, pairs, work), list[Entry], is_writer=processes.is_main
    )
    processes.gather(None)  # nobody writes before all have read
    # The log has whole chunks only
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
    entries = [one for piece in log.entries for one in piece]
    if len(entries) != len(pairs):
        raise ValueError(f"{log.path}: has {len(entries)} results for {len(pairs)} rows; move it away to start over")
    return entries


# -------------------------------------------------------------------------------------------------------------- judging


def _load_judge(recipe: Recipe, path: Path, device: torch.device) -> ResponseJudge | None:
    """Return the judge of kind `judged`, with its scores so far; None for other kinds."""
    assert isinstance(recipe.prepare, PrepareResponses)
    settings = recipe.prepare.judged
    if settings is None:
        return None
    return loading.build_response_judge(
        settings.reward,
        device,
        allow_pickle=recipe.allow_pickle,
        combine=settings.combine,
        scores=unfinished(path) / "scores",
    )


def _judge(
    section: PrepareResponses, pairs: Pairs[ResponsePair], entries: Sequence[Entry], judge: ResponseJudge
) -> list[list[float]]:
    """Return the judge's scores of each row's candidates, for `save_every` rows at a time; all processes call it."""
    scores = list[list[float]]()
    for start in tracked(range(0, len(entries), section.save_every), "judge"):
        chunk = entries[start : start + section.save_every]
        # The candidates of all rows one after another; an image is decoded once for the chunk
        asked = [pairs[start + number] for number, entry in enumerate(chunk) for _ in entry["texts"]]
        shown = {ref.key: decode(ref) for pair in asked for ref in pair.images}
        images = [[shown[ref.key] for ref in pair.images] for pair in asked]
        texts = [text for entry in chunk for text in entry["texts"]]
        truths = [pair.truth for pair in asked]
        judged = iter(judge(images, [as_text(pair.turns) for pair in asked], texts, truths).tolist())
        scores += [[next(judged) for _ in entry["texts"]] for entry in chunk]
    return scores


def _unsure(section: PrepareResponses, scores: Sequence[float]) -> str:
    """Return the reason why the judge's scores of a row make no pair; empty if they do, or without a judge."""
    if section.judged is None or is_sure(scores, section.judged.min_confidence):
        return ""
    if max(scores) == min(scores):
        return "the judge gave all answers the same score"
    return f"the judge is less than {section.judged.min_confidence:.0%} sure (prepare.judged.min_confidence)"


# --------------------------------------------------------------------------------------------------------------- checks


def _check(recipe: Recipe, section: PrepareResponses, writer: Writer | None) -> Path:
    """Return the path of the new file, after checking the recipe."""
    data, path = recipe.data, Path(recipe.data.path)
    assert isinstance(data, ResponseData)
    # The file to write
    ranked = section.judged is not None and section.judged.keep_all
    layout = "realign" if section.kind == "realign" else "rankings" if ranked else "trl"
    if data.format not in (layout, "auto"):
        raise ValueError(f"data.format: kind {section.kind} writes {layout}, got {data.format}; set it to {layout}")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"data.path: expected the file that prepare is to write, *.jsonl or *.parquet, got {path}")
    # Settings that exclude one another
    if data.images is not None and not Path(data.images).is_dir():
        raise ValueError(f"data.images: {data.images} is not a folder; expected the folder of the images' paths")
    if writer is not None and section.kind not in ("realign", "povid"):
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


def _open(section: PrepareResponses) -> Pairs[ResponsePair]:
    """Return the true answers of the source, or for a judge its prompts."""
    source, judged = section.source, section.judged
    try:
        return open_responses(
            source.format,
            locate(source.path),
            images=Path(locate(source.images)) if source.images is not None else None,
            split=source.split,
            columns=source.columns,
            limit=source.limit,
            labels=(),
            learning="pairs" if judged is None else "prompts",
            truths=judged is not None and loading.needs_truths(judged.reward),
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


# ------------------------------------------------------------------------------------------------------------ what came


def _job(section: PrepareResponses, pairs: Pairs[ResponsePair], work: Work) -> dict[str, Any]:
    """Return all that a row's result depends on; work of another job is not resumed."""
    rows = stable_hash(*(str(pair.row) for pair in pairs))
    common = {"kind": section.kind, "seed": section.seed, "save_every": section.save_every, "rows": rows}
    common["keep_torn"] = section.keep_torn
    judging = set(JudgedOutputs.model_fields) if section.judged is not None else None  # scores have files of their own
    return {**settings_of(section).model_dump(exclude=judging), **common, **work.dependencies}


def _log_entry(result: RejectedResponse | Candidates | str) -> Entry:
    """Return a result as an entry of the log."""
    if isinstance(result, str):
        return Entry(why=result, texts=[], notes={}, retrieved=None)
    if isinstance(result, Candidates):
        return Entry(why="", texts=list(result.texts), notes=dict(result.metadata), retrieved=None)
    retrieved = result.retrieved.location if result.retrieved is not None else None
    return Entry(why="", texts=[result.text], notes=dict(result.metadata), retrieved=retrieved)


def _synthesized_pairs(
    section: PrepareResponses, pairs: Pairs[ResponsePair], results: Mapping[int, tuple[Entry, list[float]]], work: Work
) -> Iterator[SynthesizedPair]:
    """Yield the pairs or lists to write, from the results by row."""
    # Re-Align's retrieved images are those of other rows
    images = {ref.location: ref for pair in pairs for ref in pair.images} if section.kind == "realign" else {}
    settings = {
        name: value for name, value in settings_of(section).model_dump().items() if name not in work.dependencies
    }
    common = {"kind": section.kind, "seed": section.seed, **work.dependencies, "settings": settings}
    # Beside a rejected response of the data the generated one is a third response
    beside = section.bdhs is not None and section.bdhs.keep_rejected
    for number, (entry, scores) in results.items():
        pair, texts, origin = pairs[number], entry["texts"], {**entry["notes"], **common}
        if section.judged is not None:
            yield _judged_pair(pair, list(zip(texts, scores, strict=True)), origin, keep_all=section.judged.keep_all)
            continue
        rejected, hallucinated = (pair.rejected, texts[0]) if beside else (texts[0], "")
        retrieved = images[entry["retrieved"]] if entry["retrieved"] else None
        yield SynthesizedPair(pair, rejected, hallucinated, retrieved, origin)


def _judged_pair(
    pair: ResponsePair, ranking: Sequence[tuple[str, float]], origin: Mapping[str, object], *, keep_all: bool
) -> SynthesizedPair:
    """Return the best and the worst of scored answers, the earliest of equal ones, or all of them."""
    (best, high), (worst, low) = (choose(ranking, key=lambda entry: entry[1]) for choose in (max, min))
    scored = replace(pair, chosen=best)
    return SynthesizedPair(scored, worst, "", None, origin, (high, low), ranking if keep_all else ())


def _nouns(section: PrepareResponses) -> tuple[str, str]:
    """Return the plural nouns of what comes in and of what goes out."""
    if section.judged is None:
        return "answers", "pairs"
    return "prompts", "lists" if section.judged.keep_all else "pairs"


def _warn_of_cut(section: PrepareResponses, entries: Sequence[Entry]) -> None:
    """Log the number of responses that the limit of new tokens cut."""
    if cut := sum(int(one["notes"].get(CUT, one["why"] == CUT_REASON)) for one in entries):
        number = len(entries) * (section.judged.responses_per_prompt if section.judged is not None else 1)
        left = "and are kept torn" if section.keep_torn else "and end with their last whole sentence"
        logger.warning(f"{cut:,} of {number:,} generated responses are {CUT}, {left}; raise that for whole ones")


def _summary(
    section: PrepareResponses,
    pairs: Pairs[ResponsePair],
    entries: Sequence[Entry],
    dropped: Sequence[SkippedRow],
    work: Work,
) -> str:
    source, noun = _nouns(section)
    text = f"{len(entries) - len(dropped):,} {noun} of {len(entries):,} {source}"
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
