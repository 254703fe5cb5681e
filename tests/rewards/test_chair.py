"""Judge by the data's own true answers: values worked by hand, and what it refuses."""

from pathlib import Path

import pytest

from mmalign.config import RewardConfig
from mmalign.language.vocabularies import load_vocabulary
from mmalign.modalities.loading import check_reward_model
from mmalign.rewards import load_response_judge, load_reward_model
from mmalign.rewards.chair import reward

CROWDS = load_vocabulary("vocabulary", "crowds")
TRUTH = ["There is a blue star. There is a yellow cross."]


@pytest.mark.parametrize(
    ("response", "truth", "penalty", "expected"),
    [
        ("There is a blue star. There is a yellow cross.", TRUTH, 1.0, 1.0),
        ("There is a blue star.", TRUTH, 1.0, 0.5),
        ("There is a blue star. There is a blue star.", TRUTH, 1.0, 0.5),  # an object counts once
        ("There is a blue star. There is a red circle.", TRUTH, 1.0, 0.0),
        ("A red circle, a red circle.", TRUTH, 1.0, -1.0),  # every invented mention counts
        ("A yellow cross and a red circle.", TRUTH, 0.25, 0.375),
        ("", TRUTH, 1.0, 0.0),
        ("<think>A red circle?</think>A blue star.", TRUTH, 1.0, 0.5),
        ("A blue star.", ["blue star", "yellow cross"], 1.0, 0.5),  # a list of names
        ("A blue star.", ["nothing"], 1.0, -1.0),
        ("Yes, there is.", ["Yes."], 1.0, 1.0),
        ("No.", ["Yes."], 1.0, 0.0),
        ("There is none.", ["no"], 1.0, 1.0),
        ("Maybe.", ["no"], 1.0, 0.0),
        ("A blue star.", ["No circles are visible. There is a blue star."], 1.0, 1.0),  # a description
        ("A yellow cross.", ["no", "yellow cross"], 1.0, 1.0),
    ],
)
def test_objects_named_less_objects_invented(response: str, truth: list[str], penalty: float, expected: float) -> None:
    assert reward(response, truth, CROWDS, penalty) == pytest.approx(expected)


def test_rows_without_a_true_answer_and_images_are_refused() -> None:
    judge = load_response_judge("chair", "crowds", penalty=0.0)
    assert judge([[]], ["what?"], ["A blue star and a red circle."], [TRUTH]).tolist() == [0.5]
    with pytest.raises(
        ValueError, match=r"reward chair: the question 'what\?' has no true answer; give the data a col"
    ):
        judge([[]], ["what?"], ["A blue star."], [[" "]])
    with pytest.raises(ValueError, match="reward: chair judges responses; for images use another"):
        load_reward_model("chair", "crowds")
    with pytest.raises(ValueError, match=r"evaluate\.reward\.name: chair reads the true answers of the data"):
        check_reward_model("evaluate.reward", RewardConfig(name="chair", path="crowds"), responses=True)
    with pytest.raises(ValueError, match=r"method.reward.path: crowd cannot be read .* expected published, refined"):
        check_reward_model("method.reward", RewardConfig(name="chair", path="crowd"), responses=True, truths=True)


def test_a_function_that_names_truths_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exact.py").write_text(
        "def exact(images, prompts, responses, truths):\n"
        "    return [float(text in truth) for text, truth in zip(responses, truths)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = load_response_judge("function", "exact:exact", batch_size=2)
    rows = [[]] * 3, ["?"] * 3, ["4", "5", "6"]
    assert judge(*rows, [("4", "four"), ("6",), ("6",)]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="reward function: exact:exact reads truths, which there are none of here"):
        judge(*rows)
    reward_of_answers = RewardConfig(name="function", path="exact:exact")
    check_reward_model("method.reward", reward_of_answers, responses=True, truths=True)
    with pytest.raises(ValueError, match=r"evaluate\.reward\.name: function reads the true answers of the data"):
        check_reward_model("evaluate.reward", reward_of_answers, responses=True)
