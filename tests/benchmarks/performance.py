"""The measurements of docs/performance.md. Not a test, but run by hand, on a machine that does nothing else:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.performance --json performance.json
    python -m tests.benchmarks.performance --from performance.json --markdown docs/performance.md

`mmalign bench` measures (mmalign/benchmark); here is what it is asked for. Most ways to train are overrides of a
recipe. Some no recipe asks for: what was tried and left out, and what a program without some idea of ours would do.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from mmalign.benchmark import against, bench, runs, tables
from mmalign.benchmark.bench import OURS
from mmalign.benchmark.cases import Content, draw_image_pairs, write_case
from mmalign.benchmark.measure import Entrant, measure
from mmalign.benchmark.meters import machine, peak_rate
from mmalign.benchmark.runs import Run
from mmalign.benchmark.tables import Comparison, Report, read_report
from mmalign.commands.load_recipe import load_recipe
from mmalign.methods.text_to_image import spo
from mmalign.modalities import loading
from mmalign.modalities.loading import DTYPES
from mmalign.policy import FrozenCopy
from mmalign.resources import resolve_model

# ------------------------------------------------------------------------------------------------ what no recipe says


def copied(run: Run) -> Run:
    """With a frozen copy as reference, whatever the recipe says."""
    another = loading.load_model(run.recipe, run.device)
    return replace(run, policy=replace(run.policy, reference=FrozenCopy(another.network)))


def channels_last(run: Run) -> Run:
    """Convolutions' weights, and so all they make, with the channels innermost."""
    nets: list[Any] = [run.policy.unwrapped]
    nets += [run.policy.reference.model] if isinstance(run.policy.reference, FrozenCopy) else []
    for net in nets:
        net.to(memory_format=torch.channels_last)
    return run


def looped(run: Run) -> Run:
    """AdamW parameter by parameter, instead of by one kernel."""
    for group in run.learner.optimizer.param_groups:
        group.update(fused=False, foreach=False)
    return run


