"""Trainings in two processes of this machine's CPU, joined by gloo."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign.commands.cache import cache
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.policy import FrozenCopy, Policy, sharding
from mmalign.training import run
from tests.helpers import forked
from tests.helpers.logged import recorded_lines

Content = dict[str, Any]
Job = tuple[str, str, Content]  # name, "train" or "cache", and the recipe

# Float32: a sum over four pairs rounds otherwise than two sums over two. Gradients differ by about 4e-6 of their norm
# for that, and so does AdamW's mean of them, which is linear in them; another batch moves it by more than a half.
GRADIENTS = 5e-5
# AdamW divides a gradient by its own size: where that is nothing but rounding, the update is the learning rate in any
# direction. That came to at most 6e-4 of the way that the weights have gone; another batch makes it more than 0.1.
WEIGHTS = 5e-3


def launch(folder: Path, jobs: Sequence[Job], timeout: float = 600) -> None:
    """Run `work` in two processes, which write the record of each job to NAME-RANK.json in the folder.

    Raises:
        RuntimeError: a process failed; the message has the ends of both logs.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    logs = [file.with_suffix(f".{rank}.log") for rank in range(2)]
    pairs = zip(logs, forked.ranks(2), strict=True)
    processes = [forked.start(work, file, log=log, **environment) for log, environment in pairs]
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    if codes != [0, 0]:
        names = [
            [line for line in log.read_text().splitlines() if line.endswith((": train", ": cache"))] for log in logs
        ]
        ends = [f"{each[-1:]}\n{log.read_text()[-4000:]}" for log, each in zip(logs, names, strict=True)]
        raise RuntimeError("\n".join(ends))


def work(file: Path) -> None:
    """Do the jobs of a file one after the other, and write down what each logged and wrote."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    rank, touched, exchanges, held = int(os.environ["RANK"]), list[str](), list[int](), list[float]()
    sys.addaudithook(lambda event, arguments: touched.extend(_written(event, arguments)))
    prepare = Accelerator.prepare

    def watched(accelerator: Accelerator, *parts: Any) -> Any:
        prepared = prepare(accelerator, *parts)
        if len(parts) == 2:  # a sharded model is not prepared
            prepared[0].register_comm_hook(exchanges, _counted)
        return prepared

    shard = run.shard_policy

    def measured(policy: Policy, device: torch.device) -> Policy:
        policy = shard(policy, device)
        held.extend(map(_held, [policy.unwrapped, *_copies(policy)]))
        return policy

    Accelerator.prepare, run.shard_policy = watched, measured
    for name, does, content in json.loads(file.read_text()):
        print(f"{name}: {does}", flush=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.distributed.init_process_group(  # by a file, where a port might be taken
            "gloo", init_method=f"file://{file}.{name}", rank=rank, world_size=2, timeout=timedelta(seconds=100)
        )
        for record in (touched, exchanges, held):
            record.clear()
        with recorded_lines() as lines:
            if does == "cache":
                cache(load_recipe(content))
                history = []
            else:
                history = train(load_recipe(content)).history
        records = {"lines": lines, "touched": touched, "exchanges": len(exchanges), "held": held}
        file.with_name(f"{name}-{rank}.json").write_text(json.dumps({"history": history, **records}))


def _copies(policy: Policy) -> list[torch.nn.Module]:
    return [policy.reference.model] if isinstance(policy.reference, FrozenCopy) else []


def _held(net: torch.nn.Module) -> float:
    """Return the share of a network's parameters that this process holds."""
    parameters = list(net.parameters())
    return sum(p.numel() for p in sharding.local(parameters)) / sum(p.numel() for p in parameters)


def _written(event: str, arguments: Sequence[Any]) -> list[str]:
    """Return the paths that a call writes to, by the name of Python's audit event."""
    if event == "open":
        path, _, flags = arguments
        return [str(path)] if isinstance(path, str | Path) and flags & (os.O_WRONLY | os.O_RDWR) else []
    return [str(arguments[0])] if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") else []


def _counted(exchanges: list[int], bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    if bucket.is_last():
        exchanges.append(1)
    return allreduce_hook(None, bucket)  # as without a hook: the mean over the processes


def read(folder: Path, name: str, rank: int | str) -> dict[str, Any]:
    """Read what a process recorded of a job."""
    record: dict[str, Any] = json.loads((folder / f"{name}-{rank}.json").read_text())
    return record


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Return the weights of a run's checkpoint."""
    return load_file(folder / f"checkpoint-{step:08d}" / "model.safetensors")


def distance(folder: Path, other_folder: Path, steps: int) -> tuple[float, float]:
    """Return two relative distances of runs that saved after every update.

    They are the distance of their weights over the way gone since the first update, and that of their mean gradients.
    """
    start, a, b = (_flat(weights(*where)) for where in ((folder, 1), (folder, steps), (other_folder, steps)))
    actual, expected = (_mean_gradient(each, steps) for each in (folder, other_folder))
    return _relative(a - b, a - start), _relative(actual - expected, actual)


def _mean_gradient(folder: Path, step: int) -> Tensor:
    state = torch.load(folder / f"checkpoint-{step:08d}" / "state.pt", weights_only=True)
    return _flat({str(name): moments["exp_avg"] for name, moments in state["optimizer"]["state"].items()})


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def _relative(difference: Tensor, scale: Tensor) -> float:
    return float(difference.norm() / scale.norm())
