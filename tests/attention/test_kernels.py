"""Whether xformers can serve, and the sentence that says why not; a small package stands in for every broken one."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmalign.attention import choice, decoders, kernels
from mmalign.attention.choice import SelectedBackend, check, select_backend
from tests.helpers.vlm_models import BUILDERS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HEADS = frozenset({64})
INVALID = "class xFormersInvalidLibException(Exception):\n    build_info = None\n"
WHOLE = {
    "__init__.py": "__version__ = '0.0.35'",
    "ops/__init__.py": "from xformers.ops.fmha import memory_efficient_attention",
    "ops/fmha/__init__.py": "from xformers.ops.fmha import cutlass, flash\ndef memory_efficient_attention(): ...",
    "ops/fmha/common.py": "_built_with_cuda = True",
    "_cpp_lib.py": f"{INVALID}_cpp_library_load_exception = None",
    "ops/fmha/flash.py": "class FwOp:\n    is_available = staticmethod(lambda: True)",
    "ops/fmha/cutlass.py": "class FwOp:\n    is_available = staticmethod(lambda: True)",
}
NO_KERNELS = {  # neither of its own, nor of PyTorch
    "ops/fmha/common.py": "_built_with_cuda = False",
    "ops/fmha/flash.py": "class FwOp:\n    is_available = staticmethod(lambda: False)",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Writes a package xformers of the given files, which is then the one that is found."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "xformers"]

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            (tmp_path / "xformers" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "xformers" / name).write_text(content)

    own = {name: sys.modules.pop(name) for name in loaded()}
    kernels._unusable_reason.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(own)
    kernels._unusable_reason.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "why"),
    [
        (CPU, torch.float32, {64}, "it has no kernels for a CPU"),
        (CUDA, torch.float64, {64}, "it has no kernels for float64"),
        (CUDA, torch.bfloat16, {64, 7}, "the model's head dimension is 7; it supports multiples of 8 up to"),
        (CUDA, torch.bfloat16, {64, 264}, "the model's head dimension is 264"),
    ],
)
def test_what_no_kernel_is_for_is_named(device: torch.device, dtype: torch.dtype, heads: set[int], why: str) -> None:
    assert kernels.unsupported_reason(device, dtype, frozenset(heads)).startswith(why)
    assert select_backend("auto", device, dtype, frozenset(heads)).backend == "sdpa"
    with pytest.raises(ValueError, match=f"^train.attention: xformers .*: {why}.*; use auto or sdpa$"):
        select_backend("xformers", device, dtype, frozenset(heads))


def test_a_package_that_is_whole_is_used(package: Callable[[dict[str, str]], None]) -> None:
    package(WHOLE)
    assert kernels.platform_unsupported_reason(CUDA, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (
            {"ops/__init__.py": "raise OSError('no libcudart.so.12')"},
            "it cannot be imported (OSError: no lib",
        ),
        ({"ops/__init__.py": "1 / 0"}, "it cannot be imported (ZeroDivisionError: "),
        ({"__init__.py": "raise ImportError('needs PyTorch 1.13')"}, "it cannot be imported (ImportError: needs"),
        ({"__init__.py": "__version__ = '0.0.28.post3'"}, "xformers 0.0.28.post3 is installed, expected xformers>=0"),
        ({"__init__.py": "__version__ = '0.0.36'"}, "xformers 0.0.36 is installed, expected xformers>=0.0.35,<0.0.36"),
        (
            {**NO_KERNELS, "_cpp_lib.py": f"{INVALID}_cpp_library_load_exception = RuntimeError('not built')"},
            f"xformers 0.0.35 has no compiled part, and PyTorch {torch.__version__} (CUDA ",
        ),
        (
            {
                **NO_KERNELS,
                "_cpp_lib.py": "class info: torch_version = '2.10.0+cu128'\n"
                f"{INVALID}    build_info = info\n_cpp_library_load_exception = xFormersInvalidLibException()",
            },
            "xformers 0.0.35 is built for PyTorch 2.10.0+cu128, and PyTorch",
        ),
    ],
)
def test_a_broken_package_is_named(
    package: Callable[[dict[str, str]], None], changed: dict[str, str], why: str
) -> None:
    package({**WHOLE, **changed})
    assert kernels.platform_unsupported_reason(CUDA, torch.bfloat16).startswith(why)
    with pytest.raises(ValueError, match=r"^train.attention: xformers"):
        check("xformers", CUDA, torch.bfloat16)
    check("auto", CUDA, torch.bfloat16)
    check("sdpa", CUDA, torch.bfloat16)
    assert why in str(select_backend("auto", CUDA, torch.bfloat16, HEADS))


def test_a_package_that_cannot_be_imported_is_hidden_from_diffusers(
    package: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    """diffusers looks for it as here, then imports it, and would fail with its error in any text-to-image run."""
    from diffusers.utils.import_utils import _is_package_available

    package({**WHOLE, "ops/__init__.py": "raise OSError('no libcudart.so.12')"})
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info/METADATA").write_text("Name: xformers\nVersion: 0.0.35\n")
    assert _is_package_available("xformers") == (True, "0.0.35")
    check("sdpa", CPU, torch.float32)
    assert not _is_package_available("xformers")[0]


LOADING = """
import logging, torch, sys
for name in ("torch.utils._pytree", "torchao", "bitsandbytes", "transformers", "diffusers"):  # about other packages
    logging.getLogger(name).setLevel("ERROR")
