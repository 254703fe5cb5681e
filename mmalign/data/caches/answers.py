"""Cache of generated answers on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmalign.data.caches.fingerprint import fingerprint_settings
from mmalign.data.caches.journal import AppendLog
from mmalign.families.types import GeneratedText


class AnswerCache:
    """Answers of one model, by image and question, in memory and in a file.

    Attributes:
        answers: the texts.
        cut: the questions whose answers were cut at the limit of new tokens.

    Args:
        folder: folder of the files.
        settings: everything that an answer depends on besides its question: the model's weights, the decoding, the
            place of the images; JSON. Each group of settings has a file of its own.
        is_writer: false in all processes of a launch but one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, is_writer: bool = True) -> None:
        file = folder / f"{fingerprint_settings(settings)}.jsonl"
        self._journal = AppendLog(file, settings, list[tuple[str, str, str, bool]], is_writer=is_writer)
        self.answers, self.cut = dict[tuple[str, str], str](), set[tuple[str, str]]()
        for piece in self._journal.entries:
            self._know({(image, question): GeneratedText(text, cut) for image, question, text, cut in piece})

    def add(self, answers: Mapping[tuple[str, str], GeneratedText]) -> None:
        """Add answers to the file."""
        self._journal.append([(*key, answer.text, answer.is_cut) for key, answer in answers.items()])
        self._know(answers)

    def _know(self, answers: Mapping[tuple[str, str], GeneratedText]) -> None:
        self.answers.update((key, answer.text) for key, answer in answers.items())
        self.cut.update(key for key, answer in answers.items() if answer.is_cut)
