"""The shapes are those of the published checkpoints, and what is written loads and learns."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.benchmark import cases
from mmalign.benchmark import random_models as shapes
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.data.images import decode
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading
from mmalign.modalities.data import open_data

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------- at their published size


def numbers(parts: dict[str, Any]) -> dict[str, int]:
    return {name: sum(p.numel() for p in net.parameters()) for name, net in parts.items()}


@pytest.fixture
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("meta")
def test_diffusion_models_have_their_published_sizes() -> None:
    """As the checkpoints on the Hub have them."""
    vae, clip_l = 83_653_863, 123_060_480
    assert numbers(shapes.stable_diffusion_parts()) == {"vae": vae, "text_encoder": clip_l, "unet": 859_520_964}
    assert numbers(shapes.sdxl_parts()) == {
        "vae": vae,
        "text_encoder": clip_l,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
    }


@pytest.mark.usefixtures("meta")
def test_stable_diffusion_35_medium_has_its_size() -> None:
    """Its transformer has 2.5 billion parameters by its model card, the position table included."""
    parts = shapes.sd35_medium_parts()
    net = parts.pop("transformer")
    assert 2.2e9 < sum(x.numel() for x in (*net.parameters(), *net.buffers())) < 2.6e9
    assert numbers(parts) == {
        "vae": 83_819_683,  # as Flux' too, which has this shape
        "text_encoder": 123_060_480 + 768 * 768,
        "text_encoder_2": 694_659_840,
    }


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(
    ("build", "number"), [(shapes.llava_model, 7_063_427_072), (shapes.qwen25_vl_model, 8_292_166_656)]
)
def test_vision_language_models_have_their_published_sizes(build: Callable[[], Any], number: int) -> None:
    assert numbers({"model": build()}) == {"model": number}


# ------------------------------------------------------------------------------------------- written at a tiny size

CLIP: shapes.Sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
VAE: shapes.Sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
UNET: shapes.Sizes = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
SD15: shapes.Sizes = {
    "unet": {**shapes.SMALL_UNET, **UNET, "block_out_channels": (8, 16), "cross_attention_dim": 16},
    "vae": VAE,
    "text": CLIP,
}
SDXL: shapes.Sizes = {
    "unet": {
        **shapes.SDXL_UNET,
        **UNET,
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    },
    "vae": VAE,
    "texts": (CLIP, CLIP),
}
SD35M: shapes.Sizes = {
    "transformer": {
        **shapes.SD35M,
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    "vae": {**shapes.VAE_16, **VAE, "latent_channels": 16},
    "texts": (CLIP, CLIP),
}
TEXT: shapes.Sizes = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
LLAVA: shapes.Sizes = {
    "text": TEXT,
    "tower": {**shapes.VIT_SMALL, "hidden_size": 16, "intermediate_size": 24, "image_size": 28, "projection_dim": 16},
}
QWEN: shapes.Sizes = {
    "text": {
        **shapes.QWEN_7B,
        **TEXT,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    },
    "tower": {
        **shapes.QWEN_TOWER,
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    },
}


def learned(case: str, folder: Path, **data: Any) -> dict[str, float]:
    """What an update of a case's recipe says, of the model and the pairs in a folder."""
    content = cases.content(case, folder)
    content["model"]["lora"] = {"rank": 2}
    content["data"] |= data
    content["train"] |= {"precision": "float32", "batch_size": 2, "save_every": 1, "log_every": 1, "trackers": []}
    (report,) = train(load_recipe(content), say=lambda _: None).history
    return report


@pytest.mark.parametrize(
    ("write", "sizes", "case"),
    [
        (shapes.stable_diffusion, SD15, "sd15_lora"),
        (shapes.sdxl, SDXL, "sdxl_lora"),
        (shapes.sd35_medium, SD35M, "sd35m_lora"),
    ],
)
def test_a_written_diffusion_model_learns(write: Any, sizes: dict[str, Any], case: str, tmp_path: Path) -> None:
    """By its case's own settings, but for rank, precision and size."""
    write(tmp_path / "model", CPU, **sizes)
    load_family(str(tmp_path / "model"), Loading(CPU)).encode_prompts(["a red fox"])
    cases.draw_image_pairs(tmp_path / "pairs.parquet", 16, number=2)
    report = learned(case, tmp_path, resolution=16)
    assert report["logit"] == 0 and report["gradient norm"] > 0


@pytest.mark.parametrize(
    ("write", "sizes", "case"), [(shapes.llava, LLAVA, "llava15_7b"), (shapes.qwen25_vl, QWEN, "qwen25vl_7b")]
)
def test_a_written_vision_language_model_learns(write: Any, sizes: dict[str, Any], case: str, tmp_path: Path) -> None:
    """As above; an image has a token for every 14 pixels by 14 of LLaVA's 28, and for every 28 by 28 of Qwen's 56."""
    write(tmp_path / "model", CPU, **sizes)
    cases.draw_response_pairs(tmp_path / "pairs.jsonl", side=56, prompt=10, responses=(6, 9), number=2)
    family = load_vision_language(str(tmp_path / "model"), Loading(CPU))
    pairs, _ = open_data(load_recipe(cases.content(case, tmp_path)).data, 0)
    assert len(family.reader.view(decode(pairs[0].images[0])).ids) == 4
    report = learned(case, tmp_path)
    assert report["logit"] == 0 and report["gradient norm"] > 0


def test_an_image_has_576_tokens(tmp_path: Path) -> None:
    """As LLaVA-1.5 has them, and a prompt as many as it has characters, but for what stands around it."""
    content = cases.write_case("llava_middle", tmp_path, CPU)
    recipe = load_recipe(content)
    family = load_vision_language(recipe.model.path, Loading(CPU))
    pairs, _ = open_data(recipe.data, 0)
    pair = pairs[0]
    view = family.reader.view(decode(pair.images[0]))
    rows = family.reader.rows(pair.turns, [pair.chosen, pair.rejected], [("image", view)])
    assert len(view.ids) == 576
    for row, said in zip(rows, (pair.chosen, pair.rejected), strict=True):
        assert len(said) == 100 and len(row.response) == 1 + 100 + 1  # the space before it, a byte each, and the end
        assert row.start == len(["<s>"]) + len("USER: ") + 576 + len("\n") + 50 + len(" ASSISTANT:")
