"""Vocabularies of objects by name: MSCOCO's, the bundled world's, or your own in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from mmalign.language.objects import Variant, Vocabulary, coco_vocabulary, vocabulary
from mmalign.reading import read_json
from mmalign.resources import locate

CROWDS = "crowds"


def load_vocabulary(key: str, name: str) -> Vocabulary:
    """Load the vocabulary that a recipe names at `key`.

    Args:
        key: the recipe's key, for error messages.
        name: "refined" or "published" (MSCOCO's objects), "crowds" (the bundled world's), or a JSON file with other
            words for each object, {"dog": ["puppy", "hound"], "red circle": []}.

    Raises:
        ValueError: the file cannot be read, or holds no vocabulary.
    """
    if name == CROWDS:
        from mmalign.toy.crowds import KINDS

        return vocabulary({kind: [] for kind in KINDS})
    for variant in get_args(Variant):
        if name == variant:
            return coco_vocabulary(variant)
    # A file of words
    expected = f"{', '.join((*get_args(Variant), CROWDS))}, or a JSON file {{object: [synonyms]}}"
    content: Any = read_json(Path(locate(name)), f"expected {expected}", f"{key}: {name}")
    listed = isinstance(content, dict) and all(isinstance(words, list) for words in content.values())
    if not listed or not all(isinstance(word, str) for words in content.values() for word in words):
        raise ValueError(f"{key}: {name} does not hold lists of words by object; expected {expected}")
    try:
        return vocabulary(content)
    except ValueError as error:
        raise ValueError(f"{key}: {name}: {str(error).removeprefix('vocabulary: ')}") from error
