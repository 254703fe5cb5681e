"""Measurements of docs/performance.md, run by hand on an otherwise idle machine.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.performance --json performance.json
    python -m tests.benchmarks.performance --from performance.json --markdown docs/performance.md

Most variants are overrides of a recipe. Others change a run: rejected ideas, and programs without one of our ideas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from mmalign.atomic_io import write_json
from mmalign.commands import bench
from mmalign.commands._bench_run import Run
from mmalign.commands.bench import MMALIGN, Numbers, Report
from mmalign.commands.load_recipe import load_recipe
from mmalign.console import configure_logging
from mmalign.methods.text_to_image import spo
from mmalign.modalities import loading
from mmalign.policy import FrozenCopy
from mmalign.resources import resolve_model
from tests.benchmarks import against, peers
from tests.benchmarks.against import Entry, Request
from tests.benchmarks.cases import Content, write_case, write_image_pairs

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

# ------------------------------------------------------------------------------------------------- changes to a run


def unchanged(run: Run) -> Run:
    """Return the run."""
    return run


def copied(run: Run) -> Run:
    """Use a frozen copy as the run's reference, whatever the recipe says."""
    another = loading.load_model(run.recipe, run.device)
    return replace(run, policy=replace(run.policy, reference=FrozenCopy(another.network)))


def channels_last(run: Run) -> Run:
    """Store convolutions' weights, and so their activations, with the channels innermost."""
    nets: list[Any] = [run.policy.unwrapped]
    nets += [run.policy.reference.model] if isinstance(run.policy.reference, FrozenCopy) else []
    for net in nets:
        net.to(memory_format=torch.channels_last)
    return run


def looped(run: Run) -> Run:
    """Run AdamW parameter by parameter, instead of in one kernel."""
    for group in run.train_state.optimizer.param_groups:
        group.update(fused=False, foreach=False)
    return run


class OneAfterTheOther(nn.Module):
    """A network that runs the second half of its rows, and then the first again in the backward pass.

    The activations of only one half exist at a time: chosen and rejected rows in sequence.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """Call the network, which returns a tuple of one tensor."""
        half = len(x) // 2

        def part(rows: slice) -> Any:
            return tree_map(lambda y: y[rows] if isinstance(y, Tensor) and len(y) == 2 * half else y, (x, args, kwargs))

        def run_net(x: Tensor, args: Any, kwargs: Any) -> Tensor:
            return self.net(x, *args, **kwargs)[0]  # type: ignore[no-any-return]

        first = checkpoint(run_net, *part(slice(half)), use_reentrant=False)
        return (torch.cat([first, run_net(*part(slice(half, None)))]),)


def in_sequence(run: Run) -> Run:
    """Predict chosen and rejected rows in sequence."""
    return replace(run, policy=replace(run.policy, model=OneAfterTheOther(run.policy.model)))


def two_forwards(run: Run) -> Run:
    """Predict SPO's chosen and rejected steps separately, as in its release, though both begin at one x_t."""
    spec = importlib.util.spec_from_file_location("spo_with_two_forwards", str(spo.__file__))
    assert spec is not None and spec.loader is not None
    method: Any = importlib.util.module_from_spec(spec)
    sys.modules[method.__name__] = method  # its dataclasses resolve their annotations there
    spec.loader.exec_module(method)

    def step_scores(family: Any, cfg: Any, view: Any, net: nn.Module) -> Any:
        rows = view.source
        repeated = {name: getattr(view, name)[rows] for name in ("x_t", "t", "prev", "prompt")}
        twice = replace(view, **repeated, source=torch.arange(len(rows), device=rows.device))
        return spo.step_scores(family, cfg, twice, net)

    method.step_scores = step_scores
    return replace(run, method=method)


# ----------------------------------------------------------------------------------------------- variants and studies


@dataclass(frozen=True)
class Variant:
    """A variant of training: overrides of a recipe, and a change to a run. `why` is the expectation."""

    name: str
    why: str
    overrides: tuple[str, ...] = ()
    change: Callable[[Run], Run] = unchanged


