"""Tokenization of conversations and preprocessing of images by a processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from mmalign.families.types import ImageView
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens, common_prefix, expand

if TYPE_CHECKING:
    from transformers import ProcessorMixin

IMAGE = "<image>"  # image placeholder in a turn's text
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")  # all else is the image's
_BEFORE = 16  # tokens before an answer, decoded with it to find its leading space


@dataclass(frozen=True)
class HFProcessor:
    """Processor of transformers as a PromptProcessor."""

    processor: ProcessorMixin
    quirks: ModelQuirks
    image_token_id: int
    max_length: int

    @cached_property
    def placeholder(self) -> str:
        """The text of an image placeholder."""
        return str(getattr(self.processor, self.quirks.placeholder))

    @cached_property
    def _placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def preprocess_image(self, image: Image.Image) -> ImageView:
        """Take as the image's tokens those that the processor puts between the tokens of the surrounding text."""
        encoded = self.processor(text=[self.placeholder], images=[[image]], return_tensors="pt")
        around, ids = (
            self._tokenize(self.quirks.format_prompt(self.processor, self.placeholder)),
            encoded["input_ids"][0],
        )
        before = around.index(self._placeholder_id)
        after = len(around) - before - 1
        own = ids[before : len(ids) - after].tolist()
        return ImageView(tuple(own), {k: x for k, x in encoded.items() if k not in _TEXT})

    def tokenize_responses(
        self, turns: Sequence[Turn], responses: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenizedResponse]:
        prompt = self._render(turns)
        return self._joint(prompt, [self._continuation(turns, prompt, response) for response in responses], images)

    def tokenize_prompt(
        self, turns: Sequence[Turn], images: Sequence[tuple[str, ImageView]], start: str = ""
    ) -> TokenizedResponse:
        prompt, beginning = self._render(turns), start.strip()
        lead = self._around(turns, prompt, beginning)[0] if beginning else ""
        (row,) = self._joint(prompt, [lead + beginning], images)
        return row

    def _joint(
        self, rendered: str, continuations: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenizedResponse]:
        """Tokenize the rendered prompt together with each continuation; all rows' responses begin at the same index."""
        prompt = self.quirks.format_prompt(self.processor, rendered)
        views = [view.ids for _, view in images]
        texts = [prompt, *(prompt + continuation for continuation in continuations)]
        ids = [expand(self._tokenize(text), self._placeholder_id, views) for text in texts]
        start, keys = common_prefix(ids), tuple(key for key, _ in images)
        return [TokenizedResponse(tuple(row), start, keys) for row in ids[1:]]

    def template_problem(self, turns: Sequence[Turn], responses: Sequence[str]) -> str | None:
        rendered = set[str]()
        for response in (response.strip() for response in responses):
            special = [token for token in self.processor.tokenizer.all_special_tokens if token in response]
            if special:
                return f"a response holds the model's special token {special[0]}"
            if self._template:
                before, same, _ = self._render(turns, response).rpartition(response)
                if not same:
                    return "the chat template changes a response"
                rendered.add(before)
        return "the chat template renders another prompt for each response" if len(rendered) > 1 else None

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        # Without tokens before it some tokenizers (SentencePiece) drop the first word's space.
        before = list(after[-_BEFORE:])
        return self._decode([*before, *ids])[len(self._decode(before)) :]

    def image_token_positions(self, row: TokenizedResponse) -> tuple[int, ...]:
        return tuple(place for place, token in enumerate(row.ids) if token == self.image_token_id)

    def collate(self, rows: Sequence[TokenizedResponse]) -> Tokens:
        return Tokens.from_rows(rows, self.pad)

    @property
    def pad(self) -> int:
        """The id of the padding token; of the end-of-text token if there is none."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer: the chat template's end of a turn, and the end of text."""
        tokenizer = self.processor.tokenizer
        turns = [Turn("user", "?")]
        _, end = self._around(turns, self._render(turns), "!")
        return tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokenize(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # some chat templates write it
        ids: list[int] = tokenizer(text, add_special_tokens=not begun).input_ids
        return ids

    @cached_property
    def _template(self) -> str | dict[str, str] | None:
        return getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )

    def _render(self, turns: Sequence[Turn], response: str | None = None) -> str:
        """Render the conversation in the model's own layout, up to the answer or with `response` as the answer."""
        if not self._template:
            return "\n".join(turn.text for turn in turns).replace(IMAGE, self.placeholder)
        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None, chat_template=self._template
        )
        return text

    def _continuation(self, turns: Sequence[Turn], prompt: str, response: str) -> str:
        """Return the response with the chat template's text before it and the token that ends an answer."""
        response = response.strip()
        lead, end = self._around(turns, prompt, response)
        return f"{lead}{response}{end}"

    def _around(self, turns: Sequence[Turn], prompt: str, response: str) -> tuple[str, str]:
        """Return the chat template's text between rendered prompt and response, and the token that ends the answer."""
        tokenizer = self.processor.tokenizer
        if not self._template:
            return "", tokenizer.eos_token
        whole = self._render(turns, response)
        before, _, after = whole.rpartition(response)
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        ends = [(after.index(token), token) for token in tokenizer.all_special_tokens if token in after]
        return lead, min(ends)[1] if ends else tokenizer.eos_token


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn's text into the parts that chat templates take: texts, and images between them."""
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if words.strip():
            parts.append({"type": "text", "text": words.strip() if number else words.rstrip()})
    return parts
