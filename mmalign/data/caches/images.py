"""Cache of generated images on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from mmalign.atomic_io import atomic_write, remove_unfinished
from mmalign.data.caches.fingerprint import fingerprint_settings
from mmalign.data.images import BadImage, decode_file
from mmalign.data.pairs import stable_hash


class ImageCache:
    """PNG files of the images that one model generated with the same settings.

    Args:
        folder: the folder of all models' caches.
        settings: everything that an image depends on besides prompt and seed: the model's weights, the sampler; JSON.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder / fingerprint_settings(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)

    def get(self, prompt: str, seed: int, source: str = "") -> Image.Image | None:
        """Return the image of a prompt, a seed and perhaps a source's key; None if it is missing or damaged."""
        path = self._path(prompt, seed, source)
        with contextlib.suppress(BadImage):
            return decode_file(path, str(path))
        return None

    def put(self, prompt: str, seed: int, image: Image.Image, source: str = "") -> None:
        """Write an image atomically."""
        with atomic_write(self._path(prompt, seed, source), shared=True) as part:
            image.save(part, format="PNG")

    def _path(self, prompt: str, seed: int, source: str) -> Path:
        return self.folder / f"{stable_hash(prompt, str(seed), *filter(None, [source])):016x}.png"
