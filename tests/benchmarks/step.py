"""The benchmark of docs/performance.md: every way to train, on two models. Not a test, but run by hand:

    python -m tests.benchmarks.step --json step.json
    python -m tests.benchmarks.step --from step.json --markdown docs/performance.md

`mmalign bench` measures (mmalign/benchmark); here is what it is asked for. One of the ways no recipe asks for: LoRA
with a frozen copy of the network as its reference, to show what that would cost.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from mmalign import assemble
from mmalign.assemble import DTYPES
from mmalign.benchmark import runs, tables
from mmalign.benchmark.cases import Content, draw_image_pairs, write_case
from mmalign.benchmark.measure import Entrant, Measured, measure
from mmalign.benchmark.meters import machine, peak_rate
from mmalign.benchmark.tables import Comparison, Report, read_report
from mmalign.policy import FrozenCopy
from mmalign.recipe import load_recipe
from mmalign.share import resolve_model


@dataclass(frozen=True)
class Variant:
    """A way to train, as overrides of a recipe. `copied`: with a frozen copy as reference, whatever the recipe says."""

    name: str
    overrides: tuple[str, ...]
    copied: bool = False


OFF = "data.cache='off'"
LORA = Variant("LoRA, adapters off", ())
LORA_COPY = Variant("LoRA, frozen copy", (), copied=True)
LORA_UNCACHED = Variant("LoRA, adapters off, no caches", (OFF,))
FULL = Variant("full, frozen copy", ("model.tune=full",))
FULL_UNCACHED = Variant("full, frozen copy, no caches", ("model.tune=full", OFF))
MAPO = Variant("full, mapo (no reference)", ("model.tune=full", "method.name=mapo"))
VARIANTS = (LORA, LORA_COPY, LORA_UNCACHED, FULL, FULL_UNCACHED, MAPO)

COMPARISONS = [  # one against the other, and what follows from what they compute
    Comparison(LORA_COPY.name, LORA.name, "the same operations; one network more in memory"),
    Comparison(
        LORA_UNCACHED.name,
        LORA.name,
        "autoencoder and text encoder run for every batch; their weights are in memory either way, pixels come on top",
    ),
    Comparison(FULL_UNCACHED.name, FULL.name, "likewise, beside a dearer step"),
    Comparison(MAPO.name, FULL.name, "one forward pass less, one network less"),
    Comparison(
        FULL.name, LORA.name, "gradients of all weights; in memory the copy, these gradients, and Adam's two moments"
    ),
]


def build(variant: Variant, content: Content, accelerator: Any, folder: Path, updates: int) -> runs.Run:
    """A variant of a recipe in memory."""
    recipe = load_recipe(content, variant.overrides)
    run = runs.build(recipe, folder, accelerator, updates=updates)
    if variant.copied:
        another = assemble.load_model(recipe, accelerator.device)
        run = replace(run, policy=replace(run.policy, reference=FrozenCopy(another.network)))
    return run


def measure_variants(content: Content, folder: Path, *, repeats: int, say: Callable[[str], None]) -> list[Measured]:
    """Every variant of a recipe."""
    accelerator = Accelerator()
    entrants = [Entrant(variant.name, partial(build, variant, content, accelerator)) for variant in VARIANTS]
    return measure(entrants, folder, repeats=repeats, device=accelerator.device, say=say)


def tiny(folder: Path) -> Content:
    """The bundled model on pairs of the bundled world."""
    draw_image_pairs(folder / "pairs.parquet", 64)
    return {
        "method": {"name": "diffusion_dpo"},
        "model": {"path": resolve_model("models/tiny_sd")},
        "data": {"path": str(folder / "pairs.parquet"), "resolution": 64},
        "train": {"steps": 1, "batch_size": 16, "lr": 1e-5},
        "output": str(folder / "output"),
    }


def measure_all(repeats: int) -> Report:
    """The bundled model, and a larger one."""
    say = Console(stderr=True, highlight=False).print
    measured, accelerator = dict[str, list[Measured]](), Accelerator()
    half = "bfloat16" if accelerator.device.type == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {
            "tiny_sd": tiny(folder / "tiny"),
            "middle-sized, random weights": write_case("sd_middle", folder / "middle", accelerator.device),
        }
        for name, content in models.items():
            content["train"]["precision"] = half
            size, batch = content["data"]["resolution"], content["train"]["batch_size"]
            title = f"{name}: {size} px, batches of {batch} pairs"
            measured[title] = measure_variants(content, folder / f"runs of {name}", repeats=repeats, say=say)
    return Report(machine(), measured, COMPARISONS, peak_rate(accelerator.device, DTYPES[half]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or take what was measured; show it, and write it where one asks."""
    parser = argparse.ArgumentParser(description="What a training step costs.")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument(
        "--from", type=Path, dest="source", help="measure nothing; take the numbers of an earlier --json"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables into this document, between its two markers")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    report = read_report(options.source) if options.source else measure_all(options.repeats)
    tables.show(report)
    if options.json:
        tables.write_report(report, options.json)
    if options.markdown:
        tables.write_markdown(report, options.markdown)


if __name__ == "__main__":
    main()
