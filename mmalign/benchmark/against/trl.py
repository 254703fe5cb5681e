"""The loss of TRL's own DPOTrainer (`_compute_loss`), on vision-language models.

Rows are prompts with the chosen responses, then with the rejected, padded, and every image goes through the vision
tower once for each of its rows, for policy and reference: that is what TRL's collator gives its trainer. The tokens are
our reader's, so that both compute the same. TRL's collator also prepares every image twice; here that is done once.

What runs is TRL's code, called with the attributes of a trainer that it reads.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.benchmark.runs import Run
from mmalign.config import Recipe, Train
from mmalign.families import loading
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.language.tokens import Tokens
from mmalign.policy import FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rng import Draws

about = "TRL's DPOTrainer._compute_loss: two padded rows a pair, images encoded for each, policy and reference"
own = ("data.cache='off'", "train.attention='sdpa'", "train.compile=false", "train.pack='off'")

TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma")  # whose images' tensors join along one dimension


def available() -> None:
    """Look for TRL.

    Raises:
        ValueError: it is not installed, or too old.
    """
    _trainer()


def check(recipe: Recipe, processes: int) -> None:
    """Refuse what TRL's trainer does otherwise.

    Raises:
        ValueError: what.
    """
    if processes > 1:
        raise ValueError(
            f"--against trl: its loss is called here without what distributes it, and there are {processes} processes; "
            "use one"
        )
    method: Any = recipe.method
    if method.name != "dpo" or method.loss != "dpo" or method.label_smoothing or method.nll:
        raise ValueError(
            "--against trl: compares with DPO's own loss; expected method: {name: dpo} with loss: dpo, "
            f"label_smoothing: 0 and nll: 0, got name: {method.name} and the settings of the recipe"
        )
    kind = loading.model_type(resolve_model(recipe.model.path), recipe.model.revision)
    if kind not in TYPES:
        raise ValueError(f"--against trl: cannot give it images of a {kind}; use one of {', '.join(TYPES)}")


def alike(recipe: Recipe) -> Sequence[str]:
    """Nothing."""
    return ()


def prepare(policy: Policy) -> None:
    """TRL's fused head, on the policy and on a copy that is its reference."""
    from trl.trainer.utils import add_fused_lm_head

    _, outputs = _trainer()
    add_fused_lm_head(policy.unwrapped.model, outputs=outputs)
    if isinstance(policy.reference, FrozenCopy):
        add_fused_lm_head(policy.reference.model.model)


def optimizer(parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
    """The recipe's: TRL's default is fused AdamW as well."""
    return None


def loss(run: Run, batch: Any, draws: Draws, switch: Callable[[str], None]) -> Tensor:
    """See Peer."""
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
    """What TRL's collator makes of a batch: the images' tensors once a row."""
    tokens: Tokens = batch.tokens.to(device)
    model, facts = family.network.model, family.reader.facts
    told = decoder_inputs(model, facts, tokens.ids, tokens.mask, tokens.is_response, [])
    views = [batch.views[key].tensors for row in tokens.images for key in row]
    pixels = {name: torch.cat([view[name] for view in views]).to(device) for name in views[0]}
    return {**told, **pixels, "completion_mask": tokens.is_response.long()}


def _holder(run: Run, switch: Callable[[str], None]) -> Any:
    """The attributes of a trainer that `_compute_loss` reads."""
    policy, model = run.policy, run.policy.model.model
    method: Any = run.recipe.method

    def reference(**inputs: Any) -> Any:
        def run_it(net: Any) -> Any:
            return net.model(**inputs)

        switch("reference")
        found = policy.on_reference(run_it)
        switch("policy")
        return found

    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=run.learner.accelerator,
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
    """TRL's trainer, and the outputs of its fused head that it asks for.

    Raises:
        ValueError: TRL is not installed, or too old.
    """
    try:
        from trl import DPOTrainer
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--against trl: needs TRL, 1.16 or later, which cannot be imported ({error}); pip install 'trl>=1.16'"
        ) from None
    return DPOTrainer, ("log_probs", "entropy", "mean_logits", "is_top1")
