"""Start-up cost of the tests."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "diffusers", "open_clip", "accelerate", "datasets", "mmalign")


def test_conftest_loads_no_heavy_library() -> None:
    """A file of tests pays only for what it imports itself."""
    code = f"import sys, tests.conftest; print([name for name in {HEAVY} if name in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
