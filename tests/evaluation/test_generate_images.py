"""Image cache: a stopped run resumes, and no image is generated twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from mmalign.config import ImageModel, SamplingConfig
from mmalign.data.caches.images import ImageCache
from mmalign.evaluation.generate_images import cache_settings, generate_images
from mmalign.families.types import PromptInputs

PROMPTS, SEEDS = ["a fox", "a fox", "a car", "a bus", "a cat"], [0, 1, 2, 3, 4]


class Painter:
    """A family whose images are noise by prompt and seed; `calls` has the seeds of each batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fail_at = fail_at

    def sample(
        self, net: Any, prompts: Sequence[str], seeds: Sequence[int], _: SamplingConfig, sources: Any = None
    ) -> list[Image.Image]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(list(seeds))
        rngs = [np.random.default_rng([seed, len(prompt)]) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for rng in rngs]


def generate(painter: Any, cache: ImageCache) -> list[bytes]:
    images = generate_images(painter, nn.Identity(), PROMPTS, SEEDS, SamplingConfig(batch_size=2), cache)
    return [image.tobytes() for image in images]


def test_stopped_run_resumes_with_its_batch(tmp_path: Path) -> None:
    settings = {"model": "a"}
    whole = generate(Painter(), ImageCache(tmp_path / "uninterrupted", settings))
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(fail_at=1), ImageCache(tmp_path, settings))
    again = Painter()
    assert generate(again, ImageCache(tmp_path, settings)) == whole
    assert again.calls == [[2, 3], [4]]
    third = Painter()
    assert generate(third, ImageCache(tmp_path, settings)) == whole and third.calls == []


def test_damaged_image_is_generated_again_with_its_batch(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, {})
    whole = generate(Painter(), cache)
    files = sorted(cache.folder.glob("*.png"))
    assert len(files) == 5
    files[0].write_bytes(files[0].read_bytes()[:30])
    again = Painter()
    assert generate(again, cache) == whole
    assert len(again.calls) == 1 and not list(cache.folder.glob("*.part"))


def test_other_settings_have_their_own_cache(tmp_path: Path) -> None:
    generate(Painter(), ImageCache(tmp_path, {"model": "a"}))
    other_painter = Painter()
    generate(other_painter, ImageCache(tmp_path, {"model": "b"}))
    assert len(other_painter.calls) == 3


@dataclass(frozen=True)
class Noise:
    """Schedule of one number."""

    level: float


def test_images_depend_on_encoders_and_schedule() -> None:
    """Two models may share a denoiser and differ in all else."""

    def settings(seed: int, level: float, zeros: bool = True) -> dict[str, object]:
        encoder = nn.Linear(1, 1)
        nn.init.constant_(encoder.weight, seed)
        nn.init.zeros_(encoder.bias)
        parts = {"encoders": lambda: [("text", encoder)], "schedule": Noise(level), "network": nn.Identity()}
        inputs = PromptInputs({}, {"force_zeros_for_empty_prompt": zeros})
        family: Any = SimpleNamespace(prompt_inputs=lambda: inputs, **parts)
        return cache_settings(family, ImageModel(path="x"), "float32", SamplingConfig())

    assert settings(0, 0.5) == settings(0, 0.5)
    assert settings(0, 0.5) != settings(1, 0.5) and settings(0, 0.5) != settings(0, 0.6)
    assert settings(0, 0.5) != settings(0, 0.5, zeros=False)
