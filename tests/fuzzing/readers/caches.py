"""Caches of tensors, and journals of unfinished work."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from mmalign.data.caches.answers import AnswerCache
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.journal import AppendLog
from mmalign.families.types import GeneratedText
from mmalign.modalities.vision_language.prepare import Entry
from tests.fuzzing.mutations import VALUES
from tests.fuzzing.readers.checkpoints import files_in
from tests.fuzzing.rule import Files, Reader

JOB: dict[str, Any] = {"model": "m", "seed": 1, "settings": {"rho": 0.5}}
PRINT = {"model": "m", "resolution": 32}


def cache_files() -> Files:
    with tempfile.TemporaryDirectory() as name:
        cache = ArrayCache.open(Path(name), PRINT)
        cache.put({key: {"latent": torch.ones(2, 3), "mean": torch.zeros(1)} for key in ("a", "b")})
        return files_in(Path(name))


def read_cache(folder: Path) -> None:
    cache = ArrayCache.open(folder, PRINT)
    for key in cache:
        cache.get(key)


def answer_files() -> Files:
    with tempfile.TemporaryDirectory() as name:
        AnswerCache(Path(name), JOB).add(
            {("a.png", "Say."): GeneratedText("yes", True), ("b.png", "Say."): GeneratedText("")}
        )
        return files_in(Path(name))


def read_answers(folder: Path) -> None:
    book = AnswerCache(folder, JOB)
    assert all(isinstance(text, str) for answer in book.answers.items() for text in (*answer[0], answer[1]))
    book.add({("c.png", "Say."): GeneratedText("no")})


def work_files() -> Files:
    with tempfile.TemporaryDirectory() as name:
        log = AppendLog(Path(name) / "rows.unfinished", JOB, list[Entry])
        log.append([Entry(why="too short", texts=[], notes={}, retrieved=None)])
        log.append([Entry(why="", texts=["no"], notes={"tries": 2}, retrieved="rows.jsonl: line 1")])
        return files_in(Path(name))


def read_work(folder: Path) -> None:
    log = AppendLog(folder / "rows.unfinished", JOB, list[Entry])
    for entry in (one for piece in log.entries for one in piece):
        _ = entry["why"], entry["texts"], entry["notes"], entry["retrieved"]


def lines(values: list[Any], name: str, head: bytes) -> Files:
    return {name: b"\n".join([head, *(json.dumps(value).encode() for value in values)]) + b"\n"}


CACHE, ANSWERS, WORK = cache_files(), answer_files(), work_files()
PIECES = st.lists(VALUES, max_size=3)

READERS = (
    Reader("caches", read_cache, (CACHE,), share=80, places=("data.cache",)),
    Reader(
        "answers of evaluate",
        read_answers,
        (ANSWERS,),
        share=50,
        generated=PIECES.map(
            lambda made: lines(made, next(iter(ANSWERS)), next(iter(ANSWERS.values())).splitlines()[0])
        ),
    ),
    Reader(
        "work of prepare",
        read_work,
        (WORK,),
        share=50,
        generated=PIECES.map(lambda made: lines(made, "rows.unfinished", WORK["rows.unfinished"].splitlines()[0])),
    ),
)
