"""Pair losses equal those of TRL's trainers, where TRL is installed; the losses there are parts of its trainers."""

import importlib.util
from collections import defaultdict
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config.methods.vision_language import DPOConfig
from mmalign.losses import pairwise, wrappers
from mmalign.losses.pairwise import Pair
from mmalign.methods._pair_loss import pair_losses

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)

G = torch.Generator().manual_seed(1)
LENGTHS = torch.randint(2, 9, (2, 16), generator=G)
SUMS = tuple(Pair(*(-5 * torch.rand(2, 16, generator=G) - 0.1)) for _ in range(2))
MEANS = tuple(Pair(chosen / LENGTHS[0], rejected / LENGTHS[1]) for chosen, rejected in SUMS)
BETA = 0.3


@cache
def trainers() -> Any:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    return SimpleNamespace(dpo=DPOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def trl_dpo(types: list[str], weights: list[float], **options: Any) -> Tensor:
    """Return the losses [16] of DPOTrainer, which gets its log-probabilities as a model's outputs, pair by pair."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, **options}
    args = SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, loss_types=types, loss_weights=weights, beta=BETA, use_weighting=False, args=args,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **settings,
    )  # fmt: skip
    losses = []
    for n in range(16):
        mask = torch.zeros(2, 10, dtype=torch.long)
        logps = torch.zeros(2, 9)
        for side in (0, 1):
            length = int(LENGTHS[side, n])
            mask[side, 1 : length + 1] = 1
            logps[side, :length] = SUMS[0][side][n] / length
        outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps < 0)
        reference = {f"ref_{name}_logps": SUMS[1][k][n, None] for k, name in enumerate(("chosen", "rejected"))}
        inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, **reference}
        losses.append(trainers().dpo._compute_loss(trainer, lambda outputs=outputs, **_: outputs, inputs, False))
    return torch.stack(losses)


CASES = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ({"name": "exo", "label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    "nca_pair": ("nca", {}),
    "robust": ({"name": "robust", "flip_rate": 0.2}, {"label_smoothing": 0.2}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "sigmoid_norm": ("dpo", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pair_loss_is_trl_s(name: str) -> None:
    loss, options = CASES[name]
    cfg = DPOConfig(beta=BETA, loss=loss, score="mean" if name == "sigmoid_norm" else "auto")
    expected = trl_dpo([name], [1.0], **options)
    losses = pair_losses(cfg, None, *(MEANS if cfg.mean else SUMS))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_a_sum_is_trl_s() -> None:
    cfg = DPOConfig(beta=BETA, loss={"dpo": 0.8, "bco_pair": 0.2})
    torch.testing.assert_close(pair_losses(cfg, None, *SUMS), trl_dpo(["sigmoid", "bco_pair"], [0.8, 0.2]))


@pytest.mark.parametrize(
    ("divergence", "trl_name"), [("js", "js_divergence"), ("forward_kl",) * 2, ("alpha", "alpha_divergence")]
)
def test_a_divergence_is_trl_s(divergence: Any, trl_name: str) -> None:
    cfg = DPOConfig(beta=BETA, divergence=divergence)
    values = trl_dpo(["sigmoid"], [1.0], f_divergence_type=trl_name)
    torch.testing.assert_close(pair_losses(cfg, None, *SUMS), values, rtol=1e-4, atol=1e-6)


def test_losses_without_a_reference_are_trl_s() -> None:
    settings = {"alpha": 0.0, "accelerator": SimpleNamespace(device="cpu"), "beta": 2.0, "label_smoothing": 0.0}
    for name, scores, loss in (
        ("simpo", MEANS, partial(pairwise.simpo, gamma=0.5)),
        ("sigmoid", SUMS, pairwise.cpo),
    ):
        trainer = SimpleNamespace(loss_type=name, simpo_gamma=0.5, **settings)
        expected = trainers().cpo.cpo_loss(trainer, *scores[0])[0]
        torch.testing.assert_close(loss(scores[0], wrappers.without_reference(scores[0]), beta=2.0), expected)
    ratio = trainers().orpo.odds_ratio_loss(SimpleNamespace(**settings), *MEANS[0])[0]
    losses = pairwise.orpo(MEANS[0], wrappers.without_reference(MEANS[0]), beta=2.0)
    torch.testing.assert_close(losses, -MEANS[0].chosen - ratio, rtol=1e-5, atol=1e-6)
