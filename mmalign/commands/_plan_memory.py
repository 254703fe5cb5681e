"""Peak memory of a recipe's training, from configurations alone.

The model is built as `mmalign train` builds it, adapters and reference included, but its tensors are fake ones: they
have a shape and a dtype, and no storage. One micro-batch then runs through the method's own `contrasts` and `loss` and
backward, and `LiveBytes` counts the tensors that live at once, as `mmalign bench` counts those of a real update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmalign import methods
from mmalign.commands import train
from mmalign.commands._bench_meters import LiveBytes
from mmalign.config import Recipe
from mmalign.config.methods import find_method
from mmalign.config.methods.text_to_image import DiffusionDPOConfig
from mmalign.config.methods.vision_language import DPOConfig
from mmalign.data.data_module import Splits
from mmalign.families.shapes import META, fetch_configurations, without_storage
from mmalign.methods.text_to_image import diffusion_dpo
from mmalign.methods.vision_language import dpo
from mmalign.modalities import Example, loading, modality_of
from mmalign.policy import FrozenCopy, Policy
from mmalign.resources import resolve_model
from mmalign.rng import KeyedRNG
from mmalign.training import loop

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run by part, and the functions that count those of a micro-batch.

    Attributes:
        networks: weights of each network, by name; the trained one includes its adapters.
        example: the batches, what leaves the device, and the caches.
        reference: weights of the frozen copy.
        gradients: gradients of the trained weights.
        optimizer: state of the optimizer, and moving average.
        lagging: lagging copies of the trained weights.
        encoding: activations of the encoders for one image and one prompt.
        checkpoint: bytes of a checkpoint on the disk.
        activations: activations, and all else that lives for a micro-batch of so many pairs only.
    """

    networks: dict[str, int]
    example: Example
    reference: int
    gradients: int
    optimizer: int
    lagging: int
    encoding: int
    checkpoint: int
    activations: Callable[[int], int]

    def training(self, batch_size: int, *, all_stay: bool = False) -> int:
        """Return the peak of an update; `all_stay` if no network leaves, as on a CPU."""
        stay = sum(size for name, size in self.networks.items() if all_stay or name not in self.example.leaving)
        fixed = self.reference + self.gradients + self.optimizer + self.lagging
        return stay + fixed + self.activations(batch_size)

    @property
    def preparing(self) -> int:
        """The peak before the first update: all networks, or the largest one, and the encoders' activations."""
        return (max if self.example.apart else sum)(self.networks.values()) + self.encoding


class _LiveBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Counter of live bytes that lets a real mask select from fake tensors: a fake mask would have no known size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            indices = [
                part for i in args[1] for part in (i.nonzero().unbind(1) if i is not None and _is_mask(i) else (i,))
            ]
            args = (args[0], indices)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_mask(index: Tensor | None) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)


def estimate(recipe: Recipe, splits: Splits | None, *, on_card: bool) -> Memory:
    """Return the memory of a recipe's training, by its pairs if they are at hand.

    A CPU, which is not `on_card`, has other precisions under autocast.

    Raises:
        ValueError: the model's configurations are not at hand, or the model cannot be trained as the recipe asks.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    modality, needs = modality_of(recipe), methods.requirements_of(recipe.method)
    if modality.encode_example is None:
        raise ValueError(f"method.name: {recipe.method.name} trains a judge, which a plan does not cover")
    # Cached scores replace the frozen copy
    precomputed = needs.precompute is not None and recipe.data.cache != "off"
    scores = precomputed and needs.precompute is not None and needs.precompute.scores
    policy, encoders = _build(recipe, reference_cached=scores)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_storage([policy.unwrapped, *copies(policy), *encoders.values()], mode)
    # Encoding, and bytes of all weights
    memory = _LiveBytes()
    with memory:
        networks = {name: _count(memory, [net]) for name, net in encoders.items()}
        networks["policy"] = _count(memory, [policy.unwrapped])
        reference = _count(memory, copies(policy))
        # Bytes above this are activations of the encoders
        before = memory.live
        example = modality.encode_example(policy.family, recipe, needs, splits)
    trained = policy.trainable()
    # Gradients and copies have the sizes of the trained weights
    gradients = sum(p.nbytes for p in trained)
    state = optimizer_bytes(trained, recipe.train.optimizer)
    average = gradients if recipe.train.ema else 0
    lagging = gradients * sum(rule is not None for rule in (recipe.method.reference, needs.old))
    return Memory(
        networks,
        replace(example, apart=example.apart and on_card),
        reference,
        gradients,
        state + average,
        lagging,
        memory.peak - before,
        gradients + state + average + lagging,
        _Activations(recipe, policy, example, precomputed=precomputed, on_card=on_card),
    )


def _build(recipe: Recipe, *, reference_cached: bool) -> tuple[Policy, dict[str, nn.Module]]:
    """Return the policy on the meta device, with a family that runs on a CPU, and the encoders by name."""
    key, name = recipe.model.configurations
    folder = fetch_configurations(resolve_model(name), recipe.model.revision)
    model = recipe.model.model_copy(update={key: folder, "revision": None})
    # Plain attention, without compilation and sharding, since the estimate runs on fake tensors
    simple = recipe.train.model_copy(update={"attention": "sdpa", "compile": False, "sharding": "none"})
    recipe = recipe.model_copy(update={"train": simple, "model": model})
    family = loading.load_model(recipe, META)
    encoders = dict(family.encoders())
    with META:
        policy = train.build_policy(family, recipe, reference_cached=reference_cached)
    return replace(policy, family=replace(family, loading=replace(family.loading, device=CPU))), encoders


def _count(memory: LiveBytes, nets: Iterable[nn.Module]) -> int:
    """Count the weights of networks that were not counted before; return their bytes."""
    before = memory.live
    for net in nets:
        for tensor in (*net.parameters(), *net.buffers()):
            memory.count(tensor)
    return memory.live - before


# Functions of networks that autocast runs in float32 on CUDA, and in half precision on a CPU.
FLOAT32_ON_CUDA: dict[str, Callable[..., Tensor]] = {
    "layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
    "rms_norm": F.rms_norm,
    "softmax": F.softmax,
}


@contextlib.contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """Give the CPU's autocast CUDA's precision of norms and softmax, whose activations are twice as large."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, options = tree_map_only(Tensor, lambda x: x.float(), (args, options))
            return function(*args, **options)

        return call

    # Not a mode: the backward pass, which repeats checkpointed blocks, would not see it
    try:
        for name, function in FLOAT32_ON_CUDA.items():
            setattr(F, name, in_float32(function))
        yield
    finally:
        for name, function in FLOAT32_ON_CUDA.items():
            setattr(F, name, function)


