"""Studies of judged outputs on the bundled models: several ways to learn from the same judgements.

    python -m tests.benchmarks.studies flipped_labels --output runs/studies
    python -m tests.benchmarks.studies thumbs --output runs/studies

A study is a set of arms, each a recipe with other settings. If it has several learning rates, every arm is trained
first with each rate on one seed, and evaluated on the validation split. The best rate by the first measure is kept.
Then `mmalign compare` trains every arm with three seeds and evaluates on the test split. The same command continues a
stopped study.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.commands.compare import compare
from mmalign.commands.load_recipe import dump_recipe, load_recipe
from mmalign.config.base import Choice
from mmalign.config.losses import PairLossConfig
from mmalign.rng import KeyedRNG
from mmalign.training.export import read_run_info

IMAGES, RESPONSES = "configs/text_to_image/diffusion_dpo_tiny_sd.yaml", "configs/vision_language/dpo_tiny_llava.yaml"
SFT, RESPONSE_SFT = "configs/text_to_image/sft_tiny_sd.yaml", "configs/vision_language/response_sft_tiny_llava.yaml"
VALIDATION = ("evaluate.split=validation",)
# Without a part of sums, and a loss that needs a known rate
LOSSES = {name: kind for name, kind in Choice.sections(PairLossConfig).items() if name not in ("anchor", "robust")}
BEST_OF = "evaluate.best_of={n: [4, 16], reward: {path: models/tiny_clip}}"  # the judge that made the pairs


@dataclass(frozen=True)
class Arm:
    """Recipe of a study: a shipped recipe with other settings."""

    recipe: str
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Arms by name, and the learning rates of the search.

    Attributes:
        arms: the arms.
        rates: the learning rates to choose from; none to keep the recipes'.
        lower_is_better: the sign of the first measure.
    """

    arms: Mapping[str, Arm]
    rates: Sequence[float] = ()
    lower_is_better: bool = False


def flip_labels(source: Path, target: Path, share: float, seed: int = 0) -> int:
    """Write a Pick-a-Pic file with a random share of its labels swapped, and return their number."""
    table = pq.read_table(source)
    keys = KeyedRNG(seed).uniform(list(range(table.num_rows)), (1,), "studies: flipped label")[:, 0]
    flipped = (keys < share).tolist()
    names = table.column_names
    for kind in ("label", "score"):
        sides = [table.column(f"{kind}_{side}").to_pylist() for side in (0, 1)]
        rows = [(b, a) if flip else (a, b) for a, b, flip in zip(*sides, flipped, strict=True)]
        for side, name in enumerate((f"{kind}_0", f"{kind}_1")):
            column = pa.array([row[side] for row in rows], table.schema.field(name).type)
            table = table.set_column(names.index(name), name, column)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return sum(flipped)


def flipped_labels(folder: Path) -> Study:
    """Return the study of a fifth of wrong labels: losses that assume none, a known rate, or learn it."""
    pairs = folder / "flipped-pairs.parquet"
    if not pairs.is_file():
        number = flip_labels(Path("assets/quickstart-pairs.parquet"), pairs, 0.2)
        print(f"{pairs}: {number} labels are swapped")
    losses = {
        "dpo": "dpo",
        "robust": "{name: robust, flip_rate: 0.2}",
        "smoothed": "{name: dpo, label_smoothing: 0.2}",
    }
    arms = {name: Arm(IMAGES, [f"method.loss={loss}", f"data.path={pairs}"]) for name, loss in losses.items()}
    arms["lcpo"] = Arm(IMAGES, ["method.label_noise={}", f"data.path={pairs}"])
    return Study({"sft": Arm(SFT, [f"data.path={pairs}"]), **arms, "dpo_clean": Arm(IMAGES)})


