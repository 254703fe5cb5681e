"""Generation of images from prompts and seeds, with a cache.

Every batch is written to the cache, so a stopped run resumes after its last batch. Runs share the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.config import ImageModel, ImageSize, SamplingConfig
from mmalign.console import tracked
from mmalign.data.caches import fingerprint
from mmalign.data.caches.images import ImageCache
from mmalign.data.images import decode, prepare
from mmalign.data.pairs import ImageRef
from mmalign.families.base import TextToImage
from mmalign.training.processes import current_processes


def cache_settings(
    family: TextToImage, model: ImageModel, precision: str, sampling: SamplingConfig
) -> dict[str, object]:
    """Return all that images depend on, apart from the denoiser's weights: settings, encoders and noise schedule."""
    vae = {"vae": model.vae, "vae_dtype": model.vae_dtype}
    parts = {
        "encoders": {name: fingerprint.fingerprint_network(net) for name, net in family.encoders()},
        "tokenizers": fingerprint.fingerprint_prompt_inputs(family.prompt_inputs()),
        "schedule": fingerprint.fingerprint_schedule(family.schedule),
        "config": fingerprint.fingerprint_config(family.network),
    }
    return {"sampling": sampling.model_dump(), "precision": precision, **vae, **parts}


def generate_images(
    family: TextToImage,
    net: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    cache: ImageCache,
    sources: Sequence[ImageRef] | None = None,
) -> list[Image.Image]:
    """Generate an image for every prompt and seed, with a progress bar; `sources` are the images that prompts edit.

    If the cache lacks any image of a batch, the whole batch is generated: rounding depends on the batch size. The
    processes of a launch take the batches in turn, and then read one another's from the cache.

    Raises:
        ValueError: a source cannot be read, or the model does not fit the sources.
    """
    processes, images = current_processes(), list[Image.Image]()
    starts = range(0, len(prompts), sampling.batch_size)
    # Each process fills the cache with its batches, and then reads those of all
    if processes.size > 1:
        for index, start in enumerate(tracked(starts, "draw")):
            if processes.is_mine(index):
                _generate_batch(family, net, prompts, seeds, sampling, start, cache, sources)
        processes.gather(None)
    for start in tracked(starts, "draw"):
        images += _generate_batch(family, net, prompts, seeds, sampling, start, cache, sources)
    return images


def read_sources(family: TextToImage, sources: Sequence[ImageRef], sampling: SamplingConfig) -> Tensor:
    """Return source images [N, 3, H, W], scaled and cropped to the size of the images to generate.

    Raises:
        ValueError: an image cannot be read.
    """
    size = ImageSize.parse(sampling.resolution or family.resolution)
    return torch.stack([prepare(decode(source), size)[0] for source in sources])


def _generate_batch(
    family: TextToImage,
    net: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    start: int,
    cache: ImageCache,
    sources: Sequence[ImageRef] | None,
) -> list[Image.Image]:
    """Return the images of the batch that begins at `start`, from the cache if it has all of them."""
    batch = slice(start, start + sampling.batch_size)
    refs = sources[batch] if sources is not None else None
    # Edits of one prompt differ by their sources
    names = [ref.key for ref in refs] if refs is not None else [""] * len(prompts[batch])
    keys = list(zip(prompts[batch], seeds[batch], names, strict=True))
    batch_images = [image for key in keys if (image := cache.get(*key)) is not None]
    if len(batch_images) < len(keys):
        shown = read_sources(family, refs, sampling) if refs is not None else None
        batch_images = family.sample(net, list(prompts[batch]), list(seeds[batch]), sampling, shown)
        for (prompt, seed, source), image in zip(keys, batch_images, strict=True):
            cache.put(prompt, seed, image, source)
    return batch_images
