"""Layouts of response data: their columns, and one parse function each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.data.formats.files import Record, read_list, read_number, read_thumb, shorten
from mmalign.data.formats.image_files import Image
from mmalign.data.formats.layouts import THUMBS as THUMBS_NAME
from mmalign.data.formats.layouts import Layout
from mmalign.data.formats.messages import (
    Message,
    images_of,
    placed_images,
    read_completion,
    read_messages,
    read_text,
    split_conversations,
)
from mmalign.data.pairs import UnusableRowError
from mmalign.language.chat import Turn
from mmalign.reading import parse_json

_MEDIA = ("video", "videos", "audio", "audios")
_TOOLS = ("tools", "functions")


@dataclass(frozen=True)
class ParsedRow:
    """Texts and images of a row, or of one of its several rejected responses.

    `rejected_images` is None if the rejected response has the chosen one's images. `rejected` is None in a row with an
    answer alone. `hallucinated` is a second rejected response, or empty. `later_turns` says that the conversations
    differ in later turns as well, which are left out. `others` are the responses of a list after the second, and
    `scores` those of all; a pair has none. `truth` has the texts of the true answer.
    """

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str | None
    images: tuple[Image, ...]
    rejected_images: tuple[Image, ...] | None = None
    other_images: tuple[Image, ...] = ()
    hallucinated: str = ""
    later_turns: bool = False
    others: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    truth: tuple[str, ...] = ()
    compared: tuple[float, ...] = ()  # the scores of the chosen and the rejected response, in a pair of scored ones

    @property
    def responses(self) -> tuple[str, ...]:
        """All responses in order, without the hallucinated one."""
        return (self.chosen, *([self.rejected] if self.rejected is not None else []), *self.others)

    @property
    def all_images(self) -> tuple[Image, ...]:
        """Images of both sides, then the other images."""
        return self.images + (self.rejected_images or ()) + self.other_images


# Rows of the several rejected responses of a record, or the reasons why one of them cannot be used
ParsedRows = tuple[ParsedRow | UnusableRowError, ...]


def _with(rows: ParsedRows, **extra: Any) -> ParsedRows:
    """Return the rows with the fields that further columns of their record hold."""
    return tuple(replace(row, **extra) if isinstance(row, ParsedRow) else row for row in rows)


def _row(
    row: Record, prompt: Sequence[Message], chosen: str, rejected: str | None, images: object, later: bool = False
) -> ParsedRow:
    """Return a row of this prompt, with the columns that rows of any layout may have: `system`, and media."""
    # What the model would not see
    for name in (*_MEDIA, *_TOOLS):
        if _filled(row.get(name)):
            raise UnusableRowError(f"has {name}, which are not trained on")
    # The column `system` is the first turn, unless the messages have one
    messages, system = list(prompt), read_text("system", row.get("system"))
    if system.strip() and (not messages or messages[0].turn.role != "system"):
        messages.insert(0, Message(Turn("system", system)))
    if not messages or messages[-1].turn.role == "assistant":
        raise UnusableRowError("the prompt ends with the assistant's own words; a response cannot continue them")
    placed = placed_images(messages, images_of(images))
    if not placed and not row.keys() & {"image", "images", "img_path"}:
        raise UnusableRowError("has no 'images', nor an image in its messages", "missing image")
    return ParsedRow(tuple(message.turn for message in messages), chosen, rejected, placed, later_turns=later)


def _images_in(row: Record) -> object:
    """Return the images in the column `images`, or, where that is empty, in `image`; a table may have both."""
    several = row.get("images")
    return row.get("image") if several in (None, "", []) else several


def _filled(value: object) -> bool:
    """Return whether a column holds anything, perhaps as JSON."""
    if isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", "None"):
        return False
    return any(value) if isinstance(value, list) else bool(value)


def _several(name: str, value: object) -> list[object]:
    """Return the responses of a column: one, or a list of several."""
    if isinstance(value, list) and not any(isinstance(one, Mapping) for one in value):
        if not value:
            raise UnusableRowError(f"{name} is empty")
        return value
    return [value]


def _pairs(row: Record, prompt: Sequence[Message], chosen: object, rejected: object, images: object) -> ParsedRows:
    """Return a row for every rejected response; a response is a text, messages, or the whole conversation."""
    best, rows = read_completion("chosen", chosen), list[ParsedRow | UnusableRowError]()
    for other in _several("rejected", rejected):
        # A response that cannot be used drops its own pair alone
        try:
            split = split_conversations(*_conversations(prompt, best, read_completion("rejected", other)))
            rows.append(_row(row, *split[:3], images, later=split[3]))
        except UnusableRowError as error:
            rows.append(error)
    return tuple(rows)


def _conversations(
    prompt: Sequence[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Return both sides as whole conversations; a whole one repeats the prompt, perhaps without its system turn."""
    whole = next((side for side in (chosen, rejected) if not _is_answer(side)), [])
    system = [message for message in prompt[:1] if whole and message.turn.role == "system" != whole[0].turn.role]
    start = whole[:-1] if whole else prompt
    good, bad = ([*system, *([*start, *side] if _is_answer(side) else side)] for side in (chosen, rejected))
    return good, bad


