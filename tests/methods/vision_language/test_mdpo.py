"""mDPO: published values of its three terms, its crop, and what the anchor does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.families.types import ImageFeatures
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.methods.vision_language import dpo, mdpo
from mmalign.methods.vision_language._responses import TOKEN, Contrast
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG
from tests.helpers.golden import golden
from tests.helpers.policies import DRAWS, adapted, gradient, run
from tests.helpers.response_batches import PAIRS, batch

GOLDEN = golden("mdpo")
TERMS = ("text", "image", "anchor")


class Given:
    """A family whose responses of one token have the published log-probabilities."""

    def token_logps(self, net: Any, tokens: Tokens, features: Any) -> Tensor:
        return net[:, None]


def published(cfg: mdpo.Config) -> Any:
    """The published scores of two pairs; the crops have been made."""
    views = ("chosen", "rejected", "chosen_cropped")
    policy_logps = torch.tensor([x for view in views for x in GOLDEN["inputs"]["policy_logps"][view]])
    reference_logps = [torch.tensor(GOLDEN["inputs"]["ref_logps"][view]) for view in views]
    reference_scores = dict(zip((*mdpo.VIEWS, TOKEN), (*reference_logps, reference_logps[0]), strict=True))
    given = EncodedResponses(
        [0, 1], Tokens.from_rows([TokenizedResponse((1, 2), 1)] * 6, 0), ImageFeatures({}), torch.ones(2)
    )
    policy: Any = Policy(Given(), policy_logps, policy_logps, None)  # type: ignore[arg-type]
    return mdpo.loss(policy, Contrast(given, reference_scores), cfg)


def test_the_three_terms_are_the_published_ones() -> None:
    step = published(mdpo.Config())
    torch.testing.assert_close(step.losses, torch.tensor(GOLDEN["expected"]["losses"]), rtol=2e-6, atol=2e-6)
    for name, published_name in zip(TERMS, ("dpo", "copo", "anchor"), strict=True):
        expected = torch.tensor(GOLDEN["expected"]["terms"][published_name])
        torch.testing.assert_close(step.metrics[f"{name} loss"], expected, rtol=2e-6, atol=2e-6)
    for name, published_name in (("chosen", "chosen"), ("rejected", "rejected"), ("cropped", "image")):
        rewards = torch.tensor(GOLDEN["expected"][f"{published_name}_rewards"])
        torch.testing.assert_close(0.1 * step.metrics[f"{name} gain"], rewards, rtol=1e-5, atol=1e-6)


def test_delta_is_what_the_chosen_response_must_gain() -> None:
    """-log sigma(reward - delta), of the published rewards; the other terms do not know it."""
    plain, more = (published(mdpo.Config(delta=delta)) for delta in (0.0, 0.3))
    expected = -torch.sigmoid(torch.tensor(GOLDEN["expected"]["chosen_rewards"]) - 0.3).log()
    torch.testing.assert_close(more.metrics["anchor loss"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(more.metrics["image loss"], plain.metrics["image loss"])


def test_text_and_image_terms_are_dpo_s_and_the_crop_s(llava: VisionLanguage) -> None:
    """The text term is DPO's; the image term is worked out from the scores under the crop."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    metrics = run(mdpo, policy, given, mdpo.Config()).metrics
    plain = run(dpo, policy, given, dpo.Config()).metrics
    torch.testing.assert_close(metrics["text loss"], plain["loss"], rtol=1e-4, atol=1e-5)
    logit = 0.1 * (metrics["chosen gain"] - metrics["cropped gain"])
    torch.testing.assert_close(metrics["image loss"], -torch.sigmoid(logit).log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["anchor loss"], -torch.sigmoid(0.1 * metrics["chosen gain"]).log())
    assert logit.abs().min() > 1e-5


def test_a_crop_that_keeps_all_is_the_picture(llava: VisionLanguage) -> None:
    """Whatever ratio was drawn, all of the area has but one; the image term is then of two equal sides."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    metrics = run(mdpo, policy, given, mdpo.Config(crop_area=[1.0, 1.0])).metrics
    for of in ("gain", "log-probability"):
        assert torch.equal(metrics[f"cropped {of}"], metrics[f"chosen {of}"])
    assert torch.equal(metrics["image loss"], torch.full((3,), math.log(2)))


def test_crop_depends_on_the_row_and_is_encoded_once(llava: Any, monkeypatch: Any) -> None:
    policy, given, seen = adapted(llava), batch(llava), list[Any]()
    encode = type(llava).encode_images
    monkeypatch.setattr(type(llava), "encode_images", lambda self, v: seen.append(dict(v)) or encode(self, v))
    for rng in (DRAWS, DRAWS, KeyedRNG(DRAWS.seed, epoch=1)):
        run(mdpo, policy, given, mdpo.Config(), rng)
    alone = batch(llava, PAIRS[1:2])
    run(mdpo, policy, alone, mdpo.Config())
    once, again, later, _, single = ([v.tensors["pixel_values"] for v in views.values()] for views in seen)
    assert len(once) == 3 and not torch.equal(once[0], once[1])  # two rows of one picture
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], later[0]) and torch.equal(single[0], once[1])


def test_the_anchor_alone_moves_the_chosen_response_up(llava: VisionLanguage) -> None:
    """Its gradient is -beta sigma(-z) times that of the chosen response's log-probability."""
    policy, given = adapted(llava, moved=0.1), batch(llava, PAIRS[:1])
    chosen = llava.token_logps(policy.model, given.tokens[:1], given.features).sum()
    policy.model.zero_grad()
    chosen.backward()
    own = torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
    low, high = (gradient(policy, run(mdpo, policy, given, mdpo.Config(delta=delta))) for delta in (0.0, 1.0))
    z = 0.1 * run(mdpo, policy, given, mdpo.Config()).metrics["chosen gain"].item()
    factor = 0.1 * (1 / (1 + math.exp(z - 1)) - 1 / (1 + math.exp(z)))
    assert (high - low + factor * own).norm() < 1e-3 * (factor * own).norm()


def test_a_crop_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="expected the smaller fraction first"):
        mdpo.Config(crop_area=[0.5, 0.2])
