"""Learned rates of wrong labels and a learned beta: worked values, laws, and what a method remembers and tells."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from mmalign import methods
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.config.methods.kinds import LabelNoiseConfig
from mmalign.families.base import VisionLanguage
from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from mmalign.losses.wrappers import Labels
from mmalign.methods._pair_loss import label_metrics, pair_losses
from mmalign.methods._pair_memory import RATE, SIZE, pair_memory, posteriors, present
from mmalign.methods.text_to_image import diffusion_dpo, instruct_engine
from mmalign.methods.vision_language import bdhs, dpo, mdpo, povid
from mmalign.training import checkpoint
from tests.helpers import recipes, response_batches
from tests.helpers.data_files import pick_a_pic
from tests.helpers.golden import golden
from tests.helpers.policies import adapted, run

VALUES = golden("objectives")
GIVEN = {name: torch.tensor(values, dtype=torch.float64) for name, values in VALUES["inputs"].items()}
SCORES = Pair(GIVEN["pc"], GIVEN["pr"]), Pair(GIVEN["rc"], GIVEN["rr"])
Z = 0.5 * (SCORES[0].margin - SCORES[1].margin)
NOISY = dpo.Config(beta=0.5, label_noise=LabelNoiseConfig())


def labels(*annotators: str, preference: float = 1.0) -> Labels:
    ones = torch.ones(len(annotators), dtype=torch.float64)
    return Labels(preference * ones, 0 * ones, ones, annotators)


def test_the_rate_of_wrong_labels_has_its_worked_values() -> None:
    share, right = posteriors(NOISY, None, Z)
    assert share.tolist() == pytest.approx(VALUES["lcpo posterior eta=.9"], abs=1e-9)
    assert torch.allclose(share, right, rtol=0, atol=1e-12)
    assert pair_losses(NOISY, None, *SCORES).tolist() == pytest.approx(VALUES["lcpo loss"], abs=1e-9)
    memory = pair_memory(NOISY)
    assert memory is not None
    after = memory.remember(memory.start, {"label right": float(right.mean())})
    assert 1 - after[RATE] == pytest.approx(VALUES["lcpo eta after a=.1"], abs=1e-9)


def test_a_rate_near_zero_leaves_the_loss() -> None:
    sure = NOISY.model_copy(update={"label_noise": LabelNoiseConfig(start=1e-12)})
    assert torch.allclose(pair_losses(sure, None, *SCORES), pairwise.dpo(*SCORES, beta=0.5), rtol=0, atol=1e-10)


def test_the_posterior_has_no_gradient_and_swapping_a_pair_swaps_it() -> None:
    sides = Pair(*(side.clone().requires_grad_() for side in SCORES[0]))
    pair_losses(NOISY, None, sides, SCORES[1]).sum().backward()
    share, _ = posteriors(NOISY, None, Z)
    slope = -0.5 * (share * torch.sigmoid(-Z) - (1 - share) * torch.sigmoid(Z))
    assert torch.allclose(sides.chosen.grad, slope, rtol=0, atol=1e-12)
    # A label of preference 0 is the swapped pair's
    gap = partial(posteriors, NOISY)
    assert torch.allclose(gap(labels("", "", "", preference=0.0), -Z)[0], 1 - gap(None, Z)[0], rtol=0, atol=1e-12)
    assert torch.allclose(gap(labels("", "", "", preference=0.5), Z)[0], torch.sigmoid(Z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js", "forward_kl", "alpha"])
def test_the_rate_is_learned_from_the_posterior_of_the_loss(divergence: Any) -> None:
    """With sure labels the posterior of the better side is that of a right label, and the loss is linear in it."""
    cfg = NOISY.model_copy(update={"divergence": divergence})
    right = label_metrics(cfg, None, SCORES[0]._asdict(), SCORES[1]._asdict())["label right"]
    sure = partial(pair_losses, cfg.model_copy(update={"label_noise": None}), None)
    backward = (Pair(side.rejected, side.chosen) for side in SCORES)
    expected = right * sure(*SCORES) + (1 - right) * sure(*backward)
    torch.testing.assert_close(pair_losses(cfg, None, *SCORES), expected, rtol=0, atol=1e-12)


def test_a_learned_rate_never_ends_at_certainty() -> None:
    """Labels that all agree, then one that the policy contradicts beyond float32: its posterior is a number."""
    cfg = dpo.Config(label_noise={"speed": 1.0, "annotators": {"kim": 0.4}})
    memory = pair_memory(cfg)
    assert memory is not None
    after = memory.remember(memory.start, {"label right": 0.5, "label right of kim": 0.0, "labels of kim": 0.5})
    assert after == {RATE: pytest.approx(1e-4), f"{RATE} of kim": pytest.approx(1 - 1e-4)}
    given = Labels(torch.ones(2), torch.zeros(2), torch.ones(2), ["", "kim"])
    for gap in (torch.tensor([-200.0, 200.0]), torch.tensor([200.0, -200.0])):
        for cfg_now in (present(cfg, after), dpo.Config(label_noise={"start": 1e-12})):
            assert all(values.isfinite().all() for values in posteriors(cfg_now, given, gap))


def test_alternating_learns_the_rate_of_each_annotator() -> None:
    """Labels of a known model with known flips: 5 % of all, 30 % of lee; the model itself is fixed."""
    g = torch.Generator().manual_seed(3)
    cfg = dpo.Config(label_noise={"annotators": {"lee": 0.1}, "speed": 0.5})
    names = ["lee", "kim"] * 2000
    z = 4 * torch.randn(4000, generator=g, dtype=torch.float64)
    true = torch.rand(4000, generator=g, dtype=torch.float64) < torch.sigmoid(z)
    rates = torch.tensor([0.3, 0.05], dtype=torch.float64).repeat(2000)
    wrong = torch.rand(4000, generator=g, dtype=torch.float64) < rates
    gap = torch.where(true ^ wrong, z, -z)
    memory, method = pair_memory(cfg), dict(pair_memory(cfg).start)  # type: ignore[union-attr]
    assert memory is not None
    for _ in range(60):
        _, right = posteriors(present(cfg, method), labels(*names), gap)
        own = torch.tensor([name == "lee" for name in names], dtype=torch.float64)
        means = {"label right": right, "label right of lee": own * right, "labels of lee": own}
        method = memory.remember(method, {name: float(x.mean()) for name, x in means.items()})
    assert method[f"{RATE} of lee"] == pytest.approx(0.3, abs=0.05)
    assert method[RATE] == pytest.approx(0.05, abs=0.05)
    assert memory.describe(method) == f"wrong labels: {method[RATE]:.1%}, lee {method[f'{RATE} of lee']:.1%}"
    absent = memory.remember(method, {"label right": 0.9, "label right of lee": 0.0, "labels of lee": 0.0})
    assert absent[f"{RATE} of lee"] == method[f"{RATE} of lee"] and absent[RATE] != method[RATE]


def test_beta_follows_the_margins_down_from_the_recipe_s() -> None:
    """Gradient factor 0.2: |z| is logit(0.8) = 1.386294, so margins of 0.002 give beta 693.147181."""
    cfg = diffusion_dpo.Config(beta=5000.0, auto_beta={"decay": 0.5})
    memory = pair_memory(cfg)
    assert memory is not None and present(cfg, memory.start).beta == pytest.approx(5000)
    assert present(cfg, {SIZE: 0.002}).beta == pytest.approx(693.147181, abs=1e-5)
    assert present(cfg, {SIZE: 0.0}).beta == 5000.0
    # A mean |z| of 20 at the recipe's beta is a margin of 0.004
    after = memory.remember(memory.start, {"logit size": 20.0})
    assert after[SIZE] == pytest.approx(0.5 * memory.start[SIZE] + 0.5 * 0.004)
    assert memory.describe({SIZE: 0.002}) == "beta: 693"
    steady = {SIZE: 0.002}
    for _ in range(3):  # margins of one size hold beta where the mean |z| is the wished one
        steady = memory.remember(steady, {"logit size": 0.002 * present(cfg, steady).beta})
    assert steady[SIZE] == pytest.approx(0.002)


def test_methods_learn_and_log_what_the_memory_reads(llava: VisionLanguage) -> None:
    policy, batch = adapted(llava, moved=0.1), response_batches.batch(llava)
    for method in (dpo, mdpo):
        cfg: Any = method.Config(beta=1.0, auto_beta={}, label_noise={"annotators": {"kim": 0.4}}, nll=0.1)
        memory = methods.requirements_of(cfg).memory
        assert memory is not None
        learning = replace(policy, memory=dict(memory.start))
        given = replace(batch, labels=Labels(torch.ones(3), torch.zeros(3), torch.ones(3), ["kim", "", "lee"]))
        step = run(method, learning, given, cfg)
        means = {name: values.mean() for name, values in step.metrics.items()}
        methods.remember(memory, learning, means)
        changed = {name for name, value in learning.memory.items() if value != memory.start[name]}
        assert changed == {RATE, f"{RATE} of kim", SIZE}
        assert not torch.equal(run(method, learning, given, cfg).losses, step.losses)
        json.dumps(learning.memory)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (partial(dpo.Config, loss="simpo", auto_beta={}), "margins against a reference, which simpo has not"),
        (partial(instruct_engine.Config, label_noise={}), "both images of a pair fit their own prompts"),
        (partial(dpo.Config, label_noise={"start": 0.5}), "less than 0.5"),
        (partial(dpo.Config, divergence="js", auto_beta={}), "divergence: js changes them"),
        (partial(bdhs.Config, mode="mixed", label_noise={}), "mode mixed replaces the pairs"),
        (partial(bdhs.Config, gamma=0, label_noise={}), "gamma 0 replaces the pairs"),
        (partial(povid.Config, combine="paper", label_noise={}), "combine: paper has no loss of the data's pair"),
        (partial(povid.Config, gamma=0, label_noise={}), "gamma 0 has no loss of the data's pair"),
    ],
)
def test_what_cannot_be_learned_is_refused(build: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        build()


def memory_of(output: Path) -> dict[str, float]:
    path = checkpoint.latest(output, resumable=True)
    assert path is not None
    memory: dict[str, float] = checkpoint.read(path, None).state["memory"]
    return memory


@pytest.mark.slow
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tiny_sd15: Path, tmp_path: Path) -> None:
    """Labels, rates and beta of two updates at once, and of one and another; the verdict tells what was learned."""
    rows = pq.read_table(pick_a_pic(tmp_path / "plain.parquet")).to_pylist()
    given = [{**row, "annotator": "kim", "preference": 0.9, "weight": 1.5} for row in rows]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "pairs.parquet")
    method = {"name": "diffusion_dpo", "auto_beta": {}, "label_noise": {"annotators": {"kim": 0.2}}, "sft": 0.1}
    whole, halves = (
        recipes.diffusion(tiny_sd15, tmp_path / "pairs.parquet", tmp_path / name, method=method)
        for name in ("whole", "halves")
    )
    trained = [
        train(load_recipe({**recipe, "train": {**recipe["train"], "steps": steps}}))
        for recipe, steps in ((whole, 2), (halves, 1), (halves, 2))
    ]
    assert memory_of(tmp_path / "whole") == memory_of(tmp_path / "halves")
    assert "wrong labels: 10.0%, kim " in trained[0].verdict and "; beta: " in trained[0].verdict
    assert trained[0].verdict == trained[2].verdict and trained[2].steps == 2
