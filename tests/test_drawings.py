"""Pictures are kept as they come, and what was drawn once is not drawn again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from mmalign.drawings import Album, draw
from mmalign.families import Sampling

PROMPTS, SEEDS = ["a fox", "a fox", "a car", "a bus", "a cat"], [0, 1, 2, 3, 4]


class Painter:
    """A family that paints noise by prompt and seed, and remembers what it was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.fail_at = fail_at

    def sample(self, net: Any, prompts: Sequence[str], seeds: Sequence[int], _: Sampling) -> list[Image.Image]:
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(list(seeds))
        rngs = [np.random.default_rng([seed, len(prompt)]) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for rng in rngs]


def drawn(painter: Any, album: Album | None) -> list[bytes]:
    images = draw(painter, nn.Identity(), PROMPTS, SEEDS, Sampling(batch_size=2), album)
    return [image.tobytes() for image in images]


def test_a_stop_costs_the_batch_that_it_came_in(tmp_path: Path) -> None:
    whole, of = drawn(Painter(), None), {"model": "a"}
    with pytest.raises(KeyboardInterrupt):
        drawn(Painter(fail_at=1), Album(tmp_path, of))
    again = Painter()
    assert drawn(again, Album(tmp_path, of)) == whole
    assert again.asked == [[2, 3], [4]]
    third = Painter()
    assert drawn(third, Album(tmp_path, of)) == whole and third.asked == []


def test_a_damaged_or_missing_picture_is_drawn_again_with_its_batch(tmp_path: Path) -> None:
    album = Album(tmp_path, {})
    whole = drawn(Painter(), album)
    files = sorted(album.folder.glob("*.png"))
    assert len(files) == 5
    files[0].write_bytes(files[0].read_bytes()[:30])
    again = Painter()
    assert drawn(again, album) == whole
    assert len(again.asked) == 1 and not list(album.folder.glob("*.part"))


def test_another_model_or_way_of_drawing_has_an_album_of_its_own(tmp_path: Path) -> None:
    drawn(Painter(), Album(tmp_path, {"model": "a"}))
    other = Painter()
    drawn(other, Album(tmp_path, {"model": "b"}))
    assert len(other.asked) == 3
