"""Methods that learn from thumbs and from lists, on tiny models of the real classes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config.base import Choice
from mmalign.config.judged_losses import BCOLossConfig, GroupLossConfig, UnpairedLossConfig
from mmalign.data.loaders.batches import EncodedPairs, EncodedResponses
from mmalign.families.types import Moments
from mmalign.language.tokens import Tokens
from mmalign.methods import remember
from mmalign.methods._judged import AVERAGE
from mmalign.methods.text_to_image import diffusion_dpo, diffusion_kto, diffusion_lpo
from mmalign.methods.vision_language import dpo, kto, lipo
from tests.helpers.image_batches import ROWS, pairs
from tests.helpers.policies import full, gradient, run
from tests.helpers.response_batches import batch as response_pairs

NO_DROPOUT = {"caption_dropout": 0.0}
UNPAIRED, GROUP = Choice.sections(UnpairedLossConfig), Choice.sections(GroupLossConfig)
MEMORY = {AVERAGE: 0.0, "updates": 0.0}


def thumbs(batch: EncodedPairs, labels: list[float]) -> EncodedPairs:
    """Return the chosen images of pairs, with labels."""
    number = len(batch.rows)
    latents = Moments(batch.latents.mean[:number], batch.latents.std[:number])
    return replace(batch, latents=latents, sizes=batch.sizes[:number], scores=torch.tensor(labels)[:, None])


def lists(batch: EncodedPairs, scores: Tensor) -> EncodedPairs:
    """Return lists of K images, those of the pairs again and again with other brightness."""
    number, most = scores.shape
    mean = torch.cat([batch.latents.mean[(k % 2) * number :][:number] + 0.3 * (k // 2) for k in range(most)])
    sizes = batch.sizes[:number].repeat(most, 1)
    return replace(batch, latents=Moments(mean, torch.zeros_like(mean)), sizes=sizes, scores=scores)


def listed(family: Any, scores: Tensor) -> EncodedResponses:
    """Return the pairs' responses as lists of K."""
    batch, most = response_pairs(family), scores.shape[1]
    number = len(batch.rows)
    parts = [batch.tokens[(k % 2) * number :][:number] for k in range(most)]
    return replace(batch, tokens=Tokens.cat(parts), scores=scores)


def up_and_down(batch: EncodedResponses) -> EncodedResponses:
    """Return the chosen responses as thumbs."""
    number = len(batch.rows)
    return replace(batch, tokens=batch.tokens[:number], scores=torch.tensor([[1.0], [0.0], [1.0]])[:number])


# --------------------------------------------------------------------------------------------------------------- images


def test_an_image_s_loss_does_not_depend_on_its_batch(sd: Any) -> None:
    policy = replace(full(sd, 0.02), memory={AVERAGE: 1e-4, "updates": 3.0})
    cfg, labels = diffusion_kto.Config(**NO_DROPOUT), [1.0, 0.0, 0.0, 1.0]
    together = run(diffusion_kto, policy, thumbs(pairs(sd), labels), cfg).losses
    for row, label, loss in zip(ROWS, labels, together, strict=True):
        alone = run(diffusion_kto, policy, thumbs(pairs(sd, [row]), [label]), cfg).losses
        torch.testing.assert_close(alone[0], loss, rtol=1e-5, atol=1e-6)


def test_kto_is_one_half_at_the_reference_and_weights_scale_it(sd: Any) -> None:
    """Its gradient raises the score of a liked image and lowers that of another."""
    cfg = diffusion_kto.Config(**NO_DROPOUT, liked_weight=2.0, disliked_weight=0.5)
    step = run(diffusion_kto, replace(full(sd), memory=MEMORY), thumbs(pairs(sd), [1.0, 0.0, 1.0, 0.0]), cfg)
    torch.testing.assert_close(step.losses.detach(), torch.tensor([1.0, 0.25, 1.0, 0.25]))
    assert step.metrics["accuracy"].tolist() == [0.5] * 4


def test_liked_and_disliked_images_have_opposite_gradients(sd: Any) -> None:
    policy, cfg = replace(full(sd), memory=MEMORY), diffusion_kto.Config(**NO_DROPOUT)
    up, down = (
        gradient(policy, run(diffusion_kto, policy, thumbs(pairs(sd), [label] * 4), cfg)) for label in (1.0, 0.0)
    )
    assert up.any()
    torch.testing.assert_close(up, -down)


def test_baseline_is_the_mean_gain_of_the_update_before(sd: Any) -> None:
    policy = replace(full(sd, 0.02), memory=dict(MEMORY))
    cfg = diffusion_kto.Config(**NO_DROPOUT, loss=BCOLossConfig())
    step = run(diffusion_kto, policy, thumbs(pairs(sd), [1.0, 0.0, 1.0, 0.0]), cfg)
    mean = {name: values.mean() for name, values in step.metrics.items()}
    remember(diffusion_kto.requirements(cfg).memory, policy, mean)
    assert policy.memory == {AVERAGE: pytest.approx(float(mean["output gain"])), "updates": 1.0}
    after = run(diffusion_kto, policy, thumbs(pairs(sd), [1.0, 0.0, 1.0, 0.0]), cfg)
    assert after.metrics["baseline"].tolist() == pytest.approx([float(mean["output gain"])] * 4)


