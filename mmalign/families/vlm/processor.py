"""Tokenization of conversations and preprocessing of images by a processor of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from mmalign.families.types import ImageView
from mmalign.families.vlm.chat_template import ChatTemplate, TemplateError
from mmalign.families.vlm.quirks import ModelQuirks
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens, common_prefix, expand
from mmalign.reading import first_line

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")  # all else is the image's
_BEFORE = 16  # tokens before an answer, decoded with it to find its leading space


@dataclass(frozen=True)
class HFProcessor:
    """Processor of transformers as a PromptProcessor.

    Attributes:
        processor: the processor of transformers.
        quirks: the quirks of the model's type.
        image_token_id: the token that stands for an image's feature.
        max_length: most tokens of a row.
        template_arguments: values of the chat template's own variables.
    """

    processor: ProcessorMixin
    quirks: ModelQuirks
    image_token_id: int
    max_length: int
    template_arguments: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def placeholder(self) -> str:
        """The text of an image placeholder."""
        return str(getattr(self.processor, self.quirks.placeholder))

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate(self.processor, self.placeholder, self.template_arguments)

    @cached_property
    def _placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def preprocess_image(self, image: Image.Image) -> ImageView:
        """Take as the image's tokens those that the processor puts between the tokens of the surrounding text."""
        try:
            encoded = self.processor(text=[self.placeholder], images=[[image]], return_tensors="pt")
        except MemoryError:
            raise
        except Exception as error:  # a processor may raise anything for an image of an odd shape
            size = f"{image.width}x{image.height}"
            raise ValueError(f"the model's processor refuses an image of {size} ({first_line(error)})") from error
        # Tokens around a placeholder in text alone; the processor puts the same around the image's
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
        frame = self.template.frame(turns)
        continuations = [self.template.continuation(turns, frame, response) for response in responses]
        return self._joint(frame.prompt, continuations, images)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Decode growing parts of a row, since a token's text depends on the tokens before it."""
        texts, before = list[str](), ""
        for start in range(len(ids)):
            first = max(0, start - _BEFORE)
            before, whole = (self.processor.tokenizer.decode(ids[first:stop]) for stop in (start, start + 1))
            texts.append(whole[common_prefix([[*map(ord, before)], [*map(ord, whole)]]) :])
        return texts

    def tokenize_prompt(
        self, turns: Sequence[Turn], images: Sequence[tuple[str, ImageView]], start: str = ""
    ) -> TokenizedResponse:
        frame, beginning = self.template.frame(turns), start.strip()
        (row,) = self._joint(frame.prompt, [frame.lead + beginning if beginning else ""], images)
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
        try:
            frame = self.template.frame(turns)
            for response in responses:
                self.template.continuation(turns, frame, response)
        except TemplateError as error:
            return str(error)
        return None

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
        return tokenizer.convert_tokens_to_ids(self.template.end_token), tokenizer.eos_token_id

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokenize(self, text: str) -> list[int]:
        """Tokenize a text, with a begin token at its start if the tokenizer has one, and none at its end."""
        tokenizer = self.processor.tokenizer
        if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):  # some chat templates write it
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
            return ids
        ids = tokenizer(text).input_ids
        return ids[: len(ids) - self._num_appended]

    @cached_property
    def _num_appended(self) -> int:
        """The number of tokens that the tokenizer adds after every text."""
        whole, alone = (self.processor.tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
        return next(n for n in range(len(whole) + 1) if whole[len(whole) - n - len(alone) : len(whole) - n] == alone)
