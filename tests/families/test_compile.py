"""Compiled blocks (`train.compile`) compute what they compute otherwise; docs/performance.md has their speed."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.families import compile, step_judge
from tests.helpers import STANDING_VLMS, Folders, compiling, data_files, recipes
from tests.helpers.loading import CPU, load_diffusion, load_vlm

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced() -> Iterator[None]:
    with compiling.traced():
        yield


def learned(recipe: dict[str, Any]) -> tuple[list[float], dict[str, int]]:
    """Return the losses of a training, and how often PyTorch compiled something for it."""
    before = dict(torch._dynamo.utils.counters["stats"])
    history = train(load_recipe(recipe)).history
    after = torch._dynamo.utils.counters["stats"]
    return [report["loss"] for report in history], {name: after[name] - before.get(name, 0) for name in after}


@pytest.mark.slow
@needs_compiler
def test_a_compiled_denoiser_learns_the_same(tiny_sd15: Path, tmp_path: Path) -> None:
    """The reference is a frozen copy, and activations are recomputed."""
    check_denoiser("full", tiny_sd15, tmp_path)


@pytest.mark.slow
def test_a_denoiser_learns_the_same_with_adapters(traced: None, tiny_sd15: Path, tmp_path: Path) -> None:
    """The reference is the network with its adapters off."""
    check_denoiser("lora", tiny_sd15, tmp_path)


def check_denoiser(tune: str, tiny_sd15: Path, tmp_path: Path) -> None:
    pairs, losses = data_files.pick_a_pic(tmp_path / "pairs.parquet"), {}
    for on in (False, True):
        how = {"steps": 3, "compile": on, "gradient_checkpointing": tune == "full"}
        # The reference's scores are kept, or worked out beside the policy's.
        method = {"name": "diffusion_dpo", "beta": 100.0, "num_cached_draws": int(tune == "lora")}
        given = recipes.diffusion(tiny_sd15, pairs, tmp_path / f"{on}", train=how, model={"tune": tune}, method=method)
        losses[on], compilations = learned(given)
        assert bool(compilations.get("unique_graphs")) == on
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    # With adapters and without them are two graphs, which round otherwise, and beta multiplies that.
    assert losses[True][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[True][2] != losses[True][0]


@pytest.mark.slow
def test_decoder_trains_alike_with_few_graphs(traced: None, vlm_folders: Folders, tmp_path: Path) -> None:
    pairs, losses = data_files.response_pairs(tmp_path / "rows", number=12), {}
    for on in (False, True):
        given = {"steps": 12, "save_every": 12, "batch_size": 1, "lr": 1e-3, "compile": on}
        recipe = recipes.vlm(vlm_folders("llava"), pairs, tmp_path / f"{on}", train=given, model={"tune": "full"})
        losses[on], compilations = learned(recipe)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] != losses[True][0]
    # Five parts of a layer, around its attention: of the first length and of any, with gradients and without.
    assert compilations["unique_graphs"] <= 20


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd3", {"JointTransformerBlock"}),
        ("flux", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
        ("flux2", {"Flux2TransformerBlock", "Flux2SingleTransformerBlock"}),
        ("z_image", {"ZImageTransformerBlock"}),
        ("qwen_image", {"QwenImageTransformerBlock"}),
        ("qwen_image_edit_plus", {"QwenImageTransformerBlock"}),
        ("sana", {"SanaTransformerBlock", "PatchEmbed", "SanaModulatedNorm"}),
    ],
)
def test_the_blocks_of_a_transformer_are_those_that_repeat(name: str, kinds: set[str], flow_folders: Folders) -> None:
    family = load_diffusion(flow_folders(name))
    blocks = family.blocks(family.network)
    assert {type(block).__name__ for block in blocks} == kinds
    assert not any(inner in blocks for block in blocks for inner in list(block.modules())[1:])


def test_the_blocks_of_a_decoder_are_its_own(vlm_folders: Folders) -> None:
    for name in STANDING_VLMS:
        family: Any = load_vlm(vlm_folders(name))
        decoder = family.network.model.get_decoder()
        assert list(family.blocks(family.network)) == list(decoder.layers), name
        copied = family.frozen_copy()
        assert not set(family.blocks(copied)) & set(decoder.layers), name


def test_a_network_that_names_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^train.compile: .* the blocks of a Linear; leave it out$"):
        compile.denoiser_blocks(nn.Linear(1, 1))


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"^train.compile: needs a C\+\+ compiler, .* install g\+\+, set CXX"):
        compile.check(torch.device("cpu"))


def test_a_gpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launchers with one."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"^train.compile: needs a C compiler, .* install gcc, set CC"):
        compile.check(torch.device("cuda"))
    monkeypatch.setenv("CC", "cc")
    compile.check(torch.device("cuda"))


def test_a_judge_is_refused(tiny_step_judge: Path, tiny_sd15: Path) -> None:
    family = step_judge.load(str(tiny_step_judge), load_diffusion(tiny_sd15), CPU)
    with pytest.raises(ValueError, match=r"^train.compile: .* leave it out$"):
        family.blocks(family.network)