def thumbs(folder: Path) -> Study:
    """Return the study of pairs cut into liked and disliked images, against the pairs themselves."""
    cut = ["data.cut_pairs=true", "method={name: diffusion_kto, caption_dropout: 0.1, liked_share: null}"]
    arms = {loss: Arm(IMAGES, [*cut, f"method.loss={loss}"]) for loss in ("kto", "bco", "apo_zero_unpaired")}
    return Study({"sft": Arm(SFT), "dpo": Arm(IMAGES), **arms}, rates=(1e-5, 3e-5))


def pair_losses(folder: Path) -> Study:
    """Return the study of the pair losses on images, beside best of 4 and of 16; beta is Diffusion-DPO's for all."""
    hyper = {"slic": "{name: slic, delta: 0.001}"}  # in the unit of the scores
    names = [name for name, kind in LOSSES.items() if not kind.responses_only]
    arms = {name: Arm(IMAGES, [f"method.loss={hyper.get(name, name)}", BEST_OF]) for name in names}
    return Study({"sft": Arm(SFT, [BEST_OF]), **arms}, rates=(1e-5, 3e-5))


def response_losses(folder: Path) -> Study:
    """Return the study of the pair losses on responses, with published settings where they are not DPO's."""
    published = {
        "simpo": ["method.loss={name: simpo, gamma: 1.0}", "method.beta=2.0"],
        "sppo": ["method.beta=0.001"],
        "sppo_hard": ["method.beta=0.001"],
    }
    arms = {name: Arm(RESPONSES, [f"method.loss={name}", *published.get(name, [])]) for name in LOSSES}
    return Study({"sft": Arm(RESPONSE_SFT), **arms}, rates=(2.5e-5, 5e-5), lower_is_better=True)


STUDIES: Mapping[str, Callable[[Path], Study]] = {
    "flipped_labels": flipped_labels,
    "thumbs": thumbs,
    "pair_losses": pair_losses,
    "response_losses": response_losses,
}


def search(study: Study, folder: Path) -> dict[str, float]:
    """Return the rate of every arm that does best on the validation split with one seed."""
    sources = {
        (name, rate): _write_recipe(
            folder / "recipes" / f"{name}-{rate:g}.yaml", arm, [f"train.lr={rate}", *VALIDATION]
        )
        for name, arm in study.arms.items()
        for rate in study.rates
    }
    compare(list(sources.values()), seeds=1, output=folder / "search")
    rows = {row["name"]: row for row in json.loads((folder / "search" / "comparison.json").read_text())}
    gains = {key: _first_change(rows[Path(source).stem]) for key, source in sources.items()}
    sign = -1 if study.lower_is_better else 1
    return {name: max(study.rates, key=lambda rate: sign * gains[name, rate]) for name in study.arms}


def run(study: Study, folder: Path, seeds: int) -> None:
    """Search the rates, then compare the arms."""
    rates = search(study, folder) if study.rates else {}
    sources = []
    for name, arm in study.arms.items():
        chosen = [f"train.lr={rates[name]}"] if name in rates else []
        sources.append(_write_recipe(folder / "recipes" / f"{name}.yaml", arm, chosen))
    compare(sources, seeds=seeds, output=folder / "test")
    print((folder / "test" / "comparison.md").read_text())
    print("\n".join(f"{name}: lr {rate:g}" for name, rate in rates.items()))
    for name, seed in itertools.product(study.arms, range(seeds)):  # verdicts tell learned rates of wrong labels
        print(f"{name}, seed {seed}: {read_run_info(folder / 'test' / name / f'seed-{seed}' / 'model').verdict}")


def _write_recipe(file: Path, arm: Arm, overrides: Sequence[str]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(load_recipe(arm.recipe, [*arm.overrides, *overrides])))
    return str(file)


def _first_change(row: Mapping[str, object]) -> float:
    measures = row["measures"]
    assert isinstance(measures, dict)
    change = next(iter(measures.values()))["change"]["estimate"]
    assert isinstance(change, float)
    return change


def main() -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--output", type=Path, required=True, help="folder of the studies, one below it for each")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder = options.output / options.study
    run(STUDIES[options.study](folder), folder, options.seeds)


if __name__ == "__main__":
    main()
