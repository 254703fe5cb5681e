"""Hashes that tell parts of models apart by what they do, and not by where they came from or who asked last."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.data.caches.fingerprint import (
    fingerprint_config,
    fingerprint_folder,
    fingerprint_network,
    fingerprint_prompt_inputs,
    fingerprint_schedule,
    fingerprint_tensors,
    fingerprint_weights,
)
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion
from tests.helpers.loading import load_diffusion


@pytest.fixture
def family(tiny_sd15: Path) -> Any:
    return load_diffusion(tiny_sd15)


def test_fingerprint_of_copied_and_used_models(family: Any, tiny_sd15: Path, tmp_path: Path) -> None:
    """A tokenizer remembers how it was called last, a configuration which folder it was read from."""
    of = (
        fingerprint_prompt_inputs(family.prompt_inputs()),
        fingerprint_network(family.network),
        fingerprint_schedule(family.schedule),
    )
    family.encode_prompts(["a red cube"])
    family.count_truncated(["a red cube"])
    shutil.copytree(tiny_sd15, tmp_path / "copy")
    for same_family in (family, load_diffusion(tmp_path / "copy")):
        assert of == (
            fingerprint_prompt_inputs(same_family.prompt_inputs()),
            fingerprint_network(same_family.network),
            fingerprint_schedule(same_family.schedule),
        )


def test_fingerprint_depends_on_the_config(family: Any) -> None:
    before, weights = fingerprint_network(family.network), fingerprint_weights(family.network)
    family.network.register_to_config(norm_eps=1e-3)
    assert fingerprint_network(family.network) != before and fingerprint_weights(family.network) == weights
    assert fingerprint_config(torch.nn.Linear(1, 1)) == fingerprint_config(torch.nn.Linear(2, 2))


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
    assert len({fingerprint_schedule(one) for one in all_of_them}) == len(all_of_them)
    assert fingerprint_schedule(Diffusion(levels.clone(), "epsilon")) == fingerprint_schedule(all_of_them[0])


def test_a_fingerprint_knows_names_shapes_dtypes_and_every_byte() -> None:
    base = {"w": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    prints = [
        fingerprint_tensors(state)
        for state in (
            base,
            {"v": base["w"], "b": base["b"]},
            base | {"w": torch.zeros(3, 2)},
            base | {"w": torch.zeros(2, 3, dtype=torch.int32)},
            base | {"w": torch.tensor([[0.0, 0, 0], [0, 0, 1e-30]])},
            base | {"w": torch.zeros(2, 3, dtype=torch.float64)},
        )
    ]
    assert len(set(prints)) == len(prints)
    half = {name: tensor.bfloat16() for name, tensor in reversed(base.items())}
    assert fingerprint_tensors(half) == fingerprint_tensors(dict(base)) == prints[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_fingerprint_covers_position_and_bits(dtype: torch.dtype) -> None:
    """Also in the last of several parts that are added up, and where a plain sum would be the same."""
    numbers = torch.arange(200_003).remainder(251).to(dtype)
    swapped, moved, signs = numbers.clone(), numbers.clone(), numbers.clone()
    swapped[[3, 200_001]] = numbers[[200_001, 3]]
    moved[200_002:].view(torch.uint8)[-1] ^= 1
    signs[[1, 200_001]] = -signs[[1, 200_001]]
    near = numbers.clone()
    near[[12, 20]] = numbers[[20, 12]]  # of one part, and in the same place of an integer
    parts = (numbers, numbers.roll(1), swapped, moved, signs, near, numbers[:-1])
    assert len({fingerprint_tensors({"w": x}) for x in parts}) == len(parts)


def test_a_fingerprint_is_of_the_numbers_and_not_of_how_they_lie() -> None:
    square = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    apart = torch.zeros(13, dtype=torch.bfloat16)
    apart[1:] = square.flatten()
    for same in (square.t().contiguous().t(), apart[1:].view(3, 4), square.clone()):
        assert torch.equal(same, square) and fingerprint_tensors({"w": same}) == fingerprint_tensors({"w": square})
    assert fingerprint_tensors({"w": square.t()}) != fingerprint_tensors({"w": square.t().reshape(3, 4)})
    assert fingerprint_tensors({"empty": torch.zeros(0)}) != fingerprint_tensors({})


def test_an_adapter_s_alpha_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    prints = list[str]()
    for alpha in (8, 8, 16):
        (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        prints.append(fingerprint_folder(str(tmp_path)))
    assert prints[0] == prints[1] != prints[2]
