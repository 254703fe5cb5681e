"""Methods, one file per paper: the file's name is the method's name in a recipe.

A method from outside is named by its configuration, "module:Class"; its functions stand beside the class.

A method is two functions. `contrasts` returns the items to compare, without gradients and with the reference's scores.
`loss` returns the cost of preferring the wrong item. All contrasts of a batch exist before its first update, so a
method that samples from the policy sees one state of it. `requirements` states what the method needs of a run.

Results that depend only on a pair, its random draws and the reference can be precomputed once (`PrecomputeSpec`). A
pair's draws then repeat after `num_draws` epochs. `contrasts` reads the tensors from `batch.precomputed`, which is None
without a cache. Precomputed reference scores (`PrecomputeSpec.scores`) replace the reference network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from torch import Tensor, nn

from mmalign import registry
from mmalign.config import MethodConfig, Rewards
from mmalign.config.base import LaggingConfig
from mmalign.config.evaluation import Combine
from mmalign.config.methods import find_method
from mmalign.data.caches.precompute import PrecomputeSpec
from mmalign.data.formats.layouts import Learning
from mmalign.data.loaders.batches import EncodedPairs, EncodedPrompts, EncodedResponses, JudgedImages
from mmalign.families.base import Family
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Step:
    """Losses, weights and metrics of one contrast.

    Attributes:
        losses: one loss per pair [B].
        weights: weights of the pairs [B]; 0 for padding. The loop divides by their sum over an accumulated update.
        metrics: values [B] by name, averaged for the log with the same weights; "loss" is one of them.
        summary: values by name, one for each real row of the batch, averaged for the log without weights. They say what
            was generated, also for rows that nothing is learned from.
    """

    losses: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]
    summary: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Numbers of a run's past that a method's `loss` reads as `policy.memory`, such as KTO's baseline.

    An update reads the numbers that the update before it left, so they lag by one update. In return the loss of a row
    does not depend on the other rows of its batch, and a resumed run repeats an uninterrupted one.

    Attributes:
        start: the numbers before the first update, by name.
        remember: map the numbers and an update's mean metrics, over all rows of all processes, to the next numbers.
        describe: what the numbers say at the end of a run, for the verdict; empty for nothing.
        annotators: annotators with numbers of their own, each of which some training pair has.
    """

    start: Mapping[str, float]
    remember: Callable[[Mapping[str, float], Mapping[str, float]], dict[str, float]]
    describe: Callable[[Mapping[str, float]], str] = lambda _: ""
    annotators: Collection[str] = ()


class Contrasts(NamedTuple):
    """Contrasts of a batch: their number, the pairs of outputs in each, and the rows of the network for a pair."""

    number: int
    pairs: int
    rows_per_pair: int = 2


@dataclass(frozen=True)
class Requirements:
    """Needs of a method.

    Attributes:
        reference: a reference network, or its cached scores.
        labels: the fields of the pairs' labels that the loss reads.
        learns_from: kind of the rows: pairs, thumbs (one output with a label), lists (several outputs with scores), or
            prompts, for a method that generates its own images or responses.
        liked_share: share of liked outputs among those of an epoch; None takes every thumb once.
        ties: pairs of images neither of which is preferred, with a preference of 1/2.
        rejected: rejected responses; a method without this need also takes rows of answers alone.
        prompt_pairs: pairs with a prompt for each image.
        decoded_images: the decoded images of response pairs.
        other_images: the chosen responses again, under the pairs' other images.
        vae_decoder: the autoencoder's decoder, on the device.
        vision_tower: the vision tower during training, for images that no file contains.
        contrasts: the contrasts of a batch of so many rows.
        min_pairs: the smallest batch size, in pairs.
        new_tokens: most tokens that the method adds to a prompt; prompts that leave no room for them are skipped.
        reward: the judge of a batch's images, or of responses that the policy generates.
        combine: the combination of several judges.
        judges_groups: a call of the judge has all images of its prompts, so that it may compare them.
        reward_key: the judge's key in a recipe.
        precompute: tensors to compute once per pair and draw; None for none.
        memory: numbers of the run's past that the loss reads; None for none.
        old: the lagging copy that generates in the policy's place (`policy.as_old`); None for the policy itself.
        measured_by: settings for measuring a run, if contrasts of the method's own follow the policy; None for its own.
        hint_if_empty: advice for a run whose batches all gave nothing to learn from.
        check: a check, before loading, of the packages and files that the hyper-parameters name. It raises ValueError
            if one is missing and returns lines for the log.
    """

    reference: bool = True
    labels: Sequence[str] = ()
    learns_from: Learning = "pairs"
    liked_share: float | None = None
    ties: bool = False
    rejected: bool = True
    prompt_pairs: bool = False
    decoded_images: bool = False
    other_images: bool = False
    vae_decoder: bool = False
    vision_tower: bool = False
    contrasts: Callable[[int], Contrasts] = lambda rows: Contrasts(1, rows)
    min_pairs: int = 1
    new_tokens: int = 0
    reward: Rewards | None = None
    combine: Combine = "sum"
    judges_groups: bool = False
    reward_key: str = "method.reward"
    precompute: PrecomputeSpec | None = None
    memory: Memory | None = None
    old: LaggingConfig | None = None
    measured_by: MethodConfig | None = None
    hint_if_empty: str = ""
    check: Callable[[], Sequence[str]] = tuple

    @property
    def generates(self) -> bool:
        """True for a method that generates its own images or responses from prompts."""
        return self.learns_from == "prompts"

    @property
    def learning(self) -> Learning:
        """Kind of the image rows to read; prompts are those of pairs."""
        return "pairs" if self.learns_from == "prompts" else self.learns_from


