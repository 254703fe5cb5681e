"""Loss of TRL's own DPOTrainer (`_compute_loss`) for vision-language models.

Rows are prompts with the chosen responses, then with the rejected, padded. Every image passes through the vision tower
once for each of its rows, for policy and reference, as with TRL's collator and trainer. The tokens come from our
processor, so that both compute the same. TRL's collator also prepares every image twice; here that is done once.

An object with the trainer attributes that TRL's code reads stands in for the trainer.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.commands._bench_run import Run
from mmalign.config import Recipe, Train
from mmalign.config.losses import DPOLossConfig
from mmalign.families import loading
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.language.tokens import Tokens
from mmalign.policy import FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rng import KeyedRNG

about = "DPOTrainer._compute_loss of TRL: two padded rows per pair, an image encoded for each, policy and reference"
own = ("data.cache='off'", "train.attention='sdpa'", "train.compile=false", "train.pack_responses='off'")

TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma")  # types whose image tensors join along one axis


def available() -> None:
    """Import TRL."""
    _trainer()


def check(recipe: Recipe, num_processes: int) -> None:
    """Refuse recipes that TRL's trainer computes differently."""
    if num_processes > 1:
        raise ValueError(f"trl: got {num_processes} processes; expected 1, since nothing here distributes its loss")
    method: Any = recipe.method
    if method.name != "dpo" or method.loss != DPOLossConfig() or method.nll:
        raise ValueError(
            f"trl: got method.name: {method.name} and its settings; expected method: {{name: dpo}} with loss: dpo and "
            "nll: 0"
        )
    kind = loading.model_type(resolve_model(recipe.model.path), recipe.model.revision)
    if kind not in TYPES:
        raise ValueError(f"trl: got model.path of a {kind}; expected one of {', '.join(TYPES)}, for its images")


def alike(recipe: Recipe) -> Sequence[str]:
    """Return nothing."""
    return ()


def prepare(policy: Policy) -> None:
    """Add TRL's fused head to the policy, and to a copy that is its reference."""
    from trl.trainer.utils import add_fused_lm_head

    _, outputs = _trainer()
    add_fused_lm_head(policy.unwrapped.model, outputs=outputs)
    if isinstance(policy.reference, FrozenCopy):
        add_fused_lm_head(policy.reference.model.model)


def optimizer(parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
    """Return None for the recipe's optimizer: TRL's default is fused AdamW as well."""
    return None


def loss(run: Run, batch: Any, rng: KeyedRNG, switch: Callable[[str], None]) -> Tensor:
    """Return the mean loss of a batch."""
    trainer, _ = _trainer()
    family, policy = run.policy.family, run.policy
    inputs = _inputs(family, batch, run.device)
    switch("policy")
    half = family.loading.half
    precision = torch.autocast(run.device.type, half) if half is not None else contextlib.nullcontext()
    with precision:
        result: Tensor = trainer._compute_loss(_holder(run, switch), policy.model.model, inputs, False)
    return result


def _inputs(family: Any, batch: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of TRL's collator for a batch, with an image's tensors once for each row."""
    tokens: Tokens = batch.tokens.to(device)
    model, facts = family.network.model, family.processor.quirks
    inputs = decoder_inputs(model, facts, tokens.ids, tokens.mask, tokens.is_response, [])
    views = [batch.views[key].tensors for row in tokens.images for key in row]
    pixels = {name: torch.cat([view[name] for view in views]).to(device) for name in views[0]}
    return {**inputs, **pixels, "completion_mask": tokens.is_response.long()}


def _holder(run: Run, switch: Callable[[str], None]) -> Any:
    """Return an object with the trainer attributes that `_compute_loss` reads."""
    policy, model = run.policy, run.policy.model.model
    method: Any = run.recipe.method

    def reference(**inputs: Any) -> Any:
        switch("reference")
        result = policy.on_reference(lambda net: net.model(**inputs))
        switch("policy")
        return result

    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=run.train_state.accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False}),
        beta=method.beta,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def _trainer() -> tuple[Any, tuple[str, ...]]:
    """Return TRL's trainer, and the outputs that it requests from its fused head.

    Raises:
        ValueError: TRL is not installed, or too old.
    """
    try:
        from trl import DPOTrainer
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401
    except ImportError as error:
        raise ValueError(f"trl: got {error}; expected TRL 1.16 or later; pip install 'trl>=1.16'") from None
    return DPOTrainer, ("log_probs", "entropy", "mean_logits", "is_top1")
