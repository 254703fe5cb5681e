"""Table of docs/one_gpu.md: peak memory of LoRA trainings of published models, by `mmalign plan`.

    python -m tests.benchmarks.cards            # all rows
    python -m tests.benchmarks.cards sdxl       # those of one model

Nothing is downloaded: models.yaml has the published sizes. A micro-batch is one pair, in bfloat16, with gradient
checkpointing and caches.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from mmalign.commands._plan_memory import estimate
from mmalign.commands.load_recipe import load_recipe
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
    """Return a model's row: GB before training and while it trains, for each kind of quantized weights."""
    about, side = MODELS[name]
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_configurations(name, Path(folder))
        for kind in KINDS:
            memory = estimate(load_recipe(recipe(Path(folder), side, kind)), None, on_card=True)
            cells += [f"{memory.preparing / 1e9:.1f} / {memory.training(1) / 1e9:.1f}"]
    size = f"{side} x {side}" if side else memory.about
    return f"| {about} | {size} | {' | '.join(cells)} |"


def main() -> None:
    """Print the rows of the models that the command line names, or of all."""
    for name in sys.argv[1:] or MODELS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
