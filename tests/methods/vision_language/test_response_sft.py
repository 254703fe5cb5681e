"""The baseline: the likelihood of the chosen responses, by hand, and nothing of the rejected ones."""

from dataclasses import replace

import torch

from mmalign.families.base import VisionLanguage
from mmalign.language.tokens import Tokens
from mmalign.methods.vision_language import response_sft
from mmalign.policy import Policy
from tests.helpers.golden import golden
from tests.helpers.policies import adapted, run
from tests.helpers.response_batches import batch, published, swapped

GOLDEN = golden("dpo")


def test_the_loss_is_the_published_log_probability_a_token() -> None:
    """-9.9686 nats of 5 tokens and -5.6906 of 4."""
    step = run(response_sft, *published(GOLDEN), response_sft.Config())
    logps = torch.tensor(GOLDEN["expected"]["policy_chosen_logps"])
    counts = torch.tensor(GOLDEN["expected"]["n_tokens_chosen"])
    torch.testing.assert_close(step.losses.detach(), -logps / counts, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step.metrics["chosen log-probability"], logps, rtol=1e-6, atol=1e-6)
    assert step.metrics["chosen tokens"].tolist() == counts.tolist()


def test_it_is_minus_the_mean_of_the_tokens_log_probabilities(vlm: VisionLanguage) -> None:
    policy, given = adapted(vlm, moved=0.1), batch(vlm)
    step = run(response_sft, policy, given, response_sft.Config())
    logps = vlm.token_logps(policy.model, given.tokens, given.features)
    for row, count in enumerate(given.tokens.num_tokens[:3].tolist()):
        torch.testing.assert_close(step.losses[row], -logps[row, :count].mean(), rtol=1e-5, atol=1e-5)


def test_loss_ignores_rejected_responses_and_reference(llava: VisionLanguage) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava)
    bare = Policy(llava, policy.model, policy.unwrapped, None)
    swapped_rejected = replace(given, tokens=Tokens.cat([given.tokens[:3], swapped(given).tokens[3:]]))
    actual, expected = (run(response_sft, bare, some, response_sft.Config()) for some in (given, swapped_rejected))
    assert torch.equal(actual.losses, expected.losses)
    assert not response_sft.requirements(response_sft.Config()).reference
