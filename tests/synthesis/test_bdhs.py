"""BDHS: Algorithm 1 on a model that says what it is told to, and on tiny models of the real classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from mmalign.config import BdhsConfig, DecodingConfig
from mmalign.families.types import GeneratedText
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import Completion, GroundTruthAnswer, ResponseSampler, bdhs, too_long_reason
from mmalign.synthesis.sentence_cuts import STOPS
from mmalign.synthesis.similarity import Similarity, load_similarity
from tests.helpers.vlm_reference import PICTURES

ANSWERS = ["There is a dog. It sits on a mat.", "Yes.", "Two cats and a red car stand there."]
HOW = BdhsConfig(rho=0.5, max_new_tokens=8)
TRIGRAMS = load_similarity("similarity", "trigrams")
SEEN = 6  # image tokens of a prompt


def changed(**settings: float) -> BdhsConfig:
    return HOW.model_copy(update=settings)


@dataclass
class Scripted:
    """A model that goes on with the same words after whatever was said; it remembers what it was asked."""

    says: str = " thing."
    image_masking_unsupported_reason: str | None = None
    name: str = "scripted"
    max_length: int = 99
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def processor(self) -> Any:
        return self

    def tokenize_prompt(self, turns: Sequence[Turn], images: Sequence[Any], start: str = "") -> TokenizedResponse:
        """Its tokens are the image's and the letters of what was said."""
        return TokenizedResponse((*[0] * SEEN, *map(ord, start)), SEEN, tuple(key for key, _ in images))

    def image_token_positions(self, row: TokenizedResponse) -> tuple[int, ...]:
        return tuple(range(SEEN))

    def generate(
        self, net: Any, prompts: Sequence[TokenizedResponse], features: Any, decoding: DecodingConfig, **keys: Any
    ) -> Any:
        starts = ["".join(map(chr, row.ids[SEEN:])) for row in prompts]
        self.calls.append({"starts": starts, "decoding": decoding, **keys})
        return [GeneratedText(self.says) for _ in prompts]


def rows(answers: Sequence[str] = ANSWERS) -> list[GroundTruthAnswer]:
    return [
        GroundTruthAnswer(index, (Turn("user", "<image>What?"),), text, (("wide", None),))
        for index, text in enumerate(answers)
    ]  # type: ignore[arg-type]


def run(
    family: Any, answers: list[GroundTruthAnswer], masking: BdhsConfig = HOW, similar: Similarity = TRIGRAMS
) -> list[Completion]:
    return bdhs(ResponseSampler(family, torch.nn.Identity(), KeyedRNG(0)), answers, None, masking, similar)  # type: ignore[arg-type]


def measured(*scores: float) -> Similarity:
    """A measure that gives these values, one after another."""
    rest = iter(scores)
    return Similarity("scripted", lambda texts, others: [next(rest) for _ in texts])


def test_all_sentences_are_generated_in_one_call() -> None:
    """Four sentences of three answers in one call; each start is what was true, and the beginning of the sentence."""
    family = Scripted()
    result = run(family, rows())
    assert len(family.calls) == 1 and [one.tries for one in result] == [1, 1, 1]
    starts = family.calls[0]["starts"]
    assert len(starts) == 4 and ANSWERS[0].startswith(starts[0]) and ANSWERS[2].startswith(starts[3])
    assert starts[1].startswith("There is a dog. ") and ANSWERS[0].startswith(starts[1])
    assert starts[2] in ("", "No", "Yes")
    assert all(one.text.endswith("thing.") for one in result)
    assert result[0].text.count("thing.") == 2
    assert family.calls[0]["decoding"] == HOW and family.calls[0]["stop"] == STOPS
    assert len(set(family.calls[0]["rows"])) == 4


def test_similar_completions_are_retried() -> None:
    """Three rows: taken at once, at the third try, and never, whatever the fifth says."""
    family = Scripted()
    scores = [0.5, 0.98, 0.97, 1.0, 1.0, 0.9699, 1.0, 1.0, 1.0]
    result = run(family, rows(), similar=measured(*scores))
    assert [one.tries for one in result] == [1, 3, 5] and result[2].similarity == 1.0
    assert [len(call["starts"]) for call in family.calls] == [4, 2, 2, 1, 1]
    last = family.calls[-1]
    assert last["starts"] == [""] and last["stop"] == () and result[2].text == "thing."
    assert len({call["rows"][-1] for call in family.calls}) == 5  # every try draws anew


def test_one_try_is_guided_and_taken_as_it_is() -> None:
    family = Scripted()
    result = run(family, rows(ANSWERS[2:]), changed(tries=1), measured(1.0))
    assert len(family.calls) == 1 and family.calls[0]["stop"] == STOPS and result[0].tries == 1