def _is_answer(messages: Sequence[Message]) -> bool:
    return messages[0].turn.role == "assistant"


def _trl(location: str, row: Record) -> ParsedRows:
    name = next((name for name in ("prompt", "conversations") if row.get(name) is not None), None)
    prompt = read_messages(name, row[name]) if name is not None else []
    if not prompt and isinstance(row["chosen"], str):
        raise UnusableRowError("has no prompt")
    rows = _pairs(row, prompt, row["chosen"], row["rejected"], _images_in(row))
    return _with(rows, hallucinated=read_text("hallucinated", row.get("hallucinated")))


def _alpaca(location: str, row: Record) -> ParsedRows:
    prompt = list[Message]()
    for asked, answer in _history(row.get("history")):
        prompt += [*read_messages("history", asked), *read_completion("history", answer)]
    texts = [read_text(name, row.get(name)) for name in ("instruction", "input")]
    prompt += read_messages("instruction", "\n".join(text for text in texts if text))
    return _pairs(row, prompt, row["chosen"], row["rejected"], _images_in(row))


def _history(value: object) -> list[list[object]]:
    turns = value or []
    if not isinstance(turns, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in turns):
        raise UnusableRowError(f"history is {shorten(value)}; expected a list of [question, answer]")
    return turns


def _povid(location: str, row: Record) -> ParsedRows:
    return _pairs(row, (), row["conversations"], row["rejected_conversations"], row["image"])


def _realign(location: str, row: Record) -> ParsedRows:
    others = images_of(row["retrieved_image"])
    rows = _pairs(row, (), row["chosen"], row["rejected"], row["image"])
    return _with(rows, other_images=others)


def _asks(sample: Record) -> bool:
    """Return whether rows have a question with two responses, perhaps in JSON."""
    text = sample.get("text")
    if "question" in sample:
        return sample.keys() >= {"chosen", "rejected"}
    return not isinstance(text, str) or text.lstrip().startswith("{")


_SAID = re.compile(r"(?:.*?\bUSER:)?\s*(.*?)\s*(?:ASSISTANT:\s*)?", re.DOTALL)


def _mdpo(location: str, row: Record) -> ParsedRows:
    whole = _SAID.fullmatch(read_text("prompt", row["prompt"]))
    assert whole is not None, "every text matches"
    return _pairs(row, read_messages("prompt", whole[1]), row["chosen"], row["rejected"], row["img_path"])


