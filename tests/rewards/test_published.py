"""Published judges on small random weights of the real architectures, against the libraries that made them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPModel, CLIPProcessor

from mmalign.rewards import load_reward_model
from tests.helpers import diffusion_models

PROMPTS = ["a red circle", "two blue stars", "a red circle", "", "word " * 40]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = (1024, 128, 64, 16, 1)  # of the regression head, which has no activation


def random_head(width: int) -> dict[str, Tensor]:
    weights, numbers = {}, (0, 2, 4, 6, 7)
    for number, size in zip(numbers, SIZES, strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(size, width) / width**0.5
        weights[f"layers.{number}.bias"] = torch.randn(size)
        width = size
    return weights


def apply_head(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"])
    return x[:, 0]


@pytest.fixture
def square(images: list[Image.Image]) -> list[Image.Image]:
    """Return the images at the side of the tiny CLIP, so that no library's resizing matters."""
    return [image.convert("RGB").resize((diffusion_models.SIDE,) * 2) for image in images]


def features(folder: Path, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the unit vectors of transformers' own model and processor."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    words = {"padding": True, "truncation": True, "max_length": diffusion_models.CONTEXT}
    with torch.no_grad():
        out = model(**processor(text=prompts, images=images, return_tensors="pt", **words))
    return F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1)


def test_clip_score_is_the_papers(tiny_transformers_clip: Path, square: list[Image.Image]) -> None:
    image, text = features(tiny_transformers_clip, square, [f"A photo depicts {prompt}" for prompt in PROMPTS])
    cosines = (image * text).sum(-1)
    scores = load_reward_model("clip_score", str(tiny_transformers_clip), batch_size=2)(square, PROMPTS)
    torch.testing.assert_close(scores, 2.5 * cosines.clamp(min=0), rtol=1e-4, atol=1e-5)
    assert (cosines > 0).any()


def test_a_negative_cosine_is_a_clip_score_of_zero() -> None:
    from mmalign.rewards.clip_score import _score

    assert _score(torch.tensor([-0.5, 0.4]), torch.tensor(100.0)).tolist() == pytest.approx([0, 1])


def test_aesthetic_reads_the_image_alone(
    tiny_transformers_clip: Path, square: list[Image.Image], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    head = random_head(16)
    torch.save(head, tmp_path / "aesthetic-model.pth")
    options = {"clip": str(tiny_transformers_clip), "batch_size": 2}
    scores = load_reward_model("aesthetic", str(tmp_path), allow_pickle=True, **options)(square, PROMPTS)
    expected = apply_head(head, features(tiny_transformers_clip, square, PROMPTS)[0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
    with pytest.raises(ValueError, match=r"aesthetic-model\.pth.*allow_pickle: true"):
        load_reward_model("aesthetic", str(tmp_path), **options)
    torch.save(random_head(17), tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match=r"layers\.0\.weight \[1024, 17\] instead of \[1024, 16\].*options\.clip"):
        load_reward_model("aesthetic", str(tmp_path), allow_pickle=True, **options)


def hps_pixels(image: Image.Image, size: int) -> Tensor:
    """The release's preprocessing: to tensor, longer side, padding, normalisation."""
    pixels = transforms.ToTensor()(image.convert("RGB"))
    scale = size / max(pixels.shape[1:])
    sides = [round(side * scale) for side in pixels.shape[1:]]
    resized = transforms.Resize(sides, transforms.InterpolationMode.BICUBIC)(pixels)
    whole = torch.zeros(3, size, size)
    top, left = (size - sides[0]) // 2, (size - sides[1]) // 2
    whole[:, top : top + sides[0], left : left + sides[1]] = resized
    return (whole - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_hps_is_the_cosine_of_open_clips_features(images: list[Image.Image], tmp_path: Path) -> None:
    config: dict[str, Any] = {"embed_dim": 16}
    config["vision_cfg"] = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    judge = load_reward_model("hps", str(tmp_path), allow_pickle=True, architecture="tiny-hps", batch_size=2)
    with torch.no_grad():
        image, text, _ = model(
            torch.stack([hps_pixels(image, 32) for image in images]), open_clip.get_tokenizer("tiny-hps")(PROMPTS)
        )
    torch.testing.assert_close(judge(images, PROMPTS), (image @ text.T).diagonal(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="open_clip has no 'ViT-H-15'"):
        load_reward_model("hps", str(tmp_path), allow_pickle=True, architecture="ViT-H-15")
    with pytest.raises(ValueError, match=r"reward hps: weights: .* has no file 'HPS_v2_compressed\.pt'"):
        load_reward_model("hps", str(tmp_path), allow_pickle=True, weights="HPS_v2_compressed.pt")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "two", "blue", "stars", "word"]


def test_image_reward_is_timms_transformer_read_by_bert(images: list[Image.Image], tmp_path: Path) -> None:
    """The reference's towers are timm's and BERT's, as in the release; BERT's mask makes it see both directions."""
    torch.manual_seed(0)
    vision = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=0
    ).eval()
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
        max_position_embeddings=40, is_decoder=True, add_cross_attention=True, use_cache=False,
    )  # fmt: skip
    config.encoder_hidden_size = 128  # read nowhere: BERT's cross-attention takes vectors of its own width
    text, head = BertModel(config, add_pooling_layer=False).eval(), random_head(64)
    for layer in text.encoder.layer:
        layer.crossattention.self.key, layer.crossattention.self.value = nn.Linear(128, 64), nn.Linear(128, 64)
    text.embeddings.token_type_embeddings.weight.data.zero_()  # which BLIP's BERT does not have
    weights = {f"blip.visual_encoder.{name}": x for name, x in vision.state_dict().items()}
    weights |= {f"blip.text_encoder.{name}": x for name, x in text.state_dict().items() if "token_type" not in name}
    weights |= {f"mlp.{name}": x for name, x in head.items()}
    weights["blip.vision_proj.weight"] = torch.zeros(2, 2)  # no score depends on it
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(9)
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    words = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    words.save_pretrained(tmp_path / "words")

    options = {"tokenizer": str(tmp_path / "words"), "batch_size": 2}
    scores = load_reward_model("image_reward", str(tmp_path), allow_pickle=True, **options)(images, PROMPTS)

    preprocess = transforms.Compose([
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32),
        lambda image: image.convert("RGB"), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    tokens = words(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    bothways = tokens.attention_mask[:, None, None].expand(-1, 1, 35, -1).bool()
    with torch.no_grad():
        seen = vision.forward_features(torch.stack([preprocess(image) for image in images]))
        read = text(tokens.input_ids, attention_mask=bothways, encoder_hidden_states=seen).last_hidden_state
    expected = (apply_head(head, read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
    with pytest.raises(ValueError, match=r"expected options\.tokenizer with a folder or Hub id of BERT's"):
        load_reward_model("image_reward", str(tmp_path), allow_pickle=True, tokenizer=str(tmp_path))
    torch.save({name: x for name, x in weights.items() if "blocks.1.norm1" not in name}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"2 missing \(vision\.encoder\.layers\.1\.layer_norm1\.weight"):
        load_reward_model("image_reward", str(tmp_path), allow_pickle=True, **options)
