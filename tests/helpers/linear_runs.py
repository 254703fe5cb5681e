"""Training loop on a linear network whose updates can be computed by hand."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmalign.methods import Requirements, Step
from mmalign.policy import FrozenCopy, Policy
from mmalign.policy.lagging import LaggingCopy
from mmalign.rng import KeyedRNG
from mmalign.training import loop
from mmalign.training.loop import Progress, TrainState
from mmalign.training.optim import average_share


@dataclass(frozen=True)
class Batch:
    rows: list[int]
    x: Tensor
    y: Tensor
    weights: Tensor


@dataclass
class Regression:
    """A method with squared errors under noise from the random numbers; it records its calls."""

    contrasts_of_a_batch: int = 1
    noise: float = 0.0
    spoil: Callable[[Batch, Tensor], Tensor] = lambda batch, losses: losses
    seen: list[Any] = field(default_factory=list)
    needs: Requirements = field(default_factory=Requirements)
    offset: str = ""  # number of the memory that every target is moved by

    def requirements(self, cfg: Any) -> Requirements:
        return self.needs

    def contrasts(self, policy: Policy, batch: Batch, cfg: Any, rng: KeyedRNG) -> list[Batch]:
        weight = next(policy.model.parameters()).detach().clone()
        self.seen.append(("contrasts", batch.rows, rng, policy.model.training, torch.is_grad_enabled(), weight))
        result = []
        for index in range(self.contrasts_of_a_batch):
            x = batch.x + self.noise * rng.normal(batch.rows, (3,), "noise", index)
            result.append(replace(batch, x=x))
        return result

    def loss(self, policy: Policy, contrast: Batch, cfg: Any) -> Step:
        self.seen.append(("loss", contrast.rows, None, policy.model.training, torch.is_grad_enabled(), None))
        offset = policy.memory[self.offset] if self.offset else 0.0
        losses = self.spoil(contrast, (policy.model(contrast.x)[:, 0] - contrast.y - offset).square())
        rows = torch.tensor(contrast.rows).float()
        return Step(losses, contrast.weights, {"loss": losses.detach(), "row": rows}, {"read": rows})


class Relative(Regression):
    """The same with targets that are moved by what the reference predicts."""

    def contrasts(self, policy: Policy, batch: Batch, cfg: Any, rng: KeyedRNG) -> list[Batch]:
        made = super().contrasts(policy, batch, cfg, rng)
        predicted = [policy.on_reference(lambda net, x=one.x: net(x)[:, 0]) for one in made]  # type: ignore[misc]
        return [replace(one, y=one.y + 0.5 * y) for one, y in zip(made, predicted, strict=True) if y is not None]


def data(sizes: list[int], weights: list[float] | None = None, seed: int = 0) -> list[Batch]:
    """Return batches of the given sizes, cut from the same rows for any sizes."""
    g = torch.Generator().manual_seed(seed)
    number = sum(sizes)
    x, y = torch.randn(number, 3, generator=g), torch.randn(number, generator=g)
    w = torch.tensor(weights) if weights else torch.ones(number)
    cut = zip(torch.arange(number).split(sizes), strict=True)
    return [Batch(i.tolist(), x[i], y[i], w[i]) for (i,) in cut]


def of(batches: list[Batch]) -> loop.Batches:
    def give(epoch: int, first: int) -> Iterator[Batch]:
        return iter(batches[first:])

    return give


def network() -> nn.Linear:
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        net.bias.zero_()
    return net


@dataclass
class Run:
    """The parts of a run, and its reports after every update."""

    net: nn.Linear
    policy: Policy
    train_state: TrainState
    progress: Progress = field(default_factory=Progress)
    said: list[tuple[Progress, dict[str, float], bool]] = field(default_factory=list)
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    @property
    def copies(self) -> list[LaggingCopy]:
        average = self.train_state.ema
        return [*self.policy.lagging.values(), *([average] if average is not None else [])]

    def snapshot(self) -> dict[str, Any]:
        """Return a checkpoint's contents."""
        parts = {"net": self.net.state_dict(), "optimizer": self.train_state.optimizer.state_dict()}
        copies = [each.weights for each in self.copies]
        return copy.deepcopy({**parts, "progress": self.progress, "copies": copies, "memory": self.policy.memory})

    def restore(self, snapshot: dict[str, Any]) -> None:
        snapshot = copy.deepcopy(snapshot)
        self.net.load_state_dict(snapshot["net"])
        self.train_state.optimizer.load_state_dict(snapshot["optimizer"])
        self.progress = snapshot["progress"]
        self.policy.memory.update(snapshot["memory"])
        for mine, saved in zip(self.copies, snapshot["copies"], strict=True):
            mine.load(saved)

    def __call__(self, method: Any, batches: loop.Batches, *, steps: int, accumulate: int = 1) -> Progress:
        def after(progress: Progress, metrics: loop.Metrics) -> None:
            resting = not progress.pending
            self.said.append((copy.copy(progress), {name: float(x) for name, x in metrics.items()}, resting))
            if resting:
                self.snapshots.append(self.snapshot())

        return loop.train(
            method, None, self.policy, batches, self.train_state,
            steps=steps, gradient_accumulation_steps=accumulate, seed=3, progress=self.progress, after_update=after,
        )  # fmt: skip


def begin(
    *,
    optimizer: Any = torch.optim.SGD,
    lr: float = 0.1,
    max_grad_norm: float | None = None,
    lr_factor: Callable[[int], float] = lambda _: 1.0,
    ema: float | None = None,
    share: Callable[[int], float] | None = None,
    weights: Tensor | None = None,
) -> Run:
    """Begin a run from weights, those of `START` if none are given.

    The reference is a frozen copy; with `share`, the policy's in it after an update, it moves.
    """
    accelerator = Accelerator(cpu=True)
    net = network()
    if weights is not None:
        nn.utils.vector_to_parameters(weights.clone(), net.parameters())
    frozen = copy.deepcopy(net).requires_grad_(False)
    model, wrapped = accelerator.prepare(net, optimizer(net.parameters(), lr=lr))
    average, moving = (
        LaggingCopy(list(net.parameters()), rule) if rule is not None else None
        for rule in (partial(average_share, decay=ema) if ema else None, share)
    )
    policy = Policy(None, model, net, FrozenCopy(frozen), moving=moving)  # type: ignore[arg-type]
    return Run(net, policy, TrainState(accelerator, wrapped, lr, lr_factor, max_grad_norm, average))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


START = flat(network())
WEIGHTS = [1.0, 0.5, 2.0, 0.0, 0.0, 0.0, 1.0, 3.0]


def by_hand(batch: Batch, at: Tensor) -> Tensor:
    """Return the gradient of the weighted mean of (w x + b - y)^2: 2 sum(weight * error * (x, 1)) / sum(weight)."""
    error = batch.x @ at[:3] + at[3] - batch.y
    inputs = torch.cat([batch.x, torch.ones(len(batch.x), 1)], 1)
    return 2 * (batch.weights * error) @ inputs / batch.weights.sum()
