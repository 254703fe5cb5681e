"""Answers of a model from which part of an image is hidden."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from tests.helpers import first_fast, vlm_models
from tests.helpers.vlm_answers import GREEDY, SAMPLED, Asked, answers, head, prompt
from tests.helpers.vlm_reference import PICTURES


def logits_of(family: Any, asked: Asked, hidden: Tensor | None) -> tuple[str, Tensor]:
    """A greedy answer with the logits [T, V] of its tokens."""
    with head(family) as steps:
        (answer,) = answers(family, [asked], GREEDY, None if hidden is None else [hidden])
    return answer, torch.stack(steps)


@pytest.fixture(params=first_fast([name for name in vlm_models.ALL if name != "qwen3_5"], 2))
def hiding(request: pytest.FixtureRequest, family_of: Callable[[str], Any]) -> Any:
    """A model whose decoder attends to all it knows of an image."""
    return family_of(request.param)


def test_an_image_that_is_hidden_changes_nothing(hiding: Any) -> None:
    """Not a bit of any logit; and one that is seen does."""
    assert hiding.image_masking_unsupported_reason is None
    first, second = Asked(("wide",)), Asked(("other wide",))
    places = hiding.processor.image_token_positions(prompt(hiding, first))
    every = torch.ones(len(places), dtype=torch.bool)
    (text, blind), (same, alike) = (logits_of(hiding, asked, every) for asked in (first, second))
    assert torch.equal(blind, alike) and text == same
    (_, seeing), (_, unlike) = (logits_of(hiding, asked, None) for asked in (first, second))
    assert (seeing[0] - unlike[0]).abs().max() > 1e-3 and (seeing[0] - blind[0]).abs().max() > 1e-3


def test_where_nothing_is_hidden_the_answer_is_the_plain_one(hiding: Any) -> None:
    places = hiding.processor.image_token_positions(prompt(hiding, Asked()))
    plain, none = (logits_of(hiding, Asked(), hidden) for hidden in (None, torch.zeros(len(places), dtype=torch.bool)))
    assert plain[0] == none[0] and torch.equal(plain[1], none[1])


def allowed(family: Any, row: TokenizedResponse, hidden: Tensor) -> Tensor:
    """[1, 1, L, L]: which token may attend to which, written out."""
    length = len(row.ids)
    places = torch.arange(length)
    mask = places[:, None] >= places
    if family.processor.quirks.prefix_attention:
        mask |= (places < row.start) & (places[:, None] < row.start)
    mask[:, torch.tensor(family.processor.image_token_positions(row))[hidden]] = False
    return mask[None, None]


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "idefics3", "internvl", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_hidden_tokens_are_not_attended_to_and_keep_their_places(name: str, family_of: Callable[[str], Any]) -> None:
    """Against a mask written out over all pairs of tokens, with the positions of the whole prompt."""
    family = family_of(name)
    asked = Asked(("tall", "wide"), "<image>Hm? <image>", "There is a")
    row, model = prompt(family, asked), family.network.model
    hidden = torch.arange(len(family.processor.image_token_positions(row))) % 2 == 0
    _, result = logits_of(family, asked, hidden)

    encoded = family.processor.processor(
        text=[family.processor.template.render([Turn("user", asked.question)])],
        images=[[PICTURES[key] for key in asked.images]],
        return_tensors="pt",
    )
    ids = torch.tensor([row.ids])
    inputs = {k: v for k, v in encoded.items() if "type" not in k and k not in ("labels", "input_ids")}
    inputs["attention_mask"] = allowed(family, row, hidden)
    if "image_grid_thw" in inputs:
        types = (ids == model.config.image_token_id).int()
        inputs["position_ids"], _ = model.model.get_rope_index(
            ids, types, image_grid_thw=inputs["image_grid_thw"], attention_mask=torch.ones_like(ids)
        )
    with torch.no_grad():
        expected = model(input_ids=ids, **inputs).logits[0, -1]
    torch.testing.assert_close(result[0], expected, rtol=1e-4, atol=1e-4)  # other kernels, other orders of sums


def test_hidden_prompts_are_the_same_in_company_of_seeing_ones(hiding: Any) -> None:
    """Each prompt has its own mask, wherever padding puts its image."""
    requests = [
        Asked(),
        Asked((), "What is there on the blue mat near the car?", key=2),
        Asked(start="There is", key=3),
    ]
    counts = [len(hiding.processor.image_token_positions(prompt(hiding, asked))) for asked in requests]
    hidden = [torch.arange(count) % 3 > 0 for count in counts]
    hidden[2] = torch.zeros(counts[2], dtype=torch.bool)
    alone = [answers(hiding, [asked], SAMPLED, [mask])[0] for asked, mask in zip(requests, hidden, strict=True)]
    assert answers(hiding, requests, SAMPLED, hidden) == alone


def test_a_decoder_that_cannot_hide_tokens_says_so(family_of: Callable[[str], Any]) -> None:
    family = family_of("qwen3_5")
    message = "a qwen3_5 has linear_attention layers, which process tokens in turn into one state"
    assert family.image_masking_unsupported_reason.startswith(message)
    count = len(family.processor.image_token_positions(prompt(family, Asked())))
    with pytest.raises(ValueError, match=message):
        answers(family, [Asked()], hidden=[torch.ones(count, dtype=torch.bool)])
