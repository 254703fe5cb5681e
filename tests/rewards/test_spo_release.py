"""Step-aware reward models as SPO's authors published them, against a forward pass on transformers' own layers.

The release's files have 4 GB, so the tests write random weights with its names and shapes for a tiny CLIPModel.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from mmalign.rewards import load_reward_model, step_aware
from tests.helpers import clip_models, diffusion_models
from tests.helpers.hostile import Hostile

PROMPTS = ["a red circle", "two blue stars", "a red circle", "", "green"]
TIMES = torch.tensor([0, 301, 301, 951, 1])
FILE = "sd-v1-5_step-aware_preference_model.bin"


@pytest.fixture
def clip(tiny_transformers_clip: Path) -> str:
    return str(tiny_transformers_clip)


@pytest.fixture
def weights(clip: str, tmp_path: Path) -> dict[str, Tensor]:
    return clip_models.spo_release(tmp_path / FILE, Path(clip))


def published_scores(weights: dict[str, Tensor], clip: str, pixels: Tensor, prompts: list[str], t: Tensor) -> Tensor:
    """Return exp(logit_scale) * cosine, from the weights by their published names and the layers of transformers."""
    weights = {name.removeprefix("model."): x for name, x in weights.items() if "position_ids" not in name}
    model = CLIPModel.from_pretrained(clip).eval()
    rest = model.load_state_dict(weights, strict=False)
    assert not rest.missing_keys and all("adaLN" in name or "t_embedder" in name for name in rest.unexpected_keys)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(c)))
    tower = model.vision_model
    h = tower.pre_layrnorm(tower.embeddings(pixels))
    for i, layer in enumerate(tower.encoder.layers):
        s1, k1, g1, s2, k2, g2 = linear(f"vision_model.encoder.layers.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        h = h + g1 * layer.self_attn(layer.layer_norm1(h) * (1 + k1) + s1)[0]
        h = h + g2 * layer.mlp(layer.layer_norm2(h) * (1 + k2) + s2)
    shift, scale = linear("vision_model.adaLN_modulation.1", c).chunk(2, -1)
    image = model.visual_projection(tower.post_layernorm(h[:, 0]) * (1 + scale) + shift)
    words = CLIPProcessor.from_pretrained(clip).tokenizer
    ids = words(
        prompts, padding="max_length", max_length=diffusion_models.CONTEXT, truncation=True, return_tensors="pt"
    )
    text = model.text_projection(model.text_model(input_ids=ids["input_ids"]).pooler_output)
    return weights["logit_scale"].exp() * F.cosine_similarity(image, text)


def published_pixels(images: list[Image.Image], size: int) -> Tensor:
    """Return [N, 3, S, S]: in [-1, 1], bicubic without antialiasing, center crop, normalized."""
    rows = []
    for image in images:
        x = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        x = x.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 127.5 - 1
        h, w = (int(side * size / min(image.size) + 0.5) for side in (image.height, image.width))
        x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False)
        top, left = round((h - size) / 2), round((w - size) / 2)
        rows.append((x[:, :, top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1))
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    return (torch.cat(rows) - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.no_grad()
def test_published_judge_scores_as_published(
    weights: dict[str, Tensor], clip: str, tmp_path: Path, images: list[Image.Image]
) -> None:
    judge = load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=clip, allow_pickle=True)
    expected = published_scores(weights, clip, published_pixels(images, clip_models.SIDE), PROMPTS, TIMES)
    assert expected.std() > 0.1
    torch.testing.assert_close(judge(images, PROMPTS, TIMES), expected, rtol=1e-5, atol=1e-5)
    antialiased = load_reward_model(
        "step_aware", str(tmp_path), weights=FILE, clip=clip, preprocessing="folder", allow_pickle=True
    )
    assert (antialiased(images, PROMPTS, TIMES) - expected).abs().max() > 0.01


def test_safetensors_and_saved_folder_score_as_the_pickle(
    weights: dict[str, Tensor], clip: str, tmp_path: Path, images: list[Image.Image]
) -> None:
    """Without the prefix and the positions, and once it is a folder of mmalign that can be trained further."""
    expected = load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=clip, allow_pickle=True)(
        images, PROMPTS, TIMES
    )
    bare = {name.removeprefix("model."): x for name, x in weights.items() if "position_ids" not in name}
    save_file(bare, tmp_path / "judge.safetensors")
    judge = load_reward_model("step_aware", str(tmp_path), weights="judge.safetensors", clip=clip)
    assert torch.equal(judge(images, PROMPTS, TIMES), expected)
    step_aware.save(step_aware.read_release(str(tmp_path), FILE, clip), tmp_path / "saved")
    judge = load_reward_model("step_aware", str(tmp_path / "saved"), preprocessing="release")
    assert torch.equal(judge(images, PROMPTS, TIMES), expected)
    again = step_aware.begin(str(tmp_path / "saved")).net.state_dict()
    assert all(torch.equal(again[name], x) for name, x in load_file(tmp_path / "saved" / step_aware.WEIGHTS).items())


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: {key: x for key, x in weights.items() if key != f"model.{name}"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("t_embedder.mlp.2.bias"), "1 missing (t_embedder.mlp.2.bias)"),
        (drop("text_model.encoder.layers.1.self_attn.k_proj.weight"), "1 missing (text_model.encoder.layers.1.self_at"),
        (lambda weights: weights | {"model.vision_model.other": torch.ones(2)}, "1 unexpected (vision_model.other)"),
        (
            lambda weights: weights | {"model.vision_model.adaLN_modulation.1.bias": torch.ones(3)},
            "1 of another shape (vision_model.adaLN_modulation.1.bias [3] instead of [64])",
        ),
        (
            lambda weights: weights | {"model.text_model.embeddings.position_ids": torch.arange(16).flip(0)},
            "text_model.embeddings.position_ids is not 0, 1, 2",
        ),
        (lambda weights: {"state_dict": weights}, "holds no weights by name"),
        (lambda weights: {**weights, "model.x": Path("x")}, "holds more than tensors"),
        (lambda weights: [1, 2], "holds no weights by name"),
    ],
)
def test_other_weights_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], named: str, weights: dict[str, Tensor], clip: str, tmp_path: Path
) -> None:
    torch.save(change(weights), tmp_path / FILE)
    with pytest.raises(ValueError, match="reward step_aware") as raised:
        load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=clip, allow_pickle=True)
    assert named in str(raised.value)


def test_a_pickle_runs_no_code(weights: dict[str, Tensor], clip: str, tmp_path: Path) -> None:
    torch.save({**weights, "model.x": Hostile(tmp_path / "stolen")}, tmp_path / FILE)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=clip, allow_pickle=True)
    assert not (tmp_path / "stolen").exists()
    with pytest.raises(ValueError, match=rf"{FILE} is a pickle, .*set allow_pickle: true"):
        load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=clip)


def test_files_that_are_missing_or_damaged_are_named(weights: dict[str, Tensor], clip: str, tmp_path: Path) -> None:
    whole = (tmp_path / FILE).read_bytes()
    for name, content in {"half.bin": whole[: len(whole) // 2], "text.bin": b"no", "text.safetensors": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"reward step_aware: .*{name}.* copy it again"):
            load_reward_model("step_aware", str(tmp_path), weights=name, clip=clip, allow_pickle=True)
    with pytest.raises(ValueError, match=r"has no file 'gone\.bin'"):
        load_reward_model("step_aware", str(tmp_path), weights="gone.bin", clip=clip, allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot download 'gone\.bin' of nobody/nothing"):  # the tests are offline
        load_reward_model("step_aware", "nobody/nothing", weights="gone.bin", clip=clip, allow_pickle=True)
    with pytest.raises(ValueError, match=r"reward step_aware: clip: cannot read"):
        load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=str(tmp_path), allow_pickle=True)
    other = clip_models.clip(tmp_path / "open_clip")
    with pytest.raises(ValueError, match=r"reward step_aware: clip: cannot read"):
        load_reward_model("step_aware", str(tmp_path), weights=FILE, clip=str(other), allow_pickle=True)
