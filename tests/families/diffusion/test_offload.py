"""Offloading: each stage has its own networks on the device, and images are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from mmalign.commands._plan_memory import estimate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.preflight import check
from mmalign.commands.train import train
from mmalign.config import SamplingConfig
from mmalign.families.diffusion.offload import stages
from mmalign.families.loading import load_family
from mmalign.families.types import Loading
from tests.helpers import recipes
from tests.helpers.loading import load_diffusion

SAMPLING = SamplingConfig(steps=1, guidance=2.0)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Record where networks are told to go, by id, and leave them on the CPU."""
    known = dict[int, str]()

    def to(self: nn.Module, *args: Any, **_: Any) -> nn.Module:
        known[id(self)] = torch.device(args[0]).type
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return known


def test_a_stage_has_its_networks_alone(
    tiny_sdxl: Path, devices: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_diffusion(tiny_sdxl).sample(load_diffusion(tiny_sdxl).network, ["a fox"], [0], SAMPLING)
    family: Any = load_family(str(tiny_sdxl), Loading(torch.device("cuda"), offload=True))
    monkeypatch.setattr(type(family.loading), "autocast", lambda _: torch.no_grad())
    parts, seen = dict(family.encoders()) | {"unet": family.network}, dict[str, set[str]]()
    devices.clear()

    def recorded(name: str, own: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            seen[name] = {other for other, net in parts.items() if devices[id(net)] == "cuda"}
            return own(*args, **options)

        return run

    for name, part in parts.items():
        method = "decode" if name == "vae" else "forward"
        monkeypatch.setattr(part, method, recorded(name, getattr(part, method)))
    (image,) = family.sample(family.network, ["a fox"], [0], SAMPLING)
    encoders = {"vae", "text_encoder", "text_encoder_2"}
    assert seen == {"text_encoder": encoders, "text_encoder_2": encoders, "unet": {"unet", "vae"}, "vae": {"vae"}}
    assert set(devices.values()) == {"cpu"}  # back where they were loaded
    assert image.tobytes() == wanted[0].tobytes()


def test_networks_return_after_an_error(devices: dict[int, str]) -> None:
    nets = [nn.Linear(1, 1), nn.Linear(1, 1)]
    with pytest.raises(RuntimeError), stages(nets, torch.device("cuda")) as stage:
        stage(nets[0])
        assert [devices[id(net)] for net in nets] == ["cuda", "cpu"]
        raise RuntimeError
    assert set(devices.values()) == {"cpu"}


def test_encoders_that_left_the_device_do_not_lead_the_pipeline(
    tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As during a training with caches: the pipeline would take the first encoder's device for its own."""
    family: Any = load_diffusion(tiny_sd15)
    given = family.pipeline_kwargs(["a fox"], SAMPLING)
    monkeypatch.setattr(type(family), "pipeline_kwargs", lambda *_: given)
    family.pipeline.vae.to("meta")
    family.pipeline.text_encoder.to("meta")
    called = list[Any]()

    def call(self: Any, **options: Any) -> Any:
        called.append((self.device, self.vae, self.text_encoder, options["latents"].device))
        raise InterruptedError

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    with pytest.raises(InterruptedError):
        family.sample(family.network, ["a fox"], [0], SAMPLING)
    assert called == [(torch.device("cpu"), None, None, torch.device("cpu"))]
    assert family.pipeline.vae is not None


@pytest.mark.slow
def test_a_training_places_what_it_encodes_with(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = list[list[str]]()
    content = recipes.diffusion_in(tiny_sd15, tmp_path, model={"offload": True}, train={"steps": 1})
    recipe = load_recipe(content)
    monkeypatch.setattr(
        "mmalign.families.diffusion.pipeline.place",
        lambda _, used, device: placed.append([type(net).__name__ for net in used]),
    )
    train(recipe)
    assert placed == [["CLIPTextModel"], ["AutoencoderKL"], ["UNet2DConditionModel"]]
    # And the plan has one network at a time before training
    together = estimate(load_recipe(content, ["model.offload=false"]), None, on_card=True)
    apart = estimate(recipe, None, on_card=True)
    assert together.preparing - apart.preparing == sum(apart.networks.values()) - max(apart.networks.values())
    assert "model.offload=true" in together.example.remedies and "model.offload=true" not in apart.example.remedies


def test_sharding_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    content = recipes.diffusion_in(tiny_sd15, tmp_path, model={"offload": True}, train={"sharding": "fsdp2"})
    with pytest.raises(ValueError, match=r"model\.offload: .*train\.sharding"):
        check(load_recipe(content), "training")
