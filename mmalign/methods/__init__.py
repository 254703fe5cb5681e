"""Methods, one file per paper: the file's name is the method's name in a recipe.

A method answers two questions: what is compared (`contrasts`, without gradients), and how much it hurts to prefer the
wrong one (`loss`). `contrasts` is complete before the first update, and holds the reference's scores, so that a method
that samples is not changed by its own updates halfway.

A method that draws its own images has `learns_from = "prompts"`, and is given prompts alone; one that looks at images
of latents has `needs_vae_decoder = True`. A `judge` in a method's settings (a RewardConfig) comes with every batch.
What is to be said when a method could make nothing of its batches is `hint_if_empty`.

A method of responses may ask for more than tokens and features: `needs_decoded_images(config)` for the decoded images,
`needs_other_images = True` for the chosen responses to the pairs' other images. One of images may ask for a
prompt of the rejected image's own, `needs_prompt_pairs = True`, or for so many pairs in a batch, `min_pairs = 2`. A
method whose settings name what may not be there, such as a similarity model, looks for it in `notes(config)`, before
anything is loaded; the lines that it gives are told at the beginning of a run.

What follows from a pair, its draws and the reference alone need not be worked out twice. A method whose `keeps(config)`
gives a `PrecomputeSpec` says so: then a pair's draws come again after `PrecomputeSpec.num_draws` epochs, and before the
training every pair that it will meet is worked out once and kept on disk. `contrasts` finds it in `batch.precomputed`,
which is None without a cache. It is the reference's scores in the one contrast of a batch, or what `keep(policy, batch,
config, draws)` gives by name, each [B, ...], where a method has such a function.

There are two kinds. What a method goes on to compute with is worked out pair by pair, and where nothing is kept by
`precompute_per_pair`: the same bits in any batch. The reference's scores (`PrecomputeSpec.scores`) are worked out in
the batches in which the training first meets the pairs: networks round by the batch, and a policy that has not moved is
to score exactly what its reference does. `reference_scores` finds them, or asks the reference. All of it must be there,
for where the whole network learns no reference is loaded beside it then. A method that needs the vision tower in the
training, for pictures that no file has, says so in `needs_vision_tower(config)`; any other is given no more pictures
once all is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmalign import registry
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Step:
    """What a method makes of one contrast.

    Attributes:
        losses: [B].
        weights: [B]; 0 for a padding row. The loop divides by the sum of the weights over everything it accumulates.
        metrics: each [B], averaged for the log with the same weights.
    """

    losses: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]


def epoch_rng(method: Any, cfg: Any, rng: KeyedRNG) -> KeyedRNG:
    """The draws of an epoch, for a method that keeps what it makes of a few out of these few."""
    spec: PrecomputeSpec | None = method.precompute_spec(cfg) if hasattr(method, "precompute_spec") else None
    return rng if spec is None else replace(rng, epoch=rng.epoch % spec.num_draws)


def compute_precomputed(method: Any, policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG) -> dict[str, Tensor]:
    """What a method keeps of a batch, by name, each [B, ...]."""
    own: Callable[..., dict[str, Tensor]] = getattr(method, "precompute", None) or partial(_scores_of, method)
    return own(policy, batch, cfg, epoch_rng(method, cfg, rng))


def _scores_of(method: Any, policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG) -> dict[str, Tensor]:
    return reference_scores_of(method.contrasts(policy, batch, cfg, rng))


def reference_scores_of(contrasts: Sequence[Any]) -> Scores:
    """The reference's scores in the one contrast that a method has made of a batch."""
    (contrast,) = contrasts
    scores: Scores | None = contrast.reference
    assert scores is not None, "what is kept is the reference's, and needs one"
    return scores


def precompute_per_pair(
    compute: Callable[..., dict[str, Tensor]], policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG
) -> dict[str, Tensor]:
    """What a method keeps of a batch [B, ...], worked out pair by pair: in another company it would round otherwise."""
    tensors = [compute(policy, single, cfg, rng) for single in batch.singles()]
    return {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}


def reference_scores(
    policy: Policy[Any], batch: Any, run: Callable[[nn.Module], dict[str, Tensor]]
) -> dict[str, Tensor] | None:
    """What `run` gives for the reference, each [B, ...]: as it is kept with the batch, or else by its network."""
    precomputed: dict[str, Tensor] | None = batch.precomputed
    return policy.on_reference(run) if precomputed is None else precomputed


C = TypeVar("C")


class Method(Protocol[C]):
    """What a file in this folder must offer; a module satisfies it."""

    @property
    def Config(self) -> type:
        """The hyper-parameters, a pydantic model with the paper's values as defaults."""

    @property
    def modality(self) -> str:
        """What it aligns, a key of `sections.SECTIONS`; the recipe's model and data are of that kind."""

    @property
    def needs_reference(self) -> bool:
        """Whether the policy must come with a reference."""

    def contrasts(self, policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG) -> list[C]:
        """Everything that needs no gradient, the reference's scores included."""

    def loss(self, policy: Policy[Any], contrast: C, cfg: Any) -> Step:
        """Run the policy, once."""


FOLDERS = ("text_to_image", "vision_language")


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(name for folder in FOLDERS for name in registry.names(f"{__name__}.{folder}"))


def find(name: str) -> Any:
    """Return the module of the method called `name`.

    Raises:
        ValueError: there is no such file.
    """
    return registry.find([f"{__name__}.{folder}" for folder in FOLDERS], name, "method.name: there is no method")
