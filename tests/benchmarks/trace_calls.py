"""Functions that one update calls: a measure of how much code a reader meets.

python -m tests.benchmarks.trace_calls             # a Diffusion-DPO batch, and a batch of BDHS online with one try
python -m tests.benchmarks.trace_calls --list      # each function, with its number of calls
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mmalign
from mmalign.commands import _bench_run
from mmalign.commands.load_recipe import load_recipe

PACKAGE = Path(mmalign.__file__).parent
ONE_PAIR = ["train.batch_size=1", "train.gradient_accumulation_steps=1"]
CASES = {
    "Diffusion-DPO batch": ("configs/text_to_image/diffusion_dpo_tiny_sd.yaml", []),
    "BDHS online try": (
        "configs/vision_language/quickstart.yaml",
        [
            "method.mode=online",
            "method.online.tries=1",
            "method.online.max_new_tokens=8",
            "method.online.similarity=trigrams",
            "method.online.batch_size=1",
        ],
    ),
}
ANONYMOUS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<module>")


@contextmanager
def traced() -> Iterator[Counter[CodeType]]:
    """Count the calls of the package's own functions; comprehensions do not count."""
    calls: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name not in ANONYMOUS and Path(code.co_filename).is_relative_to(PACKAGE):
            calls[code] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def trace_update(source: str, overrides: Sequence[str]) -> Counter[CodeType]:
    """Trace one update of a recipe with one pair a batch, after its caches are filled and a first update is made."""
    from accelerate import Accelerator

    recipe = load_recipe(source, [*ONE_PAIR, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        run = _bench_run.build(recipe, Accelerator(), Path(folder), updates=2)
        _bench_run.train_updates(run, 1, None)
        with traced() as calls:
            _bench_run.train_updates(run, 1, None)
    own = {"_bench_run.py", "_bench_meters.py"}
    return Counter({code: number for code, number in calls.items() if Path(code.co_filename).name not in own})


def summarize(calls: Counter[CodeType]) -> dict[str, int]:
    """Return the number of calls, of functions, of files, and of these files' lines."""
    files = {Path(code.co_filename) for code in calls}
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return {"calls": calls.total(), "functions": len(calls), "files": len(files), "lines": lines}


def main(arguments: Sequence[str] | None = None, write: Callable[[str], None] = print) -> None:
    """Trace every case and print its numbers."""
    parser = argparse.ArgumentParser(description="Count the functions that one update calls.")
    parser.add_argument("--list", action="store_true", help="each function, with its number of calls")
    options = parser.parse_args(arguments)
    for name, (source, overrides) in CASES.items():
        calls = trace_update(source, overrides)
        write(f"{name}: " + ", ".join(f"{number:,} {kind}" for kind, number in summarize(calls).items()))
        if options.list:
            for code, number in calls.most_common():
                file = Path(code.co_filename).relative_to(PACKAGE)
                write(f"  {number:5} {file}:{code.co_firstlineno} {code.co_qualname}")


if __name__ == "__main__":
    main()
