"""Other programs' steps: they compute what ours does, as those programs do, and are told apart where they do not."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.benchmark import against, bench, measure, runs
from mmalign.benchmark.against import diffusers, trl
from mmalign.benchmark.bench import Asked
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import ImageModel
from tests.benchmark.wrong_steps import wrong_beta_of
from tests.helpers import recipes

OFF = "data.cache='off'"


def no_reference(run: runs.Run, batch: Any, draws: Any, switch: Any) -> Tensor:
    policy = replace(run.policy, reference=runs.FrozenCopy(run.policy.unwrapped))
    return diffusers.loss(replace(run, policy=policy), batch, draws, switch)


def swapped(run: runs.Run, batch: Any, draws: Any, switch: Any) -> Tensor:
    return diffusers.loss(run, replace(batch, pixels=batch.pixels.roll(len(batch.rows), 0)), draws, switch)


@pytest.mark.parametrize("wrong", [wrong_beta_of(diffusers.loss), no_reference, swapped])
def test_another_step_is_told_apart(wrong: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    """What equality is asked of sees twice the beta, a reference that is the policy, and exchanged images."""

    other: Any = SimpleNamespace(prepare=diffusers.prepare, optimizer=diffusers.optimizer, loss=wrong)
    released = {"name": "diffusion_dpo", "beta": 5000.0}
    asked = Asked(recipes.diffusion_in(tiny_sd15, tmp_path, method=released, model={"tune": "lora"}), peer="diffusers")
    right = runs.build(asked.recipe(), tmp_path / "ours", Accelerator(), updates=1)
    theirs = runs.build(asked.recipe(*diffusers.own), tmp_path / "theirs", Accelerator(), updates=1, peer=other)
    apart = runs.first_gradient(theirs).beside(runs.first_gradient(right))
    with pytest.raises(ValueError, match="does not compute what it is compared with"):
        measure.require_same(measure.Entrant("wrong", lambda **_: theirs, bench.SAME), apart)


def test_a_wrong_step_is_never_timed(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "loss", wrong_beta_of(diffusers.loss))
    asked = Asked(recipes.diffusion_in(tiny_sd15, tmp_path, model={"tune": "lora"}), peer="diffusers")
    with pytest.raises(ValueError, match="diffusers does not compute"):
        bench.run(asked, tmp_path, Accelerator(), name="wrong", repeats=1, say=lambda _: None)


@pytest.mark.parametrize("name", against.names())
def test_a_peer_offers_what_is_asked_of_it(name: str) -> None:
    """Every call of `Peer`, with its arguments."""
    peer = against.find(name)
    assert peer.about and all(isinstance(assignment, str) for assignment in peer.own)
    for call, asked in inspect.getmembers(against.Peer, inspect.isfunction):
        if not call.startswith("_"):
            assert list(inspect.signature(getattr(peer, call)).parameters) == [*inspect.signature(asked).parameters][1:]


def test_peers_run_as_their_programs_do(tiny_sd15: Path, tmp_path: Path) -> None:
    """Whatever the recipe asks for itself, and which stays with its own run."""
    given = recipes.diffusion_in(tiny_sd15, tmp_path, train={"attention": "xformers", "compile": True})
    for peer in (diffusers, trl):
        theirs = load_recipe(given, peer.own[:3])
        assert (theirs.data.cache, theirs.train.attention, theirs.train.compile) == ("off", "sdpa", False)
    assert trl.own[3:] == ("train.pack='off'",)  # the decoder keeps the attention of transformers
    ours = Asked(given, peer="diffusers").recipe()
    assert (ours.data.cache, ours.train.attention, ours.train.compile) == ("auto", "xformers", True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_autoencoder_is_in_half_precision_where_the_script_has_it(
    precision: str, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """On both sides: train_diffusion_dpo.py puts it into the weights' dtype, train_diffusion_dpo_sdxl.py does not."""
    for model, expected in ((tiny_sd15, precision), (tiny_sdxl, "float32")):
        asked = Asked(recipes.diffusion_in(model, tmp_path, train={"precision": precision}), peer="diffusers")
        for found in (asked.recipe(), asked.recipe(*diffusers.own)):
            assert isinstance(found.model, ImageModel) and found.model.vae_dtype == expected


def test_both_sides_encode_in_half_precision(tiny_sd15: Path, tmp_path: Path) -> None:
    given = recipes.diffusion_in(tiny_sd15, tmp_path, model={"tune": "lora"}, train={"precision": "bfloat16"})
    asked = Asked(given, peer="diffusers")
    ours = runs.build(asked.recipe(), tmp_path / "ours", Accelerator(), updates=1)
    theirs = runs.build(asked.recipe(*diffusers.own), tmp_path / "theirs", Accelerator(), updates=1, peer=diffusers)
    assert {run.policy.family.pipeline.vae.dtype for run in (ours, theirs)} == {torch.bfloat16}


def test_a_peer_sends_its_gradients_once_an_update(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three micro-batches the first two, forward and backward, are inside of `no_sync`."""
    asked = Asked(recipes.diffusion_in(tiny_sd15, tmp_path, train={"accumulate": 3, "batch_size": 1}), peer="diffusers")
    accelerator, inside, seen = Accelerator(), [False], list[tuple[str, bool]]()
    run = runs.build(asked.recipe(*diffusers.own), tmp_path / "run", accelerator, updates=1, peer=diffusers)

    @contextlib.contextmanager
    def no_sync(model: Any) -> Iterator[None]:
        assert model is run.policy.model
        inside[0] = True
        yield
        inside[0] = False

    backward, loss = accelerator.backward, diffusers.loss

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append((name, inside[0]))
            return function(*args)

        return call

    monkeypatch.setattr(accelerator, "no_sync", no_sync)
    monkeypatch.setattr(accelerator, "backward", recorded("backward", backward))
    monkeypatch.setattr(diffusers, "loss", recorded("loss", loss))
    runs.advance(run, 1)
    assert seen == [(name, silent) for silent in (True, True, False) for name in ("loss", "backward")]


def test_programs_refuse_what_they_do_not_train(tiny_sd15: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got name: mapo"):
        diffusers.check(load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, method={"name": "mapo"})), 1)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
        diffusers.check(load_recipe(recipes.diffusion_in(tiny_sd3, tmp_path)), 1)
