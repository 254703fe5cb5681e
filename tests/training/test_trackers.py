"""Curves and configurations as trackers get them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmalign.training.trackers import charts, init_trackers, log_curves, log_samples, without_samples


def test_the_reference_follows_from_the_gain() -> None:
    """A gain is a difference of scores: of log-probabilities, or of -1/2 error."""
    means = {
        "chosen log-probability": -5.0,
        "chosen gain": 1.5,
        "rejected log-probability": -7.0,
        "rejected gain": -2.0,
    }
    lines = {"chosen": -5.0, "chosen reference": -6.5, "rejected": -7.0, "rejected reference": -5.0}
    assert charts(means) == {"log-probability": lines}
    assert charts({"matched error": 0.4, "matched gain": 0.05}) == {
        "error": {"matched": 0.4, "matched reference": pytest.approx(0.5)}
    }


def test_a_method_without_reference_has_its_own_lines_alone() -> None:
    assert charts({"chosen error": 0.4, "rejected error": 0.5, "loss": 1.0}) == {
        "error": {"chosen": 0.4, "rejected": 0.5}
    }
    assert charts({"loss": 1.0}) == {}


def test_tensorboard_draws_both_models_in_one_chart(tmp_path: Path) -> None:
    """Lines of one chart are runs with the same tag; the recipe's values are hyper-parameters by their keys."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    init_trackers(accelerator, "mine", {"train": {"lr": 0.1, "ema": None, "trackers": ["tensorboard"]}, "output": "x"})
    log_curves(accelerator, {"chosen error": 0.4, "chosen gain": 0.05}, 7, "held-out ")
    accelerator.end_training()
    values = {}
    for folder in {path.parent for path in (tmp_path / "mmalign").rglob("events.*")}:
        read = EventAccumulator(str(folder))
        read.Reload()
        for tag in read.Tags()["scalars"]:
            values[folder.name, tag] = [(event.step, pytest.approx(event.value)) for event in read.Scalars(tag)]
    assert values == {
        ("held-out error_chosen", "held-out error"): [(7, 0.4)],
        ("held-out error_chosen reference", "held-out error"): [(7, 0.5)],
    }
    (written,) = (tmp_path / "mmalign").rglob("hparams.yml")
    assert yaml.safe_load(written.read_text()) == {"train.lr": 0.1, "train.trackers": "['tensorboard']", "output": "x"}


def test_other_trackers_get_one_group() -> None:
    class Tracker:
        name = "wandb"

        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

    logged: list[Any] = []
    accelerator: Any = type("Accelerator", (), {"trackers": [Tracker()]})
    log_curves(accelerator, {"chosen error": 0.4}, 3)
    log_curves(accelerator, {"loss": 0.4}, 4)
    assert logged == [(3, {"error/chosen": 0.4})]


class Recording:
    """Stand-in for wandb's tracker, which is not installed."""

    name = "wandb"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.calls += [(tag, [image.shape for image in images]) for tag, images in values.items()]

    def log_table(self, name: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.calls.append((name, [columns, *data]))


def test_wandb_shows_base_and_policy_side_by_side() -> None:
    tracker, image = Recording(), Image.new("RGB", (6, 4))
    accelerator: Any = type("Accelerator", (), {"trackers": [tracker]})
    log_samples(accelerator, ["a cat"], [image], [image], 3)
    log_samples(accelerator, ["a cat"], [], [image], 3)
    log_samples(accelerator, ["What?" * 30], ["a"], ["b"], 3)
    tag = f"samples/1: {('What?' * 30)[:60]}"
    assert tracker.calls == [
        ("samples/1: a cat", [(4, 12, 3)]),
        ("samples/1: a cat", [(4, 6, 3)]),
        (tag, [["question", "base", "policy"], ["What?" * 30, "a", "b"]]),
    ]


def test_other_trackers_are_named_once() -> None:
    trackers = [type("Tracker", (), {"name": name})() for name in ("mlflow", "tensorboard", "aim")]
    accelerator: Any = type("Accelerator", (), {"trackers": trackers})
    assert without_samples(accelerator) == ["mlflow", "aim"]
