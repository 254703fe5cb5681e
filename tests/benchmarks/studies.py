"""Studies of judged outputs on the bundled models: several ways to learn from the same judgements.

    python -m tests.benchmarks.studies flipped_labels --output runs/studies
    python -m tests.benchmarks.studies thumbs --output runs/studies        (or any other study)

A study is a set of arms, each a recipe with other settings. If it has several learning rates, every arm is trained
first with each rate on one seed, and evaluated on the validation split. The best rate by the first measure is kept.
Then `mmalign compare` trains every arm with three seeds and evaluates on the test split. The same command continues a
stopped study, and `--arms` takes some of the arms.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmalign.commands.compare import compare
from mmalign.commands.load_recipe import dump_recipe, load_recipe
from mmalign.commands.prepare import prepare
from mmalign.config.base import Choice
from mmalign.config.losses import PairLossConfig
from mmalign.training.export import read_run_info
from tests.benchmarks import study_data

IMAGES, RESPONSES = "configs/text_to_image/diffusion_dpo_tiny_sd.yaml", "configs/vision_language/dpo_tiny_llava.yaml"
ONLINE_RESPONSES = "configs/vision_language/online_dpo_tiny_llava.yaml"
LISTS = "configs/text_to_image/diffusion_lpo_tiny_sd.yaml"
SFT, RESPONSE_SFT = "configs/text_to_image/sft_tiny_sd.yaml", "configs/vision_language/response_sft_tiny_llava.yaml"
VALIDATION = ("evaluate.split=validation", "evaluate.best_of=null")  # best of n takes no part in a search
PAIRS = Path("assets/quickstart-pairs.parquet")
# Learning rates of the search; DGPO has online DPO's
ONLINE: Mapping[str, Sequence[float]] = {
    "diffusion_online_dpo": (2e-5, 4e-5),
    "dgpo": (),
    "nft": (4e-5, 1e-4),
    "awm": (4e-5, 1e-4),
    "flow_grpo": (4e-5, 1e-4),
}
ONLINE_UPDATES, ONLINE_IMAGES = 108, 2304  # six updates of 64 images, of every 128 images
FEWER_UPDATES, FEWER_IMAGES = 54, 1152  # half of both
WORTH = 4.0  # log-odds of a fulfilled part of a prompt, for MODPO's margin
# Without a part of sums, and a loss that needs a known rate
LOSSES = {name: kind for name, kind in Choice.sections(PairLossConfig).items() if name not in ("anchor", "robust")}
BEST_OF = "evaluate.best_of={n: [4, 16], reward: {path: models/tiny_clip}}"  # the judge that made the pairs


@dataclass(frozen=True)
class Arm:
    """Recipe of a study: a shipped recipe with other settings.

    Attributes:
        recipe: the shipped recipe.
        overrides: the settings.
        rates: the learning rates to choose from; none to keep the recipe's, None for the study's.
    """

    recipe: str
    overrides: Sequence[str] = ()
    rates: Sequence[float] | None = None


@dataclass(frozen=True)
class Study:
    """Arms by name, and the learning rates of the search.

    Attributes:
        arms: the arms.
        write: write the data that the arms read.
        rates: the learning rates to choose from; none to keep the recipes'.
        search: settings of the search alone, such as fewer updates, by arm.
        lower_is_better: the sign of the first measure.
        pairs: numbers of pairs after which the compared runs are evaluated too.
    """

    arms: Mapping[str, Arm]
    write: Callable[[], None] = lambda: None
    rates: Sequence[float] = ()
    search: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lower_is_better: bool = False
    pairs: Sequence[int] = ()


def flipped_labels(folder: Path) -> Study:
    """Return the study of a fifth of wrong labels: losses that assume none, a known rate, or learn it."""
    pairs = folder / "flipped-pairs.parquet"

    def write() -> None:
        print(f"{pairs}: {study_data.flip_labels(PAIRS, pairs, 0.2)} labels are swapped")

    losses = {
        "dpo": "dpo",
        "robust": "{name: robust, flip_rate: 0.2}",
        "smoothed": "{name: dpo, label_smoothing: 0.2}",
    }
    arms = {name: Arm(IMAGES, [f"method.loss={loss}", f"data.path={pairs}"]) for name, loss in losses.items()}
    arms["lcpo"] = Arm(IMAGES, ["method.label_noise={}", f"data.path={pairs}"])
    return Study({"sft": Arm(SFT, [f"data.path={pairs}"]), **arms, "dpo_clean": Arm(IMAGES)}, write)


def thumbs(folder: Path) -> Study:
    """Return the study of pairs cut into liked and disliked images, against the pairs themselves."""
    cut = ["data.cut_pairs=true", "method={name: diffusion_kto, caption_dropout: 0.1, liked_share: null}"]
    arms = {loss: Arm(IMAGES, [*cut, f"method.loss={loss}"]) for loss in ("kto", "bco", "apo_zero_unpaired")}
    return Study({"sft": Arm(SFT), "dpo": Arm(IMAGES), **arms}, rates=(1e-5, 3e-5))


def lists(folder: Path) -> Study:
    """Return the study of rankings of four images against their best and worst, at as many images an update."""
    pairs = folder / "pairs.parquet"

    def write() -> None:
        number = study_data.write_best_and_worst(_generate_lists(folder), pairs)
        print(f"{pairs}: {number} pairs of the lists' best and worst images")

    of_lists = [f"data.path={folder / 'lists.parquet'}", "train.batch_size=16"]
    arms = {
        loss: Arm(
            IMAGES, [*of_lists, f"method={{name: diffusion_lpo, beta: 3000, caption_dropout: 0.1, loss: {loss}}}"]
        )
        for loss in ("plackett_luce", "lambda_rank")
    }
    of_pairs = [f"data.path={pairs}"]
    return Study({"sft": Arm(SFT, of_pairs), "dpo": Arm(IMAGES, of_pairs), **arms}, write, rates=(1e-5, 3e-5))


def objectives(folder: Path) -> Study:
    """Return the study of MODPO: the count of a prompt decides the pairs, its colours the margin (arXiv:2310.03708)."""
    counts, colours = folder / "counts.parquet", folder / "colours.parquet"

    def write() -> None:
        source = _generate_lists(folder)
        for target, parts in ((counts, ("count", "colour")), (colours, ("colour", "count"))):
            print(f"{target}: {study_data.write_objectives(source, target, *parts, WORTH)} pairs")

    arms = {"count": Arm(IMAGES, [f"data.path={counts}"]), "colour": Arm(IMAGES, [f"data.path={colours}"])}
    for weight in (0.75, 0.5, 0.25):  # of the count
        margin = ["data.margin=score", f"data.margin_scale={(1 - weight) / weight}"]
        arms[f"count_{weight}"] = Arm(IMAGES, [f"data.path={counts}", f"method.beta={3000 / weight}", *margin])
    return Study(arms, write)


def online_images(folder: Path) -> Study:
    """Return the study of learning online, beside methods that learn from as many images of the base model.

    All of it runs in bfloat16, which is half again as fast on a CPU that has it.
    """
    pairs, half = folder / "pairs.parquet", "train.precision=bfloat16"

    def write() -> None:
        print(f"{pairs}: {_best_and_worst(folder, pairs, ONLINE_IMAGES, [half])} pairs of {ONLINE_IMAGES:,} images")

    offline = {
        "sft": Arm(SFT, [f"data.path={pairs}", half]),
        "diffusion_dpo": Arm(IMAGES, [f"data.path={pairs}", half, "train.steps=106"]),
    }
    arms = {name: Arm(_tiny_sd(name), [half], rates) for name, rates in ONLINE.items()}
    # 16 prompts at a time, as the others have them; `online_groups` has the recipe's 32
    of_16 = ["method.generation.prompts_per_contrast=16", "method.generation.noisings=3"]
    arms["dgpo"] = replace(arms["dgpo"], overrides=[half, *of_16, f"train.steps={ONLINE_UPDATES}", "train.lr=2.0e-5"])
    arms["online_dpo_fixed"] = Arm(_tiny_sd("diffusion_online_dpo"), [half, "method.reference=null"])
    # A reference that moves allows more from update to update: the rate that is best halfway is too large at the end
    shorter = {name: [f"train.steps={ONLINE_UPDATES // 2}"] for name in arms if name != "diffusion_online_dpo"}
    halfway = (ONLINE_UPDATES // 2 * 32,)  # updates of 32 pairs, or of 64 images
    return Study({**offline, **arms}, write, rates=(2e-5, 4e-5), search=shorter, pairs=halfway)


def online_groups(folder: Path) -> Study:
    """Return the study of how often a group of images is learned from, and how many at a time.

    All have half as many images as in `online_images`, in float32. Online DPO makes 6, 12 or 24 updates of a generation
    of 32 prompts, or six with eight images of 16 or with two judges. DGPO, NFT and CRD learn from all its 128 images in
    every update, Flow-GRPO from those of 16 prompts. Diffusion-DPO has as many images of the base model, and makes as
    many updates as online DPO with 12 or 24. SPO alone has twice as many images.
    """
    pairs = folder / "pairs.parquet"
    of_pairs = f"data.path={pairs}"

    def write() -> None:
        print(f"{pairs}: {_best_and_worst(folder, pairs, FEWER_IMAGES)} pairs of {FEWER_IMAGES:,} images")

    shorter = f"train.steps={FEWER_UPDATES}"
    shared = [shorter, "method.generation.shared_start=true"]
    of_8 = ["method.generation.images=8", "train.batch_size=16"]  # 128 of a generation, as with four
    judges = "[{path: models/tiny_clip}, {name: step_aware, path: models/tiny_clip_steps}]"
    chance = "{name: function, path: 'tests.benchmarks.study_data:chance'}"
    arms = {
        "diffusion_dpo": Arm(IMAGES, [of_pairs, f"train.steps={2 * FEWER_UPDATES}"]),
        "diffusion_dpo_longer": Arm(IMAGES, [of_pairs, f"train.steps={4 * FEWER_UPDATES}"], (4e-5,)),
        "diffusion_online_dpo": _repeated(6, 4e-5),
        "online_dpo_12": _repeated(12, 4e-5),
        "online_dpo_24": _repeated(24, 2e-5),
        "online_dpo_of_8": _repeated(6, 4e-5, *of_8),
        "online_dpo_two_judges": _repeated(6, 4e-5, f"method.reward={judges}", "method.combine=zscore"),
        "dgpo": Arm(_tiny_sd("dgpo")),
        "dgpo_12": Arm(_tiny_sd("dgpo"), _updates(12)),
        "dgpo_of_8": Arm(_tiny_sd("dgpo"), of_8, (4e-5,)),
        "dgpo_of_8_ema": Arm(_tiny_sd("dgpo"), [*of_8, "train.ema=0.9"], (4e-5,)),
        "dgpo_group": Arm(_tiny_sd("dgpo"), ["method.advantages.scale=group"], (4e-5,)),
        "crd": Arm(_tiny_sd("crd"), rates=(4e-5,)),
        "crd_2": Arm(_tiny_sd("crd"), ["method.reference_guidance=2.0"], (4e-5,)),
        "crd_chance": Arm(_tiny_sd("crd"), [f"method.reward={chance}"], (4e-5,)),
        "crd_beta": Arm(_tiny_sd("crd"), ["method.beta=3000", "method.reference_guidance=1.0"], (4e-5,)),
        "nft": Arm(
            _tiny_sd("nft"),
            [shorter, "method.generation.prompts_per_contrast=null", "method.generation.noisings=6"],
            (1e-4,),
        ),
        "flow_grpo_shared": Arm(_tiny_sd("flow_grpo"), shared, (1e-4,)),
        # 32 images are sampled for each update of SPO, so that it has twice as many as the others
        "spo_clip": Arm(
            _tiny_sd("spo"), [f"train.steps={ONLINE_IMAGES // 32}", "method.reward={path: models/tiny_clip}"], (4e-5,)
        ),
        "flow_grpo_clip": Arm(_tiny_sd("flow_grpo"), [*shared, "method.clip=8.0e-4"], (1e-4,)),
    }
    return Study(arms, write, rates=(2e-5, 4e-5))


def _repeated(times: int, rate: float, *settings: str) -> Arm:
    """Return online DPO with so many updates of each generation, after which the reference follows the policy."""
    return Arm(_tiny_sd("diffusion_online_dpo"), [*_updates(times), *settings], [rate])


def _updates(times: int) -> list[str]:
    """Return the settings for so many updates of each generation."""
    steps = FEWER_UPDATES // 6 * times
    return [f"train.steps={steps}", f"method.generation.noisings={times}", f"method.reference.every={times}"]


def _best_and_worst(folder: Path, pairs: Path, images: int, settings: Sequence[str] = ()) -> int:
    """Write the pairs of the base model's images, four of each prompt by the sampler of the online methods."""
    sampler = ["prepare.sampling.steps=10", "prepare.sampling.guidance=1.0"]
    lists = _generate_lists(folder, [f"prepare.prompts={images // 4}", *sampler, *settings])
    return study_data.write_best_and_worst(lists, pairs)


