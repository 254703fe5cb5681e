"""What holds for every method that compares responses, on tiny models of the real classes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmalign import methods
from mmalign.config.losses import DPOLossConfig
from mmalign.config.methods import find_method
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods.vision_language import dpo, mdpo, povid, realign, response_sft, rlhfv
from tests.helpers.policies import DRAWS, adapted, gradient, run
from tests.helpers.response_batches import PAIRS, batch, swapped

# The terms of a method's loss: each is ln 2 where policy and reference are equal.
TERMS = {
    "dpo": [""],
    "mdpo": ["text ", "image ", "anchor "],
    "povid": [""],
    "realign": ["text ", "image "],
    "rlhfv": [""],
}
DEFAULTS: dict[Any, dict[str, Any]] = {
    dpo: {"beta": 0.1, "loss": DPOLossConfig(), "nll": 0.0},
    mdpo: {"beta": 0.1, "delta": 0.0, "crop_area": [0.01, 0.2], "nll": 0.0},
    povid: {"beta": 0.1, "gamma": 0.5, "noise_step": 500, "overflow": "clamp", "tokens": "policy"}
    | {"combine": "average", "nll": 0.0},
    realign: {"beta": 0.1, "image_weight": 1.0, "rejected_scoring": "written", "nll": 0.0},
    rlhfv: {"beta": 0.5, "gamma": 5.0, "min_block": 3, "nll": 0.0},
}


def name_of(method: Any) -> str:
    name: str = method.__name__.split(".")[-1]
    return name


EVERY = pytest.mark.parametrize("method", DEFAULTS, ids=name_of)
EVERY_AND_SFT = pytest.mark.parametrize("method", [*DEFAULTS, response_sft], ids=name_of)


@EVERY
def test_the_defaults_are_the_paper_s_or_the_release_s(method: Any) -> None:
    cfg = method.Config()
    assert {name: getattr(cfg, name) for name in DEFAULTS[method]} == DEFAULTS[method]


@pytest.mark.slow
@EVERY
def test_policy_at_reference_has_ln_2_per_term_and_gradient(vlm: VisionLanguage, method: Any) -> None:
    policy = adapted(vlm)
    step = run(method, policy, batch(vlm), method.Config())
    terms = TERMS[name_of(method)]
    torch.testing.assert_close(step.losses.detach(), torch.full((3,), len(terms) * math.log(2)))
    for term in terms:
        torch.testing.assert_close(step.metrics[f"{term}loss"], torch.full((3,), math.log(2)))
    gains = [name for name in step.metrics if name.endswith("gain")]
    assert gains and all((step.metrics[name] == 0).all() for name in gains)
    assert (step.metrics["accuracy"] == 0.5).all()
    assert gradient(policy, step).norm() > 1e-3


@pytest.mark.slow
@EVERY
def test_a_row_s_numbers_are_its_own_whatever_its_company(vlm: VisionLanguage, method: Any) -> None:
    """Alone or beside longer ones: padding does not leak, and noise and crop are the row's. Rounding alone differs."""
    policy = adapted(vlm, moved=0.1)
    whole = run(method, policy, batch(vlm), method.Config())
    for index, pair in enumerate(PAIRS):
        alone = run(method, policy, batch(vlm, [pair]), method.Config())
        assert alone.metrics.keys() == whole.metrics.keys()
        for name, values in alone.metrics.items():
            torch.testing.assert_close(values[0], whole.metrics[name][index], rtol=1e-4, atol=1e-4)


