"""Training of a judge of images, on a tiny CLIP of the real classes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.data.loaders.batches import JudgedImages
from mmalign.families import image_judge
from mmalign.families.image_judge import ImageJudge
from mmalign.families.types import LoraSettings
from mmalign.losses.wrappers import Labels
from mmalign.methods import Step
from mmalign.methods.text_to_image import bradley_terry
from mmalign.methods.text_to_image.bradley_terry import Config
from mmalign.policy import Policy
from mmalign.rewards import load_reward_model
from tests.helpers.loading import CPU
from tests.helpers.policies import gradient, run

PROMPTS = ["a red fox", "a hen", "two owls"]
PLAIN = Config()
LISTS = Config(rows="lists")


@pytest.fixture
def family(tiny_clip: Path) -> ImageJudge:
    return image_judge.load(str(tiny_clip), CPU)


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (20, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def rows(family: ImageJudge, seeds: list[int], scores: Tensor | None = None) -> JudgedImages:
    """Return rows of the images with these seeds, the first images of all rows first; pairs without scores."""
    images = torch.stack([family.preprocess(picture(seed)) for seed in seeds])
    number = len(PROMPTS)
    scores = torch.full((number, len(seeds) // number), torch.nan) if scores is None else scores
    return JudgedImages(list(range(number)), PROMPTS, images, torch.ones(number), scores, None)


def learning(family: ImageJudge) -> Policy[ImageJudge]:
    family.unfreeze()
    return Policy(family, family.network, family.network, None)


def judged(policy: Policy[ImageJudge], batch: JudgedImages, cfg: Config = PLAIN) -> Step:
    return run(bradley_terry, policy, batch, cfg)


def labelled(batch: JudgedImages, share: Tensor, weight: float = 1.0) -> JudgedImages:
    return replace(batch, labels=Labels(share, torch.zeros(3), torch.full((3,), weight)))


def test_equal_images_cost_the_entropy_of_their_label(family: ImageJudge) -> None:
    policy, equal = learning(family), rows(family, [1, 2, 3, 1, 2, 3])
    step = judged(policy, equal)
    assert step.losses.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-6)
    assert step.metrics["accuracy"].tolist() == [0.5] * 3
    tied = judged(policy, labelled(equal, torch.full((3,), 0.5)))
    assert tied.losses.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_soft_label_is_reached_where_the_judge_has_its_probability(family: ImageJudge) -> None:
    policy, batch = learning(family), rows(family, [1, 2, 3, 4, 5, 6])
    sure = judged(policy, batch)
    share = torch.sigmoid(sure.metrics["margin"])
    size = gradient(policy, sure).norm()
    assert gradient(policy, judged(policy, labelled(batch, share))).norm() < 1e-5 * size
    # Off that probability the loss is the mixture of both verdicts, times the weight
    mixed = judged(policy, labelled(batch, torch.full((3,), 0.8), weight=2.0)).losses
    swapped = judged(policy, labelled(batch, torch.zeros(3))).losses
    torch.testing.assert_close(mixed, 2 * (0.8 * sure.losses + 0.2 * swapped))


def test_accuracy_counts_the_preferred_side(family: ImageJudge) -> None:
    policy, batch = learning(family), rows(family, [1, 2, 3, 4, 5, 6])
    first = judged(policy, batch).metrics["accuracy"]
    second = judged(policy, labelled(batch, torch.tensor([0.0, 0.2, 0.3]))).metrics["accuracy"]
    assert torch.equal(first + second, torch.ones(3)) and first.any() != first.all()


def test_a_list_of_two_images_is_a_pair(family: ImageJudge) -> None:
    policy, pairs = learning(family), rows(family, [1, 2, 3, 4, 5, 6])
    lists = judged(policy, replace(pairs, scores=torch.tensor([[7.0, 1.0]] * 3)), LISTS)
    step = judged(policy, pairs)
    torch.testing.assert_close(lists.losses, step.losses)
    assert torch.equal(lists.metrics["margin"], step.metrics["margin"])


def test_the_ranking_of_a_list_is_drawn_best_first(family: ImageJudge) -> None:
    """The loss of three images without ties is -log of the softmax over all, then over two; the second list has two."""
    scores = torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, torch.nan], [1.0, 1.0, 0.0]])
    step = judged(learning(family), rows(family, list(range(9)), scores), LISTS)
    with torch.no_grad():
        images = family.inputs(rows(family, list(range(9)), scores).images)
        s = family.score(family.network, images, family.text_inputs(PROMPTS)).view(3, 3).T
    plackett = -s[0].log_softmax(0)[0] - s[0, 1:].log_softmax(0)[0]
    assert step.losses[0].item() == pytest.approx(plackett.item(), rel=1e-5)
    assert step.losses[1].item() == pytest.approx(-s[1, :2].log_softmax(0)[0].item(), rel=1e-5)
    tied = -s[2, [0, 2]].log_softmax(0)[0] - s[2, [1, 2]].log_softmax(0)[0]
    assert step.losses[2].item() == pytest.approx(tied.item(), rel=1e-5)


def test_a_swap_of_sides_swaps_the_verdict(family: ImageJudge) -> None:
    policy = learning(family)
    margin = judged(policy, rows(family, [1, 2, 3, 4, 5, 6])).metrics["margin"]
    swapped = judged(policy, rows(family, [4, 5, 6, 1, 2, 3])).metrics["margin"]
    assert torch.equal(margin.sign(), -swapped.sign())
    torch.testing.assert_close(margin, -swapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["tiny_clip", "tiny_transformers_clip"])
def test_the_last_layers_learn_on_features_alone(start: str, request: pytest.FixtureRequest) -> None:
    """Scores and gradients are those of the whole network."""
    folder = str(request.getfixturevalue(start))
    head, whole = (image_judge.load(folder, CPU, head_only=only) for only in (True, False))
    policy, batch = learning(head), rows(head, [1, 2, 3, 4, 5, 6])
    trained = {name for name, p in head.network.named_parameters() if p.requires_grad}
    assert trained == {"clip.visual.proj", "clip.text_projection", "clip.logit_scale"}
    features = head.inputs(batch.images)
    assert features.shape == (6, 32) and torch.equal(head.inputs(features), features)
    step, expected = judged(policy, replace(batch, images=features)), judged(learning(whole), batch)
    torch.testing.assert_close(step.losses, expected.losses, rtol=1e-5, atol=1e-6)
    step.losses.sum().backward()
    expected.losses.sum().backward()
    for name in trained:
        own, others = (f.network.get_parameter(name).grad for f in (head, whole))
        torch.testing.assert_close(own, others, rtol=1e-4, atol=1e-6)


def test_adapters_begin_without_effect_and_are_saved_within_the_weights(family: ImageJudge, tmp_path: Path) -> None:
    images, text = family.inputs(rows(family, [1, 2, 3]).images), family.tokens(PROMPTS)
    before = family.score(family.network, images, text)
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    torch.testing.assert_close(family.score(family.network, images, text), before)
    adapted = {
        name.split(".lora_")[0].split(".")[1] for name, p in family.network.named_parameters() if p.requires_grad
    }
    assert adapted == {"visual", "transformer"}  # both towers
    with torch.no_grad():
        for parameter in family.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = family.score(family.network, images, text)
    assert not torch.allclose(after, before)
    family.save(tmp_path / "judge", family.network)
    torch.testing.assert_close(family.score(family.load_trained(tmp_path / "judge"), images, text), after)
    assert torch.equal(family.score(family.network, images, text), after)  # saving leaves the adapters


def test_what_is_saved_is_a_reward_model(family: ImageJudge, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in family.network.parameters():
            parameter.mul_(1.1)
    family.save(tmp_path / "judge", family.network)
    images = [picture(seed) for seed in range(3)]
    scores = family.score(family.network, torch.stack(list(map(family.preprocess, images))), family.tokens(PROMPTS))
    torch.testing.assert_close(load_reward_model("open_clip", str(tmp_path / "judge"))(images, PROMPTS), scores)
    for dtype in (None, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        family.export(tmp_path / str(dtype), family.network, "merged", dtype)
    with pytest.raises(ValueError, match="has one form"):
        family.export(tmp_path, family.network, "peft", None)


def test_random_weights_are_the_same_every_time(tiny_clip: Path, tiny_transformers_clip: Path) -> None:
    for folder in (str(tiny_clip), str(tiny_transformers_clip)):
        first, again = (image_judge.load(folder, CPU, random=True).network.state_dict() for _ in range(2))
        assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not torch.equal(first["clip.visual.proj"], image_judge.load(folder, CPU).network.clip.visual.proj)


def test_what_cannot_be_adapted_is_refused(
    family: ImageJudge, monkeypatch: pytest.MonkeyPatch, tiny_clip: Path
) -> None:
    assert "out_proj" not in family.linear_layers
    with pytest.raises(ValueError, match=r"model\.lora\.targets: attn\.out_proj cannot be adapted; expected .*c_fc"):
        family.add_lora(LoraSettings(rank=1, alpha=1.0, targets=["attn.out_proj"], seed=0))
    with pytest.raises(ValueError, match=r"model\.adapter: a trained judge is a whole CLIP"):
        family.continue_adapter("somewhere")
    with pytest.raises(ValueError, match=r"train\.attention: xformers"):
        family.use_attention("xformers")
    family.network.clip.visual.proj = None
    with pytest.raises(ValueError, match=r"model\.head: the towers VisionTransformer and CLIP end in no linear layer"):
        family.network.head()
    load = image_judge._clip_files.load_start

    def with_statistics(path: str, *, random: bool) -> object:
        parts = load(path, random=random)
        parts.model.visual.norm = nn.BatchNorm2d(3)
        return parts

    monkeypatch.setattr(image_judge._clip_files, "load_start", with_statistics)
    with pytest.raises(ValueError, match=r"model\.path: the vision tower of .* has batch normalization"):
        image_judge.load(family.name, CPU)
