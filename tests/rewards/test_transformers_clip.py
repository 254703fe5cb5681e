"""The judge of transformers' CLIPs on a tiny random one, against the library's own model and processor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from mmalign.rewards import load_reward_model, step_aware
from mmalign.rewards.transformers_clip import load_parts
from tests.helpers import clip_models, diffusion_models

PROMPTS = ["a red circle", "two blue stars", "a red circle", "", "word " * 40]
TIMES = torch.tensor([0, 301, 301, 951, 1])


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_it_scores_as_the_library_s_own_model_does(activation: str, tmp_path: Path, images: list[Image.Image]) -> None:
    """The same pixels and tokens: float32 rounding. From images: the library resizes tensors, open_clip by Pillow."""
    images = [image.convert("RGB") for image in images]
    folder = clip_models.transformers_clip(tmp_path / "clip", activation=activation)
    clip_model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    words = {"padding": True, "truncation": True, "max_length": diffusion_models.CONTEXT}
    inputs = processor(text=PROMPTS, images=images, return_tensors="pt", **words)
    with torch.no_grad():
        expected = clip_model(**inputs).logits_per_image.diag()
        model, preprocess, tokenize, _ = load_parts(str(folder))
        image = model.eval().encode_image(inputs["pixel_values"], normalize=True)
        text = model.encode_text(tokenize(PROMPTS), normalize=True)
        torch.testing.assert_close(model.logit_scale.exp() * (image * text).sum(-1), expected, rtol=1e-5, atol=1e-5)
    result = load_reward_model("transformers_clip", str(folder))(images, PROMPTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02 * float(expected.std()))
    pixels = torch.stack([preprocess(image) for image in images])
    # Images that need no resizing are the same pixels; of the others a pixel may round by 2 of 255, over a std of 0.26.
    torch.testing.assert_close(pixels[0], inputs["pixel_values"][0])
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=2.1 / 255 / 0.26)


def test_a_score_does_not_depend_on_its_company(tiny_transformers_clip: Path, images: list[Image.Image]) -> None:
    reward_model = load_reward_model("transformers_clip", str(tiny_transformers_clip), batch_size=2)
    together = reward_model(images, PROMPTS)
    alone = torch.cat([reward_model([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_a_step_aware_judge_begins_as_it(
    tiny_transformers_clip: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    """At every time, also once it is saved: with the tokenizer and the preprocessing that it came with."""
    step_aware.save(step_aware.begin(str(tiny_transformers_clip)), tmp_path / "begun")
    clean = load_reward_model("transformers_clip", str(tiny_transformers_clip))(images, PROMPTS)
    assert torch.equal(load_reward_model("step_aware", str(tmp_path / "begun"))(images, PROMPTS, TIMES), clean)


def test_defaults_to_clips_tokenizer_and_preprocessing(tmp_path: Path, images: list[Image.Image]) -> None:
    """As PickScore's card has it, of which only the weights count."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    from transformers import CLIPConfig

    text, vision = {**tower, "eos_token_id": 49_407}, {**tower, "patch_size": 56}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "a")
    _, preprocess, tokenize, about = load_parts(str(tmp_path / "a"))
    assert tokenize("a cat").tolist()[0][:5] == [49406, 320, 2368, 49407, 0]
    assert preprocess(images[1]).shape == (3, 224, 224)
    assert about["preprocess_cfg"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    step_aware.save(step_aware.begin(str(tmp_path / "a")), tmp_path / "begun")
    clean = load_reward_model("transformers_clip", str(tmp_path / "a"))(images, PROMPTS)
    assert torch.equal(load_reward_model("step_aware", str(tmp_path / "begun"))(images, PROMPTS, TIMES), clean)


def test_preprocessor_file_of_older_versions_is_read(tiny_transformers_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(tiny_transformers_clip, folder)
    (folder / "processor_config.json").unlink()
    own = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "resample": 2}
    own |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_center_crop": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    about = load_parts(str(folder))[-1]["preprocess_cfg"]
    assert (about["size"], about["mean"], about["std"]) == (16, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert about["interpolation"] == "bilinear" and about["resize_mode"] == "shortest"


def spoilt(folder: Path, to: Path, name: str, **changed: object) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / name).read_text())
    (to / name).write_text(json.dumps({**config, **changed}))
    return to


def test_what_is_no_such_model_is_refused_in_a_sentence(
    tiny_transformers_clip: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    model_folder = tiny_transformers_clip
    config = json.loads((model_folder / "config.json").read_text())
    deeper = spoilt(
        model_folder, tmp_path / "a", "config.json", vision_config={**config["vision_config"], "num_hidden_layers": 3}
    )
    relu = {name: {**config[name], "hidden_act": "relu"} for name in ("text_config", "vision_config")}
    squashed = {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 16}
    bare = spoilt(model_folder, tmp_path / "d", "config.json")
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (bare / file).unlink(missing_ok=True)
    (tmp_path / "e").mkdir()
    cases = {
        deeper: "weights are missing, such as ['vision_model.encoder.layers.2",
        spoilt(model_folder, tmp_path / "b", "config.json", **relu): "its activations are relu and relu",
        spoilt(
            model_folder, tmp_path / "c", "processor_config.json", image_processor=squashed
        ): "expected squares of the full",
        bare: "it has no tokenizer, and 74 tokens, where CLIP's own has 49408",
        tiny_clip: "cannot load",
        tmp_path / "e": "cannot load",
    }
    for folder, sentence in cases.items():
        with pytest.raises(ValueError) as raised:
            load_reward_model("transformers_clip", str(folder))
        assert sentence in str(raised.value) and "expected a folder with a CLIPModel" in str(raised.value)
