"""A whole run on every flow-matching family: resuming, caching, and a trained model that is drawn with."""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.config import SamplingConfig
from mmalign.families.loading import load_family
from mmalign.modalities import loading
from tests.helpers import Folders, data_files, first_fast, flow_models, recipes
from tests.helpers.loading import CPU, load_diffusion
from tests.helpers.runs import assert_resumes, assert_same, train_weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "name"), [*(("lora", name) for name in flow_models.BUILDERS), ("full", "flux2"), ("full", "sana")]
)
def test_going_on_from_a_checkpoint_equals_never_stopping(
    tune: str, name: str, flow_folders: Folders, tmp_path: Path
) -> None:
    """Bit for bit; and what is left is the base and its better half, as every command takes them."""
    edits = name in flow_models.EDITORS
    base, pairs = flow_folders(name), data_files.pick_a_pic(tmp_path / "pairs.parquet", number=4, sources=edits)
    method = {"name": "mapo" if tune == "full" else "diffusion_dpo"}
    options = {"steps": 2, "batch_size": 2, "save_every": 1, "lr": 1e-2}
    model = {"tune": tune, "lora": {"rank": 2}}
    content = recipes.diffusion(base, pairs, tmp_path / "whole", method=method, model=model, train=options)
    assert_resumes(content)
    family = load_diffusion(base)
    policy = loading.load_trained_policy(family, tmp_path / "whole" / "model")
    sampling = SamplingConfig(steps=2, guidance=2.0, resolution=32)
    shown = {"sources": flow_models.sources(1, 32, 32)} if edits else {}
    before = policy.on_reference(lambda net: family.sample(net, ["thing"], [0], sampling, **shown))
    after = family.sample(policy.unwrapped, ["thing"], [0], sampling, **shown)
    assert before is not None and before[0].tobytes() != after[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(["flux2", "qwen_image", *flow_models.EDITORS], 0))
def test_the_numbers_are_the_same_without_a_cache(name: str, flow_folders: Folders, tmp_path: Path) -> None:
    """Standardised latents, padded text and its mask: read from a cache or encoded in every batch."""
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=4, sources=name in flow_models.EDITORS)
    options = {"train": {"steps": 2}, "data": {"flip": True}}
    cached, uncached = (recipes.diffusion(flow_folders(name), pairs, tmp_path / to, **options) for to in ("a", "b"))
    assert_same(train_weights(cached), train_weights(uncached, "data.cache='off'"))


METHODS = {
    "diffusion_dpo": {},
    "mapo": {},
    "sft": {},
    "inpo": {"steps": 3},
    "cca": {},
    "instruct_engine": {},
    "spo": {"steps": 3, "start": 1, "candidates": 2, "eta": 0.7, "guidance": 2.0, "threshold": 0.0},
}


NOT_FROM_PROMPTS = [("spo", "qwen_image_edit"), ("spo", "qwen_image_edit_plus")]
# Every method on two families, of which one edits; on the others two whose steps are the family's own, and one of the
# rest in turn.
FIRST, *OTHERS = flow_models.BUILDERS
PAIRS = [*((method, FIRST) for method in METHODS)]
PAIRS += [(method, name) for name in OTHERS for method in ("inpo", "spo")]
PAIRS += zip(cycle(["cca", "instruct_engine", "mapo", "sft"]), OTHERS, strict=False)
PAIRS += [(method, "qwen_image_edit") for method in METHODS]
PAIRS = [pair for pair in dict.fromkeys(PAIRS) if pair not in NOT_FROM_PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), first_fast(PAIRS, 7))
def test_methods_train_families(
    method: str, name: str, flow_folders: Folders, tiny_step_judge: Path, tmp_path: Path
) -> None:
    """One update by the one loop; it begins at the loss of a policy that is its reference, and moves the weights."""
    edits = name in flow_models.EDITORS
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=4, rejected={}, sources=edits)
    settings: dict[str, Any] = {"name": method, **METHODS[method]}
    if method == "spo":
        settings["reward"] = {"name": "step_aware", "path": str(tiny_step_judge)}
    options = {"steps": 1, "batch_size": 2, "lr": 1e-2, "warmup_steps": 0}
    content = recipes.diffusion(flow_folders(name), pairs, tmp_path / "out", train=options)
    recipe = load_recipe({**content, "method": settings})
    (output,) = train(recipe).history
    first = {"cca": 2 * math.log(2), "mapo": None, "sft": None}.get(method, math.log(2))
    assert math.isfinite(output["loss"]) and (first is None or abs(output["loss"] - first) < 1e-3)
    about = loading.load_trained_policy(load_family(content["model"]["path"], CPU), tmp_path / "out" / "model")
    after = dict(about.unwrapped.named_parameters())
    before = dict(load_family(content["model"]["path"], CPU).network.named_parameters())
    assert any(not torch.equal(after[key], value) for key, value in before.items())
