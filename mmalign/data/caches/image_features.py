"""Cache of image features from frozen vision towers, keyed by image content and shared by all runs.

Images are encoded one at a time, as in a training batch. Cached features therefore equal computed ones bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.fill import Items, fill, in_workers, num_bytes
from mmalign.data.images import decode
from mmalign.data.pairs import ImageRef
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.families.vlm.image_features import backend_name

if TYPE_CHECKING:
    from accelerate import Accelerator

IDS = "ids"  # field with the image's placeholder tokens
SHARE = 0.5  # share of the free disk that features may take


def feature_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """Return everything that image features and placeholder tokens depend on besides the image."""
    parts, reader = list(family.encoders()), _processor(family)
    return {
        **{name: fingerprint.fingerprint_network(net) for name, net in parts},
        "config": fingerprint.fingerprint_config(family.network),
        "processor": fingerprint.fingerprint_files(reader.processor, template=False),
        "run": "; ".join(sorted({backend_name(net) for _, net in parts})),
        "autocast": str(family.half),
    }


def tokenizer_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """Return everything that text tokens depend on."""
    reader = _processor(family)
    arguments = sorted(reader.template_arguments.items())
    return {"words": fingerprint.fingerprint_files(reader.processor), "template_arguments": str(arguments)}


def _processor(family: Any) -> Any:
    """Return a family's prompt processor, which has a processor of transformers."""
    return family.processor


def cached_view(cache: ArrayCache | None, key: str) -> ImageView | None:
    """Return an image's view with its cached features; None if they are not in the cache."""
    if cache is None or key not in cache:
        return None
    arrays = cache.get(key)
    return ImageView(tuple(arrays.pop(IDS).tolist()), {}, arrays)


def fill_features(
    family: VisionLanguage, images: Iterable[ImageRef], cache: ArrayCache, accelerator: Accelerator, *, num_workers: int
) -> bool:
    """Encode the images that the cache lacks, each process its share; unreadable ones are left out.

    Returns:
        False, with nothing stored, if the features would take more than half of the free disk of any process. The size
        of the first image stands for all.
    """
    # This process's share of the distinct images
    images_by_key = {ref.key: ref for ref in images}
    rank, world_size = accelerator.process_index, accelerator.num_processes
    share = [images_by_key[key] for key in cache.share(images_by_key, rank=rank, world_size=world_size)]
    steps = _encode(family, share, num_workers)
    # Encode up to the first readable image, whose size stands for all
    head = list[Items]()
    while not any(head) and len(head) < len(share):
        head.append(next(steps))
    expected = sum(map(num_bytes, head)) * len(share) * world_size
    # All processes decide alike: one short disk is enough to store nothing
    is_short = torch.tensor([expected > SHARE * shutil.disk_usage(cache.folder).free], device=accelerator.device)
    if accelerator.reduce(is_short.int(), reduction="sum"):
        return False
    fill(cache, chain(head, steps), len(share), "encode images", accelerator)
    return True


def _encode(family: VisionLanguage, images: Sequence[ImageRef], num_workers: int) -> Iterator[Items]:
    """Yield the features and placeholder tokens of each image, or nothing for an unusable one."""
    for ref, view in zip(images, in_workers(partial(_view, family.processor), images, num_workers), strict=True):
        if view is None:
            yield {}
            continue
        (features,) = family.features_as_tensors(family.encode_images({ref.key: view})).values()
        yield {ref.key: {IDS: torch.tensor(view.ids), **{name: x.cpu() for name, x in features.items()}}}


def _view(processor: PromptProcessor, ref: ImageRef) -> ImageView | None:
    """Return an image's view, or None for an unusable image."""
    try:
        return processor.preprocess_image(decode(ref))
    except ValueError:  # unreadable, or of a shape that the processor refuses
        return None
