"""Accuracy for people that a judge has never seen, by the number of their pairs (PAL, arXiv:2406.08469).

    python -m tests.benchmarks.judge_annotators --output runs/annotators

The world has three planted tastes: for many objects, for warm colours and for large objects. Every person has shares in
them, drawn from a Dirichlet distribution, and labels pairs of two scenes at random, with the log-odds of the shares'
mean taste. A judge with as many prototypes learns from the pairs of 60 people. Of 30 others each has a few pairs for
learning and 64 for the test. Three judges are tested on these:

    mean     the judge with its mean taste, which knows nothing of the person
    added    the judge after `model.tune: annotators` on the person's pairs; one run adds all new people
    fresh    a judge from the same CLIP, trained on one person's pairs alone (`model.head: linear`)

Learning rate and updates of the last two are chosen on six more people, for each number of pairs. Intervals are over
people. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.evaluation.statistics import paired_difference, proportion
from mmalign.rewards import open_clip
from mmalign.rewards._annotators import load_mixture
from mmalign.toy import scenes

CLIP = "models/tiny_clip_eval"
KNOWN, SEARCHED, TESTED = 60, 6, 30  # people
OF_KNOWN, OF_TEST = 24, 64  # pairs of a person
NUMBERS = (4, 8, 16, 32)  # pairs that a new person gives
WARM = ("red", "orange", "yellow")
CONCENTRATION = 0.3  # of the Dirichlet distribution of shares
CERTAINTY = 4.0  # log-odds of a unit of taste
SETTINGS: Mapping[str, Sequence[tuple[float, int]]] = {  # learning rates and updates
    "added": ((1e-3, 25), (1e-3, 100), (3e-3, 100)),
    "fresh": ((1e-3, 25), (1e-3, 100)),
}

Outcomes = NDArray[np.float64]


class Pair(NamedTuple):
    """Two scenes of a prompt, the tastes' differences [3] of the first from the second, and the first one's label."""

    prompt: str
    images: tuple[bytes, bytes]
    gains: NDArray[np.float64]
    first: bool


@dataclass(frozen=True)
class Person:
    """Person with shares [3] in the tastes, and the labelled pairs to learn from and to test on."""

    name: str
    shares: NDArray[np.float64]
    learning: Sequence[Pair]
    test: Sequence[Pair]


def draw_person(name: str, seed: int, learning: int, test: int) -> Person:
    """Draw a person's shares, pairs and labels."""
    rng = np.random.default_rng([7, seed])
    shares = rng.dirichlet([CONCENTRATION] * 3)
    pairs = [draw_pair(shares, rng) for _ in range(learning + test)]
    return Person(name, shares, pairs[:learning], pairs[learning:])


def draw_pair(shares: NDArray[np.float64], rng: np.random.Generator) -> Pair:
    """Draw two scenes of one shape, and the label of a person with these shares."""
    shape = scenes.SHAPES[rng.integers(len(scenes.SHAPES))]
    (image, tastes), (other, others) = (draw_scene(shape, rng) for _ in range(2))
    gains = tastes - others
    first = bool(rng.random() < 1 / (1 + np.exp(-CERTAINTY * shares @ gains)))
    return Pair(shape, (image, other), gains, first)


def draw_scene(shape: str, rng: np.random.Generator) -> tuple[bytes, NDArray[np.float64]]:
    """Draw a scene of one to four objects of a shape and a colour; return a PNG and its value [3] by each taste."""
    number, colour = int(rng.integers(1, 5)), list(scenes.COLOURS)[rng.integers(len(scenes.COLOURS))]
    objects = scenes.place_objects(scenes.ScenePrompt((scenes.Group(number, colour, shape),)), rng)
    buffer = io.BytesIO()
    scenes.render(objects).save(buffer, "PNG")
    radius = np.mean([x.radius for x in objects])
    return buffer.getvalue(), np.array([(number - 2.5) / 1.1, 1.0 if colour in WARM else -1.0, (radius - 8.2) / 1.4])