def _rlhfv(location: str, row: Record) -> ParsedRows:
    record: object = row
    # The record itself, or JSON in the column text
    if row.get("question") is None:
        text = row.get("text")
        try:
            record = parse_json(text if isinstance(text, str) else json.dumps(text, default=str))
        except ValueError as error:
            raise UnusableRowError(f"text is {shorten(text)}; expected JSON with a question ({error})") from error
    if not isinstance(record, Mapping):
        raise UnusableRowError(f"text is {shorten(record)}; expected a record with question, chosen and rejected")
    lacking = [name for name in ("question", "chosen", "rejected") if record.get(name) is None]
    if lacking:
        raise UnusableRowError(f"has no {', no '.join(lacking)}; expected question, chosen and rejected")
    return _pairs(
        row, read_messages("question", record["question"]), record["chosen"], record["rejected"], row["image"]
    )


def _swift(location: str, row: Record) -> ParsedRows:
    # The last message is the chosen response
    messages = read_messages("messages", row["messages"])
    if messages[-1].turn.role != "assistant" or len(messages) < 2:
        raise UnusableRowError("the last message is not the assistant's")
    images, prompt, chosen = _images_in(row), messages[:-1], messages[-1].turn.text
    # Rejected messages are a whole conversation, or begin with the answer
    if row.get("rejected_messages") is not None:
        rejected = read_messages("rejected_messages", row["rejected_messages"])
        whole = rejected if rejected[0].turn.role != "assistant" else [*prompt, *rejected]
        shared, good, bad, later = split_conversations(messages, whole)
        rows: ParsedRows = (_row(row, shared, good, bad, images, later),)
    else:
        # Rejected texts; where only the images differ, the chosen one again
        others = [text for text in _several("rejected_response", row.get("rejected_response") or None) if text]
        fallback = [chosen] if row.get("rejected_images") else [""]
        texts = [read_text("rejected_response", one) for one in others] or fallback
        rows = tuple(_row(row, prompt, chosen, text, images) for text in texts)
    # The rejected images belong to every row of the record
    return _with(rows, rejected_images=images_of(row.get("rejected_images")) or None)


def _answers(location: str, row: Record) -> ParsedRows:
    messages = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if messages is None:
        # An answer in a column of its own
        answer, prompt = read_text("answer", row.get("answer")), read_messages("prompt", row.get("prompt"))
    else:
        # Or the last answer in a conversation; what follows it is left out
        turns = read_messages("messages", messages)
        last = max((index for index, message in enumerate(turns) if message.turn.role == "assistant"), default=0)
        if not last:
            raise UnusableRowError("no message is the assistant's answer to another")
        answer, prompt = turns[last].turn.text, turns[:last]
    return (replace(_row(row, prompt, answer, None, _images_in(row)), truth=_truth(row, answer)),)


def _truth(row: Record, answer: str) -> tuple[str, ...]:
    """Return the texts of the column `truth`, one or several; without it, the answer."""
    value = row.get("truth")
    if value is None:
        return (answer,) if answer.strip() else ()
    texts = read_list("truth", value) if isinstance(value, list) or str(value).startswith("[") else [value]
    return tuple(read_text("truth", text) for text in texts)


def _thumbs(location: str, row: Record) -> ParsedRows:
    prompt = read_messages("prompt", row["prompt"])
    completion = read_completion("completion", row["completion"])
    if len(completion) > 1:
        raise UnusableRowError(f"completion has {len(completion)} messages; expected the assistant's one")
    parsed = _row(row, prompt, completion[0].turn.text, None, _images_in(row))
    return (replace(parsed, scores=(read_thumb(row["label"]),)),)


def _rankings(location: str, row: Record) -> ParsedRows:
    responses = [read_text("responses", text) for text in read_list("responses", row["responses"])]
    # Ranks count downwards
    name, sign = ("scores", 1) if row.get("scores") is not None else ("ranks", -1)
    worth = [sign * read_number(name, value) for value in read_list(name, row.get(name))]
    if len(responses) < 2 or len(worth) != len(responses):
        raise UnusableRowError(
            f"has {len(responses)} responses and {len(worth)} {name}; expected a score for each of two or more"
        )
    # The best first; of equal ones the first
    order = sorted(range(len(worth)), key=lambda n: -worth[n])
    first, second, *others = (responses[n] for n in order)
    parsed = _row(row, read_messages("prompt", row["prompt"]), first, second, _images_in(row))
    return (replace(parsed, others=tuple(others), scores=tuple(worth[n] for n in order)),)


