"""The most similar images, by hand."""

import pytest
import torch

from mmalign.synthesis import rejected_responses
from mmalign.synthesis.rejected_responses import nearest


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors of these angles."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_the_nearest_come_first_and_copies_do_not_count(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles 0, 10, 25, 180 and 0 again: the first and the last are one image."""
    monkeypatch.setattr(rejected_responses, "ROWS", rows)
    vectors = at(0, 10, 25, 180, 0)
    assert nearest(vectors, 9) == [[1, 2, 3], [0, 4, 2, 3], [1, 0, 4, 3], [2, 1, 0, 4], [1, 2, 3]]
    assert nearest(vectors[:4], 1) == [[1], [0], [1], [2]]


def test_one_image_has_no_other() -> None:
    assert nearest(at(30), 3) == [[]]
