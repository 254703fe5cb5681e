"""Several judges as one: values worked by hand, and the laws of each combination."""

import math
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.commands.load_recipe import load_recipe
from mmalign.config.evaluation import BestOf, WeightedReward
from mmalign.modalities.loading import check_method_judge, check_reward_model
from mmalign.rewards._combine import Combination, combined, combined_responses, standard_scores, votes

PROMPTS = ["a", "a", "b", "b"]
SCORES = torch.tensor([[1.0, 3.0, 2.0, 6.0], [10.0, 0.0, 0.0, 20.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([2.0, 1.0], dtype=torch.float64)


def together(
    combine: str, scores: Tensor = SCORES, weights: Tensor = WEIGHTS, at_least: Sequence[float | None] = (None,) * 3
) -> list[float]:
    def judge(row: Tensor) -> object:
        def call(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
            return row.float() if t is None else row.float() + t

        return call

    combination = Combination(combine, weights, at_least[: len(scores)])
    model = combined([judge(row) for row in scores], combination)  # type: ignore[misc]
    return model([Image.new("RGB", (4, 4))] * len(PROMPTS), PROMPTS).tolist()


def test_sum_adds_weighted_scores_and_passes_timesteps() -> None:
    assert together("sum") == [12, 6, 4, 32]
    judge = combined(
        [lambda images, prompts, t=None: torch.zeros(2) + t] * 2,
        Combination("sum", torch.tensor([1.0, 2.0]), [None, None]),
    )
    assert judge([Image.new("RGB", (4, 4))] * 2, ["a", "b"], torch.tensor([1.0, 2.0])).tolist() == [3, 6]


def test_standard_scores_are_in_pooled_deviations_of_a_prompt() -> None:
    """Judge 1: deviations of the prompts' means 1 and 2, pooled sqrt((2 + 8) / 2) = sqrt(5); mean 3.

    Judge 2: deviations 5 and 10, pooled sqrt((50 + 200) / 2) = sqrt(125); mean 7.5.
    """
    first = [2 * x / math.sqrt(5) for x in (-2, 0, -1, 3)]
    second = [x / math.sqrt(125) for x in (2.5, -7.5, -7.5, 12.5)]
    assert together("zscore") == pytest.approx([x + y for x, y in zip(first, second, strict=True)])


def test_standard_scores_ignore_a_judges_scale_and_a_judge_without_an_opinion() -> None:
    rescaled = torch.stack([SCORES[0] * 7 - 3, SCORES[1]])
    assert together("zscore", rescaled) == pytest.approx(together("zscore"))
    mute = torch.cat([SCORES, torch.tensor([[1.0, 1.0, 5.0, 5.0]], dtype=torch.float64)])  # equal within each prompt
    weights = torch.cat([WEIGHTS, torch.tensor([9.0], dtype=torch.float64)])
    assert together("zscore", mute, weights) == pytest.approx(together("zscore"))
    alone = standard_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), ["a", "b"])
    assert alone.tolist() == [0, 0]  # nothing to compare


def test_between_two_images_the_difference_is_the_log_odds_of_the_votes() -> None:
    """Prompt a: 2 of 3 votes for the second image. Prompt b: all for the second, which counts as 99 %."""
    a, b, c, d = together("vote")
    assert b - a == pytest.approx(math.log(2), abs=1e-6) and a == pytest.approx(-b)
    assert 1 / (1 + math.exp(c - d)) == pytest.approx(0.99, abs=1e-6)


def test_votes_ignore_any_rising_function_of_a_judges_scores() -> None:
    assert together("vote", torch.stack([SCORES[0].exp(), SCORES[1] ** 3])) == together("vote")


def test_votes_between_three_images_and_ties() -> None:
    """Shares against the two others: judge 1 gives (1, 1/2, 0), judge 2 (1/4, 1/4, 1); mean (5/8, 3/8, 1/2)."""
    scores = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    result = votes(scores, torch.ones(2, dtype=torch.float64), ["p"] * 3)
    torch.testing.assert_close(result, torch.tensor([5 / 8, 3 / 8, 1 / 2], dtype=torch.float64).logit() / 2)
    assert votes(scores, torch.ones(2, dtype=torch.float64), ["p", "q", "r"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("combine", ["sum", "zscore", "group_zscore", "vote"])
def test_responses_are_combined_as_images_are(combine: str) -> None:
    """Answers to one question about images of one content are compared; those about another image are not."""

    def judge(row: Tensor) -> object:
        return lambda images, prompts, responses, truths: row[[int(text) for text in responses]].float()

    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    images = [[red], [red.copy()], [blue], [blue]]
    model = combined_responses([judge(row) for row in SCORES], Combination(combine, WEIGHTS, [None] * 2))  # type: ignore[misc]
    assert model(images, ["what?"] * 4, ["0", "1", "2", "3"]).tolist() == pytest.approx(together(combine))


def test_standard_scores_of_a_prompt_are_gdpo_s() -> None:
    """Each judge of two images gives -1 and 1, whatever its scores; deviations have 1e-4 added."""
    assert together("group_zscore") == pytest.approx([-1, 1, -3, 3], rel=2e-4)
    weak = torch.stack([SCORES[0], torch.tensor([5.0, 5.0, 0.0, 1.0], dtype=torch.float64)])
    assert together("group_zscore", weak) == pytest.approx([-2, 2, -3, 3], rel=4e-4)


def test_outputs_that_break_a_constraint_get_the_least_of_their_prompt() -> None:
    """The second judge asks for 5: it refuses the better image of the first prompt, and the worse of the second."""
    assert together("sum", at_least=[None, 5.0]) == [2, 2, 4, 12]
    assert together("sum", at_least=[None, 99.0]) == [2, 2, 4, 4]
    assert together("sum", at_least=[None, 20.0]) == [2, 2, 4, 12]
    third = torch.cat([SCORES, torch.tensor([[0.0, 0.0, 0.0, -1.0]], dtype=torch.float64)])
    weights = torch.cat([WEIGHTS, torch.ones(1, dtype=torch.float64)])
    values = together("vote", third, weights, [None, None, -0.5])
    assert values[:2] == pytest.approx(together("vote")[:2]) and values[2] == values[3]


def test_constraints_need_a_reward_model_beside_them() -> None:
    term, limit = WeightedReward(path="models/tiny_clip"), WeightedReward(path="models/tiny_clip", at_least=0.5)
    with pytest.raises(ValueError, match=r"reward\.1\.weight: 2 means nothing beside at_least"):
        check_reward_model("reward", [term, limit.model_copy(update={"weight": 2.0})])
    with pytest.raises(ValueError, match="at_least makes all of them constraints"):
        check_reward_model("reward", [limit])
    with pytest.raises(ValueError, match="combine: vote needs two or more reward models"):
        BestOf(reward=[term, limit], combine="vote")


def test_what_compares_images_is_refused_where_batches_are_judged() -> None:
    """A limit gives an image the least score of its prompt, also of the same prompt's other pairs in the batch."""
    judge = "{name: step_aware, path: models/tiny_clip_steps}"
    limits = f"[{judge}, {{path: models/tiny_clip, at_least: 3}}]"
    for reward, part in ((limits, "at_least: 3"), ("{name: vlm_pairs, path: models/tiny_llava}", "reward vlm_pairs")):
        with pytest.raises(ValueError, match=f"^method.reward: {part} compares the images of a prompt"):
            check_method_judge(load_recipe("text_to_image/spo_tiny_sd", [f"method.reward={reward}"]))
    check_method_judge(load_recipe("text_to_image/nft_tiny_sd", [f"method.reward={limits}"]))
