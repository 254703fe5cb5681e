"""Pairs, thumbs and lists of images from any source, indexed without decoding an image.

`mmalign.data.formats.image_layouts` has the layouts of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.image_files import Image, ImageReader, describe_image
from mmalign.data.formats.image_layouts import (
    LAYOUTS,
    RANKINGS,
    SCORES,
    SOURCE,
    THUMBS,
    Parsed,
    group_scores,
    with_source,
)
from mmalign.data.formats.labels import COLUMN, NO_RATINGS, Margins, Scales, read_label, read_ratings
from mmalign.data.formats.layouts import AUTO, Layout, Learning, check_files, layouts_for, open_layout
from mmalign.data.formats.rows import ListRows, Rows, SourceRow, uncollected
from mmalign.data.formats.sources import Source
from mmalign.data.label import FIELDS, NO_LABEL, Label
from mmalign.data.pairs import ImagePair, ImageRef, Pairs, SkippedRow, UnusableRowError, output_names, stable_hash

Columns = Mapping[str, str]
Sources = Literal["required", "optional"]


class Selection(NamedTuple):
    """Images of a parsed row that are one training row, by number, with its prompts and scores."""

    numbers: tuple[int, ...]
    prompt: str
    rejected_prompt: str = ""
    scores: tuple[float, ...] = ()
    is_tie: bool = False


def _select(parsed: Parsed, learning: Learning, *, ties: bool = False) -> tuple[list[Selection], int]:
    """Return the training rows of a parsed row, and the number of ties among its images that are left out.

    Pairs are every two images of different worth, lists all images, the best first. Thumbs of several images are the
    best and the worst. With `ties`, a row of two images of equal worth is a pair too.

    Raises:
        UnusableRowError: a list has two prompts.
    """
    prompt, sides, worth, second = parsed.prompt, parsed.sides, parsed.worth, parsed.rejected_prompt
    # A thumb, whose worth is its label
    if len(sides) == 1:
        return [Selection((0,), prompt, scores=(worth[0],))], 0
    # Lists and thumbs need two different worths
    best, *_, worst = order = parsed.order
    if learning != "pairs" and worth[best] == worth[worst]:
        return [], 1
    if learning == "thumbs":
        return [Selection((best,), prompt, scores=(1.0,)), Selection((worst,), second or prompt, scores=(0.0,))], 0
    if learning == "lists":
        if second:
            raise UnusableRowError("has two prompts; expected a list of images for one", "two prompts")
        return [Selection(tuple(order), prompt, scores=tuple(worth[n] for n in order))], 0
    # Pairs: a tie of two, or every ordered couple of different worth
    if ties and len(sides) == 2 and worth[0] == worth[1]:
        return [Selection((0, 1), prompt, second, is_tie=True)], 0
    pairs = [(i, j) for i, a in enumerate(worth) for j, b in enumerate(worth) if a > b]
    # A file beside itself, of another worth, is neither a pair nor a tie
    selections = [Selection(pair, prompt, second) for pair in pairs if sides[pair[0]].image != sides[pair[1]].image]
    return selections, len(sides) * (len(sides) - 1) // 2 - len(pairs)


def open_pairs(
    format: str,
    path: str,
    *,
    images: Path | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    group_by: str | None = None,
    limit: int | None = None,
    prompt_pairs: str | None = None,
    sources: Sources | None = None,
    margins: Margins = COLUMN,
    labels: Collection[str] = FIELDS,
    learning: Learning = "pairs",
    cut_pairs: bool = False,
    ties: bool = False,
    attributes: Scales = NO_RATINGS,
) -> Pairs:
    """Index the pairs, thumbs or lists of a source without decoding its images.

    Args:
        format: a layout of images, or "auto".
        path: a file, a folder, a glob or a Hub id.
        images: the folder that image paths are relative to; the file's folder if not given.
        split: the start of the files' names, or the name of their folder; on the Hub, the split ("train").
        columns: map from the format's column names (or "prompt") to those in the files.
        group_by: the column whose groups stay on one side of a validation split; the prompt if not given.
        limit: the number of pairs to take from the start; None takes all.
        prompt_pairs: text for the error message that says which methods need a prompt for the rejected image; rows
            without one are skipped. None needs no such prompt.
        sources: "required" or "optional" for a model that edits images; None ignores columns with source images.
        margins: the source of the margins of the labels.
        labels: the fields of the pairs' labels that the caller reads; thumbs and lists have none.
        learning: the kind of the rows.
        cut_pairs: make thumbs of pairs; of several images the best is liked and the worst disliked.
        ties: take two images of equal worth as a pair with a preference of 1/2; they are skipped otherwise.
        attributes: columns with a list of the images' ratings, and their scales.

    Raises:
        ValueError: a file or column is missing, no layout fits, or no pair is left.
    """
    # Source and layout, by the name or by the columns
    known = layouts_for(*layouts(sources), learning, cut_pairs=cut_pairs)
    source, layout = open_layout(known, format, path, split=split, columns=columns, group_by=group_by)
    if sources == "optional" and layout.column(SOURCE) in source.columns:  # then every row has to have one
        layout = replace(layout, required=(*layout.required, SOURCE))
    if attributes:
        layout = _with_ratings(layout, attributes)
        layout.check_columns(path, source.columns, group_by)
    taken = layout.describe() if format == AUTO else ""
    unread = layout.unread(source.columns, group_by, labels=labels, margins=margins)
    rows, layout = _open_rows(source, layout, group_by, sources)
    # The index, which decodes no image
    label = partial(read_label, labels, margins)
    indexed = ImageRows(rows, layout, ImageReader(images), group_by, learning, label, attributes, ties=ties)
    skipped, tied = indexed.index(limit, prompt_pairs is not None)
    pairs = Pairs(path, indexed, np.arange(len(indexed)), skipped, tied, taken, unread)
    pairs.require(_expected(layout, prompt_pairs))
    return pairs[:limit] if limit is not None else pairs


def _open_rows(
    source: Source, layout: Layout[Parsed], group_by: str | None, sources: Sources | None
) -> tuple[Rows, Layout[Parsed]]:
    """Return the rows with the needed columns alone, and their layout; rows of one image each become rankings."""
    needed = {layout.column(name) for name in layout.columns}
    rows = source.rows({*needed, group_by} if group_by is not None else needed)
    if layout.name != SCORES.name:
        return rows, layout
    return ListRows([*group_scores(rows, layout, group_by)]), RANKINGS if sources is None else EDITS


def _with_ratings(layout: Layout[Parsed], attributes: Scales) -> Layout[Parsed]:
    """Return a layout that also needs the columns of ratings, which are lists with a number for each image of a row.

    Raises:
        ValueError: the layout has one image a row.
    """
    if layout.name == SCORES.name:
        raise ValueError("model.attributes: the layout scores has one image a row; expected rows of pairs or rankings")
    return replace(layout, required=(*layout.required, *attributes))


def _expected(layout: Layout[Parsed], prompt_pairs: str | None) -> str:
    """Return what every row needs, in words."""
    if prompt_pairs is not None:
        return f"with a prompt for the rejected image, rejected_caption or rejected_prompt: {prompt_pairs}"
    return "with an image and a label" if layout.name == THUMBS.name else "in which one image is preferred"


EDITS = with_source(RANKINGS)


def check_source(
    format: str,
    path: str,
    *,
    sources: Sources | None = None,
    learning: Learning = "pairs",
    cut_pairs: bool = False,
    **options: Any,
) -> None:
    """Check a source's files and columns, with the arguments and errors of `open_pairs`; no image is read."""
    check_files(layouts_for(*layouts(sources), learning, cut_pairs=cut_pairs), format, path, **options)


