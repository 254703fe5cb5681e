"""Rendering of conversations by a model's chat template, with the place of an answer known by construction.

Templates add text around an answer, and some change it. `ChatTemplate.frame` therefore renders the conversation with a
stand-in for the answer, which gives the text before and after any answer. An answer is then rendered for itself, and
must stand unchanged between the two. One change is accepted: white space around the tags of a thinking block, and an
opening tag that the prompt has already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mmalign.language.chat import IMAGE, Turn
from mmalign.reading import first_line
from mmalign.registry import check_known

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_STAND_IN = "Answer0of0this0conversation"  # nothing that a template strips, splits or escapes
_THINKING_TAG = r"(?:<[^<>\s]*think[^<>\s]*>|◁/?think▷)"
_AROUND_TAG = re.compile(rf"\s*({_THINKING_TAG})\s*")
_OPEN_THOUGHT = re.compile(rf"(?!</|◁/){_THINKING_TAG}\s*\Z")


class TemplateError(ValueError):
    """Error for a conversation or an answer that cannot be trained as the chat template renders it."""


class Frame(NamedTuple):
    """Text that the chat template renders around an answer.

    Attributes:
        prompt: the conversation up to the answer, as a model is prompted.
        before: the text before an answer that is part of the conversation.
        after: the text after it.
        lead: the text between prompt and answer.
        end: the text that ends an answer, up to and including `end_token`.
        end_token: the first special token after an answer, or the tokenizer's end of text.
    """

    prompt: str
    before: str
    after: str
    lead: str
    end: str
    end_token: str


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a processor; without one, the texts of the turns are joined by newlines.

    Attributes:
        processor: the processor of transformers.
        placeholder: the text of an image placeholder.
        arguments: values of the template's own variables, such as `enable_thinking`.
    """

    processor: ProcessorMixin
    placeholder: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def source(self) -> str | None:
        """The template's text; None if the model has none."""
        tokenizer = self.processor.tokenizer
        source = getattr(self.processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        return source.get("default") if isinstance(source, dict) else source

    def check_arguments(self) -> None:
        """Check that the template reads the arguments.

        Raises:
            ValueError: it has no such variable.
        """
        from jinja2 import Environment, meta

        if self.arguments:
            source = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", self.source or "")
            environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # nosec: only parsed
            known = meta.find_undeclared_variables(environment.parse(source))
            for name in self.arguments:
                check_known("model.template_arguments: the chat template has no variable", name, sorted(known))

    def render(self, turns: Sequence[Turn], answer: str | None = None) -> str:
        """Render the conversation, up to the answer or with an answer.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        if not self.source:
            return "\n".join(turn.text for turn in turns).replace(IMAGE, self.placeholder)
        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            return str(
                self.processor.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=answer is None,
                    chat_template=self.source,
                    **self.arguments,
                )
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything: jinja2's errors, TypeError, KeyError ...
            raise TemplateError(f"the chat template refuses the conversation ({first_line(error)})") from error

    def frame(self, turns: Sequence[Turn]) -> Frame:
        """Return the text around any answer to the conversation.

        Raises:
            TemplateError: the template refuses the conversation, drops answers, or begins them in another way than it
                prompts for them; or a turn holds parts of the template itself.
        """
        if self.source:
            self._check_turns(turns)
        return self._frame(turns)

    def _frame(self, turns: Sequence[Turn]) -> Frame:
        prompt, end_token = self.render(turns), self._eos
        if not self.source:
            return Frame(prompt, prompt, "", "", end_token, end_token)
        # Text around a stand-in, which no template would change
        before, stand_in, after = self.render(turns, _STAND_IN).rpartition(_STAND_IN)
        if not stand_in:
            raise TemplateError("the chat template drops or changes the answer")
        # What the template writes between the prompt and an answer
        if before.startswith(prompt):
            lead = before[len(prompt) :]
        elif prompt.startswith(before.rstrip()) and not _OPEN_THOUGHT.search(prompt):
            lead = ""  # the prompt has more: white space, or an empty thinking block
        else:
            raise TemplateError(
                "the chat template begins an answer in another way than it prompts for one; model.template_arguments "
                "sets its variables, such as {enable_thinking: false}"
            )
        # The answer ends with the first special token after it, of two at one place with the longer
        matches = [(after.index(token), -len(token), token) for token in self._special if token in after]
        if not matches:
            return Frame(prompt, before, after, lead, end_token, end_token)
        place, _, token = min(matches)
        return Frame(prompt, before, after, lead, after[: place + len(token)], token)

    def continuation(self, turns: Sequence[Turn], frame: Frame, answer: str) -> str:
        """Return the text that a model is to write after the prompt: the answer with what the template adds.

        White space around the answer is dropped, and an end token that the answer has already.

        Raises:
            TemplateError: the answer is empty, holds the template's special tokens, or is changed by the template.
        """
        # White space and end tokens around the answer are the template's to add
        answer, ends = answer.strip(), [token for token in (frame.end_token, self._eos) if token]
        while last := next((token for token in ends if answer.endswith(token)), None):
            answer = answer.removesuffix(last).rstrip()
        if not answer:
            raise TemplateError("a response is empty")
        if held := next((token for token in self._marks if token in answer), None):
            raise TemplateError(f"a response holds the model's special token {held}")
        if not self.source:
            return answer + frame.end
        # The answer unchanged between the texts around it, or changed as a thinking block may be
        whole = self.render(turns, answer)
        if whole == frame.before + answer + frame.after:
            return frame.lead + answer + frame.end
        written = whole[len(frame.prompt) : len(whole) - len(frame.after)]
        if whole == frame.prompt + written + frame.after and _is_rendered_thought(frame.prompt, written, answer):
            return written + frame.end
        # Tell which of both the template changes
        if answer in whole:
            raise TemplateError("the chat template renders another prompt or ending for a response")
        raise TemplateError("the chat template changes a response")

    def _check_turns(self, turns: Sequence[Turn]) -> None:
        """Refuse prompts that hold the template's special tokens, or begin or end as the template would.

        Raises:
            TemplateError: the prompt is rendered already.
        """
        # Special tokens anywhere, and the template's own beginning or end of a turn
        for turn in turns:
            text = turn.text.replace(IMAGE, "").strip()
            begun, ended = self._edges if turn.role == "user" else ("", "")
            mark = next((token for token in self._marks if token in text), None)
            if mark is None and begun and text.startswith(begun):
                mark = begun
            if mark is None and ended and text.endswith(ended):
                mark = ended
            if mark is not None:
                raise TemplateError(f"the prompt holds the chat template's own {mark}; give the messages' texts alone")

    @property
    def end_token(self) -> str:
        """The token that ends an answer."""
        return self._neutral.end_token

    @cached_property
    def _eos(self) -> str:
        return self.processor.tokenizer.eos_token or ""

    @cached_property
    def _special(self) -> list[str]:
        return [str(token) for token in self.processor.tokenizer.all_special_tokens]

    @cached_property
    def _neutral(self) -> Frame:
        """Text around a question without an image, and around its answer."""
        return self._frame([Turn("user", _STAND_IN)])

    @cached_property
    def _marks(self) -> list[str]:
        """The special tokens that the template writes, and those of a text's ends, except tags of thinking blocks."""
        tokenizer = self.processor.tokenizer
        written = self._neutral.before + self._neutral.end + self.placeholder
        ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        return [
            token
            for token in self._special
            if (token in written or token in ends) and not re.fullmatch(_THINKING_TAG, token)
        ]

    @cached_property
    def _edges(self) -> tuple[str, str]:
        """The template's words before and after a user's text, such as "USER:" and "ASSISTANT:"; empty without any."""
        before, _, after = self._neutral.prompt.partition(_STAND_IN)
        tokens = re.compile("|".join(map(re.escape, [self.placeholder, *self._special])))
        # A word alone, such as "user" between special tokens, may be part of a text
        begun, ended = (
            [piece.strip() for piece in tokens.split(text) if piece.strip() and not piece.strip().isalpha()]
            for text in (before, after)
        )
        return (begun or [""])[-1], (ended or [""])[-1]


def _is_rendered_thought(prompt: str, written: str, answer: str) -> bool:
    """Check that the text written after the prompt is the answer, up to white space around tags of thinking blocks.

    The prompt may end with the answer's first tag.
    """
    rendered, expected, prompted = (_AROUND_TAG.sub(r"\1", text) for text in (prompt + written, answer, prompt))
    start = len(rendered) - len(expected)
    return rendered.endswith(expected) and len(prompted) - len(expected) < start <= len(prompted)


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn's text into the parts that chat templates take: texts, and images between them."""
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if words.strip():
            parts.append({"type": "text", "text": words.strip() if number else words.rstrip()})
    return parts
