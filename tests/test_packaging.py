"""What travels in the wheel, that it is found there, and that the files a clone is set up with agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmalign

pytestmark = pytest.mark.xdist_group("packaging")  # its fixture runs once

ROOT = Path(mmalign.__file__).parent.parent
MEGABYTE = 1 << 20

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("no checkout: the installed package is under test", allow_module_level=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout, with junk in the places where work leaves it."""
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is in the extra 'dev'")
    root = tmp_path_factory.mktemp("clone")
    for name in ("mmalign", "configs", "models", "assets", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".work", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, root / name)
    for junk in ("models/.work/sd.pt", "mmalign/__pycache__/x.pyc", "runs/a/model.safetensors", ".venv/lib/x.py"):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"junk")
    (built,) = builders.WheelBuilder(str(root)).build(directory=str(root / "dist"), versions=["standard"])
    return zipfile.ZipFile(built)


@pytest.mark.slow
def test_wheel_has_exactly_the_package_and_its_share(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"mmalign", f"mmalign-{version()}.dist-info"}
    shared = {name.split("/")[2] for name in names if name.startswith("mmalign/_share/")}
    assert shared == {folder for folder in ("configs", "models", "assets") if any((ROOT / folder).glob("*"))}
    assert "mmalign/_share/models/tiny_clip/open_clip_model.safetensors" in names
    assert "mmalign/losses/pairwise.py" in names
    scripts = {"build.py", "build_llava.py", "fit.py"}
    assert [n for n in names if ".work" in n or "pycache" in n or n.split("/")[-1] in scripts] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    largest = max(wheel.infolist(), key=lambda info: info.compress_size)
    total = sum(info.compress_size for info in wheel.infolist())
    assert total < 60 * MEGABYTE, f"{total / MEGABYTE:.0f} MB, of which {largest.filename} has {largest.compress_size}"


@pytest.mark.slow
def test_bundled_files_are_found_without_a_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = "from mmalign import resources; print(resources.resolve_model('models/tiny_clip'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=environment
    )
    assert done.stdout.strip() == str(tmp_path / "site/mmalign/_share/models/tiny_clip"), done.stderr


def version() -> str:
    return str(project()["version"])


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "constraints.txt holds NAME==VERSION lines alone"
    )
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_every_dependency_is_pinned_inside_its_range() -> None:
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    lines = (*project()["dependencies"], *extras["dev"], *extras["docs"])  # type: ignore[misc]
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        pinned = pins().get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} is in pyproject.toml and not in constraints.txt: add NAME==VERSION"
        assert requirement.specifier.contains(pinned), f"{requirement} leaves out the tested {pinned}"


def test_the_constraints_fit_any_platform() -> None:
    assert [name for name in pins() if name.startswith(("nvidia-", "cuda-")) or name == "triton"] == []


@pytest.mark.parametrize("target", ["quickstart", "check", "test", "lint", "docs", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = {
        "quickstart": "mmalign quickstart",
        "check": 'pytest -n 2 --dist loadgroup -m "not slow and not gpu"',
        "test": "pytest -n 2 --dist loadgroup",
        "lint": "/mypy ",
        "docs": "mkdocs build --strict",
        "clean": "rm -rf .venv",
    }
    assert wanted[target] in done.stdout


def test_make_refuses_an_old_python_in_a_sentence(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.9"
    # The real interpreter, made to believe that it is old.
    old.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 7\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); $2"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"mmalign needs Python >= 3.11, and {old} is 3.9; name another: make PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()
    absent = subprocess.run(["make", "test", "PYTHON=no-such-python"], cwd=tmp_path, capture_output=True, text=True)
    assert absent.returncode != 0 and "there is no 'no-such-python'" in absent.stdout
