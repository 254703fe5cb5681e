"""Pairs that are edits of a source image: the column, the views, and the texts that have seen the source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.data.caches.latents import ImageViews
from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.encoder import Encoder
from mmalign.data.loaders.image_pairs import ImagePairReader
from mmalign.data.pairs import SkippedRow
from mmalign.data.shapes import Shapes
from mmalign.families.base import TextToImage
from mmalign.families.editing import SOURCE
from tests.helpers import data_files

SIDES = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
SQUARE = Shapes((ImageSize(16, 16),), {})
ROWS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str]]]] = {
    "folder": ([{**SIDES, "input_image": "2.png"}], [("0", "1", "2")]),
    "folder with image": ([{**SIDES, "image": "2.png"}], [("0", "1", "2")]),
    "pick_a_pic": (
        [{"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 0, "label_1": 1, "source": "2.png"}],
        [("1", "0", "2")],
    ),
    "rankings": (
        [{"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2], "source_image": "2.png"}],
        [("0", "1", "2")],
    ),
    "votes": (
        [{"prompt": "a", "path1": "0.png", "path2": "1.png", "choice_dist": [3, 1], "original": "2.png"}],
        [("0", "1", "2")],
    ),
    "scores": (
        [
            {"prompt": "a", "image": f"{n}.png", "score": n, "source": f"{source}.png"}
            for n, source in ((0, 2), (1, 2), (3, 4), (5, 4))
        ],
        [("1", "0", "2"), ("5", "3", "4")],  # not across the sources of one prompt
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(data_files.png(seed))
    return tmp_path


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    return str(data_files.write_jsonl(folder / "rows.jsonl", *rows))


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("use", ["required", "optional"])
def test_every_layout_has_a_source(layout: str, use: Any, folder: Path) -> None:
    rows, expected = ROWS[layout]
    pairs = open_pairs("auto", written(folder, rows), sources=use)
    assert pairs.layout.startswith(layout.split()[0]) and not pairs.skipped
    names = [tuple(Path(image.path).stem for image in pair.images) for pair in pairs]
    assert names == expected
    plain = open_pairs(layout.split()[0], written(folder, [{**row, "source": "9.png"} for row in rows]))
    assert all(pair.source is None for pair in plain)  # such a column is not read for other models


def test_a_bad_source_costs_its_row_alone(folder: Path) -> None:
    bad: dict[Any, str] = {None: "no source image", "": "no source image", "9.png": "does not exist", 3: "not an image"}
    bad |= {"../secret.png": "is outside", "https://a.b/c.png": "is a URL", "data:image/png;base64,!": "not base64"}
    rows = [{**SIDES, "source": source} for source in ("2.png", *bad)] + [SIDES]
    pairs = open_pairs("auto", written(folder, rows), sources="optional")
    expected = [*bad.values(), "no 'source'"]
    assert len(pairs) == 1 and len(pairs.skipped) == len(expected)
    assert all(word in row.reason for word, row in zip(expected, pairs.skipped, strict=True)), pairs.skipped


def test_a_missing_column_is_named_before_training(folder: Path) -> None:
    path = written(folder, [SIDES])
    assert open_pairs("auto", path, sources="optional")[0].source is None
    for format in ("auto", "folder"):
        with pytest.raises(ValueError, match=r"has no 'source' \(found .*data.columns"):
            check_source(format, path, sources="required")
    named = written(folder, [{**SIDES, "start": "2.png"}])
    (pair,) = open_pairs("auto", named, sources="required", columns={"source": "start"})
    assert pair.source is not None and Path(pair.source.path).name == "2.png"


def test_the_source_is_part_of_a_pair_s_content_and_id(folder: Path) -> None:
    rows = [{**SIDES, "source": f"{n}.png"} for n in (2, 3)] + [SIDES]
    two = open_pairs("folder", written(folder, rows[:2]), sources="required")
    (none,) = open_pairs("folder", written(folder, rows[2:]), sources="optional")
    assert len({pair.row for pair in (*two, none)}) == len({pair.content for pair in (*two, none)}) == 3


def test_a_source_is_cut_and_mirrored_as_its_pair(folder: Path) -> None:
    (folder / "0.png").write_bytes(data_files.png(0, 40))
    rows = [{**SIDES, "prompt": f"thing {n}", "source": "0.png"} for n in range(12)]
    pairs = open_pairs("folder", written(folder, rows), sources="required")
    reader, flips = ImagePairReader(SQUARE, ImageTransform("random", flip=True), seed=0), set()
    examples: list[Any] = [reader.read(pair, 1) for pair in pairs]
    for example in examples:
        chosen, _, source = example["pixels"]
        assert torch.equal(chosen, source)
        flips.add(bool(example["mirrored"]))
    assert flips == {True, False}
    batch = reader.collate(list(pairs), examples, torch.ones(12))
    assert batch.sources is not None and batch.sources.pixels is not None and batch.pixels is not None
    assert torch.equal(batch.sources.pixels, batch.pixels[:12]) and len(batch.pixels) == 24
    assert sum(key.endswith("-mirrored") for key in batch.sources.keys) == sum(
        bool(example["mirrored"]) for example in examples
    )


def test_every_view_of_a_source_has_its_texts(folder: Path) -> None:
    """Both prompts and the empty one with each view; a source that cannot be read leaves its pair to the loader."""
    (folder / "5.png").write_bytes(b"broken")
    rows = [{**SIDES, "rejected_prompt": "b", "source": f"{n}.png"} for n in (2, 5)]
    pairs = open_pairs("folder", written(folder, rows), sources="required")
    edits = dict(ImageViews(pairs, SQUARE, ImageTransform(flip=True)).edits())
    assert len(edits) == 2 * 2 * 3 and {edit.prompt for edit in edits.values()} == {"a", "b", ""}
    good, broken = ([edit for edit in edits.values() if edit.source == pair.source] for pair in pairs)
    assert torch.equal(good[0].pixels().flip(3), next(e for e in good if e.mirror).pixels())
    assert (broken[0].pixels() == 1).all()
    (skipped,) = ImagePairReader(SQUARE, ImageTransform(), 0).read(pairs[1], 0)
    assert isinstance(skipped, SkippedRow) and "source" in skipped.location


def test_a_source_is_encoded_once_for_all_texts(folder: Path, sd: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both prompts and the dropped caption have the same latents."""
    encoded, encode = list[Tensor](), sd.encode_images
    monkeypatch.setattr(type(sd), "encode_images", lambda _, images: encoded.append(images) or encode(images))
    row = {**SIDES, "rejected_prompt": "b", "source": "2.png"}
    pairs = open_pairs("folder", written(folder, [row]), sources="required")
    reader = ImagePairReader(SQUARE, ImageTransform(), seed=0)
    example: Any = reader.read(pairs[0], 0)
    read = reader.collate(list(pairs), [example], torch.ones(1))
    batch = Encoder(sd, sd.unconditional(), text=None, prompt_pairs=True).encode(read)
    assert [len(images) for images in encoded] == [1] * 3 and torch.equal(encoded[2][0], example["pixels"][-1])
    assert batch.rejected_text is not None
    for text in (batch.text, batch.unconditional, batch.rejected_text):
        assert torch.equal(text.tensors[SOURCE], encode(encoded[2]).mean)


def test_the_docs_show_a_row_with_a_source(folder: Path) -> None:
    text = Path("docs/your_data.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith('{"prompt": "make the fox blue"'))
    sides = {name: f"{n}.png" for n, name in enumerate(json.loads(line).keys() - {"prompt"})}
    (pair,) = open_pairs("auto", written(folder, [json.loads(line) | sides]), sources="required")
    assert pair.source is not None and [Path(image.path).name for image in pair.images] == [
        sides[side] for side in ("chosen", "rejected", "source")
    ]