_IMAGE_NAMES = ("img", "image_path", "img_path", "image_file", "picture")
_IMAGES = {"image": _IMAGE_NAMES, "images": ("image_paths", "pictures")}
_QUESTION = ("question", "query", "instruction")
_SIDES = {
    "chosen": ("chosen_response", "chosen_answer", "preferred", "winner"),
    "rejected": ("rejected_response", "rejected_answer", "dispreferred", "loser"),
}
_ANY = ("images", "image", "system", "tools", "videos", "audios")  # columns that rows of several layouts have


def _may_hold_images(sample: Record) -> bool:
    """Return whether rows have a column of images, or messages that may hold them."""
    messages = ("prompt", "chosen", "messages", "conversations")
    return "image" in sample or "images" in sample or any(isinstance(sample.get(name), list) for name in messages)


THUMBS = Layout(
    THUMBS_NAME,
    ("prompt", "completion", "label"),
    _ANY,
    _thumbs,
    synonyms={
        **_IMAGES,
        "prompt": _QUESTION,
        "completion": ("response", "answer", "output"),
        "label": ("liked", "thumb", "thumbs_up", "feedback"),
    },
    fits=lambda sample: _may_hold_images(sample) and isinstance(sample.get("label"), str | int | float),
    has_labels=False,
)
LAYOUTS = (
    Layout(
        "trl",
        ("chosen", "rejected"),
        ("prompt", "hallucinated", *_ANY),
        _trl,
        synonyms={**_IMAGES, **_SIDES, "prompt": _QUESTION},
        fits=_may_hold_images,
    ),
    Layout(
        "llama_factory",
        ("conversations", "chosen", "rejected"),
        _ANY,
        _trl,
        synonyms={**_IMAGES, "conversations": ("messages",)},
    ),
    Layout(
        "alpaca",
        ("instruction", "chosen", "rejected"),
        ("input", "history", *_ANY),
        _alpaca,
        synonyms=_IMAGES,
        fits=_may_hold_images,
    ),
    Layout("povid", ("image", "conversations", "rejected_conversations"), (), _povid, synonyms={"image": ("images",)}),
    Layout("realign", ("image", "retrieved_image", "chosen", "rejected"), (), _realign),
    Layout("mdpo", ("img_path", "prompt", "chosen", "rejected"), (), _mdpo),
    Layout(
        "rlhfv", ("image", "question|text"), ("chosen", "rejected"), _rlhfv, synonyms={"image": ("images",)}, fits=_asks
    ),
    Layout(
        "swift",
        ("messages", "rejected_response|rejected_messages|rejected_images"),
        ("rejected_images", *_ANY),
        _swift,
        synonyms={"images": ("image",)},
    ),
    Layout(
        "answers",
        ("prompt|messages|conversations",),
        ("answer", "truth", *_ANY),
        _answers,
        has_labels=False,
        synonyms={
            **_IMAGES,
            "prompt": _QUESTION,
            "answer": ("response", "output", "caption", "completion"),
            "truth": ("objects", "solution", "ground_truth"),
        },
        fits=_may_hold_images,
    ),
    Layout(
        "rankings",
        ("prompt", "responses", "scores|ranks"),
        _ANY,
        _rankings,
        synonyms={
            **_IMAGES,
            "prompt": _QUESTION,
            "responses": ("completions", "answers", "candidates", "outputs"),
            "scores": ("rewards", "ratings"),
            "ranks": ("rank", "ranking"),
        },
        fits=lambda sample: _may_hold_images(sample) and isinstance(sample.get("responses"), list),
    ),
)
