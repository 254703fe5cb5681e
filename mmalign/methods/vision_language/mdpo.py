"""mDPO (arXiv:2406.11839): prefer the chosen response, its whole image to a crop of it, and keep it likely.

    score(y | v) = sum_t log p(y_t | v, prompt, y_<t)                          for policy and reference
    loss = -log sigma(beta * (chosen | v  against  rejected | v))               DPO
           + -log sigma(beta * (chosen | v  against  chosen | v_c))             conditional preference
           + -log sigma(beta * (chosen | v, policy against reference) - delta)  anchor

v_c is a random part of the image, of 1 to 20 % of its area, enlarged to the image's size: the release's
RandomResizedCrop, there of the tensor that the tower takes, here of the picture before the processor, so that it is the
same for every model. The release draws another crop for the reference than for the policy; here both see the same.

3B rows: chosen, rejected, chosen with the crop. See `dpo` for the pair losses that may stand in the first two terms.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator

from mmalign.data.augment import cropped
from mmalign.data.caches.precompute import Keep
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.families.types import ImageFeatures
from mmalign.language.tokens import Tokens
from mmalign.methods import Step, reference_scores
from mmalign.methods._pair_loss import CacheDraws, bound_loss
from mmalign.methods.vision_language._images import disturbed
from mmalign.methods.vision_language._responses import (
    PAIR,
    Contrast,
    ResponseLossConfig,
    against,
    response_scores,
    response_step,
)
from mmalign.policy import Policy
from mmalign.rng import Draws

modality = "vision_language"
needs_reference = True

VIEWS = (*PAIR, "cropped")


class Config(ResponseLossConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["mdpo"] = "mdpo"
    beta: float = Field(0.1, gt=0, description="in nats: of a response, or with loss: ipo of a token")
    delta: float = Field(0.0, description="the anchor: by how many beta-fold nats the chosen response must gain")
    keep: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.01, 0.2], min_length=2, max_length=2, description="the least and the greatest share of the area of a crop"
    )
    cache_draws: CacheDraws = 0

    @model_validator(mode="after")
    def _in_order(self) -> Config:
        if self.keep[0] > self.keep[1]:
            raise ValueError(f"keep is {self.keep}; expected the least share first")
        return self


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Any, draws: Draws) -> list[Contrast]:
    """The pairs, and the chosen responses once more to a crop of their images."""

    def crop(picture: Image.Image, row: int, place: int) -> Image.Image:
        return cropped(picture, draws.uniform([row], (4,), "crop", place)[0], keep=(cfg.keep[0], cfg.keep[1]))

    tokens, found = disturbed(policy.family, batch, crop)
    features = ImageFeatures({**batch.features.images, **found.images})
    whole = replace(batch, tokens=Tokens.cat([batch.tokens, tokens]), features=features)
    score = partial(response_scores, policy.family, batch=whole, views=VIEWS, mean=cfg.loss == "ipo")
    return [Contrast(whole, reference_scores(policy, batch, score))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """The three terms."""
    batch, theirs, link = contrast.batch, contrast.reference, bound_loss(cfg)
    assert theirs is not None, "mdpo needs a reference"
    ours = response_scores(policy.family, policy.model, batch, views=VIEWS, mean=cfg.loss == "ipo")
    text, image = (against(link, ours, theirs, view) for view in ("rejected", "cropped"))
    anchor = -F.logsigmoid(cfg.beta * (ours["chosen"] - theirs["chosen"]) - cfg.delta)
    terms = {"text loss": text, "image loss": image, "anchor loss": anchor}
    return response_step(cfg, ours, theirs, batch, terms)


def keeps(cfg: Any) -> Keep | None:
    """What the reference's scores depend on besides pairs, crops and reference; None where every crop is new."""
    settings = {"mean": cfg.loss == "ipo", "least": cfg.keep[0], "greatest": cfg.keep[1]}
    return Keep(cfg.cache_draws, settings, scores=True) if cfg.cache_draws else None


def needs_pictures(cfg: Any) -> bool:
    """The pictures, to crop them."""
    return True


def needs_tower(cfg: Any) -> bool:
    """The policy looks at crops, which are made in the training."""
    return True