OFF = "data.cache='off'"
UNCACHED = Variant(
    "no caches", "frozen encoders run in every step, and so does a reference whose scores could be cached", (OFF,)
)
CACHED = Variant(
    "cached reference scores",
    "two draws per pair, whose reference scores are read from disk",
    ("method.num_cached_draws=2",),
)
COPIED = Variant("frozen copy", "the same operations; one more network in memory", (), copied)
MAPO = Variant("mapo", "no reference: one forward pass and one network less", ("method.name=mapo",))
CHECKPOINTED = Variant(
    "gradient checkpointing", "the policy's forward pass runs twice", ("train.gradient_checkpointing=true",)
)
COMPILED = Variant("compiled", "train.compile: the same operations, some of them fused", ("train.compile=true",))
HALVES = Variant(
    "gradient accumulation",
    "the same operations, half at a time; the compared first batch is another one",
    ("train.batch_size=2", "train.gradient_accumulation_steps=2"),
)
LAST = Variant("channels last", "left out of mmalign: the same operations", (), channels_last)
SEQUENCE = Variant(
    "chosen, then rejected",
    "left out of mmalign: half of the policy's forward pass runs twice",
    (),
    in_sequence,
)
LOOPED = Variant("AdamW, not fused", "the same operations, one parameter at a time", (), looped)
UNPACKED = Variant(
    "unpacked",
    "caches on, train.pack_responses: off; each response runs with its own copy of the prompt",
    ("train.pack_responses='off'",),
)
BARE = Variant("unpacked, no caches", "both", ("train.pack_responses='off'", OFF))
PYTORCH = Variant("sdpa", "train.attention: PyTorch's own, which may be cuDNN's", ("train.attention=sdpa",))
TWICE = Variant(
    "two forward passes", "as released: chosen and rejected steps are predicted separately", (), two_forwards
)


# Comparisons of a baseline with runs of ours that lack an idea, or have a further one.
BESIDE = {
    UNCACHED.name: "no caches on mmalign's side either",
    CACHED.name: "cached reference scores on mmalign's side",
    CHECKPOINTED.name: "gradient checkpointing on mmalign's side",
}


@dataclass(frozen=True)
class Study:
    """A recipe, its variants, and another program."""

    content: Callable[[Path], Content]
    variants: tuple[Variant, ...]
    overrides: tuple[str, ...] = ()
    peer: str | None = None


def tiny(folder: Path) -> Content:
    """Return a recipe of the bundled model on pairs of the bundled world."""
    write_image_pairs(folder / "pairs.parquet", 64)
    return {
        "method": {"name": "diffusion_dpo"},
        "model": {"path": resolve_model("models/tiny_sd")},
        "data": {"path": str(folder / "pairs.parquet"), "resolution": 64},
        "train": {"steps": 1, "batch_size": 16, "lr": 1e-5},
        "output": str(folder / "output"),
    }


def case(name: str, folder: Path) -> Content:
    """Return the recipe of a case, large enough that arithmetic outweighs Python."""
    return write_case(name, folder, Accelerator().device)


def steps(folder: Path) -> Content:
    """Return a recipe of SPO on the bundled model, which generates its training data."""
    recipe = load_recipe("configs/text_to_image/spo_tiny_sd.yaml")
    return {**recipe.model_dump(exclude_unset=True), "output": str(folder / "output")}


FULL = "model.tune=full"
IMAGES, RESPONSES = partial(case, "sd_middle"), partial(case, "llava_middle")
STUDIES = {
    "tiny_sd, LoRA": Study(tiny, (UNCACHED, CACHED)),
    "tiny_sd, full": Study(tiny, (UNCACHED, CACHED, MAPO), (FULL,)),
    "sd_middle, LoRA": Study(
        IMAGES, (UNCACHED, CACHED, COPIED, HALVES, CHECKPOINTED, SEQUENCE, COMPILED, LAST), peer="diffusers"
    ),
    "sd_middle, full": Study(
        IMAGES,
        (UNCACHED, CACHED, MAPO, HALVES, CHECKPOINTED, SEQUENCE, COMPILED, LAST, LOOPED),
        (FULL,),
        peer="diffusers",
    ),
    "llava_middle, LoRA": Study(RESPONSES, (UNCACHED, UNPACKED, BARE, CHECKPOINTED, COMPILED), peer="trl"),
    "llava_middle, full": Study(
        RESPONSES, (UNCACHED, UNPACKED, BARE, CHECKPOINTED, COMPILED, LOOPED), (FULL,), peer="trl"
    ),
    "SPO on tiny_sd": Study(steps, (TWICE,), ("train.batch_size=2",)),
}
DIT = (PYTORCH, UNCACHED, COMPILED)
STUDIES_CUDA = {
    **{
        name: Study(partial(case, name), (*DIT, LAST), peer="diffusers")
        for name in ("sd15_lora", "sd15_full", "sdxl_lora", "sdxl_full")
    },
    "sd35m_lora": Study(partial(case, "sd35m_lora"), DIT),
    "llava15_7b": Study(partial(case, "llava15_7b"), (*DIT, UNPACKED), peer="trl"),
    "qwen25vl_7b": Study(partial(case, "qwen25vl_7b"), (*DIT, UNPACKED), peer="trl"),
}


