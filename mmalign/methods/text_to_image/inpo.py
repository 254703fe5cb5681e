"""InPO (arXiv:2503.18454): Diffusion-DPO at the noise that the model itself would make each image of.

    t as in Diffusion-DPO, one for both images of a pair
    x_t = DDIM inversion of x_0 to t                             each image separately, without guidance
    eps = (x_t - signal * x_0) / noise                           so the target is the image's own
    score, loss as in Diffusion-DPO, at (x_t, t)

As one step from x_t to x_0, a diffusion model has an implicit reward of (x_0, x_t). Inversion finds the x_t that
belongs to this x_0; fresh noise is unrelated to either image.

The release differs in three points, which `inversion: release` reproduces:

* Its grid ends up to 99 timesteps above t, while networks and target get t (at t = 2 with 6.5 times the noise).
* It first evaluates the network at timestep -99.
* Its eta makes x_t noisier than t.

The release inverts the whole batch to the first pair's t. Here every row is inverted to its own t in both modes.

`inversion: exact` ends at the exact level of t, but each step errs: `order: 1` (DDIM, Euler) as published, or
`order: 2` (Heun). With the exact scores of Gaussian latents and t of 100 or more, x_t is off the true map by 15 to 20 %
of its standard deviation with 10 steps of order 1. For as many network calls, 5 steps of order 2 are off by 1 to 3 %.
In flow matching the errors are 7 to 15 % and 1 to 6 % from t = 0.25 on. docs/methods.md has the table.

Cost of a pair, in forward passes of the denoiser on one image (a backward pass is two): 8 as Diffusion-DPO, plus 2 for
each network call of the inversion. At 10 steps of order 1 the average is 5.5 calls, so 19 in all (the release: 20.8).
The inversion has no gradient.

With `inverter: reference` and `num_cached_draws: K` a pair cycles through K draws of everything random, one per epoch.
Each draw is inverted once, before training, and x_t is cached on disk. An update then costs as much as Diffusion-DPO's.
x_t is cached in float32 and takes half as much space per draw as the pair's latents. With float16 the results would
differ from those without a cache. Near t = 0 the implied noise, divided by a level of 0.03, would be off by up to 2 %.
The reference's scores are not cached, so the reference stays in memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from mmalign.config.methods.text_to_image import InPOConfig as Config
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion import inversion
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements
from mmalign.methods._pair_memory import pair_requirements
from mmalign.methods.text_to_image import _denoising, diffusion_dpo
from mmalign.methods.text_to_image._denoising import CleanPairs, Contrast, NoisedPairs, denoising_scores
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the reference of loss or inverter, and cached inversions if `num_cached_draws` is set.

    A policy finds its own inversions easy, however broken it is, so a run is measured on the reference's, if there is
    one.
    """
    settings = cfg.model_dump(include={"caption_dropout", "inversion", "steps", "order", "eta"})
    cached = PrecomputeSpec(cfg.num_cached_draws, settings, compute=precompute) if cfg.num_cached_draws else None
    needs = pair_requirements(cfg, 0, {}, reference=cfg.inverter == "reference")
    measured_by = cfg.model_copy(update={"inverter": "reference"}) if needs.reference else None
    return replace(needs, precompute=cached, measured_by=measured_by)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: both images of every pair, inverted to the pair's t."""
    clean = _denoising.sample_clean_pairs(policy.family, batch, cfg.caption_dropout, rng)
    if batch.precomputed is not None:
        # [B, 2, C, H, W] -> [2B, C, H, W], the chosen images first
        x_t = batch.precomputed["x_t"].transpose(0, 1).flatten(0, 1)
    else:
        x_t = invert_pairs(policy, batch, clean, cfg, rng)
    # The implied noise, as the schedule's target
    eps = inversion.implied_noise(policy.family.schedule, x_t, clean.x_0, clean.t)
    view = NoisedPairs(x_t, clean.t, policy.family.schedule.target(clean.x_0, eps, clean.t), clean.cond)
    score = partial(denoising_scores, policy.family, view=view)
    return [Contrast(view, policy.on_reference(score) if cfg.uses_reference else None, batch.weights, batch.labels)]


loss = diffusion_dpo.loss


def precompute(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> dict[str, Tensor]:
    """Return x_t of both images [B, 2, C, H, W], the costly part; the implied noise follows from it."""
    clean = _denoising.sample_clean_pairs(policy.family, batch, cfg.caption_dropout, rng)
    x_t = invert_pairs(policy, batch, clean, cfg, rng)
    return {"x_t": x_t.view(2, -1, *x_t.shape[1:]).transpose(0, 1)}


def invert_pairs(
    policy: Policy[TextToImage], batch: EncodedPairs, clean: CleanPairs, cfg: Config, rng: KeyedRNG
) -> Tensor:
    """Invert the images to x_t [2B, C, H, W] with the bare network of the policy or of the reference."""
    schedule = policy.family.schedule

    # Noise [2B, C, H, W] of an inversion's step
    def fresh(number: int) -> Tensor:
        z = rng.normal(batch.rows, (2, *clean.x_0.shape[1:]), "inversion", number)
        return z.transpose(0, 1).flatten(0, 1).to(clean.x_0.device)

    def run(net: nn.Module) -> Tensor:
        def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return policy.family.predict(net, x, t, clean.cond[rows])

        if cfg.inversion == "exact":
            hops = inversion.exact(schedule, clean.t, steps=cfg.steps, eta=cfg.eta, order=cfg.order)
        else:
            hops = inversion.release(schedule, clean.t, steps=cfg.steps, eta=cfg.eta)
        with policy.gathered(net):  # processes have unequally many hops
            return inversion.invert(predict, schedule, clean.x_0, hops, fresh)

    x_t = run(policy.unwrapped) if cfg.inverter == "policy" else policy.on_reference(run)
    assert x_t is not None, "inpo needs a reference"
    return x_t
