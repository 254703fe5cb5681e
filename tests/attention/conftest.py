"""Attention through xformers without a GPU."""

import pytest

from mmalign.attention import BACKENDS, kernels
from tests.helpers import xformers_kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> xformers_kernel.Kernel:
    """Let a stand-in compute in place of xformers' kernels; each call of the backend is compared with the formula."""
    pytest.importorskip("xformers", reason="xformers is not installed: pip install 'mmalign[dev]'")
    if why := kernels._unusable_reason():
        pytest.skip(f"xformers cannot be used: {why}")
    result = xformers_kernel.Kernel()
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", result)
    monkeypatch.setitem(BACKENDS, "xformers", xformers_kernel.compared)
    return result
