"""The shapes are those of the published checkpoints: their numbers of parameters say so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.benchmark import cases
from mmalign.benchmark import random_models as shapes
from mmalign.data.images import decode
from mmalign.families import Loading, load_vision_language
from mmalign.feed import open_data
from mmalign.recipe import load_recipe


def sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel(**shapes.SD15_UNET)
    return net


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel(**shapes.SDXL_UNET)
    return net


def sd35_medium() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    net: nn.Module = SD3Transformer2DModel(**shapes.SD35M)
    return net


def clip_g() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    net: nn.Module = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, **shapes.CLIP_G))
    return net


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    net: nn.Module = AutoencoderKL(**shapes._blocks(shapes.VAE))
    return net


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shapes.VIT_L), text_config=LlamaConfig(**shapes.LLAMA_7B), image_token_id=3
    )
    net: nn.Module = LlavaForConditionalGeneration(config)
    return net


def qwen25_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(vision_config=shapes.QWEN_TOWER, text_config=shapes.QWEN_7B)
    net: nn.Module = Qwen2_5_VLForConditionalGeneration(config)
    return net


@pytest.mark.parametrize(
    ("build", "number"),
    [
        (sd15, 859_520_964),  # as the checkpoints on the Hub have them
        (sdxl, 2_567_463_684),
        (clip_g, 694_659_840),
        (vae, 83_653_863),
        (llava, 7_063_427_072),
        (qwen25_vl, 8_292_166_656),
    ],
)
def test_sizes_are_the_published_ones(build: Any, number: int) -> None:
    with torch.device("meta"):
        net = build()
    assert sum(p.numel() for p in net.parameters()) == number


def test_stable_diffusion_35_medium_has_its_size() -> None:
    """2.5 billion parameters by its model card, the position table included."""
    with torch.device("meta"):
        net = sd35_medium()
    numbers = sum(x.numel() for x in (*net.parameters(), *net.buffers()))
    assert 2.2e9 < numbers < 2.6e9


def test_an_image_has_576_tokens(tmp_path: Path) -> None:
    """As LLaVA-1.5 has them, and a prompt as many as it has characters, but for what stands around it."""
    content = cases.write_case("llava_middle", tmp_path, torch.device("cpu"))
    recipe = load_recipe(content)
    family = load_vision_language(recipe.model.path, Loading(torch.device("cpu")))
    pairs, _ = open_data(recipe.data, 0)
    pair = pairs[0]
    view = family.reader.view(decode(pair.images[0]))
    rows = family.reader.rows(pair.turns, [pair.chosen, pair.rejected], [("image", view)])
    assert len(view.ids) == 576
    for row, said in zip(rows, (pair.chosen, pair.rejected), strict=True):
        assert len(said) == 100 and len(row.response) == 1 + 100 + 1  # the space before it, a byte each, and the end
        assert row.start == len(["<s>"]) + len("USER: ") + 576 + len("\n") + 50 + len(" ASSISTANT:")
