"""Published values, worked examples and laws of the losses."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mmalign.diffusion.noise import mean_square
from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from tests.helpers.golden import golden


def cases(name: str) -> list:
    content = golden(name)
    return [pytest.param(case, id=key) for key, case in content["cases"].items()]


def tensors(case: dict, dtype: torch.dtype, *names: str) -> list[Tensor]:
    return [torch.tensor(case["inputs"][n], dtype=dtype) for n in names]


def scores(prediction: Tensor, target: Tensor) -> Pair:
    error = (prediction - target).square().flatten(1).mean(1)
    return Pair(*(-0.5 * error).chunk(2))


def assert_close(actual: object, expected: object, *, rtol: float = 1.3e-6, atol: float = 1e-5) -> None:
    """As in torch.testing, which imports torch.distributed first: half of the time of all these tests."""
    if isinstance(actual, Tensor):
        assert isinstance(expected, Tensor) and actual.dtype == expected.dtype
    result, wanted = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    assert result.shape == wanted.shape and torch.allclose(result, wanted, rtol=rtol, atol=atol), (result, wanted)


@pytest.mark.parametrize("case", cases("diffusion_dpo"))
def test_dpo_gives_the_release_s_numbers(case: dict) -> None:
    """SalesforceAIResearch/DiffusionDPO, train.py:1121-1145, in float64."""
    policy, reference, target = tensors(case, torch.float64, "model_pred", "ref_pred", "target")
    policy.requires_grad_()
    policy_scores, reference_scores = scores(policy, target), scores(reference, target)
    beta, expected = case["inputs"]["beta_dpo"], case["expected"]
    values = pairwise.dpo(policy_scores, reference_scores, beta=beta)
    z = beta * (policy_scores.margin - reference_scores.margin)
    values.mean().backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert_close(values.mean(), torch.tensor(expected["loss"], dtype=torch.float64), **close)
    assert_close(z, torch.tensor(expected["inside_term"], dtype=torch.float64), **close)
    assert_close(policy.grad, torch.tensor(expected["grad_model_pred"], dtype=torch.float64), **close)
    assert_close(-2 * policy_scores.chosen, torch.tensor(expected["model_losses_w"], dtype=torch.float64), **close)


@pytest.mark.parametrize("case", cases("mapo"))
def test_mapo_gives_the_stable_form_of_the_release_s_numbers(case: dict) -> None:
    """mapo-t2i/mapo, utils.py:286-301, with expm1 and the limit at zero error, in float64."""
    prediction, target = tensors(case, torch.float64, "model_pred", "target")
    prediction.requires_grad_()
    given, expected = case["inputs"], case["stable_form_fp64_not_peers"]
    chosen, rejected = mean_square_64(prediction, target).chunk(2)
    values = pairwise.mapo(
        chosen, rejected, beta=given["beta_mapo"], snr=given["snr_value"], num_timesteps=given["num_train_timesteps"]
    )
    assert_close(values.mean().item(), expected["loss"], rtol=1e-10, atol=1e-10)
    values.mean().backward()
    assert torch.isfinite(prediction.grad).all()


def mean_square_64(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().flatten(1).mean(1)


def test_mapo_agrees_with_the_release_where_the_release_is_right() -> None:
    """On the ordinary case the published float32 numbers hold too."""
    case = golden("mapo")["cases"]["base"]
    prediction, target = tensors(case, torch.float32, "model_pred", "target")
    prediction.requires_grad_()
    chosen, rejected = mean_square(prediction, target).chunk(2)
    value = pairwise.mapo(chosen, rejected, beta=0.1).mean()
    value.backward()
    expected = case["expected_official_fp32"]
    assert_close(value.item(), expected["loss"], rtol=2e-5, atol=2e-5)
    assert_close(prediction.grad, torch.tensor(expected["grad_model_pred"]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("error", [0.0, 1e-8, 1e-4, 1e-3, 0.29, 0.6, 1.0, 80.0, 175.0, 1e3])
def test_mapo_s_bounded_score_and_slope_are_exact_at_any_error(error: float) -> None:
    """Against mpmath-free float64 arithmetic: s(x) = x / (e^x - 1), s' = (expm1 - x e^x) / expm1^2."""
    x = torch.tensor([error], dtype=torch.float32, requires_grad=True)
    value = pairwise._bounded(x)
    value.sum().backward()
    exact = 1 - error / 2 if error < 1e-6 else 0.0 if error > 700 else error / math.expm1(error)
    if error < 1e-3:
        slope = -0.5 + error / 6
    elif error > 300:
        slope = 0.0
    else:
        slope = (math.expm1(error) - error * math.exp(error)) / math.expm1(error) ** 2
    assert_close(value.item(), exact, rtol=1e-6, atol=1e-7)
    assert_close(x.grad.item(), slope, rtol=1e-5, atol=1e-6)


