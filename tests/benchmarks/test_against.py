"""Steps of other programs: equal to ours, run as those programs run them, and never timed if wrong."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.commands import _bench_run, bench
from mmalign.commands._bench_run import Run
from mmalign.commands.bench import MMALIGN, Report
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import ImageModel, Recipe
from mmalign.policy import FrozenCopy
from tests.benchmarks import against, equality, peers
from tests.benchmarks.against import Request
from tests.benchmarks.equality import LIMIT, apart_in_float32, first_gradient, require_same
from tests.benchmarks.peers import diffusers, trl, use_peer
from tests.helpers import recipes

pytestmark = pytest.mark.xdist_group("against")  # its fixture runs once

OFF, KEPT = "data.cache='off'", "method.num_cached_draws=2"
RELEASED = {"name": "diffusion_dpo", "beta": 5000.0}


def diffusers_request(model: Path, folder: Path, **sections: Any) -> Request:
    content = recipes.diffusion_in(model, folder, **{"model": {"tune": "lora"}, **sections})
    return against.with_alike(Request(content, peer="diffusers"), 1)


def peer_run(request: Request, folder: Path, accelerator: Any, peer: Any = diffusers) -> Run:
    recipe = against.recipes_of(request)["diffusers"]
    return use_peer(_bench_run.build(recipe, accelerator, folder, 1), peer)


# ----------------------------------------------------------------------------------------------- the same step is timed


@pytest.fixture(scope="module")
def report(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    content = recipes.diffusion_in(tiny_sd15, tmp_path_factory.mktemp("against"), model={"tune": "lora"})
    return against.against(Request(content, (), [OFF, KEPT], "diffusers"), repeats=1)


def test_filling_is_in_the_time_of_one_epoch(report: Report) -> None:
    filling = {name: float(report.costs[name]["filling ms/pair"] or 0) / 1000 for name in report.runs}
    assert filling[OFF] == filling["diffusers"] == 0 < filling[MMALIGN]
    kept, plain = (report.runs[name].seconds[0] / 2 + filling[name] for name in (KEPT, MMALIGN))
    assert report.ratios[f"{KEPT} / {MMALIGN}"]["time of one epoch"] == pytest.approx(kept / plain)


def test_half_precision_is_compared_in_float32(tiny_sd15: Path, tmp_path: Path, log_lines: list[str]) -> None:
    """In bfloat16 rounding could refuse a correct step."""
    request = diffusers_request(tiny_sd15, tmp_path, method=RELEASED, train={"precision": "bfloat16"})
    report = against.against(request, repeats=1)
    assert list(report.runs) == [MMALIGN, "diffusers"] and log_lines[0].startswith("diffusers:")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_comparison_is_float32_whatever_is_measured(
    mixed_precision: str, start: Any, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are within a tenth of the limit, with small batches and no autocast.

    With float16 the accelerator puts autocast around the network; on a CPU it does so for bfloat16 alone.
    """
    request = diffusers_request(
        tiny_sd15,
        tmp_path,
        method=RELEASED,
        train={"precision": "bfloat16", "gradient_accumulation_steps": 2, "batch_size": 4},
    )
    built, autocast, build = list[Recipe](), list[bool](), _bench_run.build

    def noted(recipe: Recipe, *arguments: Any) -> Run:
        built.append(recipe)
        run = build(recipe, *arguments)
        network: Any = run.policy.unwrapped
        network.conv_in.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
        return run

    monkeypatch.setattr(equality, "build", noted)
    recipe, other = against.recipes_of(request).values()
    apart = apart_in_float32(recipe, other, diffusers, tmp_path, Accelerator(mixed_precision=mixed_precision))
    assert apart is not None and apart[1] < LIMIT / 10
    assert autocast and not any(autocast)
    exact = [
        (r.train.precision, r.model.vae_dtype, r.train.gradient_accumulation_steps, r.train.batch_size) for r in built
    ]  # type: ignore[union-attr]
    assert exact == [("float32", "float32", 1, 2)] * 2 and recipe.train.precision == "bfloat16"


# ------------------------------------------------------------------------------------------------ a wrong step is not


def wrong_beta(run: Run, *arguments: Any, loss: Callable[..., Tensor] = diffusers.loss) -> Tensor:
    method: Any = run.recipe.method
    twice = method.model_copy(update={"beta": 2 * method.beta})
    return loss(replace(run, recipe=run.recipe.model_copy(update={"method": twice})), *arguments)


def no_reference(run: Run, *arguments: Any) -> Tensor:
    policy = replace(run.policy, reference=FrozenCopy(run.policy.unwrapped))
    return diffusers.loss(replace(run, policy=policy), *arguments)


