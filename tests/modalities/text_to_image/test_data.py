"""Caches of image pairs hold what their fingerprints say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmalign.config import ImageData
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.families.types import PromptInputs
from mmalign.modalities.text_to_image import data


def test_texts_that_see_sources_are_of_one_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cropped source and a padded one give a text encoder that sees it other embeddings."""
    opened = list[dict[str, Any]]()

    def record(_: object, depends: dict[str, Any]) -> None:
        opened.append(depends)
        raise InterruptedError

    monkeypatch.setattr(ArrayCache, "open", record)
    family: Any = SimpleNamespace(prompt_inputs=lambda: PromptInputs({}, {}))
    for edits in ([object()], []):
        for fit in ("crop", "pad"):
            with pytest.raises(InterruptedError):
                data._fill_text(family, {}, [], ImageData(path="x", fit=fit), tmp_path, None, edits)  # type: ignore
    assert opened[0] != opened[1] and opened[2] == opened[3]
