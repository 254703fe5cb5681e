"""Two processes against one: every method, by data parallelism and by sharding (FSDP2), on the bundled models.

    python -m tests.benchmarks.two_processes              # all cases
    python -m tests.benchmarks.two_processes dpo inpo     # some

A case is trained by one process, by two, and by two that shard the model, each for a few updates. The sharded run is
then repeated from its first checkpoint. The table compares with one process: the largest difference of a loss, the
distance of the weights over the way gone since the first update, and that of the mean gradients. The last column says
whether the resumed run has the same bits.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.prepare import prepare
from mmalign.commands.train import train
from tests.helpers import processes
from tests.helpers.processes import GRADIENTS, WEIGHTS, Content, Job

LOSSES = 1e-3  # relative, of a loss above 0.1: a logit is beta times a difference of scores, each rounded
IMAGES, RESPONSES = "configs/text_to_image/{}_tiny_sd.yaml", "configs/vision_language/{}_tiny_llava.yaml"
TRAIN = ["train.save_every=1", "train.keep_checkpoints=9", "train.log_every=1", "train.trackers=[]"]
IMAGE_DATA = ["data.limit=24", "train.steps=3", "train.batch_size=4"]
RESPONSE_DATA = [
    "data.path=assets/quickstart-responses.parquet",
    "data.limit=12",
    "train.steps=3",
    "train.batch_size=4",
    "evaluate=null",
]
LORA, FULL = ["model.tune=lora"], ["model.tune=full"]
GENERATED = ["method.online.similarity=trigrams", "method.online.max_new_tokens=8", "method.online.tries=2"]
MIXED = ["method.mixed.vocabulary=crowds", "method.mixed.max_new_tokens=8"]
WHOLE_BATCH = "train.gradient_accumulation_steps=3"  # SPO's contrasts of a batch, whose pairs each process orders alone
# Of pixels alone: a network rounds its rewards by their batch. That moved nft's gradient, a difference of images, ten
# times as much as all else did.
IMAGES_JUDGED = [
    "method.reward={name: function, path: 'tests.helpers.image_batches:bright'}",
    *(f"method.generation.{name}" for name in ("images=3", "steps=4", "noisings=1")),
]
ANSWERS_JUDGED = [
    "data.path=assets/quickstart-answers.parquet",
    "method.advantages=batch",
    *(f"method.generation.{name}" for name in ("answers=4", "max_new_tokens=12")),
]
BDHS = "configs/vision_language/quickstart.yaml"


@dataclass(frozen=True)
class Case:
    """A short run: its recipe, and the overrides of its method, data and tuning.

    The pairs of a `coupled` method depend on their batch, so one process accumulates two batches of the size of two.
    What a `precomputed` method caches is rounded by its batch, so a run that is to stop caches its later updates first.
    """

    recipe: str
    overrides: Sequence[str]
    sharded: bool = True
    coupled: bool = False
    precomputed: bool = False

    def content(self, output: Path, *more: str) -> Content:
        recipe = load_recipe(self.recipe, [*self.overrides, *TRAIN, f"output={output}", *more])
        return recipe.model_dump(mode="json")


def _image(name: str, *overrides: str) -> Case:
    return Case(IMAGES.format(name), [*IMAGE_DATA, *overrides])


def _response(name: str, *overrides: str) -> Case:
    return Case(RESPONSES.format(name), [*RESPONSE_DATA, *overrides])


CASES = {
    "diffusion_dpo": _image("diffusion_dpo", *FULL, "train.ema=0.9"),
    "diffusion_dpo lora": _image("diffusion_dpo", *LORA, "train.gradient_checkpointing=true", "data.flip=true"),
    "diffusion_dpo cached": _image("diffusion_dpo", *FULL, "method.num_cached_draws=1"),
    "inpo": _image("inpo", *FULL),
    "inpo lora": _image("inpo", *LORA),
    "inpo cached": replace(
        _image("inpo", *FULL, "method.inverter=reference", "method.num_cached_draws=1"), precomputed=True
    ),
    "mapo": _image("mapo", *FULL),
    "sft": _image("sft", *FULL, "train.max_grad_norm=null"),
    "cca": replace(_image("cca", *FULL), coupled=True),
    "cca lora": replace(_image("cca", *LORA), coupled=True),
    "instruct_engine": _image("instruct_engine", *FULL),
    "spo": _image("spo", "data.limit=12", "method.steps=4", "method.start=1", WHOLE_BATCH),
    "nft": _image("nft", *IMAGES_JUDGED),
    "grpo": _response("grpo", *FULL, *ANSWERS_JUDGED),
    "step_preference": replace(_image("step_preference", "data.limit=60"), sharded=False),
    "dpo": _response("dpo", *FULL, "train.ema=0.9"),
    "dpo lora": _response("dpo", *LORA, "train.gradient_checkpointing=true"),
    "dpo uncached": _response("dpo", *FULL, "data.cache=off"),
    "mdpo": _response("mdpo", *FULL),
    "mdpo lora": _response("mdpo", *LORA),
    "povid": _response("povid", *FULL),
    "povid cached": _response("povid", *FULL, "method.num_cached_draws=1"),
    "realign": _response("realign", *FULL, "data.path={realign}", "data.limit=8"),
    "rlhfv": _response("dpo", *FULL, "method={name: rlhfv}"),
    "response_sft": _response("response_sft", *FULL),
    "bdhs": Case(BDHS, [*RESPONSE_DATA, *FULL]),
    "bdhs online": Case(BDHS, [*RESPONSE_DATA, *FULL, "method.mode=online", *GENERATED]),
    "bdhs mixed": Case(BDHS, [*RESPONSE_DATA, *LORA, "method.mode=mixed", *MIXED]),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Distances of a run in two processes from that in one, and whether it resumes bit for bit (None: not tried)."""

    loss: float
    weights: float
    gradients: float
    resumed: bool | None = None

    @property
    def is_equal(self) -> bool:
        return (
            self.loss < LOSSES and self.weights < WEIGHTS and self.gradients < GRADIENTS and self.resumed is not False
        )


