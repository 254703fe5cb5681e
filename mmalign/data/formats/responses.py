"""Formats of vision-language response pairs, and of answers alone.

trl      `images` (a list) or `image`, `prompt`, `chosen`, `rejected`: texts, or lists of messages. Without `prompt`,
         or if both sides are whole conversations, the prompt is their shared start. `hallucinated` may hold a second
         rejected response.
llama_factory  `images`, `conversations` up to the last question, and the messages `chosen` and `rejected`.
alpaca   `images`, `instruction`, `input` and `history` with the texts `chosen` and `rejected`.
povid    `image`, `conversations` and `rejected_conversations` (messages with `from` and `value`); arXiv:2402.11411.
realign  `image`, `retrieved_image`, `chosen` and `rejected` (messages); arXiv:2502.13146.
mdpo     `img_path`, `prompt` ("USER: <image> ... ASSISTANT:" as a whole), `chosen`, `rejected`; arXiv:2406.11839.
rlhfv    `image`, `question`, `chosen`, `rejected`, or the last three as JSON in `text`; arXiv:2312.00849, 2405.17220.
swift    `images`, `messages` with the chosen response as the last, `rejected_response` or `rejected_messages`, and
         `rejected_images` if the rejected response belongs to other images.
rankings `images` or `image`, `prompt`, `responses` (a list) and `scores` (larger is better) or `ranks` (smaller is
         better). Every two responses of different scores are a pair.
thumbs   TRL's `prompt, completion, label` with `images` or `image`: the rows of methods that learn from single outputs.
answers  `images` or `image`, `prompt` and `answer`; or `messages` or `conversations`, using the last answer. These are
         true answers alone; `prepare` makes pairs from them, and `response_sft` trains on them. Methods that generate
         responses need no answer; their judges may read it, or `truth`: one or several texts, such as objects.
auto     The layout that the columns fit best.

A column `system` is the first turn. Rows with tools, videos or audios are dropped by name. Several rejected responses
of a row are as many pairs. All layouts of pairs also take the columns of `mmalign.data.formats.labels`.

All are JSON, JSON lines, Parquet files or a dataset on the Hub; images are paths, bytes, or structs with bytes.
`<image>` in a prompt marks an image's position. In a prompt without it the images come first. `columns` maps a name
above to the name in the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.conversations import LAYOUTS, THUMBS, ParsedRow, ParsedRows
from mmalign.data.formats.image_files import Image, ImageReader, image_name, shorten_name
from mmalign.data.formats.labels import COLUMN, Margins, read_label
from mmalign.data.formats.layouts import AUTO, Layout, Learning, check_files, layouts_for, open_layout
from mmalign.data.formats.rows import SourceRow
from mmalign.data.label import FIELDS, Label
from mmalign.data.pairs import ImageRef, Pairs, ResponsePair, SkippedRow, UnusableRowError, stable_hash
from mmalign.language.chat import IMAGE, Turn

logger = logging.getLogger(__name__)

Columns = Mapping[str, str]
NamedImages = tuple[tuple[str, ImageRef], ...]  # images with the names that a row id is hashed from


@dataclass(frozen=True)
class IndexedRow:
    """Usable row with its texts and the locations of its images."""

    parsed: ParsedRow
    location: str
    group: str | None  # of the column to group by; None groups by the images
    folders: tuple[Path, ...]  # of its image paths
    label: Label


class ResponseRows:
    """Source of response pairs, whose images are read when their pair is built."""

    def __init__(self, entries: Sequence[IndexedRow], reader: ImageReader) -> None:
        self._entries, self._reader = entries, reader

    def pair(self, number: int) -> ResponsePair:
        """Return the pair of that number."""
        entry = self._entries[number]
        parsed, images = entry.parsed, self._images(entry)
        # Images come in order: chosen, rejected (if they differ), others
        sides = [images[: len(parsed.images)]]
        sides.append(images[len(parsed.images) :][: len(parsed.rejected_images or ())] or sides[0])
        others = images[len(parsed.images) + len(parsed.rejected_images or ()) :]
        # The row id, from texts and images' names; an image without a name counts by its content
        texts = [f"{turn.role}: {turn.text}" for turn in parsed.turns]
        rejected = parsed.rejected or ""
        row = stable_hash(
            *texts, parsed.chosen, rejected, *parsed.others, *(name for side in sides for name, _ in side)
        )
        refs = [tuple(ref for _, ref in some) for some in (*sides, others)]
        return ResponsePair(
            row,
            parsed.turns,
            parsed.chosen,
            rejected,
            refs[0],
            refs[1],
            refs[2],
            entry.location,
            self._group(entry),
            parsed.hallucinated,
            entry.label,
            parsed.others,
            parsed.scores,
            parsed.truth,
        )

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the groups of these pairs."""
        return [self._group(self._entries[n]) for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts of these pairs: the text of the last turn before the responses."""
        return [self._entries[n].parsed.turns[-1].text for n in numbers.tolist()]

    def liked(self, numbers: NDArray[np.int64]) -> list[bool]:
        """Return whether the best score of each of these rows is above 0."""
        return [max(self._entries[n].parsed.scores, default=1.0) > 0 for n in numbers.tolist()]

    def annotators(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the annotator of each of these pairs, "" for none."""
        return [self._entries[n].label.annotator for n in numbers.tolist()]

    def _group(self, entry: IndexedRow) -> str:
        """Return the group of a row; by default its images' names, or the content of images without a name."""
        if entry.group is not None:
            return entry.group
        return " ".join(name for name, _ in self._images(entry)[: len(entry.parsed.images)])

    def _images(self, entry: IndexedRow) -> NamedImages:
        images = list[tuple[str, ImageRef]]()
        for index, image in enumerate(entry.parsed.all_images):
            name = image_name(image)
            place = f"image {index}" + (f" ({shorten_name(name)})" if name else "")
            ref = self._reader.ref(image, entry.folders, partial("{}, {}".format, entry.location, place))
            images.append((name or ref.key, ref))
        return tuple(images)


def open_responses(
    format: str,
    path: str,
    *,
    images: Path | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    group_by: str | None = None,
    limit: int | None = None,
    margins: Margins = COLUMN,
    labels: Collection[str] = FIELDS,
    learning: Learning = "pairs",
    cut_pairs: bool = False,
    truths: bool = False,
) -> Pairs[ResponsePair]:
    """Index the pairs, thumbs or lists of a source: read and check its texts, without decoding its images.

    The arguments are those of `mmalign.data.formats.images.open_pairs`, with a format of the module docstring. By
    default the images of a pair are its group. `truths` drops prompts without a true answer.

    Raises:
        ValueError: a file or column is missing, a row does not match the format, or no pair is left.
    """
    # Source and layout, by the name or by the columns
    layouts = layouts_for(LAYOUTS, THUMBS, learning, cut_pairs=cut_pairs)
    source, layout = open_layout(layouts, format, path, split=split, columns=columns, group_by=group_by)
    taken = layout.describe() if format == AUTO else ""
    # Labels are those of pairs alone
    of_pairs = learning == "pairs" and layout.has_labels
    label = partial(read_label, labels if of_pairs else (), margins)
    reader = ImageReader(images)
    select = partial(_select, learning=learning, truths=truths)
    # The index: every row's texts are read and checked, and that its images exist
    entries, dropped, tied = _index(source.rows(), layout, reader, group_by, learning, label, select)
    if later := sum(entry.parsed.later_turns for entry in entries):
        logger.info(f"{path}: {later:,} conversations have later turns than the answer compared, which are left out")
    unread = layout.unread(source.columns, group_by, labels=labels, margins=margins)
    entries = _distinct(entries) if learning == "prompts" else entries
    pairs = Pairs(path, ResponseRows(entries, reader), np.arange(len(entries)), dropped, tied, taken, unread)
    pairs.require(f"with an image and {_EXPECTED[learning]}")
    return pairs[:limit] if limit is not None else pairs


def _index(
    rows: Iterable[SourceRow | SkippedRow],
    layout: Layout[ParsedRows],
    reader: ImageReader,
    group_by: str | None,
    learning: Learning,
    label: Callable[..., Label],
    select: Callable[[ParsedRows], tuple[ParsedRows, int]],
) -> tuple[list[IndexedRow], list[SkippedRow], list[str]]:
    """Return the usable rows, the skipped ones, and the locations of ties; `label` reads a label from a record."""
    # A record may give several rows, of which each is checked and skipped for itself
    entries, dropped, tied = list[IndexedRow](), list[SkippedRow](), list[str]()
    for row in rows:
        if isinstance(row, SkippedRow):
            dropped.append(row)
            continue
        try:
            parsed_rows, ties = select(layout.read(row.location, row.record))
            group = layout.group(row.record, group_by) if group_by is not None else None
        except UnusableRowError as error:
            dropped.append(SkippedRow(row.location, str(error), error.defect))
            continue
        tied += [row.location] * ties
        for number, unplaced in enumerate(parsed_rows, start=1):
            location = row.location if len(parsed_rows) == 1 else f"{row.location}, {_PART[learning]} {number}"
            try:
                parsed = _with_image_places(unplaced, is_prompt=learning == "prompts")
                for image in parsed.all_images:
                    reader.check(image, row.folders)
                row_label = label(layout.own_names(row.record), scores=parsed.compared)
            except UnusableRowError as error:
                dropped.append(SkippedRow(location, str(error), error.defect))
                continue
            entries.append(IndexedRow(parsed, location, group, row.folders, row_label))
    return entries, dropped, tied


def _distinct(entries: Sequence[IndexedRow]) -> list[IndexedRow]:
    """Return the first of all prompts with the same text, true answer, and names or places of images."""
    first = dict[object, IndexedRow]()
    for entry in entries:
        images = tuple(image if isinstance(image, str) else image.place for image in entry.parsed.images)
        first.setdefault((entry.parsed.turns, entry.parsed.truth, images, entry.folders), entry)
    return list(first.values())


def check_source(
    format: str, path: str, *, learning: Learning = "pairs", cut_pairs: bool = False, **options: Any
) -> None:
    """Check a source's files and columns, with the arguments and errors of `open_responses`; no image is read."""
    check_files(layouts_for(LAYOUTS, THUMBS, learning, cut_pairs=cut_pairs), format, path, **options)


_PART = {"pairs": "rejected response", "thumbs": "response", "lists": "response", "prompts": "prompt"}  # of several
_EXPECTED = {
    "pairs": "two different responses",
    "thumbs": "a response with a label",
    "lists": "several responses with scores",
    "prompts": "a prompt",
}


def _select(rows: ParsedRows, learning: Learning, truths: bool) -> tuple[ParsedRows, int]:
    """Return the pairs, thumbs, lists or prompts of a record's rows, and the number of ties among scored responses.

    Pairs of scored responses are every two of different scores. Thumbs of several responses are the best and the worst.
    A pair is a list of two with the scores 1 and 0.
    """
    selected, ties = list[ParsedRow | UnusableRowError](), 0
    for row in rows:
        if isinstance(row, UnusableRowError):
            selected.append(row)
            continue
        # Prompts alone, perhaps with true answers for a judge
        if learning == "prompts":
            if truths and not any(text.strip() for text in row.truth):
                selected.append(UnusableRowError("has no true answer; expected texts in truth, or an answer"))
                continue
            selected.append(ParsedRow(row.turns, "", None, row.images, later_turns=row.later_turns, truth=row.truth))
            continue
        # One response: a thumb, or an answer alone
        if len(row.responses) == 1:
            judged = learning == "pairs" or row.scores  # answers alone are for methods without rejected ones
            reason = "has an answer alone; expected several responses, or one with a label"
            selected.append(row if judged else UnusableRowError(reason))
            continue
        # Several: every two, as they are, the best and the worst, or the whole list
        scores = row.scores or (1.0, 0.0)
        if learning == "pairs" and row.scores:
            couples = [*combinations(zip(row.responses, scores, strict=True), 2)]
            different = [(better, worse, (more, less)) for (better, more), (worse, less) in couples if more > less]
            ties += len(couples) - len(different)
            selected += [
                replace(row, chosen=better, rejected=worse, others=(), scores=(), compared=compared)
                for better, worse, compared in different
            ]
        elif learning == "pairs":
            selected.append(row)
        elif scores[0] == scores[-1]:
            ties += 1
        elif learning == "thumbs":
            selected += [
                _single(row, row.chosen, row.images, 1.0),
                _single(row, row.responses[-1], row.rejected_images or row.images, 0.0),
            ]
        else:
            selected.append(replace(row, scores=scores))
    return tuple(selected), ties


def _single(row: ParsedRow, response: str, images: tuple[Image, ...], score: float) -> ParsedRow:
    """Return the thumb of a response."""
    return ParsedRow(row.turns, response, None, images, scores=(score,), later_turns=row.later_turns)


def _with_image_places(parsed: ParsedRow | UnusableRowError, *, is_prompt: bool) -> ParsedRow:
    """Return the row with a placeholder for every image in its prompt; a prompt alone has no response to check.

    Raises:
        UnusableRowError: it is given, a response is empty, equal to the other or holds a placeholder, or the images do
            not match.
    """
    if isinstance(parsed, UnusableRowError):
        raise parsed
    # Texts to check, by their names in messages; a list's are numbered
    named = {"chosen": parsed.chosen, "rejected": parsed.rejected, "hallucinated": parsed.hallucinated or None}
    texts = {} if is_prompt else named
    if parsed.scores:
        texts = {f"{number}.": text for number, text in enumerate(parsed.responses, start=1)}
    for side, text in texts.items():
        if text is not None and not text.strip():
            raise UnusableRowError(f"the {side} response is empty")
        if text is not None and IMAGE in text:
            raise UnusableRowError(f"the {side} response holds {IMAGE}")
    if not parsed.images:
        raise UnusableRowError("has no image", "missing image")
    # Images of both sides
    if parsed.rejected_images is not None and len(parsed.rejected_images) != len(parsed.images):
        raise UnusableRowError(f"has {len(parsed.images)} images and {len(parsed.rejected_images)} rejected ones")
    # Responses must differ, unless their images do
    same_images = parsed.rejected_images is None or parsed.rejected_images == parsed.images
    for side, text in list(texts.items())[1:] if not parsed.scores else ():
        if text is not None and parsed.chosen.strip() == text.strip() and same_images:
            raise UnusableRowError(f"the chosen and the {side} response are the same", "same sides")
    # Without placeholders, the images come first in the first user turn
    places = sum(turn.text.count(IMAGE) for turn in parsed.turns)
    if places == len(parsed.images):
        return parsed
    if places:
        raise UnusableRowError(f"{places} image placeholders in the prompt for {len(parsed.images)} images")
    first = next((n for n, turn in enumerate(parsed.turns) if turn.role == "user"), None)
    if first is None:
        raise UnusableRowError("the prompt has no user turn")
    turns = list(parsed.turns)
    turns[first] = Turn("user", IMAGE * len(parsed.images) + turns[first].text)
    return replace(parsed, turns=tuple(turns))
