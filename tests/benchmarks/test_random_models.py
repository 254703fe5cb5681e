"""Random models have the shapes of published checkpoints, load and learn; a case is a recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.data.images import decode
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.types import Loading
from mmalign.methods import Requirements
from mmalign.modalities import modality_of
from tests.benchmarks import cases, random_models
from tests.benchmarks.random_models import MODELS, Sizes, resized

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------- at their published size


def count_parameters(name: str) -> dict[str, int]:
    return {part: sum(p.numel() for p in net.parameters()) for part, net in random_models.networks(name).items()}


@pytest.fixture
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


VAE, CLIP_L, CLIP_G = 83_653_863, 123_060_480, 694_659_840


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd15", {"vae": VAE, "text_encoder": CLIP_L, "unet": 859_520_964}),
        ("sdxl", {"vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": 2_567_463_684}),
        ("llava_7b", {"model": 7_063_427_072}),
        ("qwen25_vl_7b", {"model": 8_292_166_656}),
    ],
)
def test_models_have_their_published_sizes(name: str, expected: dict[str, int]) -> None:
    """The sizes are those of the checkpoints on the Hub."""
    assert count_parameters(name) == expected


@pytest.mark.usefixtures("meta")
def test_stable_diffusion_35_medium_has_its_size() -> None:
    """The model card gives its transformer 2.5 billion parameters, the position table included."""
    parts = random_models.networks("sd35_medium")
    net = parts["transformer"]
    assert 2.2e9 < sum(x.numel() for x in (*net.parameters(), *net.buffers())) < 2.6e9
    counts = count_parameters("sd35_medium")
    assert counts["vae"] == 83_819_683  # also the size of FLUX's, which has this shape
    assert (counts["text_encoder"], counts["text_encoder_2"]) == (CLIP_L + 768 * 768, CLIP_G)


# ------------------------------------------------------------------------------------------- written at a tiny size

CLIP: Sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"projection_dim": 16, "vocab_size": 49408}
SMALL_VAE: Sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TINY: dict[str, Sizes] = yaml.safe_load("""
sd_middle:
  unet: &unet {sample_size: 8, layers_per_block: 1, norm_num_groups: 4, attention_head_dim: 2,
    block_out_channels: [8, 16], cross_attention_dim: 16}
sdxl:
  unet: {<<: *unet, block_out_channels: [8, 8, 16], transformer_layers_per_block: [1, 1, 2], cross_attention_dim: 32,
    addition_time_embed_dim: 4, projection_class_embeddings_input_dim: 40}  # 16 + 6 * 4
sd35_medium:
  transformer: {sample_size: 8, num_layers: 2, num_attention_heads: 2, attention_head_dim: 8, joint_attention_dim: 32,
    caption_projection_dim: 16, pooled_projection_dim: 32, pos_embed_max_size: 16, dual_attention_layers: [0]}
llava_middle:
  text: &text {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
    vocab_size: 512, max_position_embeddings: 256}
  tower: {hidden_size: 16, intermediate_size: 24, image_size: 28, projection_dim: 16}
qwen25_vl_7b:
  text: {<<: *text, num_key_value_heads: 1,
    rope_parameters: {rope_type: default, mrope_section: [2, 1, 1], rope_theta: 1.0e+6}}
  tower: {hidden_size: 16, intermediate_size: 24, depth: 2, num_heads: 2, out_hidden_size: 16,
    fullatt_block_indexes: [1]}
""")


def tiny_sizes(name: str) -> Sizes:
    """Return tiny sizes for a model."""
    texts = {part: CLIP for part in MODELS[name].get("networks", ()) if part.startswith("text_encoder")}
    return resized(name, **texts, **({"vae": SMALL_VAE} if texts else {}), **TINY[name])


def train_case(name: str, folder: Path, **data: Any) -> dict[str, float]:
    """Train a case's recipe on the model and pairs in a folder, and return an update's metrics."""
    content = cases.content(name, folder)
    content["model"]["lora"] = {"rank": 2}
    content["data"] |= data
    content["train"] |= {"precision": "float32", "batch_size": 2, "save_every": 1, "log_every": 1, "trackers": []}
    (report,) = train(load_recipe(content)).history
    return report


@pytest.mark.parametrize(
    ("name", "case"), [("sd_middle", "sd15_lora"), ("sdxl", "sdxl_lora"), ("sd35_medium", "sd35m_lora")]
)
def test_written_diffusion_model_learns(name: str, case: str, tmp_path: Path) -> None:
    """All settings are the case's own, except rank, precision and size."""
    random_models.write(name, tmp_path / "model", CPU, tiny_sizes(name))
    load_family(str(tmp_path / "model"), Loading(CPU)).encode_prompts(["a red fox"])
    cases.write_image_pairs(tmp_path / "pairs.parquet", 16, number=2)
    report = train_case(case, tmp_path, resolution=16)
    assert report["logit"] == 0 and report["gradient norm"] > 0


@pytest.mark.parametrize(("name", "case"), [("llava_middle", "llava15_7b"), ("qwen25_vl_7b", "qwen25vl_7b")])
def test_written_vision_language_model_learns(name: str, case: str, tmp_path: Path) -> None:
    """An image has a token for every 14 pixels by 14 of LLaVA's 28, and for every 28 by 28 of Qwen's 56."""
    random_models.write(name, tmp_path / "model", CPU, tiny_sizes(name))
    cases.write_response_pairs(tmp_path / "pairs.jsonl", side=56, prompt=10, responses=(6, 9), number=2)
    family = load_vision_language(str(tmp_path / "model"), Loading(CPU))
    recipe = load_recipe(cases.content(case, tmp_path))
    pairs, _ = modality_of(recipe).open_pairs(recipe, Requirements())
    assert len(family.processor.preprocess_image(decode(pairs[0].images[0])).ids) == 4
    report = train_case(case, tmp_path)
    assert report["logit"] == 0 and report["gradient norm"] > 0


# ------------------------------------------------------------------------------------------------------------- cases


def test_image_of_llava_middle_has_576_tokens(tmp_path: Path) -> None:
    """LLaVA-1.5 has as many. A prompt has one token per character, apart from the chat template."""
    recipe = load_recipe(cases.write_case("llava_middle", tmp_path, CPU))
    family = load_vision_language(recipe.model.path, Loading(CPU))
    pairs, _ = modality_of(recipe).open_pairs(recipe, Requirements())
    pair = pairs[0]
    view = family.processor.preprocess_image(decode(pair.images[0]))
    rows = family.processor.tokenize_responses(pair.turns, [pair.chosen, pair.rejected], [("image", view)])
    assert len(view.ids) == 576
    for row, response in zip(rows, (pair.chosen, pair.rejected), strict=True):
        assert len(response) == 100 and len(row.response) == 1 + 100 + 1  # the space before, a byte each, the end
        assert row.start == len(["<s>"]) + len("USER: ") + 576 + len("\n") + 50 + len(" ASSISTANT:")


@pytest.mark.parametrize("name", cases.CASES)
def test_case_is_a_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(cases.content(name, tmp_path))
    assert recipe.model.path == str(tmp_path / "model") and recipe.output == str(tmp_path / "output")
    if cases.CASES[name].gpu:
        with pytest.raises(ValueError, match="CUDA"):
            cases.write_case(name, tmp_path, CPU)