def entries_of(study: Study, content: Content, num_processes: int = 1) -> dict[str, Entry]:
    """Return the runs of a study by name: the recipe, its variants, and the baseline."""
    request = against.with_alike(Request(content, study.overrides, (), study.peer), num_processes)
    recipe, *peer_recipe = against.recipes_of(request).values()
    entries = {MMALIGN: Entry(recipe)}
    for variant in study.variants:
        changed = load_recipe(content, [*request.overrides, *variant.overrides])
        entries[variant.name] = Entry(changed, variant.change)
    if study.peer:
        entries[study.peer] = Entry(*peer_recipe, peer=peers.load(study.peer))
    return entries


def run(title: str, study: Study, folder: Path, *, repeats: int) -> Report:
    """Measure a study."""
    accelerator = Accelerator()
    entries = entries_of(study, study.content(folder / "content"), accelerator.num_processes)
    further = [(study.peer, name) for name in entries if name in BESIDE] if study.peer else []
    return against.measure(title, entries, folder, accelerator, further, repeats=repeats)


def reasons(studies: Mapping[str, Study]) -> dict[str, str]:
    """Return the expectation of every comparison."""
    result = dict[str, str]()
    for study in studies.values():
        result |= {f"{variant.name} / {MMALIGN}": variant.why for variant in study.variants}
        if study.peer:
            result[f"{study.peer} / {MMALIGN}"] = peers.load(study.peer).about
            result |= {f"{study.peer} / {name}": why for name, why in BESIDE.items()}
    return result


def as_markdown(reports: Sequence[Report]) -> str:
    """Return the tables with the expectations."""
    parts = [", ".join(f"{key}: {value}" for key, value in reports[0].machine.items())]
    for report in reports:
        parts += [f"### {report.title}", _table(report.costs)]
        parts += [_table(report.ratios)] if report.ratios else []
    compared = {name for report in reports for name in report.ratios}
    whys = [f"- {name}: {why}." for name, why in reasons({**STUDIES, **STUDIES_CUDA}).items() if name in compared]
    return "\n\n".join([*parts, "\n".join(["Expected:", "", *whys])])


def _table(rows: Mapping[str, Numbers]) -> str:
    heads = list(dict.fromkeys(head for numbers in rows.values() for head in numbers))
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    lines += [[name, *(bench.format_number(row.get(head)) for head in heads)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_markdown(reports: Sequence[Report], path: Path) -> None:
    """Replace the text between a document's markers by the tables.

    Raises:
        ValueError: the document lacks the markers.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected a line {BEGIN} and below it a line {END}; add them around the tables")
    path.write_text(f"{before}{begin}\n{as_markdown(reports)}\n{end}{after}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a command."""
    parser = argparse.ArgumentParser(description="The measurements of docs/performance.md.")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--from", type=Path, nargs="+", dest="sources", help="measure nothing; read these --json")
    parser.add_argument("--markdown", type=Path, help="write the tables into this document, between its two markers")
    studies = list(STUDIES_CUDA if torch.cuda.is_available() else STUDIES)
    parser.add_argument("--only", nargs="+", choices=studies, default=studies, help="not all, but these")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read measurements; print them, and write them where requested."""
    configure_logging()
    options = parse(arguments)
    reports = list[Report]()
    for source in options.sources or ():
        reports += [Report(**content) for content in json.loads(source.read_text()).values()]
    for title in () if options.sources else options.only:
        against.logger.info(title)
        with tempfile.TemporaryDirectory() as folder:
            reports.append(run(title, {**STUDIES, **STUDIES_CUDA}[title], Path(folder), repeats=options.repeats))
        if options.json:  # earlier studies are saved even if a later one fails
            write_json(options.json, {report.title: asdict(report) for report in reports})
    for report in reports:
        bench.show(report)
    if options.markdown:
        write_markdown(reports, options.markdown)


if __name__ == "__main__":
    main()
