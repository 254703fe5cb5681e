"""Whether another program's step is ours, proven in float32 on a few pairs where something else is to be measured.

In half precision the comparison says nothing: a difference of two errors is multiplied by beta / 2, thousands, and
bfloat16 leaves the errors themselves no more than three digits. With Diffusion-DPO's beta the gradients of one and the
same step, on latents that differ in the seventh digit, were 0.08 to 9 of their norm apart; in float32, up to 0.0004.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from mmalign.benchmark import runs
from mmalign.benchmark.against import Peer
from mmalign.config import Recipe

PAIRS = 2  # more than one, so that a sum is no mean
EXACT = {"precision": "float32", "accumulate": 1}


def apart_in_float32(
    ours: Recipe, theirs: Recipe, peer: Peer, folder: Path, accelerator: Any
) -> tuple[float, float] | None:
    """How far a peer's first loss and gradient are from ours: see `First.beside`. Networks are freed afterwards.

    Args:
        ours: the recipe to be measured.
        theirs: the same as the peer has it.
        peer: a module of `mmalign.benchmark.against`.
        folder: for the caches.
        accelerator: of all runs.

    Raises:
        ValueError: one of them cannot be built.
    """
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, recipe, step in (("ours", ours, None), ("theirs", theirs, peer)):
            batch_size = min(PAIRS, recipe.train.batch_size)
            exact = recipe.train.model_copy(update={**EXACT, "batch_size": batch_size})
            changed: dict[str, Any] = {"train": exact}
            if hasattr(recipe.model, "vae_dtype"):
                changed["model"] = recipe.model.model_copy(update={"vae_dtype": "float32"})
            made = recipe.model_copy(update=changed)
            run = runs.build(made, folder / name, accelerator, updates=1, peer=step)
            # In float16 the accelerator itself has put autocast around the network, whatever the recipe says.
            accelerator.unwrap_model(run.policy.model, keep_fp32_wrapper=False)
            found.append(runs.first_gradient(run))
            accelerator.free_memory()
            del run
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
    return found[1].beside(found[0])
