"""Folders of better and worse images, such as good/ and bad/: files of one name are a pair, or each file is a thumb.

A caption is in STEM.txt beside an image, in the folder above, or in captions/ or prompts/ there; or in a file
metadata.jsonl or metadata.csv with the columns `file_name` and `prompt`, `caption` or `text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmalign.data.formats.files import TEXTS, kind_of, read_rows
from mmalign.data.formats.image_files import SUFFIXES
from mmalign.data.formats.rows import SourceRow
from mmalign.data.pairs import SkippedRow
from mmalign.reading import read_text

SIDES = (  # names of the folders of the chosen and of the rejected images
    ("chosen", "rejected"),
    ("good", "bad"),
    ("winner", "loser"),
    ("winners", "losers"),
    ("win", "lose"),
    ("win", "loss"),
    ("wins", "losses"),
    ("won", "lost"),
    ("preferred", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred", "unpreferred"),
    ("preferred", "other"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("best", "worst"),
    ("positive", "negative"),
    ("pos", "neg"),
    ("like", "dislike"),
    ("liked", "disliked"),
    ("yes", "no"),
)
CAPTIONS = ("prompt", "caption", "text")
MAX_CAPTION = 2**16  # bytes


def find_sides(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of better and worse images in a folder, or None."""
    if not folder.is_dir():
        return None
    inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next(((inside[good], inside[bad]) for good, bad in SIDES if good in inside and bad in inside), None)


def names_images(file: Path) -> bool:
    """Return whether a text file names one image in every row, by the column `file_name`."""
    first = next((record for _, record in read_rows(file) if not isinstance(record, SkippedRow)), {})
    return "file_name" in first


def side_rows(folder: Path) -> Iterator[SourceRow | SkippedRow]:
    """Yield a row of prompt, chosen and rejected for each two images of one name, and the reason for others."""
    sides = find_sides(folder)
    assert sides is not None, "the folder was recognized by them"
    images = [_images(side) for side in sides]
    captions = _captions(folder, sides)
    # Images of one name, in the better and the worse folder
    for name in sorted({*images[0], *images[1]}):
        location = f"{folder.name}: {name}"
        missing = [side.name for side, by_name in zip(sides, images, strict=True) if name not in by_name]
        if missing:
            reason = f"has no image in {missing[0]}/; both need the same name (for method diffusion_kto they do not)"
            yield SkippedRow(location, reason, "missing image")
            continue
        several = next((files for files in (by_name[name] for by_name in images) if len(files) > 1), None)
        if several is not None:
            names = " and ".join(file.relative_to(folder).as_posix() for file in several)
            yield SkippedRow(location, f"has {names}; keep one")
            continue
        files = [by_name[name][0] for by_name in images]
        try:
            texts = [_caption(file, folder, name, captions) for file in files]
        except ValueError as error:
            yield SkippedRow(location, str(error))
            continue
        if not any(texts):
            yield SkippedRow(location, f"has no caption; write one to {sides[0].name}/{name}.txt")
            continue
        # A caption serves both images; another one of the worse image is the rejected prompt
        prompt = texts[0] or texts[1]
        chosen, rejected = (file.relative_to(folder).as_posix() for file in files)
        record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        second = texts[1] if texts[1] != prompt else None
        yield SourceRow(location, record | {"rejected_prompt": second}, (folder,))


def thumb_rows(folder: Path) -> Iterator[SourceRow | SkippedRow]:
    """Yield a row of prompt, image and label for each image of two folders, and the reason for images without one."""
    sides = find_sides(folder)
    assert sides is not None, "the folder was recognized by them"
    captions = _captions(folder, sides)
    for side, label in zip(sides, (True, False), strict=True):
        # Better images are liked, worse ones are not; names need no partner
        for name, file in ((name, file) for name, files in _images(side).items() for file in files):
            location = f"{folder.name}: {side.name}/{name}{file.suffix}"
            try:
                prompt = _caption(file, folder, name, captions)
            except ValueError as error:
                yield SkippedRow(location, str(error))
                continue
            if not prompt:
                yield SkippedRow(location, f"has no caption; write one to {side.name}/{name}.txt")
                continue
            image = file.relative_to(folder).as_posix()
            yield SourceRow(location, {"prompt": prompt, "image": image, "label": label}, (folder,))


def _images(side: Path) -> dict[str, list[Path]]:
    """Return the images of a folder by their path without suffix, which several may share."""
    images = dict[str, list[Path]]()
    for file in sorted(side.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            images.setdefault(file.relative_to(side).with_suffix("").as_posix(), []).append(file)
    return images


def _caption(image: Path, folder: Path, name: str, captions: Mapping[str, str]) -> str:
    """Return the caption of an image, or an empty text.

    Raises:
        ValueError: its file cannot be read, is too large, or is not UTF-8.
    """
    beside = [image.with_suffix(".txt"), image.with_suffix(".caption")]
    shared = [folder / part / f"{name}.txt" for part in ("", "captions", "prompts")]
    file = next((file for file in (*beside, *shared) if file.exists()), None)
    if file is not None:
        return read_text(file, "expected a caption in UTF-8", f"the caption {file.name}", MAX_CAPTION).strip()
    # The image's own name first: two of one stem may have two captions
    places = (image.relative_to(folder).as_posix(), image.as_posix(), f"{name}{image.suffix}")
    keys = (key for place in places for key in (place, place.removesuffix(image.suffix)))
    return next((captions[key] for key in keys if captions.get(key)), "")


def _captions(folder: Path, sides: tuple[Path, Path]) -> dict[str, str]:
    """Return the captions of files metadata.*, by the image's path with and without suffix."""
    captions = dict[str, str]()
    # A file in the folder names images of either side, a file in a side its own ones
    for place in (folder, *sides):
        for file in sorted(place.glob("metadata.*")):
            if kind_of(file) not in TEXTS:
                continue
            for _, record in read_rows(file):
                if isinstance(record, SkippedRow) or not isinstance(record.get("file_name"), str):
                    continue
                text = next((record[name] for name in CAPTIONS if isinstance(record.get(name), str)), "")
                image = (Path() if place == folder else Path(place.name)) / str(record["file_name"])
                if image.name:
                    captions |= {key.as_posix(): str(text).strip() for key in (image, image.with_suffix(""))}
    return captions
