"""Judges that ask a vision-language model, against the model's own logits; and the laws of comparisons."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.config import RewardConfig
from mmalign.data.caches import fingerprint
from mmalign.judges import vlm as ask
from mmalign.judges import vlm_pairs
from mmalign.judges._asking import Asker, fill
from mmalign.language.chat import IMAGE
from mmalign.modalities.loading import build_reward_model
from mmalign.rewards import load_response_judge, load_reward_model, reward_config
from tests.helpers import Folders
from tests.helpers.vlm_reference import PICTURES, own_logits

SHOWN = [PICTURES["wide"], PICTURES["tall"], PICTURES["square"]]
PROMPTS = ["a dog on a mat", "two cats", "a dog on a mat"]


def asker(family: Any, batch_size: int = 8) -> Asker:
    return Asker("vlm", family, batch_size)


def own_odds(family: Any, question: str, images: Sequence[str], answers: tuple[str, str]) -> float:
    """The difference of the model's own logits at the first token in which the answers differ."""
    text = IMAGE * len(images) + question
    from mmalign.language.chat import Turn

    views = [(key, family.processor.preprocess_image(PICTURES[key])) for key in images]
    rows = family.processor.tokenize_responses([Turn("user", text)], answers, views)
    place = next(i for i, (a, b) in enumerate(zip(rows[0].ids, rows[1].ids, strict=False)) if a != b)
    logits = own_logits(family, rows[0].ids, text, images)[place - 1]
    return float(logits[rows[0].ids[place]] - logits[rows[1].ids[place]])