@EVERY
def test_sides_log_probabilities_equal_dpos(llava: VisionLanguage, method: Any) -> None:
    """RLHF-V's scores are weighted means; all others' are sums of the same tokens."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    step = run(method, policy, given, method.Config() if method is not rlhfv else rlhfv.Config(gamma=1.0))
    plain = run(dpo, policy, given, dpo.Config()).metrics
    for side in ("chosen", "rejected"):
        per = plain[f"{side} tokens"] if method is rlhfv else torch.ones(3)
        for of in ("log-probability", "gain"):
            torch.testing.assert_close(step.metrics[f"{side} {of}"] * per, plain[f"{side} {of}"], rtol=1e-4, atol=1e-4)
    assert (step.metrics["chosen log-probability"] < 0).all()


@EVERY
def test_nll_adds_the_chosen_response_s_mean_and_nothing_else(llava: VisionLanguage, method: Any) -> None:
    """Worked out from the token log-probabilities, whatever the method's own scores are."""
    policy, given = adapted(llava, moved=0.1), batch(llava)
    plain, more = (run(method, policy, given, method.Config(nll=weight)) for weight in (0.0, 0.5))
    chosen = given.tokens[:3]
    logps = llava.token_logps(policy.model, chosen, given.features)
    nll = -scores.mean(logps, chosen.response_mask)
    torch.testing.assert_close(more.losses - plain.losses, 0.5 * nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(more.metrics["nll"], nll.detach(), rtol=1e-4, atol=1e-5)
    assert "nll" not in plain.metrics and torch.equal(more.metrics["loss"], more.losses.detach())
    of_both, of_pair = (gradient(policy, step) for step in (more, plain))
    policy.model.zero_grad()
    (0.5 * nll).sum().backward()
    own = torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
    assert own.norm() > 1e-3 and (of_both - of_pair - own).norm() < 1e-3 * own.norm()


@pytest.mark.parametrize("method", [dpo, realign], ids=name_of)
def test_swapping_the_sides_negates_the_logit(llava: VisionLanguage, method: Any) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava)
    metrics, swapped_metrics = (run(method, policy, some, method.Config()).metrics for some in (given, swapped(given)))
    assert metrics["logit"].abs().min() > 1e-3
    torch.testing.assert_close(metrics["logit"], -swapped_metrics["logit"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["chosen gain"], swapped_metrics["rejected gain"], rtol=1e-4, atol=1e-5)


@EVERY_AND_SFT
def test_a_step_against_the_gradient_lowers_the_loss(llava: VisionLanguage, method: Any) -> None:
    policy, given, cfg = adapted(llava, moved=0.05), batch(llava), method.Config()
    before = run(method, policy, given, cfg)
    gradient(policy, before)
    torch.optim.SGD(policy.trainable(), lr=1e-3).step()
    assert run(method, policy, given, cfg).losses.mean() < before.losses.mean()


@EVERY_AND_SFT
def test_a_pair_of_weight_zero_gives_no_gradient(llava: VisionLanguage, method: Any) -> None:
    policy, cfg = adapted(llava, moved=0.1), method.Config()
    padded = replace(batch(llava), weights=torch.tensor([1.0, 0.0, 0.0]))
    of_three, of_one = (gradient(policy, run(method, policy, some, cfg)) for some in (padded, batch(llava, PAIRS[:1])))
    assert of_one.norm() > 0 and (of_three - of_one).norm() < 1e-4 * of_one.norm()


@EVERY
def test_contrasts_keep_no_graph(llava: VisionLanguage, method: Any) -> None:
    """Even where the caller forgets to say so: the reference's scores, and what noise makes of the policy."""
    (contrast,) = method.contrasts(adapted(llava), batch(llava), method.Config(), DRAWS)
    assert not any(result.requires_grad for result in contrast.reference.values())
    assert all(found.dtype == torch.float32 for found in contrast.reference.values())


@EVERY
def test_the_network_runs_once_for_the_loss(llava: Any, method: Any) -> None:
    """More than one run before a backward pass breaks distribution, and costs another pass of the decoder."""
    policy, runs = adapted(llava), list[int]()
    (contrast,) = method.contrasts(policy, batch(llava), method.Config(), DRAWS)
    llava.network.register_forward_hook(lambda *_: runs.append(1))
    method.loss(policy, contrast, method.Config())
    assert len(runs) == 1


def test_every_method_of_responses_is_held_to_these_laws() -> None:
    """But for the baseline, those that write the responses themselves, and those that learn from thumbs or lists."""
    results = [n for n in methods.names() if find_method(n)[0] == "vision_language"]
    others = {"response_sft", "bdhs", "online_dpo", "grpo", "raft", "kto", "lipo"}
    assert set(results) - others == set(TERMS)