class _Activations:
    """Function of the pairs of a micro-batch: bytes that live besides weights, gradients and optimizer state."""

    def __init__(self, recipe: Recipe, policy: Policy, example: Example, *, precomputed: bool, on_card: bool) -> None:
        self.recipe, self.policy, self.example, self.precomputed = recipe, policy, example, precomputed
        self.autocast = _autocast_of_cuda if on_card else contextlib.nullcontext
        self.known = dict[int, int]()

    def __call__(self, size: int) -> int:
        """Return the bytes for a micro-batch of `size` pairs."""
        if size not in self.known:
            self.known[size] = self._run(size)
        return self.known[size]

    def _run(self, size: int) -> int:
        policy, config = self.policy, self.recipe.method
        method: Any = methods.find(config.name)
        if method.requirements(config).generates:
            # A generated row costs as much as a given one, of which a pair has two
            shape = method.requirements(config).contrasts(size)
            size = math.ceil(shape.pairs * shape.rows_per_pair / 2)
            of_images = find_method(config.name)[0] == "text_to_image"
            method, config = (diffusion_dpo, DiffusionDPOConfig()) if of_images else (dpo, DPOConfig())
        batch, trained, rng = self.example.batch(size), policy.trainable(), KeyedRNG(self.recipe.train.seed)
        # Reference scores as the cache will hold them; making them is not counted
        if self.precomputed:
            frozen = replace(policy, reference=FrozenCopy(policy.unwrapped))
            with _LiveBytes(), torch.no_grad():
                batch = replace(batch, precomputed=methods.compute_precomputed(method, frozen, batch, config, rng))
        # One micro-batch, as the loop runs it
        memory = _LiveBytes()
        with self.autocast(), memory:
            before = _count(memory, [policy.unwrapped, *copies(policy)])
            if self.recipe.train.gradient_accumulation_steps > 1:
                for p in trained:  # gradients of earlier micro-batches
                    p.grad = torch.zeros_like(p)
            for contrast in loop.make_contrasts(method, policy, batch, config, rng):
                step = method.loss(policy, contrast, config)
                (step.losses * step.weights).sum().backward()
        for p in trained:
            p.grad = None
        # Weights and gradients are parts of their own
        return max(0, memory.peak - before - sum(p.nbytes for p in trained))


def copies(policy: Policy) -> list[nn.Module]:
    """Return the frozen copy of a policy, if it has one."""
    return [policy.reference.model] if isinstance(policy.reference, FrozenCopy) else []


def optimizer_bytes(trained: Iterable[Tensor], name: str) -> int:
    """Return the bytes of an optimizer's state after its first update.

    "adamw" has two float32 moments. "adamw_8bit" has two of a byte, with a float32 scale for every 256 numbers;
    tensors of fewer than 4,096 numbers stay in float32. "adafactor" has a row and a column of float32 per matrix.
    """
    total = 0
    for p in trained:
        number = p.numel()
        if name == "adamw_8bit" and number >= 4096:
            total += 2 * (number + 4 * -(-number // 256))
        elif name == "adafactor" and p.dim() >= 2:
            total += 4 * (number // p.shape[-1] + number // p.shape[-2])
        else:
            total += 4 * number * (1 if name == "adafactor" else 2)
    return total