def test_row_shares_its_mask_and_each_try_has_another() -> None:
    family = Scripted()
    run(family, rows(ANSWERS[:1]), similar=measured(1, 1, 1, 1, 1))
    first, *later = family.calls
    assert torch.equal(first["hidden"][0], first["hidden"][1]) and len(first["hidden"][0]) == SEEN
    assert any(not torch.equal(first["hidden"][0], call["hidden"][0]) for call in later)


@pytest.mark.parametrize(("rho", "share"), [(0.0, 0.0), (0.5, 0.5), (0.99, 0.99), (1.0, 1.0)])
def test_rho_is_the_share_that_is_hidden(rho: float, share: float) -> None:
    family = Scripted()
    run(family, rows(["A."] * 400), changed(rho=rho))
    hidden = torch.cat(family.calls[0]["hidden"]).float()
    # 2,400 draws: four standard deviations.
    assert abs(hidden.mean() - share) <= 4 * (share * (1 - share) / len(hidden)) ** 0.5


def test_a_number_of_tokens_can_be_kept_instead() -> None:
    """The same draws decide which, so that keeping more only adds to them."""
    kept = []
    for number in (0, 1, 4, 99):
        family = Scripted()
        run(family, rows(), changed(keep_tokens=number))
        kept.append(~torch.stack(family.calls[0]["hidden"]))
        assert (kept[-1].sum(1) == min(number, SEEN)).all()
    assert all(bool((fewer <= more).all()) for fewer, more in pairwise(kept))


def test_a_row_comes_out_alike_alone_and_in_company() -> None:
    alone = Scripted()
    (completion,) = run(alone, rows()[2:])
    assert completion == run(Scripted(), rows())[2]
    company = Scripted()
    run(company, rows())
    assert alone.calls[0]["rows"] == company.calls[0]["rows"][3:]
    assert torch.equal(alone.calls[0]["hidden"][0], company.calls[0]["hidden"][3])


@pytest.mark.parametrize("answer", ["Yes", "...", "no", "A"])
def test_answers_of_a_word_or_of_none(answer: str) -> None:
    (result,) = run(Scripted(), rows([answer]))
    assert result.text.endswith("thing.")


def test_a_model_that_says_nothing_leaves_what_was_said_before() -> None:
    (result,) = run(Scripted(says=""), rows(ANSWERS[2:]), changed(tries=1))
    assert ANSWERS[2].startswith(result.text)


def test_a_model_whose_image_cannot_be_hidden_is_refused() -> None:
    family = Scripted(image_masking_unsupported_reason="a qwen3_5 has linear_attention layers")
    with pytest.raises(ValueError, match=r"model\.path: BDHS masks an image for scripted, .*linear_attention"):
        run(family, rows())
    assert not family.calls


def test_an_answer_that_leaves_no_room_is_too_long() -> None:
    sampler = ResponseSampler(Scripted(max_length=SEEN + 12), torch.nn.Identity(), KeyedRNG(0))  # type: ignore[arg-type]
    (row,) = rows(["Yes."])
    assert too_long_reason(sampler, row, row.answer, 8) == too_long_reason(sampler, row, "", 12) is None
    assert too_long_reason(sampler, row, row.answer, 9) == (
        "prompt and answer have 10 tokens, and the model, which may add 9, reads 18"
    )


def asked(family: Any, key: str = "wide", answers: Sequence[str] = ANSWERS) -> tuple[list[GroundTruthAnswer], Any]:
    view = family.processor.preprocess_image(PICTURES[key])
    true_answers = [
        GroundTruthAnswer(n, (Turn("user", "<image>What is it?"),), text, ((key, view),))
        for n, text in enumerate(answers)
    ]
    return true_answers, family.encode_images({key: view})


def completed(family: Any, answers: Sequence[GroundTruthAnswer], features: Any, masking: BdhsConfig) -> list[str]:
    sampler = ResponseSampler(family, family.network, KeyedRNG(3))
    return [one.text for one in bdhs(sampler, answers, features, masking, TRIGRAMS)]


@pytest.mark.slow
def test_batched_completions_are_the_single_ones(vlm: Any) -> None:
    answers, features = asked(vlm)
    masking = changed(max_similarity=0.2, max_new_tokens=6, batch_size=3)  # most rows are tried several times
    together = completed(vlm, answers, features, masking)
    assert together == [text for row in answers for text in completed(vlm, [row], features, masking)]
    assert together == completed(vlm, answers, features, changed(max_similarity=0.2, max_new_tokens=6))
    assert len(set(together)) == len(together)


def test_with_every_token_hidden_the_image_does_not_matter(vlm: Any) -> None:
    """Greedy, so that only the image could; with none hidden it does, but for a model that says the same of any."""
    texts = {}
    for rho in (0.0, 1.0):
        masking = changed(rho=rho, tries=1, temperature=0.0)
        texts[rho] = [completed(vlm, *asked(vlm, key), masking) for key in ("wide", "other wide")]
    assert texts[1.0][0] == texts[1.0][1]
    assert "paligemma" in vlm.name or texts[0.0] != texts[1.0]
