"""Layouts of judged images: pick_a_pic, folder, rankings, votes, scores and thumbs.

pick_a_pic  Two images with two labels, as in Pick-a-Pic v2: `caption, jpg_0, jpg_1, label_0, label_1`, optionally
            `image_0_uid, image_1_uid, are_different, has_label`. The image with the larger label is chosen: 1 and 0,
            votes, ratings, true and false. Equal labels are a tie; labels between 0 and 1 that add up to 1 are
            probabilities. An optional `rejected_caption` is the rejected image's prompt; `caption` is then the chosen
            one's.
folder      `prompt, chosen, rejected`, and optionally `rejected_prompt`.
rankings    HPDv2 and ImageReward: `prompt, image_path` (a list) and `rank` (smaller is better) or `human_preference`
            (larger is better). Every two images of different rank are a pair.
votes       HPDv3: `prompt, path1, path2` and `choice_dist` (the votes of both). Without votes the first is chosen.
scores      ImageRewardDB and RichHF: rows of one image: `prompt, image` and `score` (larger is better) or `rank`
            (smaller is better), optionally `prompt_id`. Every two images of a prompt with different scores are a pair.
thumbs      `prompt, image, label`, liked or not: the rows of methods that learn from single outputs.

Each may have a `source`, the image that a pair's images are edits of, for models that edit (`with_source`).

Rows come from any file of `mmalign.data.formats.sources`. Images are paths, data URIs, bytes, or structs of bytes or a
path. `columns` maps a name above to the name in the files. The format "auto" recognizes the layout by its columns. All
layouts of pairs also take the columns of `mmalign.data.formats.labels`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import NamedTuple

from mmalign.data.formats.files import Record, as_text, read_list, read_number, read_thumb, shorten
from mmalign.data.formats.image_columns import (
    CHOSEN,
    IMAGES,
    LABELS,
    PROMPTS,
    REJECTED,
    SOURCES,
    THUMB,
    WORTHS,
    of_side,
    of_two,
)
from mmalign.data.formats.image_files import Image, StoredImage, as_image, image_name
from mmalign.data.formats.labels import NUMBERED_SCORES
from mmalign.data.formats.layouts import THUMBS as THUMBS_NAME
from mmalign.data.formats.layouts import Layout
from mmalign.data.formats.rows import Rows, SourceRow
from mmalign.data.pairs import SkippedRow, UnusableRowError
from mmalign.reading import broken_text

SOURCE = "source"  # column of the image that a pair's images are edits of
MAX_IMAGES = 256  # of a prompt; every two of them are a pair
SURE = 1e-6  # bound of the difference from 1 in a sum of probabilities


class Side(NamedTuple):
    """Image of a pair, and its name for the pair's id; without one, its content is the name."""

    image: Image
    name: str


class Parsed(NamedTuple):
    """Images of a row, judged.

    Attributes:
        prompt: the prompt of all images, or of the first one.
        sides: the images.
        worth: a number for each, larger is better.
        rejected_prompt: the second image's prompt, or "".
        group: the name of the prompt in rows of one image.
        source: the image that they are edits of, or None.
        preference: the probability that the better of two images is the better one.
        scores: the images' scores as in the row, for margins; empty without scores.
    """

    prompt: str
    sides: list[Side]
    worth: list[float]
    rejected_prompt: str = ""
    group: str = ""
    source: Side | None = None
    preference: float = 1.0
    scores: tuple[object, ...] = ()

    @property
    def order(self) -> list[int]:
        """Numbers of the images, the best first; of equal ones the first."""
        return sorted(range(len(self.sides)), key=lambda n: -self.worth[n])


def _side(value: object, uid: object = None) -> Side:
    image = as_image(value)
    return Side(image, f"uid:{as_text(uid)}" if uid not in (None, "") else image_name(image))


