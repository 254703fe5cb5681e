"""Pictures on the way from noise."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.families.base import TextToImage
from mmalign.methods.text_to_image._images import decode_images, guided
from tests.helpers.image_batches import prompts


@pytest.mark.parametrize(("side", "sizes"), [(64, [1, 8, 8, 2]), (512, [1] + [4] * 4 + [2]), (1024, [1] * 19)])
def test_images_are_decoded_a_megapixel_at_a_time(side: int, sizes: list[int]) -> None:
    decoded: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return latents[:, :1, :1, :1].expand(-1, 3, side, side)

    family: Any = SimpleNamespace(decode=decode)
    numbers = torch.arange(19.0)[:, None, None, None].expand(-1, 4, 2, 2)
    result = decode_images(family, numbers)
    assert decoded == sizes and torch.equal(result[:, 0, 0, 0], numbers[:, 0, 0, 0])


def test_guidance_of_1_has_no_unconditional_rows(sd: TextToImage) -> None:
    batch = prompts(sd)
    assert guided(sd, batch, 1.0).unconditional is None
    both = guided(sd, batch, 2.0)[torch.tensor([2, 0, 2, 1])]
    assert both.unconditional is not None and len(both.unconditional) == len(both.cond) == 4
    assert torch.equal(both.cond.tensors["embeds"][0], sd.encode_prompts([batch.prompts[2]]).tensors["embeds"][0])