def _tiny_sd(method: str) -> str:
    return f"configs/text_to_image/{method}_tiny_sd.yaml"


def _generate_lists(folder: Path, settings: Sequence[str] = ()) -> Path:
    """Return the file of four judged images for each of 400 prompts or as many as set, generated once."""
    file = folder / "lists.parquet"
    if not file.is_file():
        prepare(load_recipe(LISTS, [f"data.path={file}", f"output={folder / 'generation'}", *settings]))
    return file


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


def online_responses(folder: Path) -> Study:
    """Return the study of what online DPO and IPO compare with: the model before training, a mixture, or its past.

    IPO's margin is 5 nats a response. INPO's published one is 67, for much longer responses.
    """
    ipo = ["method.loss=ipo", "method.score=sum", "method.beta=0.1"]
    settings = {
        "dpo": [],
        "dpo_moving": ["method.reference={every: 50, mix: 0.6}"],
        "ipo": ipo,
        "ipo_md": [*ipo, "method.mixture=0.25"],
        "inpo": [*ipo, "method.reference={every: 50, mix: 1.0}", "method.base_share=0.333"],
    }
    arms = {name: Arm(ONLINE_RESPONSES, overrides) for name, overrides in settings.items()}
    return Study(arms, rates=(2e-5, 5e-5), lower_is_better=True)