def required_text(record: Record, name: str) -> str:
    """Return a text that is not blank."""
    value = record.get(name)
    if value is None or value == "":
        raise UnusableRowError(f"has no {name}")
    if not isinstance(value, str):
        came = "bytes" if isinstance(value, StoredImage) else shorten(value)
        raise UnusableRowError(f"{name} is {came}; expected a text")
    if not value.strip():
        raise UnusableRowError(f"has a blank {name}")
    if not value.isascii() and (reason := broken_text(value)) is not None:
        raise UnusableRowError(f"{name} {reason}")
    return value


def _second(record: Record, name: str) -> str:
    """Return the optional prompt of the rejected image."""
    return required_text(record, name) if record.get(name) not in (None, "") else ""


def _read_labels(location: str, record: Record) -> Parsed:
    # Pick-a-Pic marks rows without a verdict, and those of one image twice
    for flag, reason in (("has_label", "has_label is false"), ("are_different", "both images are the same")):
        value = record.get(flag)
        if value is not None and value is not True and not read_number(flag, value):
            raise UnusableRowError(reason, "same sides" if flag == "are_different" else "unusable")
    prompt, second = required_text(record, "caption"), _second(record, "rejected_caption")
    labels = [read_number(name, record[name]) for name in ("label_0", "label_1")]
    sides = [_side(record[f"jpg_{n}"], record.get(f"image_{n}_uid")) for n in (0, 1)]
    # Labels that add up to 1 are probabilities, unless one of them is 0
    preference = max(labels) if abs(sum(labels) - 1) < SURE and min(labels) > 0 else 1.0
    scores = [record[name] for name in NUMBERED_SCORES if record.get(name) not in (None, "")]
    pair = _two(prompt, sides, labels, second)
    return pair._replace(preference=preference, scores=tuple(scores) if len(scores) == 2 else ())


def _two(prompt: str, sides: list[Side], worth: list[float], rejected_prompt: str = "") -> Parsed:
    if sides[0].image == sides[1].image:
        raise UnusableRowError("the chosen and the rejected image are the same", "same sides")
    return Parsed(prompt, sides, worth, rejected_prompt)


def _read_sides(location: str, record: Record) -> Parsed:
    prompt, second = required_text(record, "prompt"), _second(record, "rejected_prompt")
    return _two(prompt, [_side(record[side]) for side in ("chosen", "rejected")], [1.0, 0.0], second)


def _read_votes(location: str, record: Record) -> Parsed:
    votes = record["choice_dist"]
    counts = read_list("choice_dist", votes) if votes is not None else [1.0, 0.0]
    worth = [read_number("choice_dist", vote) for vote in counts]
    if len(worth) != 2:
        raise UnusableRowError(f"choice_dist is {shorten(votes)}; expected the votes of both images")
    return _two(required_text(record, "prompt"), [_side(record[name]) for name in ("path1", "path2")], worth)


def _read_ranking(location: str, record: Record) -> Parsed:
    images = read_list("image_path", record["image_path"])
    # Ranks count downwards, preferences upwards; a row may have both
    worths = []
    for name, sign in (("rank", -1), ("human_preference", 1)):
        if record.get(name) is not None:
            worths.append([sign * read_number(name, value) for value in read_list(name, record[name])])
    if not worths or any(len(worth) != len(images) for worth in worths):
        came = ", ".join(
            f"{name} is {shorten(record.get(name))}" for name in ("image_path", "rank", "human_preference")
        )
        raise UnusableRowError(f"{came}; expected a list of images, and one as long of ranks or preferences")
    prompt, sides = required_text(record, "prompt"), [_side(image) for image in images]
    if len(sides) < 2:
        raise UnusableRowError("has the only image of its prompt; expected several to compare")
    if len(sides) > MAX_IMAGES:
        raise UnusableRowError(f"has {len(sides):,} images of a prompt; expected at most {MAX_IMAGES}")
    # Two orders, if there are both, must agree on every two images
    first, last = worths[0], worths[-1]
    if any((first[i] - first[j]) * (last[i] - last[j]) < 0 for i, j in combinations(range(len(sides)), 2)):
        raise UnusableRowError("rank and human_preference contradict each other; remove one of them")
    # The finer order; of equally fine ones the preferences, whose distances count
    worth = max((last, first), key=lambda values: len(set(values)))
    return Parsed(prompt, sides, worth, scores=tuple(last))