def requirements_of(config: MethodConfig) -> Requirements:
    """Return the requirements of the method that a recipe's `method` section configures."""
    return find(config.name).requirements(config)


def remember(memory: Memory | None, policy: Policy, metrics: Mapping[str, Tensor]) -> None:
    """Update the policy's memory in place from an update's mean metrics; does nothing for a method without memory."""
    if memory is not None:
        policy.memory.update(memory.remember(policy.memory, {name: float(mean) for name, mean in metrics.items()}))


def epoch_rng(spec: PrecomputeSpec | None, rng: KeyedRNG) -> KeyedRNG:
    """Return the epoch's RNG, cycling through `num_draws` epochs if the method precomputes."""
    return rng if spec is None else replace(rng, epoch=rng.epoch % spec.num_draws)


def compute_precomputed(
    method: AnyMethod, policy: Policy, batch: Batch, cfg: MethodConfig, rng: KeyedRNG
) -> dict[str, Tensor]:
    """Return the tensors that a method precomputes for a batch, by name, each [B, ...]."""
    spec = method.requirements(cfg).precompute
    rng = epoch_rng(spec, rng)
    if spec is not None and spec.compute is not None:
        return spec.compute(policy, batch, cfg, rng)
    return reference_scores_of(method.contrasts(policy, batch, cfg, rng))


def cached_scores(
    num_draws: int, settings: Mapping[str, str | int | float], compute: Callable[..., Scores] | None = None
) -> PrecomputeSpec | None:
    """Return the spec of cached reference scores; None for 0 draws, that is, new draws in every epoch."""
    return PrecomputeSpec(num_draws, settings, scores=True, compute=compute) if num_draws else None


def reference_scores_of(contrasts: Sequence[Any]) -> Scores:
    """Return the reference's scores of a batch's only contrast."""
    (contrast,) = contrasts
    scores: Scores | None = contrast.reference
    assert scores is not None, "only the scores of a reference can be precomputed"
    return scores


def reference_scores(
    policy: Policy, batch: EncodedPairs | EncodedResponses, run: Callable[[nn.Module], dict[str, Tensor]]
) -> dict[str, Tensor] | None:
    """Return the reference's scores, each [B, ...]: the batch's cached ones, else `run` on the reference network."""
    return policy.on_reference(run) if batch.precomputed is None else batch.precomputed


Batch = EncodedPairs | EncodedPrompts | EncodedResponses | JudgedImages
F = TypeVar("F", bound=Family, contravariant=True)
B = TypeVar("B", bound=Batch, contravariant=True)
H = TypeVar("H", bound=MethodConfig, contravariant=True)
C = TypeVar("C")


class Method(Protocol[F, B, H, C]):
    """Interface of a method's module, for a family, its batches, the hyper-parameters and the contrasts."""

    def requirements(self, cfg: H) -> Requirements:
        """Return the method's needs under these hyper-parameters."""

    def contrasts(self, policy: Policy[F], batch: B, cfg: H, rng: KeyedRNG) -> list[C]:
        """Return the contrasts of a batch: all inputs of `loss` that need no gradient, reference scores included."""

    def loss(self, policy: Policy[F], contrast: C, cfg: H) -> Step:
        """Run the policy once and return the losses of one contrast."""


AnyMethod = Method[Any, Any, Any, Any]


FOLDERS = ("text_to_image", "vision_language")
_FUNCTIONS = ("requirements", "contrasts", "loss")


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(name for folder in FOLDERS for name in registry.names(f"{__name__}.{folder}"))


def find(name: str) -> AnyMethod:
    """Return the module of the method called `name`, or of the class "module:Class" from outside.

    Raises:
        ValueError: no method has that name, or the module from outside lacks a function.
    """
    if registry.is_outside(name):
        return cast(AnyMethod, registry.module_of("method.name", find_method(name)[1], _FUNCTIONS))
    packages = [f"{__name__}.{folder}" for folder in FOLDERS]
    return cast(AnyMethod, registry.find(packages, name, "method.name: there is no method"))
