"""Measure how much of an update's gradient is signal, for methods that learn from generated images.

    python -m tests.benchmarks.gradient_signal                                # all of the table
    python -m tests.benchmarks.gradient_signal --only dgpo flow_grpo          # some rows

Eight batches of 32 prompts are generated and judged as in training, and the untrained bundled model gets the gradient
of one update from each. Gradients of independent batches have nothing but their mean in common, so the mean of their
products over the mean of their squares is the share of a gradient's squared length that is signal. The rest is chance,
and averages out over updates no faster than over images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mmalign.commands import _bench_run
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.evaluation.statistics import Interval
from mmalign.rng import KeyedRNG
from mmalign.training.loop import make_contrasts
from tests.helpers.policies import gradient

BATCHES = 8
ALL_IMAGES = ("method.generation.prompts_per_contrast=null",)
SHARED = ("method.generation.shared_start=true",)
# Row of the table: method, and its settings
ROWS: Mapping[str, tuple[str, Sequence[str]]] = {
    "diffusion_online_dpo": ("diffusion_online_dpo", ()),
    "dgpo": ("dgpo", ALL_IMAGES),
    "dgpo, 16 prompts": ("dgpo", ["method.generation.prompts_per_contrast=16"]),
    "flow_grpo": ("flow_grpo", ALL_IMAGES),
    "flow_grpo, shared start": ("flow_grpo", [*ALL_IMAGES, *SHARED]),
    "spo": ("spo", ()),
}


def load(row: str) -> Recipe:
    """Return the recipe of a row, for as many batches of distinct prompts as are measured."""
    method, settings = ROWS[row]
    # `_bench_run` reads prompts for some updates
    batches = f"train.gradient_accumulation_steps={BATCHES // _bench_run.DISTINCT_UPDATES}"
    return load_recipe(f"configs/text_to_image/{method}_tiny_sd.yaml", [*settings, batches])


def gradients(recipe: Recipe) -> Tensor:
    """Return the gradients [BATCHES, P] of the untrained model, each of one contrast of another batch."""
    from accelerate import Accelerator

    with tempfile.TemporaryDirectory() as folder:
        run = _bench_run.build(recipe, Accelerator(), Path(folder), updates=1)
        rows = []
        for number, batch in enumerate(run.data_module.batches(0, 0)):
            contrasts = make_contrasts(run.method, run.policy, batch, recipe.method, KeyedRNG(0))
            # Another contrast of each batch: times, steps and parts of all kinds
            step = run.method.loss(run.policy, contrasts[number % len(contrasts)], recipe.method)
            rows.append(gradient(run.policy, step) / step.weights.sum())
    return torch.stack(rows)


def signal(vectors: Tensor) -> Interval:
    """Return the share of the vectors' [N, P] squared length that is that of their mean, with a jackknife interval."""
    gram = (vectors.double() @ vectors.double().T).numpy()
    number = len(gram)
    left_out = [_share(np.delete(np.delete(gram, i, 0), i, 1)) for i in range(number)]
    estimate = _share(gram)
    error = float(np.sqrt((number - 1) * np.var(left_out)))
    reach = float(stats.t.ppf(0.975, number - 1)) * error
    return Interval(estimate, estimate - reach, estimate + reach)


def _share(gram: np.ndarray) -> float:
    """Return the mean product of different vectors over the mean square, from all products [N, N]."""
    number, squares = len(gram), float(np.trace(gram))
    return (float(gram.sum()) - squares) / (number - 1) / squares


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="some of the rows")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the table."""
    print("| gradient of one update | signal, % of its squared length |")
    print("|---|---|", flush=True)
    for row in parse().only:
        print(f"| {row} | {signal(gradients(load(row))).points(signed=False)} |", flush=True)


if __name__ == "__main__":
    main()