def write(path: Path, people: Mapping[str, Sequence[Pair]]) -> Path:
    """Write pairs of people as a Pick-a-Pic file with a column `annotator`."""
    rows = [
        {
            "caption": pair.prompt,
            "jpg_0": pair.images[0],
            "jpg_1": pair.images[1],
            "label_0": float(pair.first),
            "label_1": float(not pair.first),
            "annotator": name,
        }
        for name, pairs in people.items()
        for pair in pairs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def train(output: Path, pairs: Path, model: Mapping[str, Any], options: Mapping[str, Any]) -> Path:
    """Train a judge, unless it has been trained, and return its folder."""
    content = {
        "method": {"name": "bradley_terry"},
        "model": dict(model),
        "data": {"path": str(pairs), "cache": str(output.parent / "cache")},
        "train": {"save_every": options["steps"], "log_every": options["steps"], "trackers": [], **options},
        "output": str(output),
    }
    if not (output / "model").is_dir():
        mmalign.train(load_recipe(content))
    return output / "model"


def outcomes(margins: NDArray[np.float64], pairs: Sequence[Pair]) -> Outcomes:
    """Return 1 where the sign of a margin is that of the label, 0.5 for a margin of 0."""
    labels = np.array([1.0 if pair.first else -1.0 for pair in pairs])
    verdicts: Outcomes = (np.sign(margins) * labels + 1) / 2
    return verdicts


def right(judge: Path, people: Sequence[Person], *, own: bool = False) -> Outcomes:
    """Return 1 for each test pair [P, T] that a judge orders as labelled, by each person's own taste or the mean."""
    model = open_clip.load(str(judge), torch.device("cpu"), open_clip.Config())
    mixture, rows = load_mixture(str(judge)), list[Outcomes]()
    for person in people:
        images = [Image.open(io.BytesIO(image)) for pair in person.test for image in pair.images]
        prompts = [pair.prompt for pair in person.test for _ in range(2)]
        if own:
            assert mixture is not None
            place = mixture.places([person.name] * len(prompts))
            wanted = mixture(model.text(prompts), place)
            scores = mixture.score(model.embed(images), wanted, model.model.logit_scale.exp()).detach()
        else:
            scores = model(images, prompts)
        first, second = scores.view(-1, 2).double().numpy().T
        rows.append(outcomes(first - second, person.test))
    return np.stack(rows)


@dataclass(frozen=True)
class Judges:
    """Trained judge of known people, and the runs that start from new people's pairs."""

    folder: Path
    judge: Path

    def test(self, arm: str, people: Sequence[Person], number: int, setting: tuple[float, int]) -> Outcomes:
        """Train on the first pairs of new people, and return the outcomes [P, T] on their test pairs."""
        lr, steps = setting
        groups = [people] if arm == "added" else [[person] for person in people]
        model = {"path": str(self.judge), "tune": "annotators"} if arm == "added" else {"path": CLIP, "head": "linear"}
        rows = list[Outcomes]()
        for group in groups:
            name = f"{group[0].name}-{number}"
            pairs = write(self.folder / "pairs" / f"{name}.parquet", {x.name: x.learning[:number] for x in group})
            options = {"lr": lr, "steps": steps, "batch_size": number * len(group)}
            judge = train(self.folder / arm / f"{name}-{lr:g}-{steps}", pairs, model, options)
            rows.append(right(judge, group, own=arm == "added"))
        return np.concatenate(rows)


def choose(judges: Judges, people: Sequence[Person]) -> dict[tuple[str, int], tuple[float, int]]:
    """Return the best setting of each arm and number of pairs, on people who are not tested."""
    best = dict[tuple[str, int], tuple[float, int]]()
    for arm, number in itertools.product(SETTINGS, NUMBERS):
        means = {x: float(judges.test(arm, people, number, x).mean()) for x in SETTINGS[arm]}
        best[arm, number] = max(means, key=means.__getitem__)
        verdicts = ", ".join(f"lr {lr:g} x {steps}: {mean:.1%}" for (lr, steps), mean in means.items())
        print(f"search: {arm}, {number} pairs: {verdicts}", flush=True)
    return best


def table(people: Sequence[Person], mean: Outcomes, arms: Mapping[tuple[str, int], Outcomes]) -> list[str]:
    """Return the rows of the table: outcomes [P, T] of P people, with the differences from the mean taste."""
    groups = [person.name for person in people for _ in person.test]
    pairs = [pair for person in people for pair in person.test]
    gains = [person.shares @ pair.gains for person in people for pair in person.test]

    def row(title: str, values: Outcomes) -> str:
        change = paired_difference(mean.ravel(), values.ravel(), groups).points() if values is not mean else ""
        return f"| {title} | {proportion(values.ravel(), groups).points(signed=False)} | {change} |"

    rows = ["| judge | right, % | change from the mean taste, points |", "|---|---|---|", row("mean", mean)]
    rows += [row(f"{arm}, {number} pairs", values) for (arm, number), values in arms.items()]
    return [*rows, row("the planted taste itself", outcomes(np.array(gains), pairs))]


def build(folder: Path) -> Judges:
    """Train the judge of the known people, and print its accuracy on their test pairs."""
    known = [draw_person(f"known {n}", n, OF_KNOWN, OF_TEST) for n in range(KNOWN)]
    pairs = write(folder / "known.parquet", {person.name: person.learning for person in known})
    model = {"path": CLIP, "head": "linear", "annotators": {"prototypes": 3}}
    judge = train(folder / "known", pairs, model, {"lr": 1e-3, "steps": 600, "batch_size": 64})
    groups = [person.name for person in known for _ in person.test]
    for own in (True, False):
        share = proportion(right(judge, known, own=own).ravel(), groups)
        print(f"known people, {'own' if own else 'mean'} taste: {share.points(signed=False)}", flush=True)
    return Judges(folder, judge)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pairs and runs")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark from the command line."""
    folder = parse().output
    logging.disable(logging.INFO)
    judges = build(folder)
    searched, tested = (
        [draw_person(f"{kind} {n}", start + n, max(NUMBERS), OF_TEST) for n in range(number)]
        for kind, start, number in (("searched", 1000, SEARCHED), ("tested", 2000, TESTED))
    )
    settings = choose(judges, searched)
    mean = right(judges.judge, tested)
    arms = {(arm, number): judges.test(arm, tested, number, x) for (arm, number), x in settings.items()}
    lines = table(tested, mean, arms)
    print("\n".join(lines))
    chosen = {f"{arm}, {number} pairs": setting for (arm, number), setting in settings.items()}
    (folder / "result.json").write_text(json.dumps({"table": lines, "settings": chosen}, indent=1))


if __name__ == "__main__":
    main()