def layouts(sources: Sources | None) -> tuple[Sequence[Layout[Parsed]], Layout[Parsed]]:
    """Return the layouts of several images and of thumbs, with source images if they may have or need one."""
    if sources is None:
        return LAYOUTS, THUMBS
    several, thumbs = ([with_source(x, required=sources == "required") for x in some] for some in (LAYOUTS, [THUMBS]))
    return several, thumbs[0]


class ImageRows:
    """Pairs, thumbs or lists of a source's rows, which are parsed again on access."""

    def __init__(
        self,
        rows: Rows,
        layout: Layout[Parsed],
        reader: ImageReader,
        group_by: str | None,
        learning: Learning,
        label: Callable[..., Label],
        attributes: Scales = NO_RATINGS,
        *,
        ties: bool = False,
    ) -> None:
        self._rows, self._layout, self._reader, self._group_by = rows, layout, reader, group_by
        self._learning: Learning = learning
        self._read_label, self._attributes, self._ties = label, dict(attributes), ties
        self._index: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)  # a pair's row, and its number in the row
        self._prompts, self._rejected_prompts, self._groups = list[str](), list[str](), list[str]()
        self._liked, self._annotators = list[bool](), list[str]()

    def __len__(self) -> int:
        return len(self._index)

    def index(self, limit: int | None, prompt_pairs: bool) -> tuple[list[SkippedRow], list[str]]:
        """Find the usable pairs, at least `limit` if there are; return the skipped rows and the locations of ties.

        With `prompt_pairs`, rows without a prompt for the rejected image are skipped.
        """
        # Places are (number of the row, number of the selection in the row)
        places, skipped, tied, texts = list[tuple[int, int]](), list[SkippedRow](), list[str](), dict[str, str]()
        names = (name for name in ("rejected_caption", "rejected_prompt") if name in self._layout.columns)
        second = self._layout.column(next(names, "second prompt"))
        for number, row in enumerate(uncollected(self._rows)):
            if limit is not None and len(places) >= limit:
                break
            if isinstance(row, SkippedRow):
                skipped.append(row)
                continue
            # Everything that can drop a row as a whole
            try:
                parsed = self._layout.read(row.location, row.record)
                selections, ties = _select(parsed, self._learning, ties=self._ties)
                group = parsed.prompt if self._group_by is None else self._layout.group(row.record, self._group_by)
                if prompt_pairs and not parsed.rejected_prompt:
                    raise UnusableRowError(f"has no {second}")
                labels = [self._label(row, parsed, selection) for selection in selections]
                self._ratings(row, parsed, ())
            except UnusableRowError as error:
                skipped.append(SkippedRow(row.location, str(error), error.defect))
                continue
            tied += [row.location] * ties
            # A bad image drops only the selections with it, and the row is counted once
            images = [side.image for side in parsed.sides]
            source = [parsed.source.image] if parsed.source is not None else []
            bad = self._bad_images([*images, *source] if selections else [], row)
            if bad:
                defect = next(iter(bad.values())).defect
                skipped.append(SkippedRow(row.location, " and ".join(map(str, bad.values())), defect))
            for which, selection in enumerate(selections):
                if bad and any(image in bad for image in (*source, *(images[n] for n in selection.numbers))):
                    continue
                places.append((number, which))
                self._liked.append(max(selection.scores, default=1.0) > 0)
                # Equal texts are one object
                for values, text in zip(
                    (self._prompts, self._rejected_prompts, self._groups, self._annotators),
                    (selection.prompt, selection.rejected_prompt, group, labels[which].annotator),
                    strict=True,
                ):
                    values.append(texts.setdefault(text, text))
        self._index = np.array(places, dtype=np.int64).reshape(-1, 2)
        return skipped, tied

    def _label(self, row: SourceRow, parsed: Parsed, selection: Selection) -> Label:
        """Return the label of a pair; thumbs and lists have none."""
        if self._learning != "pairs":
            return NO_LABEL
        scores = [parsed.scores[n] for n in selection.numbers] if parsed.scores else []
        preference = 0.5 if selection.is_tie else parsed.preference
        return self._read_label(self._layout.own_names(row.record), preference, scores)

    def _ratings(self, row: SourceRow, parsed: Parsed, numbers: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """Return the ratings of some of a row's images."""
        return read_ratings(self._attributes, self._layout.own_names(row.record), numbers, len(parsed.sides))

    def _bad_images(self, images: Sequence[Image], row: SourceRow) -> dict[Image, UnusableRowError]:
        bad = dict[Image, UnusableRowError]()
        for image in dict.fromkeys(image for image in images if isinstance(image, str)):
            try:
                self._reader.check(image, row.folders)
            except UnusableRowError as error:
                bad[image] = error
        return bad

    def pair(self, number: int) -> ImagePair:
        """Return the pair of that number; its images are read once, for their keys."""
        # Read and parsed again: the index keeps no images and no labels
        place, which = self._index[number].tolist()
        row = self._rows.row(place)
        parsed = self._layout.read(row.location, row.record)
        numbers, prompt, second, scores, _ = selection = _select(parsed, self._learning, ties=self._ties)[0][which]
        refs, names = list[ImageRef](), list[str]()
        roles = output_names(len(numbers), scores)
        # References to the selected images, with the source as the last
        sides = [*(parsed.sides[n] for n in numbers), *filter(None, [parsed.source])]
        for side, role in zip(sides, [*roles, "source"], strict=False):
            locate = partial("{}, {}".format, row.location, describe_image(side.image, role))
            refs.append(self._reader.ref(side.image, row.folders, locate))
            # Row ids use names instead of keys: re-encoded images keep their random numbers
            names.append(side.name or refs[-1].key)
        # Labels and scores are no part of the row id
        row_id = stable_hash(prompt, *names, *filter(None, [second]))
        outputs, place = tuple(refs[: len(numbers)]), partial(str, row.location)
        ratings = self._ratings(row, parsed, numbers)
        source, label = refs[-1] if parsed.source is not None else None, self._label(row, parsed, selection)
        return ImagePair(row_id, prompt, outputs, place, self._groups[number], second, source, label, scores, ratings)

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the groups of these pairs."""
        return [self._groups[n] for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts of these pairs, then those of their rejected images."""
        seconds = (self._rejected_prompts[n] for n in numbers.tolist())
        return [*(self._prompts[n] for n in numbers.tolist()), *filter(None, seconds)]

    def liked(self, numbers: NDArray[np.int64]) -> list[bool]:
        """Return whether the best score of each of these rows is above 0."""
        return [self._liked[n] for n in numbers.tolist()]

    def annotators(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the annotator of each of these pairs, "" for none."""
        return [self._annotators[n] for n in numbers.tolist()]
