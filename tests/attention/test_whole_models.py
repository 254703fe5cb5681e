"""What tests on a GPU hold xformers to, on a CPU: the plain reference passes it, and wrong attention does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import BACKENDS
from mmalign.attention.backends import Mask
from tests.helpers import attention_models, first_fast

CPU = torch.device("cpu")


def hotter(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, scale: float | None = None, **more: Any) -> Tensor:
    """Wrong: logits of 1.1 times their size."""
    right = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS["sdpa"](q, k, v, mask, scale=1.1 * right, **more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", first_fast(attention_models.APART))
@pytest.mark.parametrize("name", attention_models.MODELS)
def test_a_model_says_and_learns_the_same_by_every_backend(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "hotter", hotter)
    right, wrong = attention_models.compare(name, CPU, dtype, tmp_path, ("sdpa", "dense", "hotter"))
    values, gradient = attention_models.APART[dtype]
    assert attention_models.near(right, (values, gradient)), right
    assert wrong[0] > values and wrong[1] > 2 * gradient, wrong
