"""POVID: published values, whose noisy tokens are scored, and that only what noise changes counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmalign.families.base import VisionLanguage
from mmalign.methods.vision_language import dpo, povid
from mmalign.policy import FrozenCopy
from mmalign.rng import KeyedRNG
from tests.helpers.golden import golden
from tests.helpers.policies import DRAWS, adapted, gradient, run
from tests.helpers.response_batches import PAIRS, batch, published

GOLDEN = golden("povid")
EXPECTED = GOLDEN["expected"]


def close(actual: torch.Tensor, expected: Any) -> None:
    """float32 of two libraries."""
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=2e-6, atol=2e-6)


def test_each_network_s_own_tokens_give_the_release_s_losses() -> None:
    step = run(povid, *published(GOLDEN), povid.Config(tokens="own"))
    close(step.metrics["text loss"], [0.5 * x for x in EXPECTED["loss_text_per_sample"]])
    close(step.metrics["noisy loss"], [0.5 * x for x in EXPECTED["loss_noisy_per_sample"]])
    close(step.losses.mean(), EXPECTED["loss"])
    close(step.metrics["noisy log-probability"], EXPECTED["policy_noisy_own_logps"])
    gain = torch.tensor(EXPECTED["policy_noisy_own_logps"]) - torch.tensor(EXPECTED["ref_noisy_own_logps"])
    close(step.metrics["noisy gain"], gain)
    for name in ("chosen", "rejected", "noisy"):
        torch.testing.assert_close(
            0.1 * step.metrics[f"{name} gain"], torch.tensor(EXPECTED[f"{name}_rewards"]), rtol=1e-5, atol=1e-6
        )


def test_by_default_both_models_score_the_policy_s_tokens() -> None:
    step = run(povid, *published(GOLDEN), povid.Config())
    close(step.losses.mean(), EXPECTED["loss_if_ref_scores_policy_tokens"])
    reference_logps = step.metrics["noisy log-probability"] - step.metrics["noisy gain"]
    close(reference_logps, EXPECTED["ref_logps_of_policy_noisy_tokens"])


def by_hand(who: str, tokens: str) -> torch.Tensor:
    """log p of the tokens that a network finds likeliest under noise, by the definition and row by row."""
    results = []
    for row, labels in enumerate(GOLDEN["inputs"]["labels_chosen"]):
        clean = torch.tensor(GOLDEN["inputs"][f"{who}_chosen_logits"][row]).log_softmax(-1)
        noisy = GOLDEN["expected"][f"noisy_argmax_{tokens}"][row]
        results.append(sum(clean[t, noisy[t]] for t in range(7) if labels[t + 1] != -100))
    return torch.stack(results)


def test_reference_tokens_are_scored_by_both_models() -> None:
    step = run(povid, *published(GOLDEN), povid.Config(tokens="reference"))
    policy_logps, reference_logps = by_hand("policy", "ref"), by_hand("ref", "ref")
    close(step.metrics["noisy log-probability"], policy_logps)
    close(step.metrics["noisy gain"], policy_logps - reference_logps)
    chosen = torch.tensor(EXPECTED["policy_chosen_logps"]) - torch.tensor(EXPECTED["ref_chosen_logps"])
    noisy = -torch.sigmoid(0.1 * (chosen - (policy_logps - reference_logps))).log()
    close(step.losses, 0.5 * torch.tensor(EXPECTED["loss_text_per_sample"]) + 0.5 * noisy)


def test_the_paper_s_loss_is_one_sigmoid_over_a_weighted_sum() -> None:
    cfg = povid.Config(tokens="own", combine="paper", gamma=0.25)
    chosen, rejected, noisy = (torch.tensor(EXPECTED[f"{name}_rewards"]) for name in ("chosen", "rejected", "noisy"))
    close(run(povid, *published(GOLDEN), cfg).losses, -torch.sigmoid(chosen - 0.25 * rejected - 0.75 * noisy).log())


def test_gamma_1_is_the_first_stage() -> None:
    """That is DPO: the same losses to the last bit, and the published ones."""
    first, plain = run(povid, *published(GOLDEN), povid.Config(gamma=1.0)), run(dpo, *published(GOLDEN), dpo.Config())
    assert torch.equal(first.losses, plain.losses)
    close(first.losses.mean(), EXPECTED["stage1_loss"])


def test_no_row_is_added_for_the_noisy_tokens() -> None:
    """Each network scores two pairs in four rows: the noisy tokens are read off the chosen ones' states."""
    policy, given = published(GOLDEN)
    run(povid, policy, given, povid.Config())
    assert policy.family.seen == [4, 4]


def test_where_noise_changes_no_token_nothing_is_learned_from_it(vlm: VisionLanguage) -> None:
    """The noisy tokens are the chosen ones: their scores cancel, in the loss and in its gradient."""
    policy, given, cfg = adapted(vlm, moved=0.1), batch(vlm), povid.Config(gamma=0.0)
    (contrast,) = povid.contrasts(policy, given, cfg, DRAWS)
    same = replace(contrast, noisy=given.tokens[:3].responses)
    scores = policy.on_reference(lambda net: povid.noisy_scores(vlm, net, given, same.noisy))
    assert scores is not None
    step = povid.loss(policy, replace(same, reference=scores), cfg)
    assert torch.equal(step.losses.detach(), torch.full((3,), math.log(2)))
    assert (step.metrics["noisy share"] == 0).all()
    assert gradient(policy, step).norm() < 1e-5 * gradient(policy, run(povid, policy, given, cfg)).norm()


