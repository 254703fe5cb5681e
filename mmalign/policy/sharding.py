"""Sharded networks: each process holds a part of every parameter, by PyTorch's FSDP2 (`fully_shard`).

A sharded network's parameters are DTensors, split along their first dimension. A block's parameters are gathered when
it runs and released afterwards, so all processes must run the network equally often; `gathered` lifts this condition.
Weights, gradients and results equal those of plain data parallelism up to the rounding of sums.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class ShardPlan:
    """Division of a network into shards.

    Attributes:
        blocks: modules whose parameters are gathered together; the rest of the network is gathered for a whole pass.
        replicated: parameters that every process holds whole, since code outside the network's forward reads them.
        methods: names of the network's methods that run it besides `forward`.
    """

    blocks: Sequence[nn.Module]
    replicated: Sequence[nn.Parameter] = ()
    methods: Sequence[str] = ()


def move_to_host(net: nn.Module, plan: ShardPlan) -> None:
    """Move the parameters that a plan shards to the CPU; `shard` moves each block's share to the device."""
    replicated = set(plan.replicated)
    for parameter in net.parameters():
        if parameter not in replicated:
            parameter.data = parameter.data.cpu()


def shard(net: nn.Module, plan: ShardPlan, device: torch.device) -> None:
    """Shard a network over all processes, in place.

    Raises:
        ValueError: a parameter is a scalar, which cannot be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    scalars = [name for name, p in net.named_parameters() if p.dim() == 0]
    if scalars:
        raise ValueError(
            f"train.sharding: {type(net).__name__} has a parameter without dimensions ({scalars[0]}), which fsdp2 "
            "cannot split; use train.sharding: none"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Blocks before the network, which then shards what is left
    replicated = set(plan.replicated)
    for module in (*plan.blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    # Methods that bypass `forward` gather the weights as well
    for name in plan.methods:
        register_fsdp_forward_method(net, name)


@contextlib.contextmanager
def gathered(net: nn.Module) -> Iterator[None]:
    """Hold a sharded network's whole weights on every process, which may then run it any number of times.

    All processes enter and leave together. There must be no backward pass inside.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    # Otherwise the first pass would release the weights again
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's parts of tensors, which share their memory; a tensor that is not sharded is its own."""
    from torch.distributed.tensor import DTensor

    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def whole(value: T, *, keep: bool = True) -> T:
    """Gather the sharded tensors in nested dicts and lists one by one, and move them to the CPU.

    All processes call it together; those without `keep` get empty tensors.
    """
    from torch.distributed.tensor import DTensor

    given: Any = value
    result: Any = value
    if isinstance(given, DTensor):
        # A collective operation, also for processes that keep nothing
        full = given.full_tensor().detach()
        result = full.cpu() if keep else full.new_empty(0)
    elif isinstance(given, dict):
        result = {key: whole(item, keep=keep) for key, item in given.items()}
    elif isinstance(given, list):
        result = [whole(item, keep=keep) for item in given]
    return cast(T, result)


def split(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, sharded as `like`; the tensor itself if that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    # Every process has read the whole tensor, so none is sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def skeleton(net: nn.Module) -> nn.Module:
    """Return a copy of a network without weights, made before it is sharded, for `fill`."""
    # The copy shares the buffers, and gets parameters without memory
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in net.buffers()}
    for p in net.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(net, memo)


def fill(bare: nn.Module, net: nn.Module, *, keep: bool) -> None:
    """Gather a sharded network's weights one by one into its skeleton, on the CPU; all processes call it together.

    Only a process with `keep` stores them. Tied weights stay tied.
    """
    # By identity: weights under several names are gathered once
    tensors: dict[int, nn.Parameter] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        if id(p) not in tensors:
            full = whole(p.detach(), keep=keep)
            tensors[id(p)] = nn.Parameter(full, requires_grad=p.requires_grad)
        if keep:
            owner, _, last = name.rpartition(".")
            setattr(bare.get_submodule(owner), last, tensors[id(p)])