def swapped(run: Run, batch: Any, *arguments: Any) -> Tensor:
    return diffusers.loss(run, replace(batch, pixels=batch.pixels.roll(len(batch.rows), 0)), *arguments)


@pytest.mark.parametrize("loss", [wrong_beta, no_reference, swapped])
def test_wrong_step_is_detected(loss: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    request, accelerator = diffusers_request(tiny_sd15, tmp_path, method=RELEASED), Accelerator()
    wrong: Any = SimpleNamespace(prepare=diffusers.prepare, optimizer=diffusers.optimizer, loss=loss)
    right_run = _bench_run.build(against.recipes_of(request)[MMALIGN], accelerator, tmp_path / "right", 1)
    run = peer_run(request, tmp_path / "wrong", accelerator, wrong)
    apart = first_gradient(run, wrong).apart(first_gradient(right_run))
    with pytest.raises(ValueError, match="wrong does not compute"):
        require_same("wrong", apart)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_wrong_step_is_never_timed(
    precision: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "loss", wrong_beta)
    monkeypatch.setattr(bench, "time_once", lambda *_: pytest.fail("it was timed"))
    request = diffusers_request(tiny_sd15, tmp_path, method=RELEASED, train={"precision": precision})
    with pytest.raises(ValueError, match="diffusers does not compute"):
        against.against(request, repeats=1)


# --------------------------------------------------------------------------------------------- as other programs do it


@pytest.mark.parametrize("name", peers.NAMES)
def test_peer_offers_the_interface(name: str) -> None:
    peer = peers.load(name)
    assert peer.about and all(isinstance(assignment, str) for assignment in peer.own)
    for call, wanted in inspect.getmembers(peers.Peer, inspect.isfunction):
        if not call.startswith("_"):
            assert (
                list(inspect.signature(getattr(peer, call)).parameters) == [*inspect.signature(wanted).parameters][1:]
            )


def test_peers_run_as_their_programs_do(tiny_sd15: Path, tmp_path: Path) -> None:
    """The recipe's own settings apply to its own run only."""
    request = diffusers_request(tiny_sd15, tmp_path, train={"attention": "xformers", "compile": True})
    for peer in (diffusers, trl):
        recipe = load_recipe(request.source, peer.own[:3])
        assert (recipe.data.cache, recipe.train.attention, recipe.train.compile) == ("off", "sdpa", False)
    assert trl.own[3:] == ("train.pack_responses='off'",)  # the decoder uses the attention of transformers
    recipe = against.recipes_of(request)[MMALIGN]
    assert (recipe.data.cache, recipe.train.attention, recipe.train.compile) == ("auto", "xformers", True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autoencoder_has_the_precision_of_the_script(
    precision: str, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """Both sides cast to the weights' dtype for Stable Diffusion, as train_diffusion_dpo.py does, but not for SDXL."""
    for model, expected in ((tiny_sd15, precision), (tiny_sdxl, "float32")):
        request = diffusers_request(model, tmp_path, train={"precision": precision})
        for recipe in against.recipes_of(request).values():
            assert isinstance(recipe.model, ImageModel) and recipe.model.vae_dtype == expected
    request = diffusers_request(tiny_sd15, tmp_path, train={"precision": precision})
    run = peer_run(request, tmp_path / "run", Accelerator())
    assert run.policy.family.pipeline.vae.dtype == getattr(torch, precision)


def test_peer_reduces_gradients_once_an_update(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three micro-batches the first two, forward and backward, are inside `no_sync`."""
    request = diffusers_request(tiny_sd15, tmp_path, train={"gradient_accumulation_steps": 3, "batch_size": 1})
    accelerator, inside, calls = Accelerator(), [False], list[tuple[str, bool]]()
    run = peer_run(request, tmp_path / "run", accelerator)

    @contextlib.contextmanager
    def no_sync(model: Any) -> Iterator[None]:
        assert model is run.policy.model
        inside[0] = True
        yield
        inside[0] = False

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append((name, inside[0]))
            return function(*arguments)

        return call

    monkeypatch.setattr(accelerator, "no_sync", no_sync)
    monkeypatch.setattr(accelerator, "backward", recorded("backward", accelerator.backward))
    monkeypatch.setattr(diffusers, "loss", recorded("loss", diffusers.loss))
    run.updates(run, 1, None)
    assert calls == [(name, silent) for silent in (True, True, False) for name in ("loss", "backward")]


def test_diffusers_refuses_what_it_does_not_train(tiny_sd15: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mapo"):
        diffusers_request(tiny_sd15, tmp_path, method={"name": "mapo"})
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
        diffusers_request(tiny_sd3, tmp_path)