def pair(chosen: list[float], rejected: list[float]) -> Pair:
    return Pair(torch.tensor(chosen), torch.tensor(rejected))


def test_worked_examples() -> None:
    """Margins: policy 0.3, reference 0.1, so 0.2; at beta 5, z = 1."""
    policy, reference = pair([0.5], [0.2]), pair([0.4], [0.3])
    assert_close(pairwise.dpo(policy, reference, beta=5.0), torch.tensor([math.log1p(math.exp(-1))]))
    smoothed = 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e)
    assert_close(pairwise.dpo(policy, reference, beta=5.0, label_smoothing=0.1), torch.tensor([smoothed]))
    assert_close(pairwise.ipo(policy, reference, beta=5.0), torch.tensor([0.01]))  # (0.2 - 0.1)^2
    assert_close(pairwise.hinge(policy, reference, beta=2.5), torch.tensor([0.5]))
    robust = (0.9 * math.log1p(math.exp(-1)) - 0.1 * math.log1p(math.e)) / 0.8
    assert_close(pairwise.robust(policy, reference, beta=5.0, flip_rate=0.1), torch.tensor([robust]))


@pytest.mark.parametrize("case", cases("cca"))
def test_cca_gives_the_release_s_numbers(case: dict) -> None:
    """thu-ml/CCA, VAR_CCA_trainer.py:126-187, in float64: scores are sums of the tokens' log-probabilities."""
    given = golden("cca")["tensors"]
    names = ("logits", "shuffled_logits", "ref_logits", "shuffled_ref_logits")
    logits = [torch.tensor(given[name], dtype=torch.float64, requires_grad="ref" not in name) for name in names]
    tokens = torch.tensor(given["idx"])[..., None]
    own, unlearned, own_ref, unlearned_ref = (x.log_softmax(-1).gather(-1, tokens).sum((1, 2)) for x in logits)
    label, shuffled = (torch.tensor(given[name]) for name in ("label", "shuffle_label"))
    expected, settings = case["expected"], case["inputs"]
    assert (label == shuffled).tolist() == expected["treated_as_positive"]  # the dropped one, and one by accident
    policy_scores, reference_scores = Pair(own, unlearned), Pair(own_ref, unlearned_ref)
    values = pairwise.cca(
        policy_scores, reference_scores, label == shuffled, beta=settings["beta"], weight=settings["lambda_"]
    )
    values.mean().backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    for result, name in (
        (values.mean(), "loss"),
        (own - own_ref, "img_logp_gap"),
        (unlearned - unlearned_ref, "negative_img_logp_gap"),
        (logits[0].grad, "grad_logits"),
        (logits[1].grad, "grad_shuffled_logits"),
    ):
        assert_close(result, torch.tensor(expected[name], dtype=torch.float64), **close)