class OneAfterTheOther(nn.Module):
    """A network that runs the second half of its rows, and then the first again in the backward pass.

    The activations of one half exist at a time: winners and losers in sequence.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """See the network; it is asked for a tuple of one tensor."""
        half = len(x) // 2

        def part(rows: slice) -> Any:
            return tree_map(lambda y: y[rows] if isinstance(y, Tensor) and len(y) == 2 * half else y, (x, args, kwargs))

        def first(x: Tensor, args: Any, kwargs: Any) -> Tensor:
            return self.net(x, *args, **kwargs)[0]  # type: ignore[no-any-return]

        one = checkpoint(first, *part(slice(half)), use_reentrant=False)
        return (torch.cat([one, first(*part(slice(half, None)))]),)


def in_sequence(run: Run) -> Run:
    """Winners and losers one after the other."""
    return replace(run, policy=replace(run.policy, model=OneAfterTheOther(run.policy.model)))


def two_forwards(run: Run) -> Run:
    """SPO with a prediction for the chosen step and one for the rejected, as released, though both begin at one x_t."""
    found = importlib.util.spec_from_file_location("spo_with_two_forwards", str(spo.__file__))
    assert found is not None and found.loader is not None
    method: Any = importlib.util.module_from_spec(found)
    sys.modules[method.__name__] = method  # its dataclasses look there for what their annotations mean
    found.loader.exec_module(method)

    def apart(family: Any, cfg: Any, view: Any, net: nn.Module) -> Any:
        of = view.of
        each = {name: getattr(view, name)[of] for name in ("x_t", "t", "prev", "cond", "unconditional")}
        twice = replace(view, **each, of=torch.arange(len(of), device=of.device))
        return spo.step_scores(family, cfg, twice, net)

    method.step_scores = apart
    return replace(run, method=method)


# ------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Variant:
    """A way to train: overrides of a recipe, and what is done to a run. `why`: what follows from it, beforehand."""

    name: str
    why: str
    overrides: tuple[str, ...] = ()
    change: Callable[[Run], Run] = copy.copy


OFF = "data.cache='off'"
UNCACHED = Variant("no caches", "frozen encoders, and a reference whose scores can be kept, run in every step", (OFF,))
KEPT = Variant(
    "reference kept", "what the reference scores is read: two draws of a pair in turn", ("method.cache_draws=2",)
)
COPIED = Variant("frozen copy", "the same operations; one network more in memory", (), copied)
MAPO = Variant("mapo", "no reference: one forward pass less, one network less", ("method.name=mapo",))
AGAIN = Variant(
    "activations again",
    "train.gradient_checkpointing: the policy's forward pass twice",
    ("train.gradient_checkpointing=true",),
)
COMPILED = Variant("compiled", "train.compile: the same operations, some of them together", ("train.compile=true",))
HALVES = Variant(
    "half batches",
    "train.accumulate: the same operations, half at a time; the first batch, which is compared, is another",
    ("train.batch_size=2", "train.accumulate=2"),
)
LAST = Variant("channels last", "left out: the same operations", (), channels_last)
SEQUENCE = Variant(
    "in sequence", "left out: winners after losers, half of the policy's forward pass twice", (), in_sequence
)
LOOPED = Variant("AdamW looped", "the same operations, a parameter at a time", (), looped)
APART = Variant(
    "rows apart", "train.pack: off, caches on; each response runs with its own prompt", ("train.pack='off'",)
)
BARE = Variant("rows apart, no caches", "both", ("train.pack='off'", OFF))
PYTORCH = Variant("sdpa", "train.attention: PyTorch's own, which may be cuDNN's", ("train.attention=sdpa",))
TWICE = Variant("two forwards", "as released: chosen and rejected steps predicted apart", (), two_forwards)


# What of the gain over a program is left without one of our ideas, or comes with a further one.
BESIDE = {
    UNCACHED.name: "likewise, with no caches on our side either",
    KEPT.name: "likewise, with the reference kept on ours",
    AGAIN.name: "likewise, with activations again on ours",
}


@dataclass(frozen=True)
class Study:
    """A recipe, how it is trained otherwise, and another program."""

    content: Callable[[Path], Content]
    variants: tuple[Variant, ...]
    overrides: tuple[str, ...] = ()
    peer: str | None = None


def tiny(folder: Path) -> Content:
    """The bundled model on pairs of the bundled world."""
    draw_image_pairs(folder / "pairs.parquet", 64)
    return {
        "method": {"name": "diffusion_dpo"},
        "model": {"path": resolve_model("models/tiny_sd")},
        "data": {"path": str(folder / "pairs.parquet"), "resolution": 64},
        "train": {"steps": 1, "batch_size": 16, "lr": 1e-5},
        "output": str(folder / "output"),
    }


def case(name: str, folder: Path) -> Content:
    """A case of `mmalign bench`: random weights, large enough that arithmetic outweighs Python."""
    return write_case(name, folder, Accelerator().device)


def steps(folder: Path) -> Content:
    """SPO on the bundled model, which draws what it learns from."""
    recipe = load_recipe("configs/text_to_image/spo_tiny_sd.yaml")
    return {**recipe.model_dump(exclude_unset=True), "output": str(folder / "output")}


FULL = "model.tune=full"
IMAGES, RESPONSES = partial(case, "sd_middle"), partial(case, "llava_middle")
STUDIES = {
    "tiny_sd, LoRA": Study(tiny, (UNCACHED, KEPT)),
    "tiny_sd, full": Study(tiny, (UNCACHED, KEPT, MAPO), (FULL,)),
    "sd_middle, LoRA": Study(
        IMAGES, (UNCACHED, KEPT, COPIED, HALVES, AGAIN, SEQUENCE, COMPILED, LAST), peer="diffusers"
    ),
    "sd_middle, full": Study(
        IMAGES, (UNCACHED, KEPT, MAPO, HALVES, AGAIN, SEQUENCE, COMPILED, LAST, LOOPED), (FULL,), peer="diffusers"
    ),
    "llava_middle, LoRA": Study(RESPONSES, (UNCACHED, APART, BARE, AGAIN, COMPILED), peer="trl"),
    "llava_middle, full": Study(RESPONSES, (UNCACHED, APART, BARE, AGAIN, COMPILED, LOOPED), (FULL,), peer="trl"),
    "SPO on tiny_sd": Study(steps, (TWICE,), ("train.batch_size=2",)),
}
UNET, DIT, DECODER = (
    (PYTORCH, UNCACHED, COMPILED, LAST),
    (PYTORCH, UNCACHED, COMPILED),
    (PYTORCH, UNCACHED, APART, COMPILED),
)
STUDIES_CUDA = {
    "sd15_lora": Study(partial(case, "sd15_lora"), UNET, peer="diffusers"),
    "sd15_full": Study(partial(case, "sd15_full"), UNET, peer="diffusers"),
    "sdxl_lora": Study(partial(case, "sdxl_lora"), UNET, peer="diffusers"),
    "sdxl_full": Study(partial(case, "sdxl_full"), UNET, peer="diffusers"),
    "sd35m_lora": Study(partial(case, "sd35m_lora"), DIT),
    "llava15_7b": Study(partial(case, "llava15_7b"), DECODER, peer="trl"),
    "qwen25vl_7b": Study(partial(case, "qwen25vl_7b"), DECODER, peer="trl"),
}


def build(content: Content, overrides: Sequence[str], variant: Variant, folder: Path, updates: int) -> Run:
    """A variant of a recipe in memory."""
    recipe = load_recipe(content, [*overrides, *variant.overrides])
    return variant.change(runs.build(recipe, folder, Accelerator(), updates=updates))


def run(title: str, study: Study, folder: Path, *, repeats: int, say: Callable[[str], None]) -> Report:
    """Measure a study."""
    accelerator, content, overrides = Accelerator(), study.content(folder / "content"), list(study.overrides)
    peer = against.find(study.peer) if study.peer else None
    overrides += peer.alike(load_recipe(content, overrides)) if peer else ()
    ways = (Variant(OURS, ""), *study.variants)
    entrants = [Entrant(one.name, partial(build, content, overrides, one)) for one in ways]
    compared = [Comparison(one.name, OURS, one.why) for one in study.variants]
    ours = load_recipe(content, overrides)
    if study.peer and peer:
        theirs = load_recipe(content, [*overrides, *peer.own])
        entrants.append(bench.rival(study.peer, ours, theirs, folder / "float32", accelerator, say))
        compared.append(Comparison(study.peer, OURS, peer.about))
        here = [one.name for one in study.variants if one.name in BESIDE]
        compared += [Comparison(study.peer, name, BESIDE[name]) for name in here]
    rate = peak_rate(accelerator.device, DTYPES[ours.train.precision])
    rows = measure(entrants, folder / "runs", repeats=repeats, device=accelerator.device, say=say)
    return Report(machine(accelerator.device), {f"{title}: batches of {ours.train.batch_size}": rows}, compared, rate)


def joined(reports: Sequence[Report]) -> Report:
    """All studies as one report."""
    models = {title: rows for report in reports for title, rows in report.models.items()}
    compared = dict.fromkeys(one for report in reports for one in report.comparisons)
    return Report(reports[0].machine, models, list(compared), max(report.peak_rate for report in reports))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or take what was measured; show it, and write it where one asks."""
    parser = argparse.ArgumentParser(description="What a training step costs.")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--from", type=Path, nargs="+", dest="sources", help="measure nothing; take these --json")
    parser.add_argument("--markdown", type=Path, help="write the tables into this document, between its two markers")
    usual = STUDIES_CUDA if torch.cuda.is_available() else STUDIES
    parser.add_argument("--only", nargs="+", choices=usual, default=list(usual), help="not all, but these")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.sources:
        report = joined([read_report(source) for source in options.sources])
    else:
        say, reports = Console(stderr=True, highlight=False).print, list[Report]()
        for title in options.only:
            say(title)
            with tempfile.TemporaryDirectory() as folder:
                reports.append(run(title, usual[title], Path(folder), repeats=options.repeats, say=say))
            report = joined(reports)
            if options.json:  # what has been measured stays, whatever comes after it
                tables.write_report(report, options.json)
    tables.show(report)
    if options.markdown:
        tables.write_markdown(report, options.markdown)


if __name__ == "__main__":
    main()
