"""Laws of rendered responses over all families and public forms of chat templates, and templates that break them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from mmalign.families.vlm.chat_template import TemplateError
from mmalign.families.vlm.processor import HFProcessor
from mmalign.families.vlm.quirks import quirks_of
from mmalign.language.chat import Turn
from tests.helpers import chat_templates, vlm_models

FAMILIES = {**vlm_models.BUILDERS, **vlm_models.NEWER}
FORMS = [("qwen2_5_vl", name) for name in chat_templates.QWEN_FORMS]
FORMS += [("llava", name) for name in chat_templates.LLAVA_FORMS]
TURNS = [Turn("user", "<image>What is it?")]
ANSWERS = [
    *"adesimu_<>/|{}[]:%#&\"'\\",
    *("end", "im_end", "|>", "<|", "/s", "of", "assistant", "ASSISTANT:", "What is it?", "}}", "{{ x }}", "{% if %}"),
    *(
        "A dog.",
        "A dog.\n\n1. Two\n2. Three",
        "\t A \u00a0 dog \n",
        "&lt;b&gt;",
        "100 %",
        "<b>dog</b>",
        "\\n",
        "<image",
    ),
    *(
        "图中有一只狗。它在草地上。",
        "犬です。",
        "هذا كلب.",
        "\u200fזה כלב\u200f",
        "🐕\u200d🦺",
        "e\u0301",
        "\uff21",
        "ﬁ",
    ),
]
THOUGHTS = [
    "<think>\nIt barks.\n</think>\n\nA dog.",
    "<think>It barks.</think>A dog.",
    "<think>\n\n</think>\n\nA dog.",
    "<think>\nEnd?\n</think>\n\ne",
    "<think>\n它在叫。\n</think>\n\n狗。",
]


@cache
def family(name: str) -> tuple[Any, Any]:
    """Return the processor of a tiny model, with its own template."""
    processor = FAMILIES[name]()[1]
    return processor, getattr(processor, "chat_template", None)


@pytest.fixture
def reader() -> Callable[..., HFProcessor]:
    def of(name: str, template: str | None = None, **arguments: object) -> HFProcessor:
        processor, own = family(name)
        processor.chat_template = template or own
        return HFProcessor(processor, quirks_of(name), 0, 4096, arguments)

    return of


def form(name: str) -> str:
    return {**chat_templates.QWEN_FORMS, **chat_templates.LLAVA_FORMS, **chat_templates.CHANGING}[name]


def response(reader: HFProcessor, answer: str, turns: list[Turn] = TURNS) -> str:
    """Return the text of a response's tokens, special tokens included; images are not expanded."""
    frame = reader.template.frame(turns)
    prompt, text = frame.prompt, reader.template.continuation(turns, frame, answer)
    ids, start = reader._tokenize(prompt + text), len(reader._tokenize(prompt))
    assert ids[-1] == reader.ends[0] and ids[start:].count(reader.ends[0]) == 1
    return text


@pytest.mark.parametrize(("name", "template"), [*((name, None) for name in FAMILIES), *FORMS])
def test_a_response_is_the_answer_between_what_the_template_adds(
    name: str, template: str | None, reader: Callable[..., HFProcessor]
) -> None:
    """The text around an answer is that around any other, and the conversation is what the template renders."""
    read = reader(name, form(template) if template else None)
    lead, _, end = response(read, "Zebra").partition("Zebra")
    frame = read.template.frame(TURNS)
    assert not lead.strip() or template == "thinking" or template == "switched"
    for answer in ANSWERS:
        text = response(read, answer)
        assert text == lead + answer.strip() + end, answer
        whole = read.template.render(TURNS, answer.strip())
        if read.template.source and whole.startswith(frame.prompt):
            assert whole.startswith(frame.prompt + lead + answer.strip())
        assert read.template_problem(TURNS, [answer]) is None


@pytest.mark.parametrize("answer", THOUGHTS)
@pytest.mark.parametrize("template", ["thinking", "switched"])
def test_a_thinking_block_is_rendered_once(answer: str, template: str, reader: Callable[..., HFProcessor]) -> None:
    """The prompt opens the block; the response goes on with what the template renders."""
    read = reader("qwen2_5_vl", form(template))
    frame, text = read.template.frame(TURNS), response(read, answer)
    whole = read.template.render(TURNS, answer)
    assert whole == frame.prompt + text + "\n"
    assert whole.count("<think>") == whole.count("</think>") == 1
    thought, said = answer.removeprefix("<think>").split("</think>")
    assert text == f"{thought.strip()}\n</think>\n\n{said.strip()}<|im_end|>"


@pytest.mark.parametrize("template", [None, "empty thought", "spaced", "trimming"])
def test_a_thinking_block_is_text_where_the_template_has_none(
    template: str | None, reader: Callable[..., HFProcessor]
) -> None:
    read = reader("qwen2_5_vl", form(template) if template else None)
    for answer in THOUGHTS:
        assert response(read, answer) == f"{answer}<|im_end|>"


