"""Attributes that a judge of images learns beside its preference, on a tiny CLIP of the real classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmalign.data.loaders.batches import JudgedImages
from mmalign.families import image_judge
from mmalign.families.image_judge import ImageJudge
from mmalign.families.types import LoraSettings
from mmalign.methods.text_to_image import bradley_terry
from mmalign.methods.text_to_image.bradley_terry import Config
from mmalign.policy import Policy
from mmalign.rewards import load_reward_model
from tests.helpers.loading import CPU
from tests.helpers.policies import run
from tests.methods.text_to_image.test_bradley_terry import PROMPTS, picture, rows

SCALES = {"colour": (0.0, 4.0), "count": (1.0, 2.0)}
SEEDS = [1, 2, 3, 4, 5, 6]


def judge(folder: Path, trained: str = "all") -> Policy[ImageJudge]:
    family = image_judge.load(str(folder), CPU, attributes=SCALES, head_only=trained == "head")
    if trained == "adapters":
        family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    else:
        family.unfreeze()
    return Policy(family, family.network, family.network, None)


def rated(family: ImageJudge, ratings: Tensor) -> JudgedImages:
    return replace(rows(family, SEEDS), ratings=ratings)


def test_ratings_add_their_mean_squared_error(tiny_clip: Path) -> None:
    """New heads predict 2 and 1.5. Errors of half a scale: 1 and 0; 1, 1 and 1/4 are left of the second row."""
    policy = judge(tiny_clip)
    none = float("nan")
    first, second = [[0.0, 1.5], [4.0, 1.5]], [[0.0, none], [1.0, 2.0]]
    batch = rated(policy.family, torch.tensor([first, second, [[none, none], [none, none]]]))
    plain = run(bradley_terry, policy, rows(policy.family, SEEDS), Config())
    step = run(bradley_terry, policy, batch, Config(attribute_weight=2.0))
    extra = (step.losses - plain.losses).tolist()
    assert extra == pytest.approx([2 * 0.5, 2 * (1 + 0.25 + 1) / 3, 0.0], abs=1e-5)
    assert step.metrics["error of colour"].tolist() == pytest.approx([1.0, (1.25 / 2) ** 0.5, 0.0])
    assert step.metrics["error of count"].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_without_weight_it_is_the_judge_without_heads(tiny_clip: Path) -> None:
    policy = judge(tiny_clip)
    batch = rated(policy.family, torch.ones(3, 2, 2))
    plain = image_judge.load(str(tiny_clip), CPU)
    plain.unfreeze()
    alone = run(bradley_terry, Policy(plain, plain.network, plain.network, None), batch, Config())
    assert torch.equal(run(bradley_terry, policy, batch, Config(attribute_weight=0)).losses, alone.losses)


@pytest.mark.parametrize("trained", ["all", "head", "adapters"])
def test_a_trained_judge_is_a_judge_of_each_attribute(trained: str, tiny_clip: Path, tmp_path: Path) -> None:
    """Two updates lower the error, and the saved judge predicts as the one in memory."""
    policy = judge(tiny_clip, trained)
    family = policy.family
    assert all(parameter.requires_grad for parameter in family.network.attributes.parameters())
    batch = rated(family, torch.tensor([[[4.0, 1.0], [0.0, 2.0]]] * 3))
    optimizer, losses = torch.optim.Adam(policy.trainable(), lr=1e-3), list[float]()
    for _ in range(3):
        step = run(bradley_terry, policy, batch, Config())
        losses.append(step.losses.mean().item())
        optimizer.zero_grad()
        step.losses.mean().backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    family.save(tmp_path / "judge", family.network)
    images = [picture(seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        inputs = family.inputs(torch.stack(list(map(family.preprocess, images))))
        expected = family.judge(family.network, inputs, family.text_inputs(PROMPTS))
    assert expected.shape == (3, 3)
    for place, options in enumerate([{}, {"attribute": "colour"}, {"attribute": "count"}]):
        scores = load_reward_model("open_clip", str(tmp_path / "judge"), **options)(images, PROMPTS)
        torch.testing.assert_close(scores, expected[:, place], rtol=1e-4, atol=1e-5)
    loaded = family.load_trained(tmp_path / "judge")
    assert isinstance(loaded, image_judge.ClipScorer) and loaded.attributes is not None
    assert torch.equal(loaded.attributes.weight, family.network.attributes.weight)


def test_an_attribute_that_is_not_there_is_named(tiny_clip: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'colour' \(it has none\); name one of its attributes"):
        load_reward_model("open_clip", str(tiny_clip), attribute="colour")