def test_only_the_places_that_noise_changes_count(llava: VisionLanguage) -> None:
    """The margin is a sum over these places alone, worked out from the tokens' log-probabilities."""
    policy, given, cfg = adapted(llava, moved=0.1), batch(llava), povid.Config(gamma=0.0)
    (contrast,) = povid.contrasts(policy, given, cfg, DRAWS)
    chosen = given.tokens[:3]
    changed_tokens = (contrast.noisy != chosen.responses) & chosen.response_mask
    assert changed_tokens.any()
    targets = torch.stack([chosen.responses, contrast.noisy], -1)

    def margin(net: Any) -> Any:
        logps = llava.token_logps(net, chosen, given.features, targets)
        return ((logps[..., 0] - logps[..., 1]) * changed_tokens).sum(1)

    step = povid.loss(policy, contrast, cfg)
    expected = -torch.sigmoid(0.1 * (margin(policy.model) - policy.on_reference(margin))).log()
    torch.testing.assert_close(step.losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.metrics["noisy share"], changed_tokens.sum(1) / chosen.num_tokens)


def test_several_targets_are_scored_by_one_run(vlm: VisionLanguage) -> None:
    """The responses' own tokens among them; and another token's score is that of a row which goes on with it."""
    given = batch(vlm)
    chosen, plain = given.tokens[:3], vlm.token_logps(vlm.network, given.tokens[:3], given.features)
    other_targets = torch.full_like(chosen.responses, 5)
    result = vlm.token_logps(vlm.network, chosen, given.features, torch.stack([chosen.responses, other_targets], -1))
    torch.testing.assert_close(result[..., 0], plain, rtol=1e-5, atol=1e-6)
    ids = chosen.ids.clone()
    at = torch.arange(3)
    ids[at, chosen.starts] = 5
    first = vlm.token_logps(vlm.network, replace(chosen, ids=ids), given.features)[:, 0]
    torch.testing.assert_close(result[:, 0, 1], first, rtol=1e-5, atol=1e-5)
    assert (result[~chosen.response_mask] == 0).all()


@pytest.mark.parametrize("tokens", ["reference", "policy", "own"])
def test_whose_tokens_they_are(llava: VisionLanguage, tokens: str) -> None:
    """Of a policy far from its reference; under the same noise, drawn for the row alone."""
    policy, given = adapted(llava, moved=1.0), batch(llava)
    (contrast,) = povid.contrasts(policy, given, povid.Config(tokens=tokens), DRAWS)
    shared_policy = replace(policy, reference=FrozenCopy(policy.model))
    cfg = povid.Config(tokens="reference")
    (reference,), (own,) = (povid.contrasts(each, given, cfg, DRAWS) for each in (policy, shared_policy))
    assert not torch.equal(reference.noisy, own.noisy)
    assert torch.equal(contrast.noisy, (reference if tokens == "reference" else own).noisy)
    scored = own.noisy if tokens == "policy" else reference.noisy
    reference_scores = policy.on_reference(lambda net: povid.noisy_scores(llava, net, given, scored))
    assert reference_scores is not None and torch.equal(contrast.reference["noisy"], reference_scores["noisy"])


def test_noise_is_a_row_s_own_and_another_in_every_epoch(llava: VisionLanguage, monkeypatch: Any) -> None:
    """Policy and reference see one and the same picture: it is encoded once."""
    policy, given, seen = adapted(llava), batch(llava), list[dict[str, Any]]()
    encode = type(llava).encode_images
    monkeypatch.setattr(type(llava), "encode_images", lambda self, v: seen.append(dict(v)) or encode(self, v))
    for rng in (DRAWS, DRAWS, KeyedRNG(DRAWS.seed, epoch=1), KeyedRNG(DRAWS.seed + 1)):
        povid.contrasts(policy, given, povid.Config(tokens="own"), rng)
    povid.contrasts(policy, batch(llava, PAIRS[1:2]), povid.Config(), DRAWS)
    assert len(seen) == 6  # one more for the second batch itself
    once, again, later, other_seed, _, alone = ([v.tensors["pixel_values"] for v in views.values()] for views in seen)
    assert len(once) == 3 and not torch.equal(once[0], once[1])  # two rows of one picture
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(alone[0], once[1])
    assert not torch.equal(once[0], later[0]) and not torch.equal(once[0], other_seed[0])


def test_more_noise_changes_more_tokens_than_none(llava: VisionLanguage) -> None:
    """At step 0 the picture is nearly itself: the noisy tokens are the clean picture's likeliest ones."""
    policy, given = adapted(llava), batch(llava)
    (clean,) = povid.contrasts(policy, given, povid.Config(noise_step=0), DRAWS)
    assert torch.equal(clean.noisy, llava.argmax(policy.unwrapped, given.tokens[:3], given.features))


def test_a_noise_step_past_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1000"):
        povid.Config(noise_step=1000)