STUDIES: Mapping[str, Callable[[Path], Study]] = {
    "flipped_labels": flipped_labels,
    "thumbs": thumbs,
    "lists": lists,
    "objectives": objectives,
    "online_images": online_images,
    "online_groups": online_groups,
    "online_responses": online_responses,
    "pair_losses": pair_losses,
    "response_losses": response_losses,
}


def select(study: Study, arms: Sequence[str] | None) -> Study:
    """Return the study with these arms alone, in its own order; None keeps all."""
    return study if arms is None else replace(study, arms={n: arm for n, arm in study.arms.items() if n in arms})


def search(study: Study, folder: Path) -> dict[str, float]:
    """Return the rate of every arm that does best on the validation split with one seed."""
    sources = {
        (name, rate): _write_recipe(
            folder / "recipes" / f"{name}-{rate:g}.yaml",
            arm,
            [f"train.lr={rate}", *study.search.get(name, ()), *VALIDATION],
        )
        for name, arm in study.arms.items()
        for rate in _rates(study, arm)
    }
    if not sources:
        return {}
    compare(list(sources.values()), seeds=1, output=folder / "search")
    rows = {row["name"]: row for row in json.loads((folder / "search" / "comparison.json").read_text())}
    gains = {key: _first_change(rows[Path(source).stem]) for key, source in sources.items()}
    sign = -1 if study.lower_is_better else 1
    return {
        name: max(rates, key=lambda rate: sign * gains[name, rate])
        for name, arm in study.arms.items()
        if (rates := _rates(study, arm))
    }


def _rates(study: Study, arm: Arm) -> Sequence[float]:
    return study.rates if arm.rates is None else arm.rates


def run(study: Study, folder: Path, seeds: int) -> None:
    """Search the rates, then compare the arms."""
    study.write()
    rates = search(study, folder) if study.rates else {}
    sources = []
    for name, arm in study.arms.items():
        chosen = [f"train.lr={rates[name]}"] if name in rates else []
        sources.append(_write_recipe(folder / "recipes" / f"{name}.yaml", arm, chosen))
    compare(sources, seeds=seeds, output=folder / "test", pairs=study.pairs)
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, and check the names of arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--output", type=Path, required=True, help="folder of the studies, one below it for each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="some of the arms; the others can follow with the same output")
    options = parser.parse_args(arguments)
    arms = STUDIES[options.study](options.output).arms
    if unknown := sorted(set(options.arms or ()) - set(arms)):
        parser.error(f"--arms: {', '.join(unknown)}; expected some of {', '.join(arms)}")
    return options


def main() -> None:
    """Run a study from the command line."""
    options = parse()
    folder = options.output / options.study
    run(select(STUDIES[options.study](folder), options.arms), folder, options.seeds)


if __name__ == "__main__":
    main()
