"""Trained judges on the Hub: every file of theirs is read, not the weights of open_clip alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from mmalign.rewards import _clip_files, load_reward_model, step_aware
from mmalign.rewards._annotators import AnnotatorMixture
from mmalign.rewards._attributes import AttributeHeads

HUB_ID, WIDTH = "someone/judge", 128  # the width of tiny_clip's vectors


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a repository in the Hub's local cache, which no connection can add to."""
    cache = tmp_path / "hub"
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", [HUB_ID, f"hf-hub:{HUB_ID}"])
def test_attributes_and_annotators_of_a_judge_on_the_hub_count(name: str, hub: Path, images: list[Image.Image]) -> None:
    shutil.copytree("models/tiny_clip", hub)
    prompts = ["a red circle"] * len(images)
    plain = load_reward_model("open_clip", name)(images, prompts)
    assert torch.equal(plain, load_reward_model("open_clip", "models/tiny_clip")(images, prompts))

    mixture = AnnotatorMixture(["ann", "ben"], WIDTH, prototypes=2, form="distance")
    torch.nn.init.normal_(mixture.points, generator=torch.Generator().manual_seed(0))
    mixture.save(hub)
    AttributeHeads({"sharpness": (1, 5)}, WIDTH).save(hub)
    of_mean = load_reward_model("open_clip", name)(images, prompts)
    of_ann = load_reward_model("open_clip", name, annotator="ann")(images, prompts)
    assert not torch.equal(of_mean, plain) and not torch.equal(of_mean, of_ann)
    attribute = load_reward_model("open_clip", name, attribute="sharpness")(images, prompts)
    assert attribute.tolist() == [3.0] * len(images)


def test_a_step_judge_on_the_hub_is_the_one_in_a_folder(hub: Path, images: list[Image.Image]) -> None:
    shutil.copytree("models/tiny_clip_steps", hub)
    prompts, t = ["a red circle"] * len(images), torch.full((len(images),), 0.5)
    on_hub, in_folder = (load_reward_model("step_aware", path) for path in (HUB_ID, "models/tiny_clip_steps"))
    assert torch.equal(on_hub(images, prompts, t), in_folder(images, prompts, t))
    # It is also a beginning for further training
    weights = step_aware.begin(HUB_ID).net.state_dict()
    assert all(torch.equal(own, weights[key]) for key, own in step_aware.read(str(hub)).net.state_dict().items())


def test_a_clip_without_files_of_a_judge_is_read_alone(hub: Path) -> None:
    shutil.copytree("models/tiny_clip", hub)
    assert _clip_files.load_start(HUB_ID).config
    with pytest.raises(ValueError, match=f"step_aware: {HUB_ID} has no step_aware.safetensors"):
        load_reward_model("step_aware", HUB_ID)
    with pytest.raises(ValueError, match=f"annotator: {HUB_ID} has no 'ann' .it has none"):
        load_reward_model("open_clip", HUB_ID, annotator="ann")
