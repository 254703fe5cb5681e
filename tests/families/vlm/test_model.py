"""Vision-language models of every standing type: tokens as the processor's, scores as the model's own."""

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmalign.families.base import VisionLanguage
from mmalign.families.loading import load_vision_language, model_type
from mmalign.families.types import Loading, LoraSettings
from mmalign.families.vlm.checks import check_type
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.policy import AdaptersOff, Policy, adapters_off
from tests.helpers import Folders, first_fast, vlm_models, vlm_reference
from tests.helpers.loading import CPU, load_vlm
from tests.helpers.vlm_reference import PICTURES

ANSWERS = ["There is a red cube and a dog.", "Yes."]
TRIED = [
    *((name, images) for name in vlm_models.BUILDERS for images in [("wide",), ("tall", "wide")]),
    *((name, (image,)) for name in vlm_models.NEWER for image in ("wide", "tall")),
]


def rows(
    family: VisionLanguage,
    images: Sequence[str] = ("wide",),
    answers: Sequence[str] = ANSWERS,
    question: str = "What is it?",
) -> list[TokenizedResponse]:
    views = [(key, family.processor.preprocess_image(PICTURES[key])) for key in images]
    return family.processor.tokenize_responses([Turn("user", "<image>" * len(images) + question)], answers, views)


def logps(family: VisionLanguage, responses: Sequence[TokenizedResponse], net: Any = None) -> Tensor:
    views = {key: family.processor.preprocess_image(PICTURES[key]) for row in responses for key in row.images}
    tokens = family.processor.collate(responses)
    return family.token_logps(net or family.network, tokens, family.encode_images(views))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), first_fast(TRIED, 4))
def test_a_prompt_s_tokens_are_the_processor_s_own(name: str, images: tuple[str, ...], vlm_folders: Folders) -> None:
    """Also of several images, although each is processed alone."""
    family: Any = load_vlm(vlm_folders(name))
    result = rows(family, images)
    prompt = family.processor.template.render([Turn("user", "<image>" * len(images) + "What is it?")])
    encoded = family.processor.processor(text=[prompt], images=[[PICTURES[k] for k in images]], return_tensors="pt")
    for row in result:
        assert list(row.ids[: row.start]) == encoded["input_ids"][0].tolist()


LLAVA = ("<s>USER: <image><image><image><image>\nWhat is it? ASSISTANT:", " Yes.</s>")
QWEN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Yes.<|im_end|>",
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava", LLAVA),
        ("qwen2_5_vl", QWEN),
        ("paligemma", ("<image><image><image><image><s>What is it?\n", "Yes.</s>")),
    ],
)
def test_prompt_and_response_read_as_the_model_s_layout_has_them(
    name: str, text: tuple[str, str], vlm_folders: Folders
) -> None:
    """A response ends with the layout's own end of a turn, or with the end of the text where it has none."""
    family: Any = load_vlm(vlm_folders(name))
    row = rows(family)[1]
    decode = family.processor.processor.tokenizer.decode
    assert (decode(row.ids[: row.start]), decode(row.response)) == text


def test_a_token_across_the_border_belongs_to_both_responses(llava: VisionLanguage) -> None:
    """The colon and the answer share a token only where the tokenizer has one; the start is the same for both."""
    first, second = rows(llava)
    assert first.start == second.start and first.ids[: first.start] == second.ids[: second.start]
    joined = rows(llava, answers=["Yes.", "Yes, there is."])
    assert (
        joined[0].start == joined[1].start == first.start
    )  # what both responses begin with is theirs, not the prompt's


def test_conversation_with_turns_and_inline_images(vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders("qwen2_5_vl"))
    turns = [Turn("user", "Is <image> red?"), Turn("assistant", "No."), Turn("user", "And <image>")]
    views = [(k, family.processor.preprocess_image(PICTURES[k])) for k in ("wide", "tall")]
    (row,) = family.processor.tokenize_responses(turns, ["Yes."], views)
    text = family.processor.processor.tokenizer.decode(row.ids[: row.start])
    mark = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    assert f"user\nIs{mark}red?<|im_end|>" in text and f"user\nAnd{mark}<|im_end|>" in text
    assert "assistant\nNo.<|im_end|>" in text


def test_a_reader_can_be_sent_to_another_process(vlm: VisionLanguage) -> None:
    """And says the same there; nothing of the network goes with it."""
    sent = pickle.dumps(vlm.processor)
    copied, view = pickle.loads(sent), vlm.processor.preprocess_image(PICTURES["tall"])
    again = copied.preprocess_image(PICTURES["tall"])
    assert again.ids == view.ids and torch.equal(again.tensors["pixel_values"], view.tensors["pixel_values"])
    assert b"ForConditionalGeneration" not in sent


def test_placeholders_must_match_the_images(vlm: VisionLanguage) -> None:
    view = vlm.processor.preprocess_image(PICTURES["wide"])
    with pytest.raises(ValueError, match="2 image placeholders in the text for 1 images"):
        vlm.processor.tokenize_responses([Turn("user", "<image><image>What?")], ANSWERS, [("wide", view)])