def test_cca_by_hand() -> None:
    """beta 2, weight 3; gaps own 0.5 and other -0.5, then the same two of the same condition.

    z is 1 and -1, softplus(-1) = 0.313262: (0.313262 + 3 * 0.313262) / 3 = 0.417682, and
    (0.313262 + softplus(1) = 1.313262) / 3 = 0.542175.
    """
    policy_scores, reference_scores = pair([0.75, 0.75], [0.0, 0.0]), pair([0.25, 0.25], [0.5, 0.5])
    values = pairwise.cca(policy_scores, reference_scores, torch.tensor([False, True]), beta=2.0, weight=3.0)
    assert_close(values, torch.tensor([0.417682, 0.542175]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight, start", [(0.5, 1.5), (1.0, 2.0), (4.0, 1.25)])
def test_cca_starts_at_a_known_loss_and_pulls_its_sides_apart(weight: float, start: float) -> None:
    """In units of ln 2: (1 + weight) / max(weight, 1). The gradients are -1/2 and weight/2, over max(weight, 1)."""
    own, unlearned = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    zeros, different = pair([0.0, 0.0], [0.0, 0.0]), torch.tensor([False, False])
    values = pairwise.cca(Pair(own, unlearned), zeros, different, beta=1.0, weight=weight)
    assert_close(values.detach(), torch.full((2,), start * math.log(2)))
    values.sum().backward()
    assert own.grad is not None and unlearned.grad is not None
    assert_close(own.grad, torch.full((2,), -0.5 / max(weight, 1)))
    assert_close(unlearned.grad, torch.full((2,), 0.5 * weight / max(weight, 1)))


def test_cca_at_weight_1_pulls_at_first_as_dpo_does() -> None:
    """Where policy and reference agree both have gradients of -beta/2 and beta/2, so a beta carries over."""
    zeros, gradients = pair([0.0], [0.0]), []
    for loss in (partial(pairwise.cca, same_condition=torch.tensor([False]), weight=1.0), pairwise.dpo):
        sides = Pair(torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True))
        loss(sides, zeros, beta=7.0).sum().backward()
        gradients.append([side.grad.item() for side in sides])
    assert gradients == [[-3.5, 3.5], [-3.5, 3.5]]


@pytest.mark.parametrize("name, start", [("dpo", math.log(2)), ("hinge", 1.0), ("robust", math.log(2))])
def test_policy_at_reference_has_known_loss_and_gradient(name: str, start: float) -> None:
    extra = {"flip_rate": 0.2} if name == "robust" else {}
    chosen = torch.tensor([0.3, -2.0], requires_grad=True)
    policy = Pair(chosen, torch.tensor([0.1, 5.0]))
    values = getattr(pairwise, name)(policy, Pair(chosen.detach(), policy.rejected), beta=0.5, **extra)
    values.sum().backward()
    assert_close(values.detach(), torch.full((2,), start))
    assert (chosen.grad < 0).all()


def test_swapping_the_sides_negates_the_logit() -> None:
    """softplus(-z) - softplus(z) = -z, so the loss of the swapped pair differs by exactly z."""
    policy, reference = pair([0.5, -1.0], [0.2, 3.0]), pair([0.4, 0.0], [0.3, 0.5])
    z = 7.0 * (policy.margin - reference.margin)
    difference = pairwise.dpo(policy, reference, beta=7.0) - pairwise.dpo(
        Pair(*policy[::-1]), Pair(*reference[::-1]), beta=7.0
    )
    assert_close(difference, -z)


def test_robust_without_flips_is_dpo_and_half_flips_are_refused() -> None:
    policy, reference = pair([0.5, -1.0], [0.2, 3.0]), pair([0.4, 0.0], [0.3, 0.5])
    assert_close(pairwise.robust(policy, reference, beta=2.0, flip_rate=0.0), pairwise.dpo(policy, reference, beta=2.0))
    with pytest.raises(ValueError, match=r"flip_rate is 0\.5"):
        pairwise.robust(policy, reference, beta=2.0, flip_rate=0.5)


@pytest.mark.parametrize("variant, name, factor", [("sigmoid", "dpo", 1), ("hinge", "hinge", 1), ("ipo", "ipo", 4)])
def test_diffusers_beta_is_half_and_its_ipo_four_times(variant: str, name: str, factor: int) -> None:
    """diffusers' train_diffusion_dpo.py:851-890, run at beta 2500; ours is 5000 on the same numbers."""
    content = golden("diffusion_dpo")
    published = content["diffusers_variants"][f"{variant}_beta2500"]
    policy, reference, target = tensors(
        content["cases"]["base_beta5000"], torch.float32, "model_pred", "ref_pred", "target"
    )
    policy_scores, reference_scores = scores(policy, target), scores(reference, target)
    value = factor * getattr(pairwise, name)(policy_scores, reference_scores, beta=2 * published["beta_dpo"]).mean()
    assert_close(value.item(), published["expected"]["loss"], rtol=2e-5, atol=2e-5)


def step_scores(case: dict, schedule: dict, prediction: Tensor) -> Pair:
    """The mean Gaussian log-density of both next latents, from the definitions, in float64."""
    ab, prev, std = (
        torch.tensor(schedule[name], dtype=torch.float64).view(-1, 1, 1, 1)
        for name in ("alpha_prod_t", "alpha_prod_t_prev", "std_dev_t")
    )
    x_t, chosen, rejected = tensors(case, torch.float64, "latents", "next_latents_win", "next_latents_lose")
    mean = prev.sqrt() * (x_t - (1 - ab).sqrt() * prediction) / ab.sqrt() + (1 - prev - std**2).sqrt() * prediction
    law = torch.distributions.Normal(mean, std.expand_as(mean))
    return Pair(law.log_prob(chosen).mean((1, 2, 3)), law.log_prob(rejected).mean((1, 2, 3)))


@pytest.mark.parametrize("case", cases("spo"))
def test_clipped_dpo_gives_the_release_s_numbers(case: dict) -> None:
    """RockeyCoss/SPO, train_spo.py:488-586, in float64; its two forwards' gradients are summed.

    1e-8 and, of the densities, 1e-7: the release's schedule is in float32, and its own std is squared and rooted there.
    """
    policy, reference = tensors(case, torch.float64, "noise_pred_policy", "noise_pred_ref")
    policy.requires_grad_()
    given, expected = case["inputs"], case["expected"]
    policy_scores, reference_scores = (step_scores(case, case["schedule"], p) for p in (policy, reference))
    values = pairwise.clipped_dpo(policy_scores, reference_scores, beta=given["beta"], clip=given["eps"])
    values.mean().backward()
    wanted = torch.tensor(expected["grad_noise_pred_shared_forward"], dtype=torch.float64)
    assert_close(values.mean().item(), expected["loss"], rtol=1e-8, atol=1e-8)
    assert_close(policy.grad, wanted, rtol=1e-8, atol=1e-8)
    assert_close(policy_scores.chosen.tolist(), expected["logp_policy_w"], rtol=1e-7, atol=1e-7)
    assert_close(reference_scores.rejected.tolist(), expected["logp_ref_l"], rtol=1e-7, atol=1e-7)


def test_clipped_side_has_no_gradient() -> None:
    """Ratios e^0.2 and e^-0.2 are outside [0.9, 1.1]; e^0.05 is inside."""
    chosen, rejected = torch.tensor([0.2, 0.05, 0.2]), torch.tensor([0.05, -0.2, -0.2])
    for side in (chosen, rejected):
        side.requires_grad_()
    values = pairwise.clipped_dpo(Pair(chosen, rejected), pair([0.0] * 3, [0.0] * 3), beta=10.0, clip=0.1)
    values.sum().backward()
    assert (chosen.grad == 0).tolist() == [True, False, True]
    assert (rejected.grad == 0).tolist() == [False, True, True]
    largest = 10 * (math.log(1.1) - math.log(0.9))
    assert_close(values[2].item(), math.log1p(math.exp(-largest)), rtol=1e-6, atol=1e-7)


def test_clipped_dpo_inside_the_clip_is_dpo() -> None:
    policy, reference = pair([0.05, -0.02], [0.01, 0.03]), pair([0.0, 0.01], [0.02, 0.0])
    inside = pairwise.clipped_dpo(policy, reference, beta=10.0, clip=0.1)
    assert_close(inside, pairwise.dpo(policy, reference, beta=10.0))
    equal = pairwise.clipped_dpo(policy, policy, beta=1e4, clip=0.1)
    assert_close(equal, torch.full((2,), math.log(2)))


def test_a_soft_label_worked_out() -> None:
    """Scores 1 and 0, so d = 1; scores 2 and 2, a tie that is seen as one; a tie that is not."""
    values = pairwise.soft_preference(pair([1.0, 2.0, 1.0], [0.0, 2.0, 0.0]), torch.tensor([1.0, 0.5, 0.5]))
    sure = math.log1p(math.exp(-1))
    assert_close(values, torch.tensor([sure, 0.0, 0.5 * sure + 0.5 * math.log1p(math.e) - math.log(2)]))
