"""Samples while a model trains: they change no bit of the training, resume with it, and show base beside policy."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmalign.commands import preflight
from mmalign.commands.load_recipe import load_recipe
from tests.helpers import Folders, data_files, first_fast, recipes
from tests.helpers.page_reader import Page
from tests.helpers.runs import assert_same, trained

SAMPLING = {"steps": 2, "guidance": 1.0, "resolution": data_files.SIDE}


def history(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "samples.json").read_text())
    return content


def without_last(output: Path) -> Path:
    """Return a copy of a run that was stopped at its first checkpoint."""
    stopped = output.with_name("stopped")
    shutil.copytree(output, stopped, ignore=shutil.ignore_patterns("model"))
    for late in sorted(stopped.glob("checkpoint-*"))[1:]:
        shutil.rmtree(late)
    return stopped


@pytest.fixture
def images(tiny_sd15: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe with an average of the weights."""
    return recipes.diffusion(
        tiny_sd15,
        data_files.pick_a_pic(tmp_path / "pairs.parquet"),
        tmp_path / "plain",
        train={"steps": 4, "ema": 0.5, "lr": 1e-2, "keep_checkpoints": 5},
        evaluate={"benchmark": "scenes", "sampling": SAMPLING},
    )


@pytest.mark.slow
def test_images_change_nothing_and_go_on(images: dict[str, Any], tmp_path: Path) -> None:
    """Weights, losses and the resumed page are those of a run without samples, and of one that never stopped."""
    plain, weights = trained(images)
    output = tmp_path / "sampled"
    sampled = {**images, "output": str(output)}
    sampled["train"] = {**images["train"], "sample_every": 1, "samples": 2, "trackers": ["tensorboard"]}
    other, other_weights = trained(sampled)
    assert_same(weights, other_weights)
    assert plain.history == other.history

    # Two prompts, base first, a change with every update, and the average at the end
    whole = history(output)
    assert list(whole["updates"]) == ["1", "2", "3", "4"]
    assert all(len(each) == 2 for each in (whole["base"], *whole["updates"].values()))
    columns = [whole["base"], *whole["updates"].values()]
    assert len({each[0] for each in columns}) == len(columns)
    page = Page(output / "samples.html")
    assert len(page.values("img", "src")) == 10 and not page.values("meta", "http-equiv")[1:]
    labels = [alt.split(":")[0] for alt in page.values("img", "alt")]
    assert labels[:5] == ["base", "update 4", "update 3", "update 2", "update 1"]

    # TensorBoard shows base and policy as one picture
    tags = dict[str, list[int]]()
    for folder in {path.parent for path in (output / "mmalign").rglob("events.*")}:
        read = EventAccumulator(str(folder))
        read.Reload()
        tags |= {tag: [event.step for event in read.Images(tag)] for tag in read.Tags()["images"]}
        for tag in read.Tags()["images"]:
            assert {(event.width, event.height) for event in read.Images(tag)} == {
                (2 * data_files.SIDE, data_files.SIDE)
            }
    assert list(tags.values()) == [[1, 2, 3, 4]] * 2

    # Resumed: the later samples are generated again, the base is kept
    stopped = without_last(output)
    assert_same(weights, trained({**sampled, "output": str(stopped)})[1])
    assert history(stopped) == whole


@pytest.mark.slow
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
def test_answers_change_nothing_and_go_on(tune: str, vlm_folders: Folders, tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path / "rows")
    content = recipes.vlm(
        vlm_folders("llava"), rows, tmp_path / "plain", model={"tune": tune}, train={"keep_checkpoints": 5}
    )
    weights = trained(content)[1]
    output = tmp_path / "sampled"
    sampled = {**content, "output": str(output), "train": {**content["train"], "sample_every": 2, "samples": 3}}
    sampled["evaluate"] = {"benchmark": "crowds", "decoding": {"max_new_tokens": 4, "temperature": 1.0}}
    assert_same(weights, trained(sampled)[1])
    whole = history(output)
    assert list(whole["updates"]) == ["2", "4"] and len(whole["base"]) == 3
    page = Page(output / "samples.html")
    assert len(page.values("img", "src")) == 3 and page.text.count("<blockquote") == 9
    stopped = without_last(output)
    assert_same(weights, trained({**sampled, "output": str(stopped)})[1])
    assert history(stopped) == whole


def test_other_settings_begin_a_new_page(vlm_folders: Folders, tmp_path: Path, log_lines: list[str]) -> None:
    """Without adapters or a cached base there is nothing to compare with after the first update, and it is said."""
    rows = data_files.response_pairs(tmp_path / "rows")
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "run", method={"name": "response_sft"})
    sampled = {"sample_every": 1, "samples": 1, "steps": 1, "save_every": 1}
    decoding = {"evaluate": {"benchmark": "crowds", "decoding": {"max_new_tokens": 2}}}
    trained({**content, **decoding, "train": {**content["train"], **sampled}})
    assert len(history(tmp_path / "run")["base"]) == 1 and not [line for line in log_lines if "no base" in line]
    trained({**content, **decoding, "train": {**content["train"], **sampled, "samples": 2, "steps": 2}})
    later = history(tmp_path / "run")
    assert later["base"] == [] and list(later["updates"]) == ["2"] and len(later["updates"]["2"]) == 2
    assert [line for line in log_lines if "samples: no base model is at hand" in line]


def test_prompts_of_a_file_are_taken_in_its_order(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na cat\n\na dog <b>\n")
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(
        tiny_sd15,
        pairs,
        tmp_path / "run",
        train={"steps": 1, "sample_every": 5, "samples": str(tmp_path / "prompts.txt")},
        evaluate={"benchmark": "scenes", "sampling": SAMPLING},
    )
    trained(content)
    assert history(tmp_path / "run")["settings"]["titles"] == ["a cat", "a dog <b>"]
    assert list(history(tmp_path / "run")["updates"]) == ["1"]  # the last update is always shown


@pytest.mark.parametrize(
    ("method", "model", "samples", "message"),
    [
        ("dpo", {"path": "a"}, "prompts.txt", "train.samples: got 'prompts.txt'; expected a number of questions"),
        ("step_preference", {"path": "a", "denoiser": "b"}, 4, "train.sample_every: method.name: step_preference"),
    ],
)
def test_what_has_no_samples_is_refused_in_training_alone(
    method: str, model: dict[str, str], samples: int | str, message: str
) -> None:
    options = {"steps": 1, "lr": 1.0, "trackers": [], "sample_every": 1, "samples": samples}
    sections = {"method": {"name": method}, "model": model, "data": {"path": "c"}, "train": options}
    recipe = load_recipe({**sections, "output": "d"})
    with pytest.raises(ValueError, match=re.escape(message)):
        preflight.check(recipe, "training")
    with pytest.raises(ValueError, match=r"^(?!train)"):  # a later check
        preflight.check(recipe, "evaluation")
