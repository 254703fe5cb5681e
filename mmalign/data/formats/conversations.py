"""The layouts of rows of responses: which columns they have, and how a row reads. One function a layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.data.formats.files import shown
from mmalign.language.chat import Turn

Image = str | tuple[str, int | None]  # a path, or a table's column and the place in its list
Record = Mapping[str, Any]
ROLES = {"human": "user", "gpt": "assistant"}


class Unusable(ValueError):
    """Why a row cannot be learned from; it is dropped, counted and named."""


@dataclass(frozen=True)
class Parsed:
    """A row's texts and images. `rejected_images` is None where the rejected response has the same ones.

    `rejected` is None in a row of an answer alone; `hallucinated` is a second rejected response, if there is one.
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
        """Those of both sides, and others."""
        return self.images + (self.rejected_images or ()) + self.other_images

    def with_turns(self, turns: tuple[Turn, ...]) -> Parsed:
        """The row with another prompt."""
        return replace(self, turns=turns)


@dataclass(frozen=True)
class Layout:
    """Columns by our names: of each tuple in `needed` one must be there."""

    name: str
    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    parse: Callable[[str, Record], Parsed]
    names: Mapping[str, str]

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """The layout of files that call some columns otherwise.

        Raises:
            ValueError: the layout has no such column.
        """
        own = [*(c for some in self.needed for c in some), *self.optional]
        for ours in columns:
            if ours not in own:
                raise ValueError(f"data.columns: {self.name} has no column {ours!r} to rename; it has {', '.join(own)}")
        return replace(self, names=columns)

    def named(self, record: Record) -> Record:
        """The record by our names."""
        theirs = {theirs: ours for ours, theirs in self.names.items()}
        return {theirs.get(name, name): value for name, value in record.items()}

    def lacking(self, found: Sequence[str]) -> list[str]:
        """The columns that should be there and are not, by their names."""
        sets = [[self.names.get(c, c) for c in some] for some in self.needed]
        return [some[0] for some in sets if not set(some) & set(found)]


def _images(value: Any) -> tuple[Image, ...]:
    """The images of a row: none, one, or a list; structs of a path alone are paths."""
    if value is None or value == "":
        return ()
    several = value if isinstance(value, list) else [value]
    return tuple(one["path"] if isinstance(one, dict) and one.get("path") else one for one in several)


def _text(where: str, name: str, value: Any) -> str:
    """A text, or the text of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = _turn(where, name, value[0]).text
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {shown(value)}; expected a text")
    return value


def _turn(where: str, name: str, message: Any) -> Turn:
    """A message of TRL, of ms-swift (`role`, `content`) or of LLaVA (`from`, `value`)."""
    if not isinstance(message, dict):
        raise ValueError(f"{where}: {name} holds {shown(message)}; expected messages with a role and a content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join("<image>" if part.get("type") == "image" else part.get("text") or "" for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where}: {name} holds {shown(message)}; expected messages with a role and a content")
    return Turn(ROLES.get(role, role), content)


def _turns(where: str, name: str, value: Any) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} is {shown(value)}; expected a text, or a list of messages")
    return tuple(_turn(where, name, message) for message in value)


def _apart(where: str, chosen: Any, rejected: Any) -> tuple[tuple[Turn, ...], str, str]:
    """Two conversations: what both begin with, and the answers in which they first differ; what follows is left out."""
    ours, theirs = _turns(where, "chosen", chosen), _turns(where, "rejected", rejected)
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    if shared == min(len(ours), len(theirs)):
        raise Unusable("the chosen and the rejected response are the same")
    if ours[shared].role != "assistant" or theirs[shared].role != "assistant" or not shared:
        raise Unusable("the chosen and the rejected conversation have different prompts")
    return ours[:shared], ours[shared].text, theirs[shared].text


def _trl(where: str, row: Record) -> Parsed:
    images = _images(row.get("images", row.get("image")))
    hallucinated = _text(where, "hallucinated", row.get("hallucinated"))
    if row.get("prompt") is None:
        return Parsed(*_apart(where, row["chosen"], row["rejected"]), images, hallucinated=hallucinated)
    chosen, rejected = (_text(where, side, row[side]) for side in ("chosen", "rejected"))
    return Parsed(_turns(where, "prompt", row["prompt"]), chosen, rejected, images, hallucinated=hallucinated)


def _povid(where: str, row: Record) -> Parsed:
    return Parsed(*_apart(where, row["conversations"], row["rejected_conversations"]), _images(row["image"]))


def _realign(where: str, row: Record) -> Parsed:
    apart = _apart(where, row["chosen"], row["rejected"])
    return Parsed(*apart, _images(row["image"]), other_images=_images(row["retrieved_image"]))


_SAID = re.compile(r"(?:.*?\bUSER:)?\s*(.*?)\s*(?:ASSISTANT:\s*)?", re.DOTALL)


def _mdpo(where: str, row: Record) -> Parsed:
    whole = _SAID.fullmatch(_text(where, "prompt", row["prompt"]))
    assert whole is not None, "every text matches"
    chosen, rejected = (_text(where, side, row[side]) for side in ("chosen", "rejected"))
    return Parsed((Turn("user", whole[1]),), chosen, rejected, _images(row["img_path"]))


def _rlhfv(where: str, row: Record) -> Parsed:
    told: Record = row
    if row.get("question") is None:
        try:
            told = json.loads(row["text"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: text is {shown(row['text'])}; expected JSON with a question") from error
    lacking = [name for name in ("question", "chosen", "rejected") if name not in told]
    if lacking:
        raise ValueError(f"{where}: text has no {', no '.join(lacking)}; expected question, chosen and rejected")
    question, chosen, rejected = (_text(where, name, told[name]) for name in ("question", "chosen", "rejected"))
    return Parsed((Turn("user", question),), chosen, rejected, _images(row["image"]))


def _swift(where: str, row: Record) -> Parsed:
    turns, images = _turns(where, "messages", row["messages"]), _images(row["images"])
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise Unusable("the last message is not the assistant's")
    other = _images(row.get("rejected_images")) or None
    chosen = turns[-1].text
    rejected = _text(where, "rejected_response", row.get("rejected_response")) or (chosen if other else "")
    return Parsed(turns[:-1], chosen, rejected, images, other)


def _answers(where: str, row: Record) -> Parsed:
    images = _images(row.get("images", row.get("image")))
    said = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if said is None:
        answer = _text(where, "answer", row.get("answer"))
        return Parsed(_turns(where, "prompt", row.get("prompt")), answer, None, images)
    turns = _turns(where, "messages", said)
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    if not last:
        raise Unusable("no message is the assistant's answer to another")
    return Parsed(turns[:last], turns[last].text, None, images)


_ALL = (
    Layout("trl", (("images", "image"), ("chosen",), ("rejected",)), ("prompt", "hallucinated"), _trl, {}),
    Layout("povid", (("image",), ("conversations",), ("rejected_conversations",)), (), _povid, {}),
    Layout("realign", (("image",), ("retrieved_image",), ("chosen",), ("rejected",)), (), _realign, {}),
    Layout("mdpo", (("img_path",), ("prompt",), ("chosen",), ("rejected",)), (), _mdpo, {}),
    Layout("rlhfv", (("image",), ("question", "text")), ("chosen", "rejected"), _rlhfv, {}),
    Layout("swift", (("images",), ("messages",)), ("rejected_response", "rejected_images"), _swift, {}),
    Layout("answers", (("images", "image"), ("prompt", "messages", "conversations")), ("answer",), _answers, {}),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
