"""Messages of TRL, ms-swift, LLaMA-Factory, LLaVA and OpenAI as turns of a conversation, with their images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmalign.data.formats.files import shorten
from mmalign.data.formats.image_files import Image, StoredImage, as_image
from mmalign.data.pairs import UnusableRowError
from mmalign.language.chat import IMAGE, Turn

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "source", "bytes")


class Message(NamedTuple):
    """Turn of a conversation with its images.

    Attributes:
        turn: the role and the text, with `<image>` in the place of every image.
        images: the image of every place; None for one that a column of the row has.
    """

    turn: Turn
    images: tuple[Image | None, ...] = ()


def read_messages(name: str, value: object) -> list[Message]:
    """Read the messages of a column: a text of the user, one message, or a list of them.

    Raises:
        UnusableRowError: the value is neither, or a message cannot be trained on.
    """
    if isinstance(value, str):
        return [_message("user", value)]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages:
        raise UnusableRowError(f"{name} is {shorten(value)}; expected a text, or a list of messages")
    return [_read_message(name, message) for message in messages]


def read_completion(name: str, value: object) -> list[Message]:
    """Read a response: a text of the assistant, one message, or a list of them.

    Raises:
        UnusableRowError: the value is neither, or a message cannot be trained on.
    """
    if isinstance(value, str | None):
        return [_message("assistant", value or "")]
    if not isinstance(value, Mapping | list):
        raise UnusableRowError(f"{name} is {shorten(value)}; expected a text, or a list of messages")
    return read_messages(name, value)


def read_text(name: str, value: object) -> str:
    """Return a text, or the text of one message; None becomes empty.

    Raises:
        UnusableRowError: the value is neither.
    """
    messages = read_completion(name, value)
    if len(messages) > 1:
        raise UnusableRowError(f"{name} has {len(messages)} messages; expected one")
    return messages[0].turn.text


def split_conversations(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[list[Message], str, str, bool]:
    """Split two conversations into their shared turns and the answers in which they first differ.

    Returns:
        The shared messages, both answers, and whether later turns are left out.

    Raises:
        UnusableRowError: the conversations are equal, or differ in another turn than an answer.
    """
    # Compared without white space around the texts
    turns = [[(turn.role, turn.text.strip(), images) for turn, images in side] for side in (chosen, rejected)]
    shortest = min(len(chosen), len(rejected))
    shared = next((n for n in range(shortest) if turns[0][n] != turns[1][n]), shortest)
    if shared == len(chosen) == len(rejected):
        raise UnusableRowError("the chosen and the rejected response are the same", "same sides")
    sides = [side[shared].turn.role if shared < len(side) else "" for side in (chosen, rejected)]
    if sides != ["assistant", "assistant"] or not shared:
        raise UnusableRowError("the chosen and the rejected conversation have different prompts", "two prompts")
    later = max(len(chosen), len(rejected)) > shared + 1
    return list(chosen[:shared]), chosen[shared].turn.text, rejected[shared].turn.text, later


def placed_images(messages: Sequence[Message], column: tuple[Image, ...]) -> tuple[Image, ...]:
    """Return the images of a conversation in order: those of a column, of the messages, or of both in turn.

    Raises:
        UnusableRowError: the numbers do not match.
    """
    # The column has all of them, or those of the placeholders that bring no image
    places = [image for message in messages for image in message.images]
    if not any(places) or len(column) == len(places):
        return column
    rest = list(column)
    images = [image or (rest.pop(0) if rest else None) for image in places]
    if rest or not all(images):
        raise UnusableRowError(f"{len(places)} image placeholders in the prompt for {len(column)} images")
    return tuple(image for image in images if image is not None)


def images_of(value: object) -> tuple[Image, ...]:
    """Return the images of a column: nothing, one image or a list.

    Raises:
        UnusableRowError: a value is no image.
    """
    if value is None or value == "":
        return ()
    return tuple(map(_image, value if isinstance(value, list) else [value]))


def _message(role: str, text: str, images: Sequence[Image | None] | None = None) -> Message:
    return Message(Turn(role, text), tuple(images) if images is not None else (None,) * text.count(IMAGE))


def _read_message(name: str, message: object) -> Message:
    expected = "expected messages with a role and a content"
    if not isinstance(message, Mapping):
        raise UnusableRowError(f"{name} holds {shorten(message)}; {expected}")
    # OpenAI's names, or those of LLaVA
    named, content = (_first(message, *keys) for keys in (("role", "from"), ("content", "value")))
    for key in _TOOLS:
        if message.get(key):
            raise UnusableRowError(f"{name} holds {key}, which are not trained on")
    if not isinstance(named, str) or not isinstance(content, str | list | Mapping):
        raise UnusableRowError(f"{name} holds {shorten(message)}; {expected}")
    role = _ROLES.get(named.strip().lower())
    if role is None:
        raise UnusableRowError(f"{name} has a message of the role {named!r}; expected user, assistant or system")
    # Content is a text, or parts of text and images
    if isinstance(content, str):
        return _message(role, content)
    parts = [_part(name, part) for part in (content if isinstance(content, list) else [content])]
    return _message(role, "".join(text for text, _ in parts), [image for _, images in parts for image in images])


def _part(name: str, part: object) -> tuple[str, tuple[Image | None, ...]]:
    """Return the text of a part of a message's content, and the images of its placeholders."""
    # A placeholder in a text, whose image is in another column of the row
    if isinstance(part, str):
        return part, (None,) * part.count(IMAGE)
    # The type of a part, or the key that gives it away
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind is None:
        kind = next((key for key in (*_TEXT_PARTS, *_IMAGE_PARTS) if part.get(key) is not None), None)
    if isinstance(part, Mapping) and kind in _IMAGE_PARTS:
        value = _first(part, *_IMAGE_KEYS)
        return IMAGE, (None if value is None or value == "" else _image(value),)
    text = _first(part, "text", "content", "value") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str | None):
        raise UnusableRowError(f"{name} holds {shorten(part)}; expected a part of the type text or image")
    return text or "", (None,) * (text or "").count(IMAGE)


def _image(value: object) -> Image:
    """Return an image: a path, a data URI, bytes, or a record of one of them."""
    # An image inside a record, such as {image_url: {url: ...}}
    if isinstance(value, Mapping) and isinstance(inner := _first(value, *_IMAGE_KEYS), Mapping):
        value = inner
    if isinstance(value, Mapping) and (data := _first(value, "bytes", "base64", "data")) is not None:
        value = f"data:{value.get('media_type') or 'image'};base64,{data}" if isinstance(data, str) else data
    if isinstance(value, bytes):
        data = value
        return StoredImage(hashlib.blake2b(data).hexdigest(), "image", lambda _: data)
    return as_image(value)


def _first(record: Mapping[str, object], *names: str) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)
