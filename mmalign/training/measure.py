"""Measurements of single pairs under fixed random numbers, for a checkpoint's score and a run's verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from mmalign.config import MethodConfig
from mmalign.data.data_module import DataModule
from mmalign.rng import KeyedRNG
from mmalign.training import loop
from mmalign.training.run import MAX_VALIDATION_BATCHES, TrainingRun

NUM_PAIRS = 64  # training pairs of a verdict, at least

Values = dict[str, list[float]]  # metric -> a value for each pair


def measure_held_out(run: TrainingRun, config: MethodConfig, data_module: DataModule, seed: int) -> Values:
    """Return the metrics of the first validation pairs; empty without a validation split."""
    return _measure(run, config, islice(data_module.validation_batches(), MAX_VALIDATION_BATCHES), seed)


def measure_training(
    run: TrainingRun, config: MethodConfig, data_module: DataModule, seed: int, num_batches: int
) -> Values:
    """Return the metrics of the pairs in the first training batches of all processes."""
    from accelerate.utils import gather_object

    shares = gather_object([_measure(run, config, islice(data_module.batches(0), num_batches), seed)])
    return {name: [value for share in shares for value in share.get(name, ())] for name in shares[0]}


@torch.no_grad()
def _measure(run: TrainingRun, config: MethodConfig, batches: Iterable[Any], seed: int) -> Values:
    """Return all metrics of pairs of nonzero weight, in eval mode, by settings and a reference that stay."""
    values, bare = Values(), replace(run.policy.against_base(), model=run.policy.unwrapped)
    config = run.method.requirements(config).measured_by or config
    for batch in batches:
        # The draws of epoch 0 in every measurement, so that a difference is the model's
        for contrast in loop.make_contrasts(run.method, bare, batch, config, KeyedRNG(seed)):
            # Making contrasts has left it in train mode
            bare.model.eval()
            step = run.method.loss(bare, contrast, config)
            for name, metric in {**step.metrics, "loss": step.losses}.items():
                values.setdefault(name, []).extend(metric[step.weights > 0].tolist())
            for name, metric in step.summary.items():
                values.setdefault(name, []).extend(metric.tolist())
    return values