def test_arguments_of_the_template(reader: Callable[..., HFProcessor]) -> None:
    read = reader("qwen2_5_vl", form("switched"), enable_thinking=False)
    read.template.check_arguments()
    assert read.template.frame(TURNS).prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert response(read, "A dog.") == "A dog.<|im_end|>"
    assert "A dog." in read.template.render(TURNS, "A dog.")
    with pytest.raises(ValueError, match="no variable 'enable_thinkin'; did you mean 'enable_thinking'"):
        reader("qwen2_5_vl", form("switched"), enable_thinkin=False).template.check_arguments()


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("replacing", "A dog."),
        ("lower case", "A dog."),
        ("escaping", "Fish & chips."),
        ("cutting", "A dog that is longer than any answer should be."),
    ],
)
def test_a_template_that_changes_the_answer_is_named(
    template: str, answer: str, reader: Callable[..., HFProcessor]
) -> None:
    read = reader("qwen2_5_vl", form(template))
    with pytest.raises(TemplateError, match=r"the chat template (changes|drops or changes) "):
        read.tokenize_responses([Turn("user", "What?")], ["yes", answer], [])
    if template != "lower case":  # its stand-in is changed as well
        assert read.template_problem(TURNS, ["yes"]) is None


def test_a_template_that_forgets_thinking_is_named(reader: Callable[..., HFProcessor]) -> None:
    """An answer after an open thinking block would be a thought."""
    read = reader("qwen2_5_vl", chat_templates.FORGETTING)
    assert "in another way than it prompts" in str(read.template_problem(TURNS, ["A dog."]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava", "USER: <image>\nWhat is it? ASSISTANT:"),
        ("llava", "<image>\nWhat is it? ASSISTANT:"),
        ("llava", "USER: <image>\nWhat is it?"),
        ("qwen2_5_vl", "<|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen2_5_vl", "<|vision_start|><|image_pad|><|vision_end|>What is it?"),
        ("smolvlm", "User:<image>What is it?<end_of_utterance>\nAssistant:"),
        ("smolvlm", "User: <image>What is it?"),
        ("internvl", "<IMG_CONTEXT>What is it?"),
    ],
)
def test_a_prompt_in_the_layout_already_is_refused(name: str, text: str, reader: Callable[..., HFProcessor]) -> None:
    with pytest.raises(TemplateError, match="the prompt holds the chat template's own "):
        reader(name).tokenize_prompt([Turn("user", text)], [])


@pytest.mark.parametrize("text", ["Who is the assistant", "user", "USER", "Assistant", "What does USER mean?", "A:"])
def test_a_role_s_word_in_a_prompt_is_no_layout(text: str, reader: Callable[..., HFProcessor]) -> None:
    for name in FAMILIES:
        assert reader(name).template_problem([Turn("user", text)], ["A dog."]) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_token_is_written_once(name: str, reader: Callable[..., HFProcessor]) -> None:
    read = reader(name)
    end = read.template.end_token
    for answer in (
        f"A dog.{end}",
        f"A dog. {end}\n",
        f"A dog.{end}{end}",
        f"A dog.{read.processor.tokenizer.eos_token}",
    ):
        assert response(read, answer) == response(read, "A dog.")
    assert "special token" in str(read.template_problem(TURNS, [f"A {end} dog."]))
    assert read.template_problem(TURNS, [end]) == "a response is empty"


def test_a_tokenizer_that_ends_every_text(reader: Callable[..., HFProcessor]) -> None:
    """Llama's tokenizers can append the end of text to whatever they are given."""
    from tokenizers import processors

    processor = vlm_models.llava()[1]
    read = HFProcessor(processor, quirks_of("llava"), 0, 4096)
    turns = [Turn("user", "What?")]
    (plain,), prompt = read.tokenize_responses(turns, ["A dog."], []), read.tokenize_prompt(turns, [])
    marks = [("<s>", 1), ("</s>", 2)]
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, marks)
    ended = HFProcessor(processor, quirks_of("llava"), 0, 4096)
    assert processor.tokenizer("a").input_ids[-1] == 2
    assert ended.tokenize_responses(turns, ["A dog."], []) == [plain] and plain.ids[-2:].count(2) == 1
    assert ended.tokenize_prompt(turns, []) == prompt


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        ("alternating", [Turn("user", "Hi."), Turn("user", "What?")], "roles must alternate"),
        ("alternating", [Turn("system", "Hi."), Turn("user", "What?")], "Only user and assistant roles"),
        (None, [Turn("user", "<image>What?")], "the chat template refuses the conversation"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(
    template: str | None, turns: list[Turn], words: str, reader: Callable[..., HFProcessor]
) -> None:
    """The last template is for texts alone."""
    texts = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    with pytest.raises(TemplateError, match=words):
        reader("llava", form(template) if template else texts).tokenize_responses(turns, ["A dog."], [])
