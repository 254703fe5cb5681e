"""What a training step costs: pairs per second, its parts, and peak memory. Not a test, but run by hand:

    python -m tests.benchmarks.step --json step.json
    python -m tests.benchmarks.step --from step.json --markdown docs/performance.md

Every variant is a real run, put together by the functions that `mmalign train` uses, and every number comes out of
`loop.train` itself. The loop is handed all it works with, so the parts are measured by handing it the same objects with
a meter on five of their calls:

    data        the next batch: read (and decoded), and encoded where there is no cache
    noise       `method.contrasts` but for the reference: draws from position, noising
    reference   `policy.on_reference`
    policy      `method.loss`: the policy's forward pass and the loss
    backward    `accelerator.backward`
    optimizer   from there to the end of the update: scaling, clipping, the optimizer, clearing the gradients
    rest        what is left to the loop itself

Pairs per second are taken from updates without a meter. Variants take turns in every repeat, there and back, so that a
machine that slows down slows all of them; ratios are taken within a repeat. Loader workers are off: with some, reading
overlaps with the rest.

Peak memory is that of tensors. On CUDA it is what torch's allocator gave out at most. On the CPU it is the sum of
all storages alive that the step has touched, with the weights and the optimizer's state: exact and the same on every
machine, but without what a kernel uses inside itself, and without Python and its libraries (some hundred MB).

Operations are those of matrix products, convolutions and attention, counted while the step runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils._pytree import tree_leaves

from mmalign import assemble, loop, methods
from mmalign.data import scenes
from mmalign.data.drawn import write_pairs
from mmalign.feed import Feed, open_feed
from mmalign.optim import build_optimizer, schedule
from mmalign.policy import FrozenCopy, Policy
from mmalign.recipe import load_recipe
from mmalign.share import resolve_model
from tests.benchmarks import tables
from tests.benchmarks.meters import PARTS, LiveBytes, Meter, Metered, flop_counter, metered_batches
from tests.benchmarks.tables import VARIANTS, Measured, Report, Variant, read_report

NUM_PAIRS = 64
UPDATES_ON_CPU, UPDATES_ELSEWHERE = 1, 10  # of a measurement


@dataclass(frozen=True)
class Model:
    """A pipeline folder, the side of its images in pixels, and the pairs of a batch."""

    name: str
    path: str
    resolution: int
    batch_size: int


@dataclass(frozen=True)
class Run:
    """A variant in memory, somewhere in its training."""

    method: Any
    config: Any
    policy: Policy
    feed: Feed
    learner: loop.Learner
    progress: loop.Progress


def build(variant: Variant, model: Model, pairs: Path, folder: Path, accelerator: Any) -> Run:
    """The pieces of a run, as `mmalign train` makes them; `folder` keeps the caches, for all variants of a model."""
    cuda = accelerator.device.type == "cuda"
    recipe = load_recipe(
        {
            "method": {"name": variant.method},
            "model": {"path": model.path, "tune": variant.tune},
            "data": {
                "path": str(pairs),
                "resolution": model.resolution,
                "cache": str(folder) if variant.cached else "off",
            },
            "train": {
                "steps": 1,
                "batch_size": model.batch_size,
                "lr": 1e-5,
                "precision": "bfloat16" if cuda else "float32",
            },
            "output": str(folder),
        }
    )
    options = recipe.train
    family = assemble.load_model(recipe.model, options.precision, accelerator.device)
    frozen = copy.deepcopy(family.network) if variant.copied else None
    feed = open_feed(
        family,
        recipe.data,
        output=folder,
        batch_size=options.batch_size,
        seed=0,
        accelerator=accelerator,
        say=lambda _: None,
    )
    policy = assemble.build_policy(family, recipe.model, variant.method, seed=0, checkpointing=False)
    if frozen is not None:
        policy = replace(policy, reference=FrozenCopy(frozen))
    betas = (options.betas[0], options.betas[1])
    optimizer = build_optimizer(
        policy.trainable(), options.optimizer, lr=options.lr, betas=betas, weight_decay=options.weight_decay
    )
    net, optimizer = accelerator.prepare(policy.model, optimizer)
    constant = schedule("constant", warmup=0, steps=1)
    learner = loop.Learner(accelerator, optimizer, options.lr, constant, options.clip)
    return Run(methods.find(variant.method), recipe.method, replace(policy, model=net), feed, learner, loop.Progress())


def advance(run: Run, updates: int, meter: Meter | None = None) -> None:
    """Let the loop make some updates."""
    method, learner = run.method, run.learner
    batches: loop.Batches = run.feed.batches
    policy: Any = run.policy
    if meter is not None:
        method = Metered(method, meter, {"contrasts": ("noise", "rest"), "loss": ("policy", "rest")})
        batches = metered_batches(batches, meter)
        gauge: Any = Metered(learner.accelerator, meter, {"backward": ("backward", "optimizer")})
        learner = replace(learner, accelerator=gauge)
        # The reference runs from within `contrasts`.
        policy = Metered(policy, meter, {"on_reference": ("reference", "noise")})
    loop.train(
        method,
        run.config,
        policy,
        batches,
        learner,
        steps=run.progress.step + updates,
        accumulate=1,
        seed=0,
        progress=run.progress,
        after_update=lambda *_: meter.switch("rest") if meter is not None else None,
    )


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def networks(run: Run) -> list[nn.Module]:
    """Everything with weights that the run holds."""
    copies = [run.policy.reference.model] if isinstance(run.policy.reference, FrozenCopy) else []
    return [run.policy.unwrapped, *copies, *(net for _, net in run.policy.family.encoders())]


def state_bytes(run: Run) -> int:
    """Bytes that a step needs whatever it computes."""
    weights = sum(t.nbytes for net in networks(run) for t in (*net.parameters(), *net.buffers()))
    return weights + 3 * sum(p.nbytes for p in run.policy.trainable())


def peak_bytes(run: Run, device: torch.device, before: int) -> int:
    """Bytes of tensors at most, in one update; `before` is what CUDA held when the run was not yet built."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        advance(run, 1)
        return int(torch.cuda.max_memory_allocated(device)) - before
    memory = LiveBytes()
    with memory:
        for net in networks(run):
            for tensor in (*net.parameters(), *net.buffers()):
                memory.count(tensor)
        for tensor in tree_leaves(list(run.learner.optimizer.state.values())):
            memory.count(tensor)
        advance(run, 1)
    return memory.peak


