"""mDPO (arXiv:2406.11839): prefer the chosen response, its whole image to a crop of it, and keep it likely.

    score(y | v) = sum_t log p(y_t | v, prompt, y_<t)                          for policy and reference
    loss = -log sigma(beta * (chosen | v  against  rejected | v))               DPO
           + -log sigma(beta * (chosen | v  against  chosen | v_c))             conditional preference
           + -log sigma(beta * (chosen | v, policy against reference) - delta)  anchor

v_c is a random part of the image, of 1 to 20 % of its area, enlarged to the image's size (RandomResizedCrop). The
release crops the vision tower's input tensor. We crop the image before the processor, so the crop does not depend on
the model. The release draws different crops for policy and reference; here both get the same crop.

3B rows: chosen, rejected, chosen with the crop. The first two terms accept any pair loss, as in `dpo`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from PIL import Image

from mmalign.config.methods.vision_language import MDPOConfig as Config
from mmalign.data.augment import random_crop
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language.tokens import Tokens
from mmalign.losses import pairwise
from mmalign.methods import Requirements, Step, reference_scores
from mmalign.methods._pair_loss import pair_of
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.vision_language._images import with_changed_images
from mmalign.methods.vision_language._responses import PAIR, Contrast, losses_against, response_scores, response_step
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

VIEWS = (*PAIR, "cropped")


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: decoded images, the vision tower, and a reference or its cached scores.

    The anchor needs a reference even if the loss does not.
    """
    settings = {"mean": cfg.mean, "least": cfg.crop_area[0], "greatest": cfg.crop_area[1]}
    return replace(
        pair_requirements(cfg, cfg.num_cached_draws, settings, reference=True),
        decoded_images=True,
        vision_tower=True,  # the policy sees crops, which are drawn during training
    )


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the pairs, and the chosen responses again under a crop of their images."""

    def crop(picture: Image.Image, row: int, place: int) -> Image.Image:
        return random_crop(
            picture, rng.uniform([row], (4,), "crop", place)[0], area_range=(cfg.crop_area[0], cfg.crop_area[1])
        )

    tokens, cropped = with_changed_images(policy.family, batch, crop)
    features = batch.features | cropped
    whole = replace(batch, tokens=Tokens.cat([batch.tokens, tokens]), features=features)
    score = partial(response_scores, policy.family, batch=whole, views=VIEWS, mean=cfg.mean)
    return [Contrast(whole, reference_scores(policy, batch, score))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the sum of the text, image and anchor losses."""
    cfg = present(cfg, policy.memory)
    batch, reference_scores = contrast.batch, contrast.reference
    assert reference_scores is not None, "mdpo needs a reference"
    policy_scores = response_scores(policy.family, policy.model, batch, views=VIEWS, mean=cfg.mean)
    text, image = losses_against(cfg, policy_scores, reference_scores, batch, "cropped")
    # The anchor: the chosen response becomes more likely than under the reference, by a margin
    anchor = pairwise.anchor(*pair_of(policy_scores, reference_scores), beta=cfg.beta, delta=cfg.delta)
    # The other losses have the row's weight already
    if batch.labels is not None:
        anchor = batch.labels.weight * anchor
    terms = {"text loss": text, "image loss": image, "anchor loss": anchor}
    return response_step(cfg, policy_scores, reference_scores, batch, terms)