def test_yes_against_no_is_a_difference_of_the_models_logits(vlm: Any) -> None:
    judge = ask.VlmJudge(asker(vlm, 2), ask.Config())
    expected = [
        own_odds(vlm, f'Does this figure show "{prompt}"? Please answer yes or no.', [key], ("Yes", "No"))
        for prompt, key in zip(PROMPTS, ("wide", "tall", "square"), strict=True)
    ]
    scores = judge(SHOWN, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert len(set(scores.tolist())) == 3
    alone = torch.cat([judge([image], [prompt]) for image, prompt in zip(SHOWN, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-5)  # no company matters


def test_two_images_are_compared_in_both_orders(llava: Any) -> None:
    comparer = vlm_pairs.Comparer(asker(llava), vlm_pairs.Config())
    judge = vlm_pairs.PairJudge(comparer)
    question = f'Which of the two images shows "{PROMPTS[0]}" better, the first or the second? Please answer 1 or 2.'
    orders = [own_odds(llava, question, keys, ("1", "2")) for keys in (["wide", "square"], ["square", "wide"])]
    scores = judge(SHOWN, PROMPTS)
    assert float(scores[0] - scores[2]) == pytest.approx((orders[0] - orders[1]) / 2, rel=1e-3, abs=1e-4)
    assert scores[1] == 0 and scores[0] == -scores[2]  # alone under its prompt; the mean of a prompt is 0
    torch.testing.assert_close(judge(SHOWN[::-1], PROMPTS[::-1]).flip(0), scores, rtol=1e-4, atol=1e-5)


class Stub:
    """Asker whose log-odds are given by a function of the images, or biased towards the first position."""

    def __init__(self, bias: float, worth: dict[int, float] | None = None) -> None:
        self.bias, self.worth = bias, worth or {}

    def log_odds(self, questions: Sequence[str], images: Sequence[Any], answers: tuple[str, str]) -> Tensor:
        worths = [[self.worth.get(id(image), 0.0) for image in shown] for shown in images]
        return torch.tensor([self.bias + shown[0] - shown[-1] for shown in worths])


def test_a_bias_of_position_cancels_and_is_reported(log_lines: list[str]) -> None:
    """Worths 0, 1, 3 under a bias of 2: scores are the worths minus their mean; one of three pairs is consistent."""
    images = [Image.new("RGB", (4, 4)) for _ in range(3)]
    stub: Any = Stub(2.0, {id(image): worth for image, worth in zip(images, (0.0, 1.0, 3.0), strict=True)})
    scores = vlm_pairs.PairJudge(vlm_pairs.Comparer(stub, vlm_pairs.Config()))(images, ["a"] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, 3.0]) - 4 / 3)
    assert log_lines == ["vlm_pairs: 33% of 3 pairs have the same verdict in both orders"]


def test_responses_are_judged_and_compared(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ask, vlm_pairs):
        monkeypatch.setattr(module, "load_asker", lambda judge, path, device, cfg: asker(llava, cfg.batch_size))
    images, prompts = [[PICTURES["wide"]], [PICTURES["tall"]]], ["Is there a dog?", "Is there a car?"]
    first, second = ["Yes, there is.", "No."], ["No.", "Two cats."]
    both = [*images, *images], [*prompts, *prompts], [*first, *second]
    question = "Question: {}\nAnswer: {}\nIs this answer right, and does the image show all that it says? "
    question += "Please answer yes or no."
    odds = [
        own_odds(llava, question.format(prompts[0], text), ["wide"], ("Yes", "No"))
        for text in ("Yes, there is.", "No.")
    ]
    scores = load_response_judge("vlm", "none")(*both)
    torch.testing.assert_close(scores[[0, 2]], torch.tensor(odds), rtol=1e-3, atol=1e-4)
    # Compared in both orders: the scores of a question's answers have the mean 0
    compared = load_response_judge("vlm_pairs", "none")(*both)
    question = "Question: {}\nAnswer 1: {}\nAnswer 2: {}\nWhich answer is right and says only what the image shows? "
    question += "Please answer 1 or 2."
    orders = [
        own_odds(llava, question.format(prompts[0], *texts), ["wide"], ("1", "2"))
        for texts in ((first[0], second[0]), (second[0], first[0]))
    ]
    assert float(compared[0] - compared[2]) == pytest.approx((orders[0] - orders[1]) / 2, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(compared[2:], -compared[:2])
    assert (compared != 0).all()
    assert load_response_judge("vlm_pairs", "none")(images, prompts, first).tolist() == [0, 0]  # nothing to compare


def test_a_folder_is_loaded_and_its_scores_are_stored(
    vlm_folders: Folders, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RewardConfig(name="vlm", path=str(vlm_folders("llava")), options={"precision": "float32"})
    scores = tmp_path / "scores"
    judge = build_reward_model(config, torch.device("cpu"), allow_pickle=False, scores=scores)
    assert judge(SHOWN, PROMPTS).isfinite().all() and len(list(scores.glob("*.jsonl"))) == 1
    monkeypatch.setattr(fingerprint, "fingerprint_judge", None)  # weights without stored scores are not hashed
    compared = build_reward_model(config.model_copy(update={"name": "vlm_pairs"}), torch.device("cpu"),
        allow_pickle=False, scores=scores)  # fmt: skip
    compared(SHOWN, PROMPTS)
    assert len(list(scores.glob("*.jsonl"))) == 1  # comparisons depend on the company


def test_a_text_may_name_places() -> None:
    """An answer that contains {second} is judged as it is."""
    question = fill("{first} {second} {other}", first="{second}", second="{first}")
    assert question == "{second} {first} {other}"


def test_slips_end_in_a_sentence(llava: Any, tiny_clip: Any) -> None:
    with pytest.raises(ValueError, match=r"reward vlm: batch_size: .* greater than 0, got 0"):
        reward_config("vlm", {"batch_size": 0})
    with pytest.raises(ValueError, match=r"reward vlm: question: .*has no \{prompt\}"):
        reward_config("vlm", {"question": "Is it nice?"})
    with pytest.raises(ValueError, match=r"reward vlm_pairs: response_question: .*has no \{second\}"):
        reward_config("vlm_pairs", {"response_question": "{prompt} {first}?"})
    with pytest.raises(ValueError, match=r"the answers \('Yes', 'Yes'\) begin alike; name two that differ"):
        ask.VlmJudge(asker(llava), ask.Config(no="Yes"))(SHOWN, PROMPTS)
    with pytest.raises(ValueError, match=r"reward vlm: .* expected the folder of a vision-language model"):
        load_reward_model("vlm", str(tiny_clip))
    with pytest.raises(ValueError, match=r"reward vlm: a question has .* tokens, its images included"):
        ask.VlmJudge(asker(llava), ask.Config())(SHOWN[:1], ["dog " * 5000])
    with pytest.raises(
        ValueError, match="reward: open_clip judges images; for responses use one of chair, function, http, vlm"
    ):
        load_response_judge("open_clip", str(tiny_clip))
