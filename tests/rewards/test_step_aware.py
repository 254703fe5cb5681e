"""The judge of noisy images on a tiny random open_clip model: what it begins as, its equations, its files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmalign.rewards import load_reward_model, step_aware
from mmalign.rewards.step_aware import begin, save, sinusoid
from tests.helpers.golden import golden

GOLDEN = golden("spo")
PROMPTS = ["a red circle", "two blue stars", "a red circle", "", "green"]
TIMES = torch.tensor([0, 301, 301, 951, 1])


@pytest.fixture
def begun(tiny_clip: Path, tmp_path: Path) -> Path:
    """A judge that has learned nothing yet."""
    save(begin(str(tiny_clip)), tmp_path / "begun")
    return tmp_path / "begun"


@pytest.fixture
def learned(tiny_clip: Path, tmp_path: Path) -> Path:
    """A judge whose weights have all moved."""
    parts = begin(str(tiny_clip))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in parts.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save(parts, tmp_path / "learned")
    return tmp_path / "learned"


def test_untrained_step_judge_scores_as_its_clip(tiny_clip: Path, begun: Path, images: list[Image.Image]) -> None:
    """Bit for bit: x * (1 + 0) + 0, and a gate of 1."""
    clean = load_reward_model("open_clip", str(tiny_clip))(images, PROMPTS)
    reward_model = load_reward_model("step_aware", str(begun))
    assert clean.std() > 0.01
    for t in (None, torch.zeros(5), TIMES, torch.full((5,), 999.5)):
        assert torch.equal(reward_model(images, PROMPTS, t), clean)


def test_the_time_embedding_is_the_release_s() -> None:
    case = GOLDEN["spm_time_embedding"]
    result = sinusoid(torch.tensor(case["t"]), case["dim"])
    torch.testing.assert_close(result, torch.tensor(case["embedding_fp32"]), rtol=1e-5, atol=1e-4)


def test_trained_step_judge_depends_on_time_not_on_batch(learned: Path, images: list[Image.Image]) -> None:
    reward_model = load_reward_model("step_aware", str(learned))
    together = reward_model(images, PROMPTS, TIMES)
    assert (reward_model(images, PROMPTS, TIMES + 200) - together).abs().min() > 1e-3
    alone = torch.cat([reward_model([i], [p], t[None]) for i, p, t in zip(images, PROMPTS, TIMES, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    small = load_reward_model("step_aware", str(learned), batch_size=3)(images, PROMPTS, TIMES)
    torch.testing.assert_close(small, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward_model(images, PROMPTS), reward_model(images, PROMPTS, torch.zeros(5)))


def test_network_scores_as_loaded_and_all_weights_train(learned: Path, images: list[Image.Image]) -> None:
    """Of pairs: the tokens are given once for both images. Activations that are computed again change nothing."""
    parts = step_aware.read(str(learned))
    prompts, images, times = PROMPTS[:2], images[:4], TIMES[:4]
    pixels = torch.stack([parts.preprocess(i) for i in images])
    scores = parts.net(pixels, parts.tokenize(prompts), times)
    expected = load_reward_model("step_aware", str(learned))(images, prompts * 2, times)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    scores.square().sum().backward()
    names = [name for name, p in parts.net.named_parameters() if p.grad is None or not p.grad.any()]
    # A shift of all keys alike changes no attention.
    assert not [name for name in names if not name.endswith("in_proj_bias")]
    before = {name: p.grad.clone() for name, p in parts.net.named_parameters() if p.grad is not None}
    parts.net.zero_grad()
    parts.net.checkpointing = True
    parts.net(pixels, parts.tokenize(prompts), times).square().sum().backward()
    for name, p in parts.net.named_parameters():
        if name in before:
            torch.testing.assert_close(p.grad, before[name])


def test_the_blocks_follow_their_equations(learned: Path) -> None:
    """Worked out without the method's own code, on one block."""
    net = step_aware.read(str(learned)).net
    block, linear = net.clip.visual.transformer.resblocks[1], net.blocks[1]
    h, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    s1, k1, g1, s2, k2, g2 = (x[:, None] for x in linear(c).view(2, 6, 32).unbind(1))
    u = torch.nn.functional.layer_norm(h, (32,), block.ln_1.weight, block.ln_1.bias) * (1 + k1) + s1
    middle = h + g1 * block.attn(u, u, u, need_weights=False)[0]
    u = torch.nn.functional.layer_norm(middle, (32,), block.ln_2.weight, block.ln_2.bias) * (1 + k2) + s2
    expected = middle + g2 * block.mlp(u)
    torch.testing.assert_close(step_aware._steered(block, h, linear(c)), expected)


def test_prompts_are_encoded_once(tiny_clip: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    judge = step_aware.load(str(_saved(tiny_clip)), torch.device("cpu"), step_aware.Config())
    encode, calls = judge.net.clip.encode_text, list[int]()
    monkeypatch.setattr(judge.net.clip, "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k))
    for _ in range(3):
        judge(images, PROMPTS, TIMES)
    assert len(calls) == len(set(PROMPTS))


def _saved(tiny_clip: Path) -> Path:
    folder = tiny_clip.parent / "begun once"
    save(begin(str(tiny_clip)), folder)
    return folder


def test_step_judge_can_be_trained_further(tiny_clip: Path, learned: Path) -> None:
    again, first = begin(str(learned)).net.state_dict(), load_file(learned / step_aware.WEIGHTS)
    assert all(torch.equal(again[name], x) for name, x in first.items())
    start, second_start = (begin(str(tiny_clip)).net.state_dict() for _ in range(2))
    assert all(torch.equal(start[name], second_start[name]) for name in start)


def test_half_the_precision_on_disk_is_read_as_float32(begun: Path, images: list[Image.Image]) -> None:
    file = begun / step_aware.WEIGHTS
    save_file({name: x.half() for name, x in load_file(file).items()}, file)
    assert load_reward_model("step_aware", str(begun))(images, PROMPTS, TIMES).isfinite().all()


def test_what_is_no_step_aware_judge_ends_in_one_sentence(tiny_clip: Path, begun: Path) -> None:
    with pytest.raises(ValueError, match=r"has no step_aware\.safetensors; expected the folder of a step judge"):
        load_reward_model("step_aware", str(tiny_clip))
    with pytest.raises(ValueError, match="reward open_clip: cannot load"):  # its weights would not fit
        load_reward_model("open_clip", str(begun))
    (begun / step_aware.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(
        ValueError, match=r"reward step_aware: cannot load .* it may be incomplete: copy it again"
    ) as error:
        load_reward_model("step_aware", str(begun))
    assert "\n" not in str(error.value)


def test_a_tower_without_a_class_token_is_refused(tmp_path: Path, tiny_clip: Path) -> None:
    import open_clip

    config = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"]["pool_type"] = "avg"
    with pytest.raises(ValueError, match="a VisionTransformer has no input for the timestep"):
        step_aware.TimeConditioned(open_clip.CLIP(**config))