def _read_thumb(location: str, record: Record) -> Parsed:
    return Parsed(required_text(record, "prompt"), [_side(record["image"])], [read_thumb(record.get("label"))])


def _read_score(location: str, record: Record) -> Parsed:
    prompt, score = required_text(record, "prompt"), record.get("score")
    worth = read_number("score", score) if score is not None else -read_number("rank", record.get("rank"))
    group = record.get("prompt_id")
    return Parsed(prompt, [_side(record["image"])], [worth], group=as_text(group) if group is not None else prompt)


def group_scores(rows: Rows, layout: Layout[Parsed], group_by: str | None) -> Iterator[SourceRow | SkippedRow]:
    """Yield a row of `rankings` for the images of each prompt, and the reason for each row that cannot be used."""
    # Rows of one prompt, which need not be neighbours; a source image or folder of its own is another group
    groups = dict[Hashable, list[tuple[SourceRow, Parsed]]]()
    for row in rows:
        if isinstance(row, SkippedRow):
            yield row
            continue
        try:
            scored = layout.read(row.location, row.record)
            if group_by is not None:
                layout.group(row.record, group_by)  # raises if the row has none
            groups.setdefault((row.folders, scored.group, scored.prompt, scored.source), []).append((row, scored))
        except UnusableRowError as error:
            yield SkippedRow(row.location, str(error), error.defect)
    # One row of the layout `rankings` for each group, with all scores as preferences
    for group in groups.values():
        first, scored = group[0]
        if len(group) == 1:
            yield SkippedRow(first.location, "has the only image of its prompt; expected several to compare")
            continue
        images = [_placed(row, scored.sides[0].image) for row, scored in group]
        worths = [scored.worth[0] for _, scored in group]
        record: Record = {"prompt": scored.prompt, "image_path": images, "human_preference": worths}
        if scored.source is not None:
            record = {**record, SOURCE: scored.source.image}
        if group_by is not None:
            record = {**record, group_by: first.record[group_by]}
        yield SourceRow(f"{first.location} and {len(group) - 1} more of its prompt", record, first.folders)


def _placed(row: SourceRow, image: Image) -> Image:
    """Return an image whose name in messages has its own row."""
    return replace(image, column=f"{image.column} of {row.location}") if isinstance(image, StoredImage) else image


# -------------------------------------------------------------------------------------------------------------- layouts


def _is_image(value: object) -> bool:
    return value is True or isinstance(value, str | StoredImage | Mapping)


def _is_list(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.startswith("["))


def _has_two(record: Record) -> bool:
    labels = all(isinstance(record.get(name), str | int | float) for name in ("label_0", "label_1"))
    return labels and all(_is_image(record.get(name)) for name in ("jpg_0", "jpg_1"))


def _has_sides(record: Record) -> bool:
    return all(_is_image(record.get(name)) for name in ("chosen", "rejected"))


def _has_rank(record: Record) -> bool:
    worths = [record[name] for name in ("rank", "human_preference") if record.get(name) is not None]
    return _is_list(record.get("image_path")) and bool(worths) and all(map(_is_list, worths))


def _has_votes(record: Record) -> bool:
    return _is_list(record.get("choice_dist")) and all(_is_image(record.get(name)) for name in ("path1", "path2"))


def _has_score(record: Record) -> bool:
    worths = [record[name] for name in ("score", "rank") if record.get(name) is not None]
    return _is_image(record.get("image")) and bool(worths) and not any(map(_is_list, worths))


