"""A Python function as judge: its scores, its batches, and a sentence for every slip."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmalign
from mmalign.config import RewardConfig
from mmalign.modalities.loading import build_reward_model, check_reward_model
from mmalign.rewards import load_reward_model

PAGE = Path(mmalign.__file__).parents[1] / "docs" / "judges.md"
GREY, WHITE = Image.new("RGB", (8, 8), (51, 51, 51)), Image.new("RGB", (8, 8), "white")
SLIPS = """
import numpy as np
import torch

seen = []

def tensor(images, prompts): return torch.tensor([image.width for image in images], dtype=torch.float64)
def array(images, prompts): return np.array([image.width for image in images])
def counts(images, prompts):
    seen.append(len(images))
    return [0] * len(prompts)
def short(images, prompts): return [1.0] * (len(images) - 1)
def nan(images, prompts): return [1.0, float("nan")]
def text(images, prompts): return ["good", "bad"]
def truths(images, prompts): return [image.width > 8 for image in images]
def numpys_truths(images, prompts): return list(np.array([False, False]))
def one(images, prompts): return 1.0
def nothing(images, prompts): return None
def columns(images, prompts): return torch.zeros(2, 1)
def fails(images, prompts): return 1 / 0
def only_images(images): return [0.0]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slips", raising=False)
    (tmp_path / "slips.py").write_text(SLIPS)
    return "slips"


@pytest.mark.skipif(not PAGE.is_file(), reason="no checkout: the installed package is under test")
def test_the_pages_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    blocks = dict(re.findall(r"^```(python|yaml)\n# my_judges\.py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_judges.py").write_text(blocks["python"])
    config = RewardConfig(**yaml.safe_load(blocks["yaml"])["evaluate"]["reward"])
    check_reward_model("evaluate.reward", config)
    assert log_lines == [f"evaluate.reward.path: this recipe runs my_judges:brightness from {tmp_path}/my_judges.py"]
    scores = build_reward_model(config, torch.device("cpu"), allow_pickle=False)([GREY, WHITE], ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([0.2, 1.0]))


def test_tensors_and_arrays_are_scores(module: str) -> None:
    for name in ("tensor", "array"):
        scores = load_reward_model("function", f"{module}:{name}")([GREY, WHITE], ["a", "b"])
        assert scores.dtype == torch.float32 and scores.tolist() == [8, 8]
    assert load_reward_model("function", f"{module}:short")([], []).shape == (0,)


def test_truth_values_are_scores(module: str) -> None:
    wider = GREY.resize((9, 8))
    for name, expected in (("truths", [0, 1]), ("numpys_truths", [0, 0])):
        assert load_reward_model("function", f"{module}:{name}")([GREY, wider], ["a", "b"]).tolist() == expected


def test_batches_are_no_larger_than_the_option(module: str) -> None:
    load_reward_model("function", f"{module}:counts", batch_size=2)([GREY] * 5, ["a"] * 5)
    assert sys.modules[module].seen == [2, 2, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "returned 1 scores for 2 prompts"),
        ("nan", "returned nan for the prompt 'a star'"),
        ("text", "returned 'good' for the prompt 'a dog'"),
        ("one", "returned float; expected a list of 2 numbers"),
        ("nothing", "returned NoneType; expected a list of 2 numbers"),
        ("columns", r"returned \[0.0\] for the prompt 'a dog'"),
        ("fails", r"failed for 2 prompts, the first of which is 'a dog' \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_slip_ends_in_a_sentence_with_the_remedy(module: str, name: str, message: str) -> None:
    judge = load_reward_model("function", f"{module}:{name}")
    with pytest.raises(ValueError, match=rf"^reward function: slips:{name} {message}.*; correct the function") as error:
        judge([GREY, WHITE], ["a dog", "a star"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("slips:only_images", "takes other arguments .* expected a function from \\(images, prompts\\) to one number"),
        ("slips:missing", "cannot be imported"),
        ("slips:seen", "is not a function but list"),
        ("os:getpid", "is built into Python"),
        ("slips", "is not a function; expected module:function"),
    ],
)
def test_a_path_that_names_no_judge_is_refused_before_anything_loads(module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prepare.reward.path: '?{path}'? {message}"):
        check_reward_model("prepare.reward", RewardConfig(name="function", path=path))


def test_numpy_numbers_count_as_numbers() -> None:
    from mmalign.rewards import as_scores

    assert as_scores("x", [np.float32(0.5), np.int64(2)], ["a", "b"], "").tolist() == [0.5, 2]
