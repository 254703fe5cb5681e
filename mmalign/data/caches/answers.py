"""Cache of generated answers on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmalign.data.caches.fingerprint import fingerprint_settings
from mmalign.data.caches.journal import AppendLog


class AnswerCache:
    """Answers of one model, by image and question, in memory and in a file.

    Args:
        folder: folder of the files.
        settings: everything that an answer depends on besides its question: the model's weights, the decoding, the
            place of the images; JSON. Each group of settings has a file of its own.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        file = folder / f"{fingerprint_settings(settings)}.jsonl"
        self._journal = AppendLog(file, settings, list[tuple[str, str, str]])
        self.answers: dict[tuple[str, str], str] = {
            (image, question): answer for piece in self._journal.entries for image, question, answer in piece
        }

    def add(self, answers: Mapping[tuple[str, str], str]) -> None:
        """Add answers to the file."""
        self._journal.append([(*key, answer) for key, answer in answers.items()])
        self.answers.update(answers)
