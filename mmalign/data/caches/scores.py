"""Cache of judges' scores on disk, by the content of images and texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.caches.journal import AppendLog
from mmalign.rewards import ResponseJudge, RewardModel, Shown, Truths
from mmalign.rewards._combine import question_keys

logger = logging.getLogger(__name__)

T = TypeVar("T")
CHUNK = 64  # outputs judged between two writes, for judges without batches of their own


class Sharing(Protocol):
    """The processes of a launch, as `mmalign.training.processes.Processes` describes them."""

    @property
    def rank(self) -> int:
        """This process's index; 0 is the one that writes."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks; waits for all of them."""


class ScoreCache:
    """Scores of one judge, in memory and in a file; new ones are written at once.

    Args:
        folder: the folder of all judges' files.
        identity: the fingerprint of the judge, the name of its file.
        processes: the processes that judge the chunks in turn; all call `scores` with the same outputs.
        chunk: outputs judged between two writes.
    """

    def __init__(self, folder: Path, identity: str, processes: Sharing, *, chunk: int = CHUNK) -> None:
        file, job = folder / f"{identity}.jsonl", {"judge": identity}
        self._chunk, self._scores, self._processes = chunk, dict[str, float](), processes
        self._open_log = partial(AppendLog, file, job, list[tuple[str, float]], is_writer=processes.rank == 0)
        self._read_log()

    def _read_log(self) -> None:
        """Read all scores so far, also those that other runs or other judges of this identity have written."""
        self._log = self._open_log()
        self._scores |= {key: score for piece in self._log.entries for key, score in piece}

    def scores(self, keys: Sequence[str], judge: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Return the scores [N] of outputs by their keys, float32, on the CPU; `judge` scores rows without one."""
        # Another run may have stored them since the last reading; the writer reads for all
        if self._processes.rank == 0 and not self._scores.keys() >= set(keys) and self._log.is_outdated:
            self._read_log()
        num_stored = sum(key in self._scores for key in keys)
        if num_stored:
            logger.info(f"{self._log.path}: {num_stored} of {len(keys)} scores are stored there and used again")
        # What one process knows, all know: their chunks are then the same
        for known in self._processes.gather({key: self._scores[key] for key in keys if key in self._scores}):
            self._scores |= known
        # A row for each key without a score, the same on every process
        new = [row for key, row in {key: row for row, key in enumerate(keys)}.items() if key not in self._scores]
        # A round is a chunk for each process; even one without rows gathers, since all wait for all
        for start in range(0, len(new), self._chunk * self._processes.size):
            first = start + self._chunk * self._processes.rank
            rows = new[first : first + self._chunk]
            own = list(zip([keys[row] for row in rows], judge(rows).tolist(), strict=True)) if rows else []
            for piece in filter(None, self._processes.gather(own)):
                self._log.append(piece)
                self._scores.update(piece)
        return torch.tensor([self._scores[key] for key in keys], dtype=torch.float32)


@dataclass(frozen=True)
class CachedJudge:
    """Judge of images that looks up what it has scored before."""

    judge: RewardModel
    cache: ScoreCache

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; scores of noisy images (with `t`) are not stored."""
        if t is not None:
            return self.judge(images, prompts, t)
        keys = [_digest(key) for key in question_keys([[image] for image in images], prompts)]
        return self.cache.scores(keys, lambda rows: self.judge(_pick(images, rows), _pick(prompts, rows)))


@dataclass(frozen=True)
class CachedResponseJudge:
    """Judge of responses that looks up what it has scored before."""

    judge: ResponseJudge
    cache: ScoreCache

    def __call__(
        self, images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None
    ) -> Tensor:
        """Return scores [N], float32, on the CPU; with true answers they are stored under these as well."""
        truth_keys = [""] * len(prompts) if truths is None else [json.dumps(list(texts)) for texts in truths]
        rows = zip(question_keys(images, prompts), responses, truth_keys, strict=True)
        keys = [_digest(f"response {len(asked)} {len(text)} ", asked, text, truth) for asked, text, truth in rows]

        def judge(rows: Sequence[int]) -> Tensor:
            columns = _pick(images, rows), _pick(prompts, rows), _pick(responses, rows)
            return self.judge(*columns, None if truths is None else _pick(truths, rows))

        return self.cache.scores(keys, judge)


def _pick(column: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [column[row] for row in rows]


def _digest(*parts: str) -> str:
    """Return 32 hex digits of texts."""
    return hashlib.blake2b("".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
