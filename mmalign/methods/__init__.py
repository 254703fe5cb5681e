"""Methods, one file per paper: the file's name is the method's name in a recipe.

A method answers two questions: what is compared (`contrasts`, without gradients), and how much it hurts to prefer the
wrong one (`loss`). `contrasts` is complete before the first update and holds the reference's scores. So a method that
samples is not changed by its own updates halfway. `requirements` states what the method needs of a run.

Results that follow from a pair, its random draws and the reference alone can be precomputed once (`PrecomputeSpec`). A
pair's draws then repeat after `num_draws` epochs, and `contrasts` finds the tensors in `batch.precomputed`, which is
None without a cache. There are two kinds. Tensors to compute with are made pair by pair (`precompute_per_pair`), with
the same bits in any batch. Reference scores (`PrecomputeSpec.scores`) are made in the batches in which training first
meets the pairs: networks round by the batch, and a policy that has not moved must score exactly what its reference
does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmalign import registry
from mmalign.data.caches.precompute import Compute, PrecomputeSpec
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


@dataclass(frozen=True)
class Requirements:
    """What a method needs of a run.

    Attributes:
        reference: a reference network, or its cached scores.
        prompts_only: prompts without images: the method generates its own.
        prompt_pairs: pairs with a prompt for each image.
        decoded_images: the decoded images of response pairs.
        other_images: the chosen responses once more, with the pairs' other images.
        vae_decoder: the decoder of the autoencoder, on the device.
        vision_tower: the vision tower during training, for images that are in no file.
        min_pairs: the smallest batch, in pairs.
        precompute: tensors to compute once per pair and draw; None for nothing.
        hint_if_empty: advice for a run in which the method could make nothing of its batches.
        check: looks for packages and files that the hyper-parameters name, before anything is loaded; raises ValueError
            where one is missing, and returns lines for the log.
    """

    reference: bool = True
    prompts_only: bool = False
    prompt_pairs: bool = False
    decoded_images: bool = False
    other_images: bool = False
    vae_decoder: bool = False
    vision_tower: bool = False
    min_pairs: int = 1
    precompute: PrecomputeSpec | None = None
    hint_if_empty: str = ""
    check: Callable[[], Sequence[str]] = tuple


def requirements_of(config: Any) -> Requirements:
    """Return the requirements of the method that a recipe's `method` section configures."""
    requirements: Requirements = find(config.name).requirements(config)
    return requirements


def epoch_rng(method: Method[Any], cfg: Any, rng: KeyedRNG) -> KeyedRNG:
    """Return the epoch's RNG, cycling through the precomputed draws if the method has any."""
    spec = method.requirements(cfg).precompute
    return rng if spec is None else replace(rng, epoch=rng.epoch % spec.num_draws)


def compute_precomputed(
    method: Method[Any], policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG
) -> dict[str, Tensor]:
    """Return the tensors that a method precomputes for a batch, by name, each [B, ...]."""
    spec, rng = method.requirements(cfg).precompute, epoch_rng(method, cfg, rng)
    if spec is not None and spec.compute is not None:
        return spec.compute(policy, batch, cfg, rng)
    return reference_scores_of(method.contrasts(policy, batch, cfg, rng))


def cached_scores(
    num_draws: int, settings: Mapping[str, str | int | float], compute: Compute | None = None
) -> PrecomputeSpec | None:
    """Return the spec of cached reference scores; None for 0 draws, which are new in every epoch."""
    return PrecomputeSpec(num_draws, settings, scores=True, compute=compute) if num_draws else None


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
        """What it aligns, a key of `config.SECTIONS`; the recipe's model and data are of that kind."""

    def requirements(self, cfg: Any) -> Requirements:
        """State what the method needs, given its hyper-parameters."""

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