def test_metrics_are_of_the_baseline_that_the_loss_reads(sd: Any) -> None:
    """KTO's is at least 0: with a negative average gain, an output at the reference is at the baseline."""
    policy = replace(full(sd), memory={**MEMORY, AVERAGE: -0.1})
    step = run(diffusion_kto, policy, thumbs(pairs(sd), [1.0, 0.0, 1.0, 0.0]), diffusion_kto.Config(**NO_DROPOUT))
    assert step.losses.tolist() == [0.5] * 4 == step.metrics["accuracy"].tolist()
    assert step.metrics["baseline"].tolist() == [0.0] * 4 == step.metrics["logit"].tolist()


def test_a_list_of_two_images_is_diffusion_dpo(sd: Any) -> None:
    policy, batch = full(sd, 0.02), pairs(sd)
    scores = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    listwise = run(diffusion_lpo, policy, replace(batch, scores=scores), diffusion_lpo.Config())
    pairwise = run(diffusion_dpo, policy, batch, diffusion_dpo.Config())
    torch.testing.assert_close(listwise.losses, pairwise.losses)
    for name in ("accuracy", "logit", "saturated"):
        assert torch.equal(listwise.metrics[name], pairwise.metrics[name])
    assert torch.equal(listwise.metrics["worst error"], pairwise.metrics["rejected error"])


def test_more_images_in_a_batch_s_other_lists_change_nothing(sd: Any) -> None:
    """A list of three beside one of five: its noise, images and loss are those of a batch of threes."""
    policy, nan, cfg = full(sd, 0.02), torch.nan, diffusion_lpo.Config(beta=10.0)
    long = torch.tensor([[3.0, 1.0, 2.0, nan, nan], [1.0, 2.0, 3.0, 5.0, 4.0]])
    both = run(diffusion_lpo, policy, lists(pairs(sd, ROWS[:2]), long), cfg)
    alone = run(diffusion_lpo, policy, lists(pairs(sd, ROWS[:1]), long[:1, :3]), cfg)
    torch.testing.assert_close(both.losses[:1], alone.losses)


# ------------------------------------------------------------------------------------------------------------ responses


def test_a_list_of_two_responses_is_dpo(llava: Any) -> None:
    policy, batch = full(llava, 0.02), response_pairs(llava)
    scores = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    cfg = lipo.Config(beta=0.1, loss="plackett_luce")  # type: ignore[arg-type]
    listwise = run(lipo, policy, replace(batch, scores=scores), cfg)
    torch.testing.assert_close(listwise.losses, run(dpo, policy, batch, dpo.Config()).losses)


def test_kto_of_responses_learns_from_the_sign_of_the_label(llava: Any) -> None:
    policy = replace(full(llava), memory=MEMORY)
    step = run(kto, policy, up_and_down(response_pairs(llava)), kto.Config())
    torch.testing.assert_close(step.losses.detach(), torch.full((3,), 0.5))
    assert step.metrics["liked"].tolist() == [1.0, 0.0, 1.0]
    assert step.metrics["output tokens"].tolist() == response_pairs(llava).tokens.num_tokens[:3].tolist()


def test_losses_without_a_reference_need_none() -> None:
    for name in GROUP:
        needs = lipo.requirements(lipo.Config(loss=name))  # type: ignore[arg-type]
        assert needs.reference == (name not in ("pro", "rrhf")) and needs.learns_from == "lists"


# -------------------------------------------------------------------------------------------------------------- updates


def updated(method: Any, policy: Any, batch: Any, cfg: Any, updates: int = 2) -> list[float]:
    """Return the mean losses of some updates, which move every weight that has a gradient."""
    needs = method.requirements(cfg)
    policy = replace(policy, memory=dict(needs.memory.start) if needs.memory is not None else {})
    policy = policy if needs.reference else replace(policy, reference=None)
    optimizer, losses = torch.optim.SGD(policy.trainable(), lr=1e-5 if cfg.beta > 1 else 1e-3), []
    for _ in range(updates):
        step = run(method, policy, batch, cfg)
        assert gradient(policy, step).isfinite().all()
        torch.nn.utils.clip_grad_norm_(policy.trainable(), 1.0)
        optimizer.step()
        remember(needs.memory, policy, {name: values.mean() for name, values in step.metrics.items()})
        losses.append(step.losses.mean().item())
    return losses


LISTED = torch.tensor([[2.0, 0.5, 1.0], [1.0, 3.0, torch.nan], [0.0, 0.0, 4.0], [1.0, 2.0, 3.0]])
CASES: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
    **{f"diffusion_kto {n}": (diffusion_kto, {"loss": n}, lambda f: thumbs(pairs(f), [1, 0, 0, 1])) for n in UNPAIRED},
    **{
        f"diffusion_lpo {n}": (diffusion_lpo, {"loss": n}, lambda f: lists(pairs(f), LISTED))
        for n in GROUP
        if n not in ("pro", "rrhf")
    },
    **{f"kto {n}": (kto, {"loss": n}, lambda f: up_and_down(response_pairs(f))) for n in UNPAIRED},
    **{f"lipo {n}": (lipo, {"loss": n}, lambda f: listed(f, LISTED[:3])) for n in GROUP},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_updates_of_every_loss_lower_it(name: str, request: pytest.FixtureRequest) -> None:
    method, settings, batch_of = CASES[name]
    family = request.getfixturevalue("sd" if name.startswith("diffusion") else "llava")
    batch = batch_of(family)
    if settings["loss"] == "copg":  # its target is a margin in the unit of the logit
        batch = replace(batch, scores=batch.scores / 10)
    losses = updated(method, full(family), batch, method.Config(**settings))
    assert losses[1] < losses[0]


def test_losses_of_responses_are_refused_for_images() -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        diffusion_lpo.Config(loss="pro")  # type: ignore[arg-type]
