"""Answers: the model's own forward pass says what they must be, alone and in any company, with images and without."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmalign.config import DecodingConfig
from mmalign.families.types import LoraSettings, Mixture
from mmalign.families.vlm.generation import _Mixed
from mmalign.families.vlm.processor import HFProcessor
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.chat import Turn
from mmalign.policy import AdaptersOff, Policy
from mmalign.rng import KeyedRNG
from tests.helpers import Folders, first_fast, response_batches, vlm_models, vlm_reference
from tests.helpers.golden import golden
from tests.helpers.loading import load_vlm
from tests.helpers.policies import adapted
from tests.helpers.vlm_answers import DRAWS, GREEDY, QUESTION, SAMPLED, Asked, answers, head, prompt
from tests.helpers.vlm_reference import PICTURES


def test_a_prompt_is_the_one_that_responses_are_scored_after(family: Any) -> None:
    """Token for token, and what was said already is the beginning of the response."""
    view = ("wide", family.processor.preprocess_image(PICTURES["wide"]))
    turns = [Turn("user", QUESTION)]
    whole, short = family.processor.tokenize_responses(turns, ["There is a red cube and a dog.", "Yes."], [view])
    bare = family.processor.tokenize_prompt(turns, [view])
    assert bare.ids == whole.ids[: whole.start] == short.ids[: short.start] and bare.start == len(bare.ids)
    begun = family.processor.tokenize_prompt(turns, [view], "There is a red")
    assert begun.ids == whole.ids[: len(begun.ids)] and begun.start == whole.start and begun.images == ("wide",)
    assert family.processor.tokenize_prompt(turns, [view], " There is a red\n") == begun
    assert family.processor.decode(begun.response, begun.ids[: begun.start]).strip() == "There is a red"


def test_image_places_are_those_of_features(family: Any) -> None:
    """Tags between tiles and around an image are none."""
    row = prompt(family, Asked(("wide",)))
    places = family.processor.image_token_positions(row)
    (result,) = family.encode_images({"wide": family.processor.preprocess_image(PICTURES["wide"])}).images.values()
    assert len(places) == sum(x.shape[-2] for x in result.pooler_output) > 0
    assert {row.ids[place] for place in places} == {family.network.model.config.image_token_id}


def test_answer_keeps_its_leading_space() -> None:
    """As SentencePiece does: "cube" is the token "▁cube", which alone reads without its space."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = ["<unk>", "<s>", "▁a", "▁red", "▁cube"]
    tok.train_from_iterator(["a red cube"] * 8, trainers.BpeTrainer(vocab_size=60, special_tokens=words[:2]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>")
    ids = fast("a red cube", add_special_tokens=False).input_ids
    assert fast.convert_ids_to_tokens(ids) == words[2:]
    processor = HFProcessor(SimpleNamespace(tokenizer=fast), ModelQuirks(), 0, 100)
    assert processor.decode(ids[2:]) == "cube"
    assert processor.decode(ids[2:], after=ids[:2]) == " cube"


def test_an_answer_that_the_limit_cuts_says_so(family: Any) -> None:
    """Whole are an answer that ends with its end token, and one that ends with a text to stop at."""
    row = prompt(family, Asked())
    features = family.encode_images({"wide": family.processor.preprocess_image(PICTURES["wide"])})

    def cut(number: int, stop: Sequence[str] = ()) -> bool:
        decoding = DecodingConfig(max_new_tokens=number)
        (answer,) = family.generate(family.network, [row], features, decoding, rows=[1], rng=DRAWS, stop=stop)
        assert isinstance(answer.is_cut, bool)
        return bool(answer.is_cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(family.processor.__dict__, "ends", ())
        eos = family.network.model.generation_config.eos_token_id
        patch.setattr(family.network.model.generation_config, "eos_token_id", 0)
        assert cut(3) and not cut(3, [""]) and eos is not None
        # Any token ends an answer: one new token, and none is missing
        patch.setitem(family.processor.__dict__, "ends", tuple(range(len(family.processor.processor.tokenizer))))
        assert not cut(1) and not cut(3)


def own_answer(family: Any, asked: Asked, decoding: DecodingConfig) -> str:
    """Token by token from the model's own forward pass over pixels, the whole row anew each time."""
    row, responses = prompt(family, asked), list[int]()
    for step in range(decoding.max_new_tokens):
        logits = vlm_reference.own_logits(family, [*row.ids, *responses], asked.question, asked.images)[-1]
        if decoding.temperature:
            logits = logits / decoding.temperature + DRAWS.gumbel([asked.key], logits.shape, "answer", step)[0]
        responses.append(int(logits.argmax()))
        if responses[-1] in family.processor.ends:
            break
    text: str = family.processor.decode(responses, row.ids)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_of_the_model_s_own_forward_pass(family: Any, decoding: DecodingConfig) -> None:
    """Features made once, left padding, a cache and company change nothing; nor does what was said already."""
    requests = [Asked(), Asked(("tall",), QUESTION + " Describe it.", "There is a red", key=2)]
    results = answers(family, requests, decoding)
    assert results == [own_answer(family, asked, decoding) for asked in requests]
    assert all(results) and (results[0] != results[1] or decoding == GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(vlm_models.BUILDERS, 2))
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_is_the_same_alone_and_in_any_company(
    name: str, decoding: DecodingConfig, family_of: Callable[[str], Any]
) -> None:
    """Whatever the other prompts' lengths and images, their order and the size of a batch."""
    family = family_of(name)
    requests = [
        Asked(key=1),
        Asked(("tall", "square"), "<image>Hm? <image>", key=2),
        Asked((), "What is there?", "Two", key=3),
        Asked(("square",), QUESTION, "There is a green ball and", key=4),
        Asked(key=5),
    ]
    alone = [answers(family, [asked], decoding)[0] for asked in requests]
    assert answers(family, requests, decoding) == alone
    assert answers(family, requests[::-1], decoding.model_copy(update={"batch_size": 2})) == alone[::-1]
    # Prompts alike answer alike when greedy; their keys part them when sampled.
    assert (alone[0] == alone[4]) == (decoding.temperature == 0)


def test_other_draws_give_another_answer_and_equal_ones_the_same(llava: Any) -> None:
    requests = [Asked(key=key) for key in (1, 1, 2)]
    first, same, other_draw = answers(llava, requests, SAMPLED)
    assert first == same != other_draw
    for rng in (KeyedRNG(seed=4), KeyedRNG(seed=3, epoch=1)):
        assert answers(llava, requests[:1], SAMPLED, rng=rng) != [first]


@pytest.mark.slow
def test_sampled_tokens_follow_the_softmax_of_the_logits(llava: Any) -> None:
    """The first token of 600 answers, against its probability at that temperature."""
    decoding = DecodingConfig(max_new_tokens=1, temperature=0.25, batch_size=600)
    results = answers(llava, [Asked(key=key) for key in range(600)], decoding)
    row = prompt(llava, Asked())
    share = (vlm_reference.own_logits(llava, row.ids, QUESTION, ("wide",))[-1] / 0.25).softmax(-1)
    texts = [llava.processor.decode([token], row.ids) for token in range(len(share))]
    for text in {texts[token] for token in share.topk(3).indices}:
        p = share[[other == text for other in texts]].sum().item()  # parts of characters read alike
        # 3 standard deviations of a binomial share; the draws are fixed, so this passes always or never.
        assert abs(results.count(text) / 600 - p) < 3 * (p * (1 - p) / 600) ** 0.5


def test_an_answer_ends_after_the_first_of_the_stop_texts(llava: Any) -> None:
    requests = [Asked(key=1), Asked(("tall",), key=2), Asked(key=3)]
    plain = answers(llava, requests, SAMPLED)
    late, early = plain[0][4:6], plain[0][2:4]
    first = min(plain[0].index(text) + 2 for text in (late, early))
    results = answers(llava, requests, SAMPLED, stop=(late, early))
    assert results[0] == plain[0][:first]
    for stopped, whole in zip(results[1:], plain[1:], strict=True):
        assert whole.startswith(stopped)
    assert answers(llava, requests, SAMPLED, stop=("never said by anyone",)) == plain


def test_a_batch_ends_when_all_its_answers_have_ended(llava: Any) -> None:
    """A stop text costs no token more than it must; text in the prompt stops nothing."""
    (plain,) = answers(llava, [Asked()])
    with head(llava) as steps:
        assert answers(llava, [Asked()], stop=(plain[0],)) == [plain[0]]
    assert len(steps) == 1
    with head(llava) as steps:
        answers(llava, [Asked(start="Two dogs")], stop=("dogs",))
    assert len(steps) == GREEDY.max_new_tokens


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_5_vl", "paligemma"])
def test_the_token_that_ended_responses_in_training_ends_answers(name: str, family_of: Callable[[str], Any]) -> None:
    """The layout's end of a turn, or the end of the text; neither is part of the answer, nor is what would follow."""
    family = family_of(name)
    (row,) = family.processor.tokenize_responses([Turn("user", "Hm?")], ["Yes."], [])
    (plain,) = answers(family, [Asked()])
    with head(family, end=row.ids[-1]) as steps:
        (ended,) = answers(family, [Asked()])
    assert plain.startswith(ended) and 0 < len(ended) < len(plain) and len(steps) == 3


@pytest.mark.parametrize("several", [False, True])
def test_the_checkpoint_s_own_ends_end_answers_too(several: bool, vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders("llava"))
    end = family.processor.processor.tokenizer.convert_tokens_to_ids("<unk>")
    family.network.model.generation_config.eos_token_id = [2, end] if several else end
    with head(family, end) as steps:
        (ended,) = answers(family, [Asked()])
    assert ended and len(steps) == 3


def test_a_checkpoint_s_habits_are_not_the_answer_s(vlm_folders: Folders) -> None:
    """Such as Qwen2.5-VL's penalty of repetition; and the model is afterwards as it was, whatever its mode."""
    family: Any = load_vlm(vlm_folders("llava"))
    plain, model = answers(family, [Asked()]), family.network.model
    habits = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "max_length": 3, "use_cache": False}
    for name, value in habits.items():
        setattr(model.generation_config, name, value)
    family.unfreeze()
    family.enable_gradient_checkpointing()
    model.train()
    model.model.vision_tower.eval()
    own, modes = model.generation_config, [part.training for part in model.modules()]
    assert answers(family, [Asked()]) == plain
    assert model.generation_config is own and [part.training for part in model.modules()] == modes
    assert all(getattr(own, name) == value for name, value in habits.items())


def test_argmax_is_that_of_the_whole_logits(family: Any) -> None:
    responses = ["There is a red cube and a dog.", "Yes."]
    view = ("wide", family.processor.preprocess_image(PICTURES["wide"]))
    rows = family.processor.tokenize_responses([Turn("user", QUESTION)], responses, [view])
    tokens, features = family.processor.collate(rows), family.encode_images(dict([view]))
    result = family.argmax(family.network, tokens, features)
    assert result.shape == tokens.responses.shape and not result.requires_grad
    for got, row in zip(result, rows, strict=True):
        count = len(row.response)
        logits = vlm_reference.own_logits(family, row.ids, QUESTION, ("wide",))[row.start - 1 : -1]
        assert got[:count].tolist() == logits.argmax(1).tolist()
        assert got[count:].tolist() == [row.ids[0]] * (len(got) - count)


def test_without_its_adapters_a_model_answers_as_its_base(vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders("llava"))
    requests = [Asked(key=key) for key in range(4)]
    base = answers(family, requests, SAMPLED)
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    policy: Policy[Any] = Policy(family, family.network, family.network, AdaptersOff())
    assert answers(family, requests, SAMPLED) == base  # a zero second matrix: nothing has changed yet
    with torch.no_grad():
        for weight in policy.trainable():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert answers(family, requests, SAMPLED) != base
    assert policy.on_reference(lambda net: answers(family, requests, SAMPLED, net=net)) == base


def test_a_wrapped_network_answers_as_the_bare_one(llava: Any) -> None:
    wrapped = torch.nn.Sequential(llava.network)  # as a wrapper for distribution holds it
    assert answers(llava, [Asked()], net=wrapped) == answers(llava, [Asked()])


def test_the_mixture_is_the_geometric_one() -> None:
    published = golden("objectives")["geometric mixture a=.25 of ref"]
    policy, reference = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
    mixed = _Mixed(Mixture(lambda _: reference + 3.0, 0.25), {})(torch.zeros(1, 4), policy)
    torch.testing.assert_close(mixed.softmax(-1)[0], torch.tensor(published), rtol=0, atol=1e-6)


def test_another_network_is_mixed_in_at_every_token(vlm: Any) -> None:
    """Greedily, against the log-probabilities of both networks along the answers; the other one has adapters off."""
    policy = adapted(vlm, moved=0.3)
    batch = response_batches.batch(vlm)
    prompts = [replace(row, ids=row.ids[: row.start]) for row in batch.tokens.rows[:3]]
    decoding = DecodingConfig(max_new_tokens=5, batch_size=3)
    alone, mixed = (
        vlm.generate(
            policy.unwrapped, prompts, batch.features, decoding, rows=[0, 1, 2], rng=KeyedRNG(0), mixture=given
        )
        for given in (None, Mixture(policy.on_reference, 0.6))
    )
    assert [one.ids for one in alone] != [one.ids for one in mixed]
    for row, said in zip(prompts, mixed, strict=True):
        tokens = vlm.processor.collate([replace(row, ids=(*row.ids, *said.ids))])
        every = torch.arange(vlm.network.model.get_output_embeddings().out_features)
        targets = every.expand(1, len(said.ids), -1)
        with torch.no_grad():
            own = vlm.token_logps(policy.unwrapped, tokens, batch.features, targets)
        other = policy.on_reference(lambda net: vlm.token_logps(net, tokens, batch.features, targets))  # noqa: B023
        likelihood = (0.4 * own + 0.6 * other)[0]
        chosen = likelihood.gather(1, torch.tensor(said.ids)[:, None])[:, 0]
        assert (likelihood.max(1).values - chosen < 1e-4).all()
