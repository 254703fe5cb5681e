"""Pictures that models draw, kept as they come: whoever is stopped goes on where it was, and what was drawn once is not
drawn again, whichever run wants to see it.
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


class Album:
    """The pictures of one model, drawn in one way, each a file.

    Args:
        folder: where the folders of models are.
        of: what a picture depends on besides prompt and seed: the model's weights, how it draws; JSON.
    """

    def __init__(self, folder: Path, of: Mapping[str, object]) -> None:
        name = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, prompt: str, seed: int) -> Image.Image | None:
        """The picture of a prompt and a seed; None if there is none, or it is damaged."""
        with contextlib.suppress(OSError), Image.open(self._path(prompt, seed)) as image:
            return image.convert("RGB")
        return None

    def put(self, prompt: str, seed: int, image: Image.Image) -> None:
        """Keep a picture: all of it or nothing is on the disk, whenever the process ends."""
        path = self._path(prompt, seed)
        part = path.with_suffix(".part")
        image.save(part, format="PNG")
        part.replace(path)

    def _path(self, prompt: str, seed: int) -> Path:
        return self.folder / f"{hashed(prompt, str(seed)):016x}.png"


def depends(recipe: Recipe, drawing: Drawing) -> dict[str, object]:
    """What a recipe's pictures depend on besides the weights of the denoiser."""
    assert isinstance(recipe.model, ImageModel)
    vae = {"vae": recipe.model.vae, "vae_dtype": recipe.model.vae_dtype}
    return {"drawing": drawing.model_dump(), "precision": recipe.train.precision, **vae}


def draw(
    family: TextToImage,
    net: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    album: Album | None = None,
) -> list[Image.Image]:
    """One picture for every prompt and seed, with a progress bar.

    A batch of which a picture is missing is drawn whole, since a batch of another size rounds otherwise.
    """
    images: list[Image.Image] = []
    for i in tracked(range(0, len(prompts), sampling.batch_size), "draw"):
        some = list(zip(prompts[i : i + sampling.batch_size], seeds[i : i + sampling.batch_size], strict=True))
        kept = [album.get(*row) for row in some] if album is not None else []
        found = [image for image in kept if image is not None]
        if len(found) < len(some):
            found = family.sample(net, [prompt for prompt, _ in some], [seed for _, seed in some], sampling)
            if album is not None:
                for row, image in zip(some, found, strict=True):
                    album.put(*row, image)
        images += found
    return images