def _has_thumb(record: Record) -> bool:
    return _is_image(record.get("image")) and isinstance(record.get("label"), str | int | float)


PICK_A_PIC = Layout(
    "pick_a_pic",
    ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
    ("image_0_uid", "image_1_uid", "are_different", "has_label", "rejected_caption", *NUMBERED_SCORES),
    _read_labels,
    aliases={"prompt": "caption", "rejected_prompt": "rejected_caption"},
    synonyms={
        "caption": PROMPTS,
        "jpg_0": of_two(True, IMAGES),
        "jpg_1": of_two(False, IMAGES),
        "label_0": of_two(True, LABELS),
        "label_1": of_two(False, LABELS),
        "rejected_caption": ("rejected_prompt",),
    },
    fits=_has_two,
)
FOLDER = Layout(
    "folder",
    ("prompt", "chosen", "rejected"),
    ("rejected_prompt",),
    _read_sides,
    synonyms={
        "prompt": PROMPTS,
        "chosen": of_side(CHOSEN),
        "rejected": of_side(REJECTED),
        "rejected_prompt": ("rejected_caption",),
    },
    fits=_has_sides,
)
RANKINGS = Layout(
    "rankings",
    ("prompt", "image_path", "rank|human_preference"),
    (),
    _read_ranking,
    synonyms={
        "prompt": PROMPTS,
        "image_path": ("image_paths", "images", "paths", "file_path", "file_paths", "generations", "files", "image"),
        "rank": ("ranks", "ranking", "rankings"),
        "human_preference": ("preferences", "scores", "ratings", "votes", "rewards", "score", "rating", "labels"),
    },
    fits=_has_rank,
)
VOTES = Layout(
    "votes",
    ("prompt", "path1", "path2", "choice_dist"),
    (),
    _read_votes,
    synonyms={
        "prompt": PROMPTS,
        "path1": of_two(True, IMAGES),
        "path2": of_two(False, IMAGES),
        "choice_dist": ("votes", "vote_counts", "labels", "scores", "ratings", "preferences"),
    },
    fits=_has_votes,
)
SCORES = Layout(
    "scores",
    ("prompt", "image", "score|rank"),
    ("prompt_id",),
    _read_score,
    has_labels=False,
    synonyms={
        "prompt": PROMPTS,
        "image": ("image_path", "file_name", "path", "img", "jpg", "file", "img_path", "image_file", "picture"),
        "score": WORTHS,
        "rank": ("ranking",),
    },
    fits=_has_score,
)
THUMBS = Layout(
    THUMBS_NAME,
    ("prompt", "image", "label"),
    (),
    _read_thumb,
    synonyms={"prompt": PROMPTS, "image": SCORES.synonyms["image"], "label": THUMB},
    has_labels=False,
    fits=_has_thumb,
)
LAYOUTS: tuple[Layout[Parsed], ...] = (PICK_A_PIC, FOLDER, RANKINGS, VOTES, SCORES)


def with_source(layout: Layout[Parsed], *, required: bool = False) -> Layout[Parsed]:
    """Return a layout whose rows may have a source image, or have to."""
    return replace(
        layout,
        required=(*layout.required, SOURCE) if required else layout.required,
        optional=layout.optional if required else (*layout.optional, SOURCE),
        parse=partial(_read_source, layout),
        synonyms={**layout.synonyms, SOURCE: SOURCES},
        fits=partial(_fits_source, layout),
    )


def _read_source(layout: Layout[Parsed], location: str, record: Record) -> Parsed:
    parsed = layout.parse(location, record)
    return parsed._replace(source=_source(record[SOURCE])) if SOURCE in record else parsed


def _source(value: object) -> Side:
    if value in (None, ""):
        raise UnusableRowError("has no source image", "missing image")
    return _side(value)


def _fits_source(layout: Layout[Parsed], record: Record) -> bool:
    return layout.fits(record) and (record.get(SOURCE) is None or _is_image(record[SOURCE]))