def own_logps(family: Any, images: Sequence[str], answer: str) -> Tensor:
    """From the model's own forward pass over pixels and logits, for one row."""
    row = rows(family, images, [answer])[0]
    logits = vlm_reference.own_logits(family, row.ids, "<image>" * len(images) + "What is it?", images)
    at = torch.arange(row.start, len(row.ids))
    return logits.log_softmax(-1)[at - 1, torch.tensor(row.response)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), first_fast(TRIED, 4))
def test_scores_are_those_of_the_model_s_own_forward_pass(
    name: str, images: tuple[str, ...], vlm_folders: Folders
) -> None:
    """Encoding every image once, alone, and scoring in a padded batch equals pixels in and logits out for one row."""
    family = load_vlm(vlm_folders(name))
    result = logps(family, rows(family, images)).detach()
    for got, answer in zip(result, ANSWERS, strict=True):
        expected = own_logps(family, images, answer)
        torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-4, atol=1e-4)
        assert (got[len(expected) :] == 0).all()
    assert result.dtype == torch.float32 and result[result != 0].max() < 0


def test_a_batch_is_its_rows_alone(vlm: VisionLanguage) -> None:
    """Padding does not leak, and images go to their own rows; only the order of sums in a kernel differs."""
    responses = [
        *rows(vlm, ("wide",)),
        *rows(vlm, ("tall", "square"), ["No."]),
        *rows(vlm, ("square",), question="Hm?"),
    ]
    together = logps(vlm, responses).detach()
    for index, row in enumerate(responses):
        alone = logps(vlm, [row]).detach()[0]
        torch.testing.assert_close(together[index, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_the_image_matters(vlm: VisionLanguage) -> None:
    """Otherwise every test here would pass with the images left out."""
    wide, square = (logps(vlm, rows(vlm, (key,), ["Yes."])).detach() for key in ("wide", "square"))
    assert (wide - square).abs().max() > 1e-3


def test_an_image_s_features_are_the_same_in_any_company(vlm: VisionLanguage) -> None:
    views = {key: vlm.processor.preprocess_image(image) for key, image in PICTURES.items()}
    together = vlm.encode_images(views)
    for key, view in views.items():
        alone = vlm.encode_images({key: view})
        for a, b in zip(together.images[key].pooler_output, alone.images[key].pooler_output, strict=True):
            assert torch.equal(a, b)


def test_each_image_is_encoded_once(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = vlm.network.model.get_image_features

    def counted(pixel_values: Tensor, **more: Any) -> Any:
        calls.append(1)
        return encode(pixel_values=pixel_values, **more)

    counted.__signature__ = __import__("inspect").signature(encode)  # type: ignore[attr-defined]
    monkeypatch.setattr(vlm.network.model, "get_image_features", counted)
    logps(vlm, [*rows(vlm), *rows(vlm), *rows(vlm, ("square",))])
    assert len(calls) == 2


def adapted(family: Any) -> Policy[Any]:
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    return Policy(family, family.network, family.network, AdaptersOff())


def test_adapters_are_on_the_decoder_s_linear_layers_only(vlm: Any) -> None:
    policy = adapted(vlm)
    names = [name for name, p in policy.unwrapped.named_parameters() if p.requires_grad]
    decoder = vlm._decoder
    assert names and all(name.startswith(f"{decoder}.") and "lora_" in name for name in names)
    ends = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 7 * vlm_models.TEXT["num_hidden_layers"]


def test_adapters_off_is_the_base_model_bit_for_bit(vlm: Any) -> None:
    responses = rows(vlm)
    before = logps(vlm, responses).detach()
    policy = adapted(vlm)
    assert torch.equal(logps(vlm, responses), before)  # a zero second matrix: nothing has changed yet
    optimizer = torch.optim.AdamW(policy.trainable(), lr=0.05)
    for _ in range(2):
        logps(vlm, responses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), adapters_off(vlm.network):
        assert torch.equal(logps(vlm, responses), before)
    assert (logps(vlm, responses) - before).abs().max() > 1e-2


def test_policy_trained_outside_adapters_has_no_reference(llava: Any) -> None:
    llava.add_lora(LoraSettings(rank=2, alpha=2.0, targets=["q_proj"], seed=0))
    llava.network.model.model.multi_modal_projector.requires_grad_(True)
    message = r"model\.model\.multi_modal_projector.* outside the adapters are trained.*model\.tune: full"
    with pytest.raises(ValueError, match=message):
        Policy(llava, llava.network, llava.network, AdaptersOff())


def test_targets_outside_the_decoder_are_refused(llava: VisionLanguage) -> None:
    """The projector's linear_1 and the tower's out_proj are no layers of the decoder."""
    with pytest.raises(ValueError, match=r"model\.lora\.targets: no layer of model\.language_model ends in out_proj"):
        llava.add_lora(LoraSettings(rank=2, alpha=2.0, targets=["q_proj", "out_proj"], seed=0))


def test_full_tuning_shares_the_frozen_tower(vlm: Any) -> None:
    copied, responses = vlm.frozen_copy(), rows(vlm)
    vlm.unfreeze()
    policy = Policy(vlm, vlm.network, vlm.network, None)
    trained = {id(p) for p in policy.trainable()}
    policy_weights, copied_weights = dict(vlm.network.named_parameters()), dict(copied.named_parameters())
    assert policy_weights.keys() == copied_weights.keys()
    assert all((id(p) in trained) != (copied_weights[name] is p) for name, p in policy_weights.items())
    tower = [n for n in policy_weights if "vision" in n or "visual" in n or "projector" in n]
    assert tower and all(copied_weights[n] is policy_weights[n] for n in tower)
    before = logps(vlm, responses, copied)
    torch.optim.SGD(policy.trainable(), lr=0.1).zero_grad()
    logps(vlm, responses).sum().backward()
    torch.optim.SGD(policy.trainable(), lr=0.1).step()
    assert torch.equal(logps(vlm, responses, copied), before) and not torch.equal(logps(vlm, responses), before)


def test_recomputed_activations_give_the_same_gradients(vlm: Any) -> None:
    policy, responses = adapted(vlm), rows(vlm)
    vlm.network.train()

    def gradients() -> list[Tensor]:
        logps(vlm, responses).sum().backward()
        results = [p.grad.clone() for p in policy.trainable() if p.grad is not None]
        vlm.network.zero_grad()
        return results

    plain = gradients()
    vlm.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_saved_model_loads_in_its_library_and_scores_alike(vlm: Any, tune: str, tmp_path: Path) -> None:
    responses = rows(vlm)
    if tune == "lora":
        adapted(vlm)
    else:
        vlm.unfreeze()
    with torch.no_grad():
        for p in vlm.network.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trained = logps(vlm, responses).detach()
    vlm.save(tmp_path / "model", vlm.network)
    again: Any = load_vision_language(vlm.name, CPU)
    net = again.load_trained(tmp_path / "model")
    assert (net is again.network) == (tune == "lora")
    assert torch.equal(logps(again, responses, net), trained)
    if tune == "full":
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        load_vlm(tmp_path / "model")  # with its processor: a folder to go on from


def test_half_precision_weights_have_float32_scores_and_masters(vlm_folders: Folders) -> None:
    half = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
    family: Any = load_vision_language(str(vlm_folders("llava")), half)
    policy = adapted(family)
    result = logps(family, rows(family))
    assert result.dtype == torch.float32 and all(p.dtype == torch.float32 for p in policy.trainable())
    full = logps(load_vision_language(family.name, CPU), rows(family))
    torch.testing.assert_close(result, full, rtol=0.05, atol=0.1)  # bfloat16 has three digits


def broken(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**content, **config}))
    return to


def test_refuses_other_models_by_their_config(vlm_folders: Folders, tiny_sd15: Path, tmp_path: Path) -> None:
    text = broken(vlm_folders("llava"), tmp_path / "text", model_type="llama")
    with pytest.raises(ValueError, match="is a llama, which has no vision tower; expected a vision-language model"):
        model_type(str(text))
    with pytest.raises(ValueError, match=r"has no config\.json; expected the folder of a vision-language model"):
        model_type(str(tiny_sd15))
    (text / "config.json").write_text("{")
    with pytest.raises(ValueError, match="the config of a model"):
        model_type(str(text))


def test_a_processor_of_another_model_is_refused(vlm_folders: Folders, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(vlm_folders("qwen2_5_vl"), mixed)
    for file in vlm_folders("llava").iterdir():
        if not file.name.startswith(("config", "model", "generation")):
            shutil.copy(file, mixed)
    with pytest.raises(ValueError, match=r"processor of .*mixed belongs to another model"):
        load_vlm(mixed)


def test_a_processor_that_counts_other_tokens_is_refused(vlm_folders: Folders, tmp_path: Path) -> None:
    """Patches of 4 pixels in the place of 8: 16 tokens for what the model makes 4 features of."""
    shutil.copytree(vlm_folders("llava"), tmp_path / "m")
    file = tmp_path / "m" / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": 4}))
    message = "belongs to another model|gives an image 16 tokens, and the model 4 features"
    with pytest.raises(ValueError, match=message):
        load_vlm(tmp_path / "m")


def test_type_with_two_image_tokens_is_refused() -> None:
    """As Gemma 3's and Molmo 2's do; the processor is the model's own, so copying it anew would not help."""
    model, processor = vlm_models.BUILDERS["internvl"]()
    processor.image_token = "<img>"
    message = "m is a internvl, which is not supported .*placeholder in a prompt is <img>, and its features have other"
    with pytest.raises(ValueError, match=message):
        check_type("m", "internvl", model, processor)


def test_a_folder_without_its_weights_is_one_sentence(vlm_folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(vlm_folders("llava"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.path: .*could not be loaded as a vision-language model \(llava\)"):
        load_vlm(tmp_path / "m")
