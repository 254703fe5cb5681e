"""Cache of judges' scores on disk, by the content of image and prompt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.caches.journal import AppendLog
from mmalign.rewards import RewardModel

logger = logging.getLogger(__name__)

CHUNK = 64  # images judged between two writes, for judges without batches of their own


class CachedJudge:
    """Judge that looks up what it has scored before; new scores are written at once.

    Args:
        judge: the judge whose scores are stored.
        folder: the folder of all judges' files.
        identity: the fingerprint of the judge, the name of its file.
        chunk: images judged between two writes.
        is_writer: false in all processes of a launch but one.
    """

    def __init__(
        self, judge: RewardModel, folder: Path, identity: str, *, chunk: int = CHUNK, is_writer: bool = True
    ) -> None:
        file, job = folder / f"{identity}.jsonl", {"judge": identity}
        self._judge, self._chunk, self._scores = judge, chunk, dict[str, float]()
        self._open_log = partial(AppendLog, file, job, list[tuple[str, float]], is_writer=is_writer)
        self._read_log()

    def _read_log(self) -> None:
        """Read all scores so far, also those that other runs or other judges of this identity have written."""
        self._log = self._open_log()
        self._scores |= {key: score for piece in self._log.entries for key, score in piece}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; scores of noisy images (with `t`) are not stored."""
        if t is not None:
            return self._judge(images, prompts, t)
        keys = [_key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        if not self._scores.keys() >= set(keys):
            self._read_log()
        num_stored = sum(key in self._scores for key in keys)
        if num_stored:
            logger.info(f"{self._log.path}: {num_stored} of {len(keys)} scores are stored there and used again")
        new = [row for key, row in {key: row for row, key in enumerate(keys)}.items() if key not in self._scores]
        for start in range(0, len(new), self._chunk):
            rows = new[start : start + self._chunk]
            scores = self._judge([images[row] for row in rows], [prompts[row] for row in rows]).tolist()
            piece = list(zip([keys[row] for row in rows], scores, strict=True))
            self._log.append(piece)
            self._scores.update(piece)
        return torch.tensor([self._scores[key] for key in keys], dtype=torch.float32)


def _key(image: Image.Image, prompt: str) -> str:
    """Return 32 hex digits of an image's mode, size and pixels, and of its prompt."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} {len(prompt)} ".encode(), digest_size=16)
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    digest.update(image.tobytes())
    return digest.hexdigest()
