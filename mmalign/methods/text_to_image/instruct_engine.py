"""InstructEngine (arXiv:2504.10329), cross-validation alignment: two images and two prompts, each judged by the other.

    one t and eps for the image x1 of the prompt y1 and the image x2 of the prompt y2, as in Diffusion-DPO
    score(x, y) = -1/2 mean((target - network(x_t, t, y)) ** 2)   for policy and reference
    loss = sum of weight * pair loss of   x1: y1 over y2     x2: y2 over y1     y1: x1 over x2     y2: x2 over x1

Each comparison is a Diffusion-DPO loss. The last two compare images, as usual; the first two fix the image and compare
prompts. No code is published. We could not verify the paper's comparisons ("triples" of two pairs), their weights, beta
or the learning rate. All four comparisons with weight 1/4 each are our choice; beta is Diffusion-DPO's. There is no
caption dropout: without prompts the first two comparisons compare an item with itself, and the last two contradict
each other.

Data: rows in which the chosen image shows `prompt` and the rejected image shows `rejected_prompt`. Both are good images
of their own prompts. 4B rows in one run of the network, twice as many as in Diffusion-DPO; `num_cached_draws` works as
there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from mmalign.config.methods.text_to_image import InstructEngineConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step, reference_scores
from mmalign.methods._pair_loss import pair_of, preference_metrics, view_losses, with_own_loss
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.text_to_image._denoising import (
    Contrast,
    NoisedPairs,
    denoising_scores,
    noise_pairs,
    pair_conditioning,
)
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

GRID = ("x1 y1", "x2 y1", "x1 y2", "x2 y2")
COMPARED = (("x1 y1", "x1 y2"), ("x2 y2", "x2 y1"), ("x1 y1", "x2 y1"), ("x2 y2", "x1 y2"))  # better, worse
SIDES = {"matched": ("x1 y1", "x2 y2"), "mismatched": ("x1 y2", "x2 y1")}


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: a prompt for each image, and the reference of the loss or its cached scores."""
    return replace(pair_requirements(cfg, cfg.num_cached_draws, {}), labels=("weight",), prompt_pairs=True)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: both images of every pair, under one noise, with each of the two prompts."""
    family = policy.family
    assert batch.rejected_text is not None, "instruct_engine needs two prompts"
    first = noise_pairs(family, batch, 0.0, rng)
    second = replace(first, cond=pair_conditioning(family, batch, batch.rejected_text, 0.0, rng))
    view = NoisedPairs.cat([first, second])
    scores = reference_scores(policy, batch, partial(denoising_scores, family, view=view, views=GRID))
    return [Contrast(view, scores, batch.weights, batch.labels)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the weighted sum of the four pair losses."""
    reference_scores, labels, cfg = contrast.reference, contrast.labels, present(cfg, policy.memory)
    policy_scores = denoising_scores(policy.family, policy.model, contrast.view, GRID)
    # Weighted pair losses of the four comparisons; both images fit their own prompts
    compared = [pair_of(policy_scores, reference_scores, *views) for views in COMPARED]
    weights = torch.tensor(cfg.weights, device=contrast.weights.device)[:, None]
    values = (weights * torch.stack([view_losses(cfg, labels, *pair) for pair in compared])).sum(0)
    with torch.no_grad():
        # Metrics: weighted over the comparisons, by side, and by kind of comparison
        share = weights / weights.sum()
        of_logits = preference_metrics(
            torch.stack([cfg.beta * (policy.margin - reference.margin) for policy, reference in compared])
        )
        names = ("accuracy",) if reference_scores is None else tuple(of_logits)
        metrics = {"loss": values.detach(), **{name: (share * of_logits[name]).sum(0) for name in names}}
        for side, views in SIDES.items():
            metrics[f"{side} error"] = -torch.stack([2 * policy_scores[view] for view in views]).mean(0)
            if reference_scores is not None:
                gains = [policy_scores[view] - reference_scores[view] for view in views]
                metrics[f"{side} gain"] = torch.stack(gains).mean(0)
        right = of_logits["accuracy"]
        metrics |= {"prompt accuracy": right[:2].mean(0), "image accuracy": right[2:].mean(0)}
    errors = -policy_scores["x1 y1"] - policy_scores["x2 y2"]  # the mean of both images under their own prompts
    return with_own_loss(Step(values, contrast.weights, metrics), "sft", cfg.sft + cfg.likelihood, errors, labels)
