"""Table of docs/one_gpu.md: peak memory of LoRA trainings of published models, by `mmalign plan`.

    python -m tests.benchmarks.cards            # all rows
    python -m tests.benchmarks.cards sdxl       # those of one model

Nothing is downloaded: models.yaml has the published sizes. A micro-batch is one pair, in bfloat16, with gradient
checkpointing and caches.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.commands._plan_memory import estimate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.plan import GIB, MARGIN
from tests.benchmarks import random_models

RANK = 16
MODELS = {
    "sd15": ("Stable Diffusion 1.5", 512),
    "sdxl": ("SDXL", 1024),
    "sd35_medium": ("Stable Diffusion 3.5-medium, without T5", 1024),
    "flux1_dev": ("FLUX.1-dev", 1024),
    "llava_7b": ("LLaVA-1.5-7B", 0),
    "qwen25_vl_7b": ("Qwen2.5-VL-7B", 0),
}
KINDS = (None, "int8", "nf4")
CARDS = (12, 16, 24, 48, 80)  # GiB


def recipe(folder: Path, side: int, quantize: str | None) -> dict[str, Any]:
    """Return a LoRA recipe of the model in the folder."""
    data: dict[str, Any] = {"path": "absent", "format": "trl"}
    return {
        "method": {"name": "diffusion_dpo" if side else "dpo"},
        "model": {"path": str(folder), "lora": {"rank": RANK}, "quantize": quantize},
        "data": {"path": "absent", "resolution": side} if side else data,
        "train": {"steps": 1, "lr": 1e-5, "precision": "bfloat16", "gradient_checkpointing": True},
        "output": str(folder / "output"),
    }


def row(name: str) -> str:
    """Return a model's row: GB before training and while it trains by kind of weights, and what fits each card."""
    about, side = MODELS[name]
    cells, peaks = [], dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_configurations(name, Path(folder))
        for kind in KINDS:
            memory = estimate(load_recipe(recipe(Path(folder), side, kind)), None, on_card=True)
            cells += [f"{memory.preparing / 1e9:.1f} / {memory.training(1) / 1e9:.1f}"]
            whole, apart = (
                replace(memory, example=replace(memory.example, apart=apart)).preparing for apart in (False, True)
            )
            peaks[kind or "bfloat16"] = max(whole, memory.training(1))
            if side:
                peaks[f"{kind or 'bfloat16'}, offload"] = max(apart, memory.training(1))
    order = sorted(peaks, key=lambda what: ("nf4" in what, "int8" in what, "offload" in what))
    fits = [next((what for what in order if peaks[what] <= card * GIB * (1 - MARGIN)), "-") for card in CARDS]
    size = f"{side} x {side}" if side else memory.example.about
    return f"| {about} | {size} | {' | '.join([*cells, *fits])} |"


def main() -> None:
    """Print the table, with the models that the command line names, or with all."""
    head = ["model", "example", *(kind or "bfloat16" for kind in KINDS), *(f"{card} GiB" for card in CARDS)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in sys.argv[1:] or MODELS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