from mmalign.attention.choice import check
check("auto", torch.device("cpu"), torch.float32)
from diffusers import UNet2DConditionModel
print([name for name in sys.modules if name == "xformers.ops"])
"""


@pytest.mark.slow
def test_diffusers_loads_the_real_package_without_a_warning() -> None:
    """On a CPU its compiled part does not fit, and it would advise on each command to install it again."""
    pytest.importorskip("xformers", reason="xformers is not installed: pip install 'mmalign[dev]'")
    environment = {**os.environ, "DIFFUSERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "['xformers.ops']\n")


def test_the_real_package_can_be_used_beside_any_cuda() -> None:
    """A compiled part that does not load makes no difference: only mask classes and PyTorch's kernels are called."""
    pytest.importorskip("xformers", reason="xformers is not installed: pip install 'mmalign[dev]'")
    assert kernels.platform_unsupported_reason(CUDA, torch.bfloat16) is None
    assert kernels.platform_unsupported_reason(CPU, torch.bfloat16) == "it has no kernels for a CPU"


def test_supported_versions_are_those_of_the_extra() -> None:
    """The tests run on one of them."""
    ranges = [line for line in requires("mmalign") or () if line.startswith("xformers")]
    assert ranges and all(Requirement(line).specifier == SpecifierSet(kernels.SUPPORTED) for line in ranges)


def test_a_model_that_states_no_head_size_is_not_tried() -> None:
    assert select_backend("auto", CUDA, torch.bfloat16, frozenset()).backend == "sdpa"


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._unusable_reason.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        kernels.platform_unsupported_reason(CUDA, torch.float16) == "it is not installed (pip install 'mmalign[cuda]')"
    )
    kernels._unusable_reason.cache_clear()


def test_a_flag_that_another_cuda_has_left_wrong_is_mended(package: Callable[[dict[str, str]], None]) -> None:
    package({**WHOLE, "ops/fmha/common.py": "_built_with_cuda = False"})
    assert kernels.platform_unsupported_reason(CUDA, torch.bfloat16) is None
    assert sys.modules["xformers.ops.fmha.common"].__dict__["_built_with_cuda"] is True


@pytest.mark.parametrize(("cuda", "loads"), [("13.0", True), ("12.8", False), (None, False)])
def test_the_runtime_of_cuda_12_is_loaded_beside_a_newer_one(
    package: Callable[[dict[str, str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    loads: bool,
) -> None:
    package(WHOLE)
    file = tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12"
    file.parent.mkdir(parents=True)
    file.touch()
    loaded: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded.append((name, mode)))
    assert kernels.platform_unsupported_reason(CUDA, torch.bfloat16) is None
    assert loaded == ([(str(file), ctypes.RTLD_GLOBAL)] if loads else [])


def test_an_operator_that_fails_is_named(
    package: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package(WHOLE)
    kernels._failure_reason.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *shape, **more: broken())
    assert (
        kernels.unsupported_reason(CUDA, torch.bfloat16, HEADS) == "a trial run failed (RuntimeError: no kernel image)"
    )
    kernels._failure_reason.cache_clear()


def broken() -> None:
    raise RuntimeError("no kernel image\nand a page of advice")


def test_what_is_chosen_is_said() -> None:
    assert str(select_backend("sdpa", CUDA, torch.float64, frozenset({7}))) == "attention: sdpa"
    assert str(SelectedBackend("xformers")) == "attention: xformers"
    on_cpu = select_backend("auto", CPU, torch.float32, HEADS)
    assert str(on_cpu) == "attention: sdpa, since xformers is not supported: it has no kernels for a CPU"


def test_unsupported_model_gets_sdpa_and_no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention would fail in the first update, on a device where everything else is well."""
    monkeypatch.setattr(choice, "unsupported_reason", lambda *_: None)
    decoder = BUILDERS["llava"]()[0].get_decoder()
    assert decoders.xformers_unsupported_reason(decoder) is None
    assert (
        select_backend("auto", CUDA, torch.bfloat16, HEADS, decoders.xformers_unsupported_reason(decoder)).backend
        == "xformers"
    )
    decoder.config.attn_logit_softcapping = 50.0
    why = decoders.xformers_unsupported_reason(decoder)
    assert (
        select_backend("auto", CUDA, torch.bfloat16, HEADS, why) == SelectedBackend("sdpa", why) and "soft cap" in why
    )
    with pytest.raises(ValueError, match=why):
        select_backend("xformers", CUDA, torch.bfloat16, HEADS, why)