def count_flops(run: Run) -> dict[str, int]:
    """Operations of one update, by part."""
    with flop_counter() as counter:
        meter = Meter(counter.get_total_flops)
        advance(run, 1, meter)
        meter.switch("rest")
    return {part: int(number) for part, number in meter.total.items()}


def measure(model: Model, folder: Path, *, repeats: int, say: Callable[[str], None]) -> list[Measured]:
    """Every variant on one model: built, warmed up, counted, and then timed in turns."""
    gc.collect()  # what is left of another model would be freed in the middle of a measurement
    accelerator = Accelerator()
    device, pairs = accelerator.device, folder / "pairs.parquet"
    draw_pairs(pairs, model.resolution)
    runs, rows = list[Run](), list[Measured]()
    for variant in VARIANTS:
        say(f"{model.name}: {variant.name}")
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        run = build(variant, model, pairs, folder / "cache", accelerator)
        advance(run, 2)  # the warm-up: the optimizer's state and the kernels' plans exist afterwards
        peak = peak_bytes(run, device, before)
        empty: dict[str, list[float]] = {part: [] for part in PARTS}
        runs.append(run)
        rows.append(Measured(variant.name, model.batch_size, [], empty, count_flops(run), state_bytes(run), peak))
    for number in range(repeats):
        say(f"{model.name}: repeat {number + 1} of {repeats}")
        turns = list(zip(runs, rows, strict=True))
        for run, row in turns if number % 2 == 0 else reversed(turns):
            time_once(run, row, device)
    accelerator.free_memory()
    return rows


def time_once(run: Run, row: Measured, device: torch.device) -> None:
    """Add to the row the seconds of an update, as a whole and by part."""
    updates = UPDATES_ON_CPU if device.type == "cpu" else UPDATES_ELSEWHERE
    started = now(device)
    advance(run, updates)
    row.whole.append((now(device) - started) / updates)
    meter = Meter(lambda: now(device))
    advance(run, updates, meter)
    meter.switch("rest")
    for part, seconds in meter.total.items():
        row.parts[part].append(seconds / updates)


def draw_pairs(path: Path, resolution: int) -> None:
    """Pairs of the bundled world: a picture of the prompt against one with a thing wrong."""
    rng = np.random.default_rng(0)
    prompts = scenes.sample_prompts("train", NUM_PAIRS, seed=0)
    shown = [p for prompt in prompts for p in (prompt, scenes.corrupt(prompt, rng))]
    images = [scenes.draw(scenes.lay_out(p, rng)).resize((resolution, resolution)) for p in shown]
    captions = [str(prompt) for prompt in prompts for _ in range(2)]
    write_pairs(path, captions, images, [1.0, 0.0] * NUM_PAIRS, group=2, sure=0.5)


def middle(folder: Path) -> Model:
    """A Stable Diffusion of random weights with the bundled tokenizer: 128 and 256 channels, images of 128 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokens: Any = CLIPTokenizer.from_pretrained(Path(resolve_model("models/tiny_sd")) / "tokenizer")
    tokens.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(128, 256),
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokens,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return Model("middle-sized, random weights", str(folder), 128, 4)


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or take what was measured; show it, and write it where one asks."""
    parser = argparse.ArgumentParser(description="What a training step costs.")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument(
        "--from", type=Path, dest="source", help="measure nothing; take the numbers of an earlier --json"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables into this document, between its two markers")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    report = read_report(options.source) if options.source else measure_all(options.repeats)
    tables.show(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if options.markdown:
        tables.write_markdown(report, options.markdown)


def measure_all(repeats: int) -> Report:
    """The bundled model, and a larger one."""
    say = Console(stderr=True, highlight=False).print
    measured = dict[str, list[Measured]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for model in (Model("tiny_sd", resolve_model("models/tiny_sd"), 64, 16), middle(folder / "middle")):
            place = folder / f"run {len(measured)}"
            title = f"{model.name}: {model.resolution} px, batches of {model.batch_size} pairs"
            measured[title] = measure(model, place, repeats=repeats, say=say)
    return Report(machine(), measured)


if __name__ == "__main__":
    main()
