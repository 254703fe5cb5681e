"""A whole run on every flow-matching family: resuming, caching, and a trained model that is drawn with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from safetensors.torch import load_file

from mmalign import assemble, checkpoint
from mmalign.families import Loading, Sampling, load_family
from mmalign.recipe import load_recipe
from mmalign.training import train


def run(content: dict[str, Any], *overrides: str) -> dict[str, torch.Tensor]:
    """Train, and give the last checkpoint's weights."""
    recipe = load_recipe(content, overrides)
    train(recipe, say=lambda _: None)
    last = checkpoint.latest(Path(recipe.output))
    assert last is not None and last.name == f"checkpoint-{recipe.train.steps:08d}"
    return load_file(last / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", list(tiny_flow.BUILDERS))
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    tune: str, name: str, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit; and what is left is the base and its better half, as every command takes them."""
    base, pairs = flow_folders(name), tiny.pick_a_pic(tmp_path / "pairs.parquet", number=4)
    method = {"name": "mapo" if tune == "full" else "diffusion_dpo"}
    options = {"steps": 2, "batch_size": 2, "save_every": 1, "lr": 1e-2}
    model = {"tune": tune, "lora": {"rank": 2}}
    content = tiny.recipe(base, pairs, tmp_path / "whole", method=method, model=model, train=options)
    whole, stopped = run(content), tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "checkpoint-00000002")  # as if killed after the first update
    assert_same(whole, run({**content, "output": str(stopped)}))
    family = load_family(str(base), Loading(torch.device("cpu")))
    policy = assemble.load_aligned(family, tmp_path / "whole" / "model")
    sampling = Sampling(steps=2, guidance=2.0, resolution=32)
    before = policy.on_reference(lambda net: family.sample(net, ["thing"], [0], sampling))
    after = family.sample(policy.unwrapped, ["thing"], [0], sampling)
    assert before is not None and before[0].tobytes() != after[0].tobytes()


@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_the_numbers_are_the_same_without_a_cache(
    name: str, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Standardised latents, padded text and its mask: read from a cache or encoded in every batch."""
    pairs = tiny.pick_a_pic(tmp_path / "pairs.parquet", number=4)
    options = {"train": {"steps": 2}, "data": {"flip": True}}
    cached, uncached = (tiny.recipe(flow_folders(name), pairs, tmp_path / to, **options) for to in ("a", "b"))
    assert_same(run(cached), run(uncached, "data.cache='off'"))
