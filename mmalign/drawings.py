"""Images generated from prompts, cached as they come.

A stopped run resumes where it was, and no image is generated twice, whichever run needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from mmalign.data.pairs import hashed
from mmalign.families import Sampling, TextToImage
from mmalign.report import tracked
from mmalign.sections import Drawing, ImageModel, Recipe


class ImageCache:
    """Images of one model, generated with the same settings, each in a file.

    Args:
        folder: folder of the caches of all models.
        settings: everything that an image depends on besides prompt and seed: the model's weights, the sampler; JSON.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        name = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, prompt: str, seed: int) -> Image.Image | None:
        """Return the image of a prompt and a seed; None if it is missing or damaged."""
        with contextlib.suppress(OSError), Image.open(self._path(prompt, seed)) as image:
            return image.convert("RGB")
        return None

    def put(self, prompt: str, seed: int, image: Image.Image) -> None:
        """Write an image, all of it or nothing."""
        path = self._path(prompt, seed)
        part = path.with_suffix(".part")
        image.save(part, format="PNG")
        part.replace(path)

    def _path(self, prompt: str, seed: int) -> Path:
        return self.folder / f"{hashed(prompt, str(seed)):016x}.png"


def cache_settings(recipe: Recipe, drawing: Drawing) -> dict[str, object]:
    """Return the settings that a recipe's images depend on, besides the denoiser's weights."""
    assert isinstance(recipe.model, ImageModel)
    vae = {"vae": recipe.model.vae, "vae_dtype": recipe.model.vae_dtype}
    return {"drawing": drawing.model_dump(), "precision": recipe.train.precision, **vae}


def generate_images(
    family: TextToImage,
    net: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    cache: ImageCache | None = None,
) -> list[Image.Image]:
    """Generate an image for every prompt and seed, with a progress bar.

    If the cache lacks any image of a batch, the whole batch is generated: a batch of another size rounds otherwise.
    """
    images: list[Image.Image] = []
    for start in tracked(range(0, len(prompts), sampling.batch_size), "draw"):
        batch = slice(start, start + sampling.batch_size)
        keys = list(zip(prompts[batch], seeds[batch], strict=True))
        cached = [cache.get(*key) for key in keys] if cache is not None else []
        batch_images = [image for image in cached if image is not None]
        if len(batch_images) < len(keys):
            batch_images = family.sample(net, list(prompts[batch]), list(seeds[batch]), sampling)
            if cache is not None:
                for key, image in zip(keys, batch_images, strict=True):
                    cache.put(*key, image)
        images += batch_images
    return images
