"""A processor of transformers as a Reader: conversations and responses to tokens, pictures to what a tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from mmalign.families.types import ImageView
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens, common_prefix, expand

IMAGE = "<image>"  # an image's place in a turn's text
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")  # the rest is the image's
_BEFORE = 16  # tokens before an answer that tell whether it begins with a space


@dataclass(frozen=True)
class HFProcessor:
    """A processor of transformers as a Reader; the protocol says what each call does."""

    processor: Any
    quirks: ModelQuirks
    image_token_id: int
    max_length: int

    @cached_property
    def placeholder(self) -> str:
        """The text that is an image's place."""
        return str(getattr(self.processor, self.quirks.placeholder))

    @cached_property
    def _placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def preprocess_image(self, image: Image.Image) -> ImageView:
        """See Reader. The image's tokens are what the processor puts between those of the text around it."""
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
        """See Reader."""
        return self._joint(turns, [self._continuation(turns, response) for response in responses], images)

    def tokenize_prompt(
        self, turns: Sequence[Turn], images: Sequence[tuple[str, ImageView]], start: str = ""
    ) -> TokenizedResponse:
        """See Reader."""
        beginning = start.strip()
        (row,) = self._joint(turns, [self._around(turns, beginning)[0] + beginning if beginning else ""], images)
        return row

    def _joint(
        self, turns: Sequence[Turn], continuations: Sequence[str], images: Sequence[tuple[str, ImageView]]
    ) -> list[TokenizedResponse]:
        """The prompt tokenised together with what follows it; all rows' responses begin at the same place."""
        prompt = self.quirks.format_prompt(self.processor, self._render(turns))
        views = [view.ids for _, view in images]
        texts = [prompt, *(prompt + continuation for continuation in continuations)]
        ids = [expand(self._tokenize(text), self._placeholder_id, views) for text in texts]
        start, keys = common_prefix(ids), tuple(key for key, _ in images)
        return [TokenizedResponse(tuple(row), start, keys) for row in ids[1:]]

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """See Reader."""
        # Alone, some tokenizers (SentencePiece) would drop the first word's space.
        before = list(after[-_BEFORE:])
        return self._decode([*before, *ids])[len(self._decode(before)) :]

    def image_token_positions(self, row: TokenizedResponse) -> tuple[int, ...]:
        """See Reader."""
        return tuple(place for place, token in enumerate(row.ids) if token == self.image_token_id)

    def collate(self, rows: Sequence[TokenizedResponse]) -> Tokens:
        """See Reader."""
        return Tokens.from_rows(rows, self.pad)

    @property
    def pad(self) -> int:
        """The token that fills up a row."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: the layout's own end of a turn, and the end of a text."""
        tokenizer = self.processor.tokenizer
        _, end = self._around([Turn("user", "?")], "!")
        return tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokenize(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # some chat templates write it
        ids: list[int] = tokenizer(text, add_special_tokens=not begun).input_ids
        return ids

    @property
    def _template(self) -> Any:
        return getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )

    def _render(self, turns: Sequence[Turn], response: str | None = None) -> str:
        """The conversation up to where the model answers, or with its answer, in the model's own layout."""
        if not self._template:
            return "\n".join(turn.text for turn in turns).replace(IMAGE, self.placeholder)
        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None, chat_template=self._template
        )
        return text

    def _continuation(self, turns: Sequence[Turn], response: str) -> str:
        """What the model is to say: the response as the layout begins it, and the token that ends an answer."""
        response = response.strip()
        lead, end = self._around(turns, response)
        return f"{lead}{response}{end}"

    def _around(self, turns: Sequence[Turn], response: str) -> tuple[str, str]:
        """What the layout puts between prompt and response, and the token that ends the answer."""
        tokenizer = self.processor.tokenizer
        if not self._template:
            return "", tokenizer.eos_token
        prompt, whole = self._render(turns), self._render(turns, response)
        before, _, after = whole.rpartition(response)
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        ends = [(after.index(token), token) for token in tokenizer.all_special_tokens if token in after]
        return lead, min(ends)[1] if ends else tokenizer.eos_token


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's content as chat templates take it: texts, and images between them."""
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if words.strip():
            parts.append({"type": "text", "text": words.strip() if number else words.rstrip()})
    return parts
