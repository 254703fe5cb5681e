"""Comparison of two runs' first loss and gradient.

Half precision cannot show equality. beta / 2, thousands, multiplies a difference of two errors, of which bfloat16 has
three digits. With Diffusion-DPO's beta, on latents that differ in the seventh digit, the gradients of one step were
0.08 to 9 of their norm apart. In float32 they were up to 0.0004 apart. So baselines are compared in float32.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.commands._bench_run import Run, build
from mmalign.config import ImageModel, Recipe
from mmalign.rng import KeyedRNG
from mmalign.training import loop
from tests.benchmarks.peers import Peer, loader_batches, use_peer

MOVED = 1e-3  # standard deviation of the weights' change: a policy equal to the reference can hide errors
LIMIT = 0.01  # share of a gradient's norm: encoders round differently in a batch, and beta multiplies that
NUM_PAIRS = 2  # more than one, so that a sum differs from a mean

Apart = tuple[float, float]  # the losses' difference; the gradients', as a share of the other's norm


@dataclass(frozen=True)
class First:
    """The mean loss of a run's first batch, and its gradient by parameter, in float32 on the CPU."""

    loss: float
    gradients: list[Tensor]

    def apart(self, other: First) -> Apart | None:
        """Return the distance from another run; None if the two train different weights."""
        if [x.shape for x in self.gradients] != [x.shape for x in other.gradients]:
            return None
        apart = sum(
            float((a - b).double().square().sum()) for a, b in zip(self.gradients, other.gradients, strict=True)
        )
        norm = sum(float(b.double().square().sum()) for b in other.gradients)
        return abs(self.loss - other.loss), (apart / norm) ** 0.5 if norm else float(apart > 0)


def first_gradient(run: Run, peer: Peer | None = None) -> First:
    """Return loss and gradient of the first batch, after a small change of every weight, the same for all runs."""
    parameters, seed = run.policy.trainable(), run.recipe.train.seed
    generator = torch.Generator(run.device).manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(MOVED * torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype))
    # Unwrapped, since a distributed wrapper would wait for a backward pass.
    policy = replace(run.policy, model=run.policy.unwrapped)
    if peer is not None:
        policy.model.train()
        loss = peer.loss(replace(run, policy=policy), *next(loader_batches(run)), lambda _: None)
        run.progress.batch = 0
    else:
        batch = next(run.data_module.batches(0))
        contrasts = loop.make_contrasts(run.method, policy, batch, run.recipe.method, KeyedRNG(seed, 0))
        steps = [run.method.loss(policy, contrast, run.recipe.method) for contrast in contrasts]
        if not steps:
            raise ValueError("data: the method uses no pair of the first batch, so there is nothing to measure")
        weights = torch.cat([step.weights for step in steps])
        loss = (torch.cat([step.losses for step in steps]) * weights).sum() / weights.sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = (torch.zeros(p.shape) if g is None else g.float().cpu() for g, p in zip(gradients, parameters, strict=True))
    return First(float(loss.detach()), list(zeros))


def require_same(name: str, apart: Apart | None) -> None:
    """Refuse to time a program that computes something else.

    Raises:
        ValueError: the program's gradient is further away than `LIMIT`, or it trains other weights.
    """
    if apart is None or not apart[1] <= LIMIT:
        difference = "other weights are trained"
        if apart is not None:
            difference = f"the losses differ by {apart[0]:.2g}, the gradients by {apart[1]:.2g} of their norm"
        raise ValueError(
            f"{name} does not compute what it is compared with: {difference}; expected at most {LIMIT:g}, since times "
            "say nothing otherwise; leave it out, or report this with the recipe"
        )


def apart_in_float32(recipe: Recipe, peer_recipe: Recipe, peer: Peer, folder: Path, accelerator: Any) -> Apart | None:
    """Return the distance of a baseline's first loss and gradient from ours, on a few pairs, and free the networks.

    Raises:
        ValueError: one of the runs cannot be built.
    """
    firsts = list[First]()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, exact, step in (("mmalign", recipe, None), ("peer", peer_recipe, peer)):
            run = build(in_float32(exact), accelerator, folder / name, 1)
            run = run if step is None else use_peer(run, step)
            # With float16 the accelerator puts autocast around the network, whatever the recipe says.
            accelerator.unwrap_model(run.policy.model, keep_fp32_wrapper=False)
            firsts.append(first_gradient(run, step))
            accelerator.free_memory()
            del run
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
    return firsts[1].apart(firsts[0])


def in_float32(recipe: Recipe) -> Recipe:
    """Return the recipe in float32 with small batches."""
    train, model = recipe.train, recipe.model
    exact = {"precision": "float32", "gradient_accumulation_steps": 1, "batch_size": min(NUM_PAIRS, train.batch_size)}
    if isinstance(model, ImageModel):
        model = model.model_copy(update={"vae_dtype": "float32"})
    return recipe.model_copy(update={"train": train.model_copy(update=exact), "model": model})
