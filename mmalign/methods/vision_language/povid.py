"""POVID (arXiv:2402.11411): prefer the chosen response to an altered one, and to what a noisy image makes of it.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                      noise in the image, t = 500 of 1000
    n_t = argmax_v p(v | x_t, prompt, y_<t)                            the policy's noisy tokens, on the chosen history
    score(noisy) = sum_t log p(n_t | x_0, prompt, y_<t)                by policy and reference, on the clean image
    loss = gamma * -log sigma(beta * (chosen against rejected))
           + (1 - gamma) * -log sigma(beta * (chosen against noisy))

Nothing is generated. At a token that noise does not change, the chosen and noisy scores cancel, so only tokens that
depend on the image contribute. This is the paper's second stage, which starts from the first; the first stage is `dpo`
on the same pairs.

The options reproduce the paper or the release:

* The released code averages two losses, as above. `combine: paper` is the paper's single sigmoid over a weighted sum,
  -log sigma(beta * (chosen against the weighted mean of rejected and noisy)). Footnote 1 of arXiv:2407.02477 describes
  both.
* In the release each network scores its own noisy tokens, so the ratio compares two different texts: `tokens: own`. By
  default both networks score the policy's tokens, the hallucinations of the model as it is now. `tokens: reference`
  takes the reference's, which never change and equal the policy's at first.
* The release's noisy pixels wrap around: `overflow: wrap`.

With `tokens: reference` and `num_cached_draws: K` a pair cycles through K noises, one per epoch. Tokens and reference
scores are precomputed once and cached on disk, and an update costs as much as DPO's. A policy's tokens cannot be
cached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmalign.config.methods.vision_language import POVIDConfig as Config
from mmalign.data.augment import diffuse_image
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.losses.pairwise import Pair
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import pair_losses, pair_of
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.vision_language._images import with_changed_images
from mmalign.methods.vision_language._responses import losses_against, response_step, view_scores
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

TOKENS = "noisy tokens"  # the only precomputed tensor that is not a score


@dataclass(frozen=True)
class Contrast:
    """The pairs, the noisy tokens [B, R] that the policy scores, and the reference's scores, if the loss has one."""

    batch: EncodedResponses
    noisy: Tensor
    reference: Scores | None


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: decoded images, the vision tower unless cached, and a reference or its cache.

    The reference is that of the loss, or the one whose noisy tokens are scored.
    """
    settings = {"mean": cfg.mean, "noise_step": cfg.noise_step, "overflow": cfg.overflow}
    compares_tokens = cfg.tokens == "reference"
    return replace(
        pair_requirements(cfg, cfg.num_cached_draws, settings, reference=compares_tokens, compute=precompute),
        decoded_images=True,
        vision_tower=not cfg.num_cached_draws,  # for noisy images, unless their tokens are cached
    )


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the pairs, with the likeliest tokens under a noisy image."""
    if batch.precomputed is not None:
        # Scores, beside the noisy tokens
        precomputed = dict(batch.precomputed)
        return [Contrast(batch, _fitted(precomputed.pop(TOKENS), batch), precomputed)]
    family, mean = policy.family, cfg.mean

    def with_noise(picture: Image.Image, row: int, place: int) -> Image.Image:
        eps = rng.normal([row], (picture.height, picture.width, 3), "picture noise", place)[0]
        return diffuse_image(picture, eps, cfg.noise_step, overflow=cfg.overflow)

    # Likeliest tokens under noise: those that the reference scores, and those that the policy scores
    tokens, features = with_changed_images(family, batch, with_noise)
    argmax = partial(family.argmax, tokens=tokens, features=features)
    reference_tokens = None if cfg.tokens == "policy" else policy.on_reference(argmax)
    noisy_tokens = reference_tokens if cfg.tokens == "reference" else argmax(policy.unwrapped)
    assert noisy_tokens is not None, "tokens of the reference need one"
    if reference_tokens is None:
        reference_tokens = noisy_tokens
    scores = policy.on_reference(partial(noisy_scores, family, batch=batch, noisy=reference_tokens, mean=mean))
    return [Contrast(batch, noisy_tokens, scores)]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the loss of chosen against rejected and of chosen against noisy."""
    cfg = present(cfg, policy.memory)
    batch, reference_scores = contrast.batch, contrast.reference
    policy_scores = noisy_scores(policy.family, policy.model, batch, contrast.noisy, mean=cfg.mean)
    if cfg.combine == "paper":
        # For policy and reference alike, a pair whose worse side is the weighted mean
        worse, noisy = (pair_of(policy_scores, reference_scores, "chosen", view) for view in ("rejected", "noisy"))
        mixed = (
            Pair(one.chosen, cfg.gamma * one.rejected + (1 - cfg.gamma) * other.rejected)
            for one, other in zip(worse, noisy, strict=True)
        )
        terms = {"mixed loss": pair_losses(cfg, batch.labels, *mixed)}
    else:
        text, blind = losses_against(cfg, policy_scores, reference_scores, batch, "noisy")
        terms = {"text loss": cfg.gamma * text, "noisy loss": (1 - cfg.gamma) * blind}
    step = response_step(cfg, policy_scores, reference_scores, batch, terms)
    return replace(step, metrics={**step.metrics, "noisy share": _share_changed(batch, contrast.noisy)})


def precompute(
    policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG
) -> dict[str, Tensor]:
    """Return the noisy tokens [B, R] and the reference's scores."""
    (contrast,) = contrasts(policy, batch, cfg, rng)
    assert contrast.reference is not None, "only the scores of a reference can be precomputed"
    return {TOKENS: contrast.noisy, **contrast.reference}


def noisy_scores(
    family: VisionLanguage, net: nn.Module, batch: EncodedResponses, noisy: Tensor, *, mean: bool = False
) -> Scores:
    """Return log-probabilities [B] of the chosen and rejected responses, and of `noisy` [B, R] on the chosen history.

    The network runs once: the noisy tokens are scored from the hidden states of the chosen responses.
    """
    response_ids, mask, half = batch.tokens.responses, batch.tokens.response_mask, len(batch.rows)
    padded = F.pad(noisy, (0, response_ids.shape[1] - noisy.shape[1]))  # the rejected responses may be longer
    # Two targets for a token [2B, R, 2]: the written one, and for the chosen rows the noisy one
    targets = torch.stack([response_ids, torch.cat([padded, response_ids[half:]])], -1)
    responses, others = family.token_logps(net, batch.tokens, batch.features, targets).unbind(-1)
    noisy_view = view_scores(others[:half], mask[:half], ("noisy",), mean=mean)
    return {**view_scores(responses, mask, mean=mean), "noisy": noisy_view["noisy"]}


def _fitted(noisy: Tensor, batch: EncodedResponses) -> Tensor:
    """Pad or cut cached tokens [B, any] to the batch's longest chosen response; another batch set the cached length."""
    longest = batch.tokens[: len(batch.rows)].responses.shape[1]
    return F.pad(noisy, (0, max(0, longest - noisy.shape[1])))[:, :longest]


def _share_changed(batch: EncodedResponses, noisy: Tensor) -> Tensor:
    """Return the share [B] of the chosen response's tokens that differ from the noisy ones."""
    chosen = batch.tokens[: len(batch.rows)]
    other = (noisy != chosen.responses) & chosen.response_mask
    return other.sum(1) / chosen.num_tokens
