"""The open_clip judge on a tiny random model, against open_clip called by hand; and the guards around any judge."""

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign.rewards import RewardModel, checked_reward_model, load_reward_model, names, reward_module
from mmalign.rewards.open_clip import open_clip_name
from tests.helpers import clip_models

PROMPTS = ["a red circle", "two blue stars", "a red circle", "Green", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose weights are in half precision."""
    path = clip_models.clip(tmp_path_factory.mktemp("clip"))
    weights = load_file(path / "open_clip_model.safetensors")
    save_file({name: x.half() for name, x in weights.items()}, path / "open_clip_model.safetensors")
    return path


def test_scores_are_the_diagonal_of_open_clips_own_logits(folder: Path, images: list[Image.Image]) -> None:
    scores = load_reward_model("open_clip", str(folder), "cpu")(images, PROMPTS)

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    with torch.no_grad():
        logits, _ = model.eval().get_logits(torch.stack([preprocess(i) for i in images]), ids)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, logits.diagonal(), rtol=1e-5, atol=1e-5)
    scale = 1 / 0.07  # what CLIP is initialised with: a cosine times it is within
    assert scores.abs().max() <= scale * 1.001
    assert scores.std() > 0.01  # rows do differ


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_does_not_change_a_score(folder: Path, images: list[Image.Image], batch_size: int) -> None:
    one_by_one = load_reward_model("open_clip", str(folder), batch_size=batch_size)
    whole = load_reward_model("open_clip", str(folder))
    torch.testing.assert_close(one_by_one(images, PROMPTS), whole(images, PROMPTS), rtol=1e-5, atol=1e-5)
    backwards = whole(images[::-1], PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(backwards, whole(images, PROMPTS), rtol=1e-5, atol=1e-5)


def test_a_long_caption_is_cut_as_clip_cuts_it(folder: Path, images: list[Image.Image]) -> None:
    reward_model = load_reward_model("open_clip", str(folder))
    kept = "a b c d e f g h i j k l m n"  # with the start and end tokens they fill the context of 16
    torch.testing.assert_close(reward_model(images[:1], [kept + " z" * 10_000]), reward_model(images[:1], [kept]))
    scores = [reward_model(images[:1], [prompt]) for prompt in (kept + " z", kept[:-1] + "z")]
    assert scores[0] != scores[1]  # the last token still counts


def test_no_images_give_no_scores(folder: Path) -> None:
    assert load_reward_model("open_clip", str(folder))([], []).shape == (0,)


def test_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError, match=r"reward open_clip: cannot load .*expected a folder with open_clip_config\.json"
    ):
        load_reward_model("open_clip", str(tmp_path))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("models/no_such_clip", {}, "no file or folder 'models/no_such_clip'"),
        ("ViT-B-32", {}, "or an architecture of open_clip with `pretrained`"),
        ("ViT-B-32", {"pretrained": "no_such_tag"}, "no_such_tag"),
        ("ViT-B-3", {"pretrained": "openai"}, "ViT-B-3"),
    ],
)
def test_what_is_no_model_ends_in_one_sentence(path: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_reward_model("open_clip", path, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_names_reach_open_clip_with_the_schema_it_wants(folder: Path) -> None:
    assert open_clip_name(str(folder), None) == open_clip_name(f"local-dir:{folder}", None) == f"local-dir:{folder}"
    assert open_clip_name("org/name", None) == open_clip_name("hf-hub:org/name", None) == "hf-hub:org/name"
    assert open_clip_name("ViT-B-32", "laion2b_s34b_b79k") == "ViT-B-32"


def test_a_built_in_name_takes_weights_from_pretrained(tmp_path: Path) -> None:
    """The name, and no schema, reaches open_clip; the weights are the file's."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    }
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    (tmp_path / "tiny-arch.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    save_file(open_clip.create_model("tiny-arch").state_dict(), tmp_path / "weights.safetensors")
    reward_model = load_reward_model("open_clip", "tiny-arch", pretrained=str(tmp_path / "weights.safetensors"))
    assert reward_model([Image.new("RGB", (8, 8))], ["a cat"]).isfinite().all()


def test_unknown_names_and_options_list_the_known(folder: Path) -> None:
    assert names() == sorted(names()) and "open_clip" in names()
    with pytest.raises(
        ValueError, match=r"there is no 'open-clip'; did you mean 'open_clip'\? \(there are .*open_clip.*\)"
    ):
        reward_module("open-clip")
    with pytest.raises(ValueError, match=r"reward open_clip: batchsize: .*got 3; options: batch_size, pretrained"):
        load_reward_model("open_clip", str(folder), batchsize=3)
    with pytest.raises(ValueError, match=r"reward open_clip: batch_size: .*greater than 0"):
        load_reward_model("open_clip", str(folder), batch_size=0)


BLANK = [Image.new("RGB", (4, 4))] * 3


def judging(scores: Tensor) -> RewardModel:
    def judge(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return scores if t is None else scores + t

    return checked_reward_model("stub", judge)


def test_the_guard_lets_good_scores_and_timesteps_through() -> None:
    reward_model = judging(torch.tensor([1.0, -2.0, 0.0]))
    assert reward_model(BLANK, "abc").tolist() == [1, -2, 0]
    assert reward_model(BLANK, "abc", torch.tensor([1.0, 2.0, 3.0])).tolist() == [2, 0, 3]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([0.0, torch.nan, -torch.inf]), r"reward stub: 2 of 3 scores are not finite \(rows 1, 2; .*'b'"),
        (torch.zeros(3, 1), r"shape \[3, 1\] and torch.float32 for 3 images; expected \[3\]"),
        (torch.zeros(2), r"shape \[2\]"),
        (torch.tensor(0.0), r"shape \[\]"),
        (torch.zeros(3, dtype=torch.bfloat16), "torch.bfloat16"),
    ],
)
def test_the_guard_names_the_judge_and_the_rows(scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judging(scores)(BLANK, ["a", "b", "c"])


def test_the_guard_counts_prompts() -> None:
    with pytest.raises(ValueError, match="reward stub: 3 images and 2 prompts"):
        judging(torch.zeros(3))(BLANK, ["a", "b"])
