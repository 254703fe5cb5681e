"""Hashes that tell parts of models apart by what they do, and not by where they came from or who asked last."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.data.caches import fingerprint
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion
from tests.helpers.loading import load_diffusion


@pytest.fixture
def family(tiny_sd15: Path) -> Any:
    return load_diffusion(tiny_sd15)


def test_a_copy_of_a_model_is_the_same_and_so_is_one_that_has_been_used(
    family: Any, tiny_sd15: Path, tmp_path: Path
) -> None:
    """A tokenizer remembers how it was called last, a configuration which folder it was read from."""
    of = (
        fingerprint.fingerprint_tokenizer(family),
        fingerprint.fingerprint_network(family.network),
        fingerprint.fingerprint_schedule(family.schedule),
    )
    family.encode_prompts(["a red cube"])
    family.count_truncated(["a red cube"])
    shutil.copytree(tiny_sd15, tmp_path / "copy")
    for other in (family, load_diffusion(tmp_path / "copy")):
        assert of == (
            fingerprint.fingerprint_tokenizer(other),
            fingerprint.fingerprint_network(other.network),
            fingerprint.fingerprint_schedule(other.schedule),
        )


def test_a_configuration_tells_networks_of_the_same_weights_apart(family: Any) -> None:
    before = fingerprint.fingerprint_network(family.network)
    family.network.register_to_config(norm_eps=1e-3)
    assert fingerprint.fingerprint_network(family.network) != before
    assert fingerprint.fingerprint_config(torch.nn.Linear(1, 1)) == fingerprint.fingerprint_config(
        torch.nn.Linear(2, 2)
    )


def test_schedules_are_told_apart_by_levels_prediction_and_shift() -> None:
    levels = torch.linspace(0.99, 0.01, 5)
    all_of_them = [
        Diffusion(levels, "epsilon"),
        Diffusion(levels, "v_prediction"),
        Diffusion(levels.flip(0), "epsilon"),
        Flow(),
        Flow(shift=3.0),
        Flow(num_timesteps=5),
    ]
    assert len({fingerprint.fingerprint_schedule(one) for one in all_of_them}) == len(all_of_them)
    assert fingerprint.fingerprint_schedule(Diffusion(levels.clone(), "epsilon")) == fingerprint.fingerprint_schedule(
        all_of_them[0]
    )
