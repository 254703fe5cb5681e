"""Heads that predict attributes of an image and its prompt from a CLIP's unit vectors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmalign.rewards._attributes import FILE, AttributeHeads, load_heads

SCALES = {"helpful": (0.0, 4.0), "safe": (-1.0, 1.0)}


def test_a_prediction_by_hand() -> None:
    """u = (1, 0), v = (0.6, 0.8): features (sqrt 2, 0, 1.2, 0), so the head is 0.7071 + 0.3 + 0.1 = 1.1071."""
    heads = AttributeHeads({"helpful": (0.0, 4.0)}, 2)
    heads.load_state_dict({"weight": torch.tensor([[0.5, 0.0, 0.25, 0.0]]), "bias": torch.tensor([0.1])})
    value = heads(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
    assert value.tolist() == [[pytest.approx(2 + 2 * 1.1071068, rel=1e-6)]]


def test_new_heads_predict_the_middle_of_a_scale() -> None:
    vectors = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert AttributeHeads(SCALES, 4)(vectors, vectors.flip(0)).tolist() == [[2.0, 0.0]] * 3


def test_the_cosine_is_one_of_the_heads() -> None:
    image, prompt = F.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), dim=2)
    heads = AttributeHeads({"cosine": (-1.0, 1.0)}, 8)
    heads.load_state_dict({"weight": torch.tensor([[0.0] * 8 + [1 / 8] * 8]), "bias": torch.zeros(1)})
    torch.testing.assert_close(heads(image, prompt)[:, 0], F.cosine_similarity(image, prompt))


def test_errors_are_in_units_of_half_a_scale() -> None:
    losses = AttributeHeads(SCALES, 2).losses(torch.tensor([[3.0, 0.5]]), torch.tensor([[1.0, torch.nan]]))
    assert losses.tolist() == [[1.0, 0.0]]


def test_heads_are_read_as_they_were_written(tmp_path: Path) -> None:
    heads = AttributeHeads(SCALES, 2)
    with torch.no_grad():
        heads.weight.add_(torch.arange(8.0).view(2, 4))
    heads.save(tmp_path)
    read = load_heads(str(tmp_path))
    assert read is not None and list(read.scales.items()) == list(SCALES.items())
    assert torch.equal(read.weight, heads.weight) and torch.equal(read.high, heads.high)
    (tmp_path / "empty").mkdir()
    assert load_heads(str(tmp_path / "empty")) is None
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"attributes\.safetensors: cannot be read"):
        load_heads(str(tmp_path))