def compare(names: Sequence[str], folder: Path) -> dict[tuple[str, str], Result]:
    """Run the cases in a folder, and return the results by case and mode, "ddp" or "fsdp2"."""
    cases = {name: CASES[name] for name in names}
    if "realign" in cases:
        pairs = _realign_pairs(folder)
        overrides = [text.format(realign=pairs) if "{realign}" in text else text for text in CASES["realign"].overrides]
        cases["realign"] = Case(CASES["realign"].recipe, overrides)
    histories = {}
    for name, case in cases.items():
        same = ["train.batch_size=2", "train.gradient_accumulation_steps=2"] if case.coupled else []
        histories[name] = train(load_recipe(case.content(folder / "one" / name, *same))).history
    processes.launch(folder, jobs(cases, folder), timeout=3600)
    results = {}
    for name, case in cases.items():
        for mode in ("ddp", "fsdp2")[: 1 + case.sharded]:
            results[name, mode] = _result(folder, name, mode, histories[name])
    return results


def jobs(cases: dict[str, Case], folder: Path) -> list[Job]:
    """Return the trainings of two processes; each batch has half of the pairs of one process's."""
    result = list[Job]()
    for name, case in cases.items():
        half = f"train.batch_size={case.content(folder)['train']['batch_size'] // 2}"
        result.append((f"ddp {name}", "train", case.content(folder / "ddp" / name, half)))
        if case.sharded:
            sharded = (half, "train.sharding=fsdp2")
            result.append((f"fsdp2 {name}", "train", case.content(folder / "fsdp2" / name, *sharded)))
            again = folder / "resumed" / name
            if case.precomputed:
                result.append((f"cached {name}", "cache", case.content(again, *sharded)))
            result.append((f"stopped {name}", "train", case.content(again, *sharded, "train.steps=1")))
            result.append((f"resumed {name}", "train", case.content(again, *sharded)))
    return result


def _result(folder: Path, name: str, mode: str, history: list[dict[str, float]]) -> Result:
    records = [processes.read(folder, f"{mode} {name}", rank)["history"] for rank in (0, 1)]
    assert records[0] == records[1], f"{name}: the processes report different numbers"
    pairs = zip(history, records[0], strict=True)
    loss = max(abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), 0.1) for a, b in pairs)
    weights, gradients = processes.distance(folder / "one" / name, folder / mode / name, len(history))
    resumed = None
    if mode == "fsdp2":
        files = [*(folder / mode / name).glob("model/**/*.safetensors")]
        files += (folder / mode / name).glob(f"checkpoint-{len(history):08d}/*.safetensors")
        again = {file: folder / "resumed" / name / file.relative_to(folder / mode / name) for file in files}
        resumed = len(files) > 1 and all(_same(*each) for each in again.items())
    return Result(loss, weights, gradients, resumed)


def _same(file: Path, other: Path) -> bool:
    a, b = load_file(file), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _realign_pairs(folder: Path) -> Path:
    """Return a file of pairs with retrieved images, which no bundled file has."""
    path = folder / "realign.parquet"
    overrides = ["prepare.source.limit=8", "prepare.realign.max_new_tokens=8", f"data.path={path}"]
    prepare(load_recipe(RESPONSES.format("realign"), [*overrides, f"output={folder / 'realign'}"]))
    return path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases: {', '.join(CASES)}; default: all")
    names = parser.parse_args(arguments).names or list(CASES)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="two-processes-"))
    try:
        results = compare(names, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'case':22} {'mode':6} {'loss':>8} {'weights':>8} {'gradients':>9}  resumed")
    for (name, mode), result in results.items():
        numbers = f"{result.loss:8.1e} {result.weights:8.1e} {result.gradients:9.1e}"
        resumed = {None: "", True: "same bits", False: "DIFFERS"}[result.resumed]
        print(f"{name:22} {mode:6} {numbers}  {resumed}{'' if result.is_equal else '  <- beyond the bound'}")
    failures = sum(not result.is_equal for result in results.values())
    print(f"{len(results)} runs in two processes, {failures} beyond the bounds {LOSSES:g}, {WEIGHTS:g}, {GRADIENTS:g}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
