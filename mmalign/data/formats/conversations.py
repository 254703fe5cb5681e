"""Layouts of response data: their columns, and one parse function each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmalign.data.formats.files import Record, shorten
from mmalign.data.formats.image_files import Image, as_image
from mmalign.data.formats.layouts import Layout
from mmalign.data.pairs import UnusableRowError
from mmalign.language.chat import Turn
from mmalign.reading import parse_json

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class ParsedRow:
    """Texts and images of a row.

    `rejected_images` is None if the rejected response has the chosen one's images. `rejected` is None in a row with an
    answer alone. `hallucinated` is a second rejected response, or empty.
    """

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str | None
    images: tuple[Image, ...]
    rejected_images: tuple[Image, ...] | None = None
    other_images: tuple[Image, ...] = ()
    hallucinated: str = ""

    @property
    def all_images(self) -> tuple[Image, ...]:
        """Images of both sides, then the other images."""
        return self.images + (self.rejected_images or ()) + self.other_images

    def with_turns(self, turns: tuple[Turn, ...]) -> ParsedRow:
        """Return the row with another prompt."""
        return replace(self, turns=turns)


def _images(value: object) -> tuple[Image, ...]:
    """Return the images of a row from nothing, one image or a list."""
    if value is None or value == "":
        return ()
    return tuple(as_image(one) for one in (value if isinstance(value, list) else [value]))


def _text(location: str, name: str, value: object) -> str:
    """Return a text, or the text of a list of one message; None becomes empty."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = _turn(location, name, value[0]).text
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{location}: {name} is {shorten(value)}; expected a text")
    return value


def _turn(location: str, name: str, message: object) -> Turn:
    """Parse a message of TRL, of ms-swift (`role`, `content`) or of LLaVA (`from`, `value`)."""
    if not isinstance(message, dict):
        raise ValueError(f"{location}: {name} holds {shorten(message)}; expected messages with a role and a content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(_part(location, name, part) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{location}: {name} holds {shorten(message)}; expected messages with a role and a content")
    return Turn(ROLES.get(role, role), content)


def _part(location: str, name: str, part: object) -> str:
    """Return the text of a part of a message's content: a placeholder for an image."""
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind not in ("image", "text") or not isinstance(text, str | None):
        raise ValueError(
            f'{location}: {name} holds {shorten(part)}; expected {{"type": "text", "text": ...}} or {{"type": "image"}}'
        )
    return "<image>" if kind == "image" else text or ""


def _turns(location: str, name: str, value: object) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{location}: {name} is {shorten(value)}; expected a text, or a list of messages")
    return tuple(_turn(location, name, message) for message in value)


def _split_conversations(location: str, chosen: object, rejected: object) -> tuple[tuple[Turn, ...], str, str]:
    """Split two conversations into their shared turns and the answers in which they first differ.

    Later turns are dropped.
    """
    chosen_turns, rejected_turns = _turns(location, "chosen", chosen), _turns(location, "rejected", rejected)
    shared = 0
    while shared < min(len(chosen_turns), len(rejected_turns)) and chosen_turns[shared] == rejected_turns[shared]:
        shared += 1
    if shared == min(len(chosen_turns), len(rejected_turns)):
        raise UnusableRowError("the chosen and the rejected response are the same", "same sides")
    if chosen_turns[shared].role != "assistant" or rejected_turns[shared].role != "assistant" or not shared:
        raise UnusableRowError("the chosen and the rejected conversation have different prompts", "two prompts")
    return chosen_turns[:shared], chosen_turns[shared].text, rejected_turns[shared].text


def _trl(location: str, row: Record) -> ParsedRow:
    images = _images(row.get("images", row.get("image")))
    hallucinated = _text(location, "hallucinated", row.get("hallucinated"))
    if row.get("prompt") is None:
        return ParsedRow(
            *_split_conversations(location, row["chosen"], row["rejected"]), images, hallucinated=hallucinated
        )
    chosen, rejected = (_text(location, side, row[side]) for side in ("chosen", "rejected"))
    return ParsedRow(_turns(location, "prompt", row["prompt"]), chosen, rejected, images, hallucinated=hallucinated)


def _povid(location: str, row: Record) -> ParsedRow:
    return ParsedRow(
        *_split_conversations(location, row["conversations"], row["rejected_conversations"]), _images(row["image"])
    )


def _realign(location: str, row: Record) -> ParsedRow:
    apart = _split_conversations(location, row["chosen"], row["rejected"])
    return ParsedRow(*apart, _images(row["image"]), other_images=_images(row["retrieved_image"]))


_SAID = re.compile(r"(?:.*?\bUSER:)?\s*(.*?)\s*(?:ASSISTANT:\s*)?", re.DOTALL)


def _mdpo(location: str, row: Record) -> ParsedRow:
    whole = _SAID.fullmatch(_text(location, "prompt", row["prompt"]))
    assert whole is not None, "every text matches"
    chosen, rejected = (_text(location, side, row[side]) for side in ("chosen", "rejected"))
    return ParsedRow((Turn("user", whole[1]),), chosen, rejected, _images(row["img_path"]))


def _rlhfv(location: str, row: Record) -> ParsedRow:
    record: object = row
    if row.get("question") is None:
        try:
            record = parse_json(str(row.get("text")))
        except ValueError as error:
            raise ValueError(
                f"{location}: text is {shorten(row.get('text'))}; expected JSON with a question ({error})"
            ) from error
    if not isinstance(record, Mapping):
        raise ValueError(f"{location}: text is {shorten(record)}; expected a record with question, chosen and rejected")
    lacking = [name for name in ("question", "chosen", "rejected") if name not in record]
    if lacking:
        raise ValueError(f"{location}: text has no {', no '.join(lacking)}; expected question, chosen and rejected")
    question, chosen, rejected = (_text(location, name, record[name]) for name in ("question", "chosen", "rejected"))
    return ParsedRow((Turn("user", question),), chosen, rejected, _images(row["image"]))


def _swift(location: str, row: Record) -> ParsedRow:
    turns, images = _turns(location, "messages", row["messages"]), _images(row["images"])
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise UnusableRowError("the last message is not the assistant's")
    other = _images(row.get("rejected_images")) or None
    chosen = turns[-1].text
    rejected = _text(location, "rejected_response", row.get("rejected_response")) or (chosen if other else "")
    return ParsedRow(turns[:-1], chosen, rejected, images, other)


def _answers(location: str, row: Record) -> ParsedRow:
    images = _images(row.get("images", row.get("image")))
    messages = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if messages is None:
        answer = _text(location, "answer", row.get("answer"))
        return ParsedRow(_turns(location, "prompt", row.get("prompt")), answer, None, images)
    turns = _turns(location, "messages", messages)
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    if not last:
        raise UnusableRowError("no message is the assistant's answer to another")
    return ParsedRow(turns[:last], turns[last].text, None, images)


LAYOUTS = (
    Layout("trl", ("images|image", "chosen", "rejected"), ("prompt", "hallucinated"), _trl),
    Layout("povid", ("image", "conversations", "rejected_conversations"), (), _povid),
    Layout("realign", ("image", "retrieved_image", "chosen", "rejected"), (), _realign),
    Layout("mdpo", ("img_path", "prompt", "chosen", "rejected"), (), _mdpo),
    Layout("rlhfv", ("image", "question|text"), ("chosen", "rejected"), _rlhfv),
    Layout("swift", ("images", "messages"), ("rejected_response", "rejected_images"), _swift),
    Layout("answers", ("images|image", "prompt|messages|conversations"), ("answer",), _answers),
)
