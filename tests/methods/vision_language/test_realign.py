"""Re-Align: the published value, and that the second term is about images alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mmalign.families.base import VisionLanguage
from mmalign.language.tokens import Tokens
from mmalign.methods.vision_language import dpo, realign
from tests.helpers.golden import golden
from tests.helpers.policies import DRAWS, adapted, gradient, run
from tests.helpers.response_batches import batch, published

GOLDEN = golden("realign_rdpo")
PAPER = GOLDEN["expected"]["paper"]


def test_the_paper_s_loss_is_the_published_value() -> None:
    """Of the released loss function, given the log-probabilities of the words as they are written."""
    step = run(realign, *published(GOLDEN), realign.Config())
    torch.testing.assert_close(step.losses.detach(), torch.tensor(PAPER["losses"]), rtol=2e-6, atol=2e-6)
    for side, published_side in (("chosen", "chosen"), ("rejected", "rejected"), ("retrieved", "chosen_retrieved")):
        logps, base = (torch.tensor(PAPER[f"{who}_logps"][published_side]) for who in ("policy", "ref"))
        torch.testing.assert_close(step.metrics[f"{side} log-probability"], logps, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(step.metrics[f"{side} gain"], logps - base, rtol=1e-5, atol=1e-5)


def competitors(who: str, block: str, side: str) -> torch.Tensor:
    """Return the sums of the largest log-probabilities besides the written tokens', by the published definition."""
    results = []
    for logits, labels in zip(
        GOLDEN["inputs"][f"{who}_{block}_logits"], GOLDEN["inputs"][f"labels_{side}"], strict=True
    ):
        logps = torch.tensor(logits).log_softmax(-1)
        places = [t for t in range(len(labels) - 1) if labels[t + 1] != -100]
        results.append(sum(max(p for v, p in enumerate(logps[t]) if v != labels[t + 1]) for t in places))
    return torch.stack(results)


def test_competitor_scoring_is_the_release_s() -> None:
    """Each network's own runner-up or top token, in place of the rejected words and of those under the other image."""
    step = run(realign, *published(GOLDEN), realign.Config(rejected_scoring="competitor"))
    chosen = torch.tensor(PAPER["policy_logps"]["chosen"]) - torch.tensor(PAPER["ref_logps"]["chosen"])
    gains = []
    for view, block, side in (("rejected", "rejected", "rejected"), ("retrieved", "chosen_retrieved", "chosen")):
        policy_logps, reference_logps = (competitors(who, block, side) for who in ("policy", "ref"))
        gains.append(policy_logps - reference_logps)
        torch.testing.assert_close(step.metrics[f"{view} log-probability"], policy_logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.metrics[f"{view} gain"], gains[-1], rtol=1e-5, atol=1e-5)
    losses = sum(-torch.sigmoid(0.1 * (chosen - gain)).log() for gain in gains)
    torch.testing.assert_close(step.losses.detach(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.metrics["chosen gain"], chosen, rtol=1e-5, atol=1e-5)


def test_competitors_are_the_likeliest_tokens_that_are_not_written(vlm: Any) -> None:
    """On networks of the real classes: no other token scores more, and the gradient is that of their scores."""
    policy, given = adapted(vlm, moved=0.5), batch(vlm)
    (contrast,) = realign.contrasts(policy, given, realign.Config(rejected_scoring="competitor"), DRAWS)
    whole, mask = contrast.batch.tokens, contrast.batch.tokens.response_mask
    assert contrast.targets is not None
    assert torch.equal(contrast.targets[:3], whole.responses[:3])
    assert (contrast.targets[3:] != whole.responses[3:])[mask[3:]].all()
    score = partial(vlm.token_logps, policy.model, whole, contrast.batch.features)
    size: int = vlm.network.model.config.get_text_config().vocab_size
    every = torch.arange(size).expand(*whole.responses.shape, size)
    others = score(every).masked_fill(every == whole.responses[..., None], -torch.inf).amax(-1)
    best = score(contrast.targets[..., None])[..., 0]
    assert (best[3:] >= others[3:] - 1e-5)[mask[3:]].all()
    step = run(realign, policy, given, realign.Config(rejected_scoring="competitor"))
    assert gradient(policy, step).norm() > 0


def test_cached_reference_scores_know_the_scoring() -> None:
    specs = [realign.requirements(realign.Config(rejected_scoring=way)).precompute for way in ("written", "competitor")]
    assert specs[0] != specs[1]


def test_the_loss_is_dpo_and_a_share_of_the_image_term() -> None:
    """At weight 0 it is DPO's to the last bit; and it is linear in the weight."""
    losses = {w: run(realign, *published(GOLDEN), realign.Config(image_weight=w)) for w in (0.0, 0.25, 1.0)}
    plain = run(dpo, *published(GOLDEN), dpo.Config())
    assert torch.equal(losses[0.0].losses, plain.losses)
    own, similar = (torch.tensor(PAPER[f"{name}_rewards"]) for name in ("chosen", "image"))
    image = -torch.sigmoid(own - similar).log()
    for weight, step in losses.items():
        torch.testing.assert_close(step.losses, plain.losses + weight * image, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step.metrics["image loss"], weight * image, rtol=1e-5, atol=1e-6)


def test_swapping_the_images_negates_the_image_term_s_logit(vlm: VisionLanguage) -> None:
    """The chosen response to the retrieved image, and the same words to the pair's own."""
    policy, given, cfg = adapted(vlm, moved=0.1), batch(vlm), realign.Config()
    assert given.other_images is not None
    chosen = given.tokens[:3]
    swapped_images = replace(given, tokens=Tokens.cat([given.other_images, given.tokens[3:]]), other_images=chosen)
    logits = []
    for pairs in (given, swapped_images):
        metrics = run(realign, policy, pairs, cfg).metrics
        logits.append(metrics["chosen gain"] - metrics["retrieved gain"])
        torch.testing.assert_close(metrics["image loss"], -torch.sigmoid(0.1 * logits[-1]).log())
    assert logits[0].abs().min() > 1e-4
    torch.testing.assert_close(logits[0], -logits[1], rtol=1e-3, atol=1e-4)


def test_an_image_retrieved_for_itself_teaches_nothing(llava: VisionLanguage) -> None:
    """Both sides of the image term are the same numbers: its gradient cancels."""
    policy, given, cfg = adapted(llava, moved=0.1), batch(llava), realign.Config()
    same = replace(given, other_images=given.tokens[:3])
    plain = gradient(policy, run(dpo, policy, given, dpo.Config()))
    both = gradient(policy, run(realign, policy, same, cfg))
    assert (both - plain).norm() < 1e-4 * plain.norm()
    assert (gradient(policy, run(realign, policy, given, cfg)) - plain).norm() > 1e-2 * plain.norm()
