"""`train.attention` in whole runs on tiny models: what is said, what is refused, and numbers that stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.attention.choice import SelectedBackend
from mmalign.commands.evaluate import evaluate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.families.types import Loading
from mmalign.training import checkpoint
from tests.helpers import Folders, data_files, first_fast, recipes
from tests.helpers.loading import load_diffusion, load_vlm
from tests.helpers.logged import recorded_lines

STEPS = 2


@pytest.fixture(params=first_fast(["tiny_sd15", "sd3", "llava"]))
def content(
    request: pytest.FixtureRequest, flow_folders: Folders, vlm_folders: Folders, tmp_path: Path
) -> dict[str, Any]:
    """A recipe of two updates for a model of each kind."""
    short = {"steps": STEPS, "batch_size": 2, "save_every": STEPS, "lr": 1e-3}
    if request.param == "llava":
        rows = data_files.response_pairs(tmp_path / "rows")
        return recipes.vlm(vlm_folders("llava"), rows, tmp_path / "run", train=short)
    folder = flow_folders("sd3") if request.param == "sd3" else request.getfixturevalue(request.param)
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    return recipes.diffusion(folder, pairs, tmp_path / "run", train=short, model={"tune": "full"})


def run(content: dict[str, Any], *overrides: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What a run said, and the weights that it left."""
    recipe = load_recipe(content, overrides)
    with recorded_lines() as lines:
        train(recipe)
    last = checkpoint.latest(Path(recipe.output))
    assert last is not None
    return lines, load_file(last / "model.safetensors")


@pytest.mark.slow
def test_who_computes_is_said_once_and_changes_no_number_here(content: dict[str, Any], tmp_path: Path) -> None:
    result = {}
    for wanted in ("auto", "sdpa"):
        lines, result[wanted] = run(content, f"train.attention={wanted}", f"output={tmp_path / wanted}")
        why = ", since xformers is not supported: it has no kernels for a CPU" if wanted == "auto" else ""
        assert [line for line in lines if line.startswith("attention")] == [f"attention: sdpa{why}"]
    assert all(result["auto"][name].equal(weight) for name, weight in result["sdpa"].items())


@pytest.mark.slow
def test_a_run_by_the_reference_learns_the_same(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What xformers' place in a run is, taken by the plain reference: policy, reference and their gradients."""
    _, stock = run(content)
    for family in ("diffusion.pipeline", "vlm.model"):
        monkeypatch.setattr(f"mmalign.families.{family}.select_backend", lambda *_: SelectedBackend("dense"))
    lines, policy_scores = run(content, f"output={tmp_path / 'reference'}")
    assert "attention: dense" in lines
    for name, weight in stock.items():  # AdamW divides by gradients, of which some are nothing but rounding
        assert (policy_scores[name] - weight).abs().mean() < 0.05 * STEPS * 1e-3, name


@pytest.mark.usefixtures("no_model")
def test_what_cannot_serve_is_refused_before_a_model_is_loaded(content: dict[str, Any]) -> None:
    content = {**content, "evaluate": {"benchmark": "implicit"}}
    recipe = load_recipe(content, ["train.attention=xformers", "data.validation_fraction=0.5"])
    says = r"^train.attention: xformers .* no kernels for a CPU; use auto or sdpa$"
    for command in (train, evaluate):
        with pytest.raises(ValueError, match=says):
            command(recipe)


def test_a_judge_s_frozen_model_computes_as_it_is_told(
    tiny_sd15: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.attention import denoisers
    from mmalign.families import step_judge

    monkeypatch.setattr("mmalign.families.diffusion.pipeline.select_backend", lambda *_: SelectedBackend("dense"))
    frozen = load_diffusion(tiny_sd15)
    judge = step_judge.load(str(tiny_clip), frozen, Loading(torch.device("cpu")))
    assert judge.use_attention("auto").backend == "dense"
    assert denoisers.installed(frozen.network) == "dense"


def test_a_trained_decoder_computes_as_its_base(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.attention import decoders

    monkeypatch.setattr("mmalign.families.vlm.model.select_backend", lambda *_: SelectedBackend("dense"))
    family: Any = load_vlm(vlm_folders("llava"))
    tower = family.network.model.model.vision_tower
    assert decoders.installed(family.network.model.get_decoder()) == "sdpa"  # which knows of shared prompts
    family.use_attention("auto")
    family.save(tmp_path, family.network)
    for net in (family.network, family.frozen_copy(), family.load_trained(tmp_path)):
        assert decoders.installed(net.model.get_decoder()) == "dense"
        assert net.model.model.vision_tower.config._attn_implementation == "sdpa"
    assert tower.config._attn_implementation == "sdpa"
