"""Layouts of image pairs: recognized by their columns, with a good, a bad and a hostile row each."""

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.image_layouts import LAYOUTS
from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.formats.layouts import Layout, recognize
from mmalign.data.pairs import Pairs
from tests.helpers import data_files

EVIL = "../secret.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six pictures."""
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(data_files.png(seed))
    return tmp_path


def paths(pairs: Pairs) -> list[tuple[int, int]]:
    """Return the numbers of the chosen and of the rejected picture of every pair."""
    return [(int(Path(p.chosen.path).stem), int(Path(p.rejected.path).stem)) for p in pairs]


def two(first: Any, second: Any, names: str = "image_0 image_1 label_0 label_1", **extra: Any) -> dict[str, Any]:
    """Return a row of pictures 0 and 1 with a value each."""
    return {"prompt": "a", **dict(zip(names.split(), ("0.png", "1.png", first, second), strict=True)), **extra}


def single(prompt: str, seed: int, **values: Any) -> dict[str, Any]:
    return {"prompt": prompt, "image": f"{seed}.png", **values}


HPD3 = {"prompt": "a", "path1": "0.png", "path2": "1.png", "confidence": 0.9, "model1": "x", "model2": "y"}
RANKED = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"]}
SIDES = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}

# Layout, good rows, their pairs, and bad rows with their reasons
CASES: dict[str, tuple[str, list[dict[str, Any]], list[tuple[int, int]], list[tuple[dict[str, Any], str]]]] = {
    "sides": (
        "folder",
        [SIDES],
        [(0, 1)],
        [
            (SIDES | {"prompt": None}, "has no prompt"),
            (SIDES | {"prompt": " "}, "has a blank prompt"),
            (SIDES | {"prompt": ["a", "b"]}, "expected a text"),
            (SIDES | {"chosen": None}, "has no image"),
            (SIDES | {"chosen": 3}, "3 is not an image"),
            (SIDES | {"chosen": [["0.png"]]}, "is not an image"),
            (SIDES | {"chosen": "9.png"}, "does not exist"),
            (SIDES | {"rejected": "0.png"}, "are the same"),
            (SIDES | {"rejected": EVIL}, "is outside"),
            ({"prompt": "a", "chosen": "0.png"}, "has no 'rejected'"),
        ],
    ),
    "sides by other names": (
        "folder",
        [{"text": "a", "img_better": "0.png", "img_worse": "1.png", "id": 3}],
        [(0, 1)],
        [({"text": 3, "img_better": "0.png", "img_worse": "1.png"}, "prompt is 3; expected a text")],
    ),
    "labels": (
        "pick_a_pic",
        [two(1, 0), two(0.0, 1.0), two(4, 2), two(-1, 1), two(True, False), two("7", "3")],
        [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1), (0, 1)],
        [
            (two(None, 1), "label_0 is null; expected a number"),
            (two("left", 1), "expected a number"),
            (two(1, float("nan")), "label_1 is NaN"),
            (two(10**400, 1), "expected a number"),
            (two([1], {"a": 2}), "expected a number"),
            (two(1, 0, has_label=False), "has_label is false"),
            (two(1, 0, image_1=EVIL), "is outside"),
        ],
    ),
    "ratings that count from one": (
        "pick_a_pic",
        [two(2, 5, "image_1 image_2 rating_1 rating_2"), two(2, 1, "image_1 image_2 rating_1 rating_2")],
        [(1, 0), (0, 1)],
        [(two(2, "", "image_1 image_2 rating_1 rating_2"), "label_1")],
    ),
    "labels that count from one": (
        "pick_a_pic",
        [two(0, 1, "image_1 image_2 label_1 label_2")],
        [(1, 0)],
        [(two(0, None, "image_1 image_2 label_1 label_2"), "expected a number")],
    ),
    "votes of a and b": ("pick_a_pic", [two(0, 3, "image_a image_b votes_a votes_b")], [(1, 0)], []),
    "HPDv3": (
        "votes",
        [HPD3 | {"choice_dist": [12, 7]}, HPD3 | {"choice_dist": [3, 9]}, HPD3 | {"choice_dist": None}],
        [(0, 1), (1, 0), (0, 1)],
        [
            (HPD3 | {"choice_dist": [1]}, "votes of both"),
            (HPD3 | {"choice_dist": "many"}, "expected a list"),
            (HPD3 | {"choice_dist": [1, None]}, "expected a number"),
            (HPD3 | {"choice_dist": [1, 0], "path2": EVIL}, "is outside"),
        ],
    ),
    "HPDv2": (
        "rankings",
        [RANKED | {"rank": [2, 1, 2]}, {"prompt": "b", "image_path": ["3.png", "4.png"], "human_preference": [0, 1]}],
        [(1, 0), (1, 2), (4, 3)],
        [
            (RANKED | {"rank": [1, None, 2]}, "rank is null; expected a number"),
            (RANKED | {"rank": [1, 2]}, "one as long"),
            (RANKED | {"rank": [1, float("nan"), 2]}, "expected a number"),
            (RANKED | {"rank": [1, 2, 3], "human_preference": [1, 2, 3]}, "contradict each other"),
            (RANKED | {"rank": list(range(500)), "image_path": ["0.png"] * 500}, "expected at most 256"),
            (RANKED | {"rank": [1, 2, 3], "image_path": "0.png"}, "expected a list"),
            (RANKED | {"rank": [1, 1, 1], "prompt": None}, "has no prompt"),
            ({"prompt": "a", "image_path": ["0.png", EVIL], "rank": [1, 2]}, "is outside"),
        ],
    ),
    "ImageReward": (
        "rankings",
        [{"id": "x", "prompt": "a", "generations": ["0.png", "1.png"], "ranking": [2, 1]}],
        [(1, 0)],
        [],
    ),
    "ImageRewardDB": (
        "scores",
        [
            single("a", 0, prompt_id="p", rank=2, overall_rating=5),
            single("a", 1, prompt_id="p", rank=1, overall_rating=6),
            single("b", 2, prompt_id="q", rank=1, overall_rating=3),
            single("b", 3, prompt_id="q", rank=2, overall_rating=3),
            single("a", 4, prompt_id="r", rank=1, overall_rating=1),
            single("a", 5, prompt_id="r", rank=1, overall_rating=1),
        ],
        [(1, 0), (2, 3)],
        [
            (single("c", 0, prompt_id="s", rank=None), "rank is null; expected a number"),
            (single("d", 0, prompt_id="t", rank=1), "the only image of its prompt"),
        ],
    ),
    "rows of one image each": (
        "scores",
        [single("a", 0, score=0.25), single("b", 2, score=1), single("a", 1, score=0.5), single("b", 3, score=True)],
        [(1, 0)],
        [
            (single("a", 2, score="good"), "expected a number"),
            ({"image": "0.png", "score": 1}, "has no 'prompt'"),
            (single("a", 2, score=1) | {"image": None}, "has no image"),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layout_is_recognized_and_drops_bad_rows(case: str, folder: Path) -> None:
    name, good, expected, bad = CASES[case]
    rows = [*good, *(row for row, _ in bad)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    check_source("auto", str(path))
    pairs = open_pairs("auto", str(path))
    assert paths(pairs) == expected
    assert f", read as {name} (" in pairs.summary()
    reasons = {row.location: row.reason for row in pairs.skipped}
    for number, (_, reason) in enumerate(bad, start=len(good) + 1):
        assert reason in reasons[f"rows.jsonl: line {number}"]
    assert len(reasons) == len(bad)
    for row, reason in bad:  # the only row, and the reason of its file
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=str(path)) as refused:
            open_pairs("auto", str(path), columns={})
        assert reason in str(refused.value) or "expected a known layout" in str(refused.value)


def test_columns_of_a_recognized_layout_are_said(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"Caption": "a", "winner": "0.png", "loser image": "1.png"}))
    pairs = open_pairs("auto", str(path))
    assert pairs.layout == "folder (prompt is 'Caption', chosen is 'winner', rejected is 'loser image')"
    swapped = open_pairs("auto", str(path), columns={"chosen": "loser image", "rejected": "winner"})
    assert paths(pairs) == [(0, 1)] and paths(swapped) == [(1, 0)]
    assert (
        "read as"
        not in open_pairs(
            "folder", str(path), columns={"prompt": "Caption", "chosen": "winner", "rejected": "loser image"}
        ).summary()
    )


def test_what_is_not_recognized_is_told_with_the_nearest_layout(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "0.png", "other": "1.png"}))
    with pytest.raises(
        ValueError,
        match=r"has no 'rejected' \(found prompt, chosen, other\); .* folder \(prompt, chosen, rejected\) is nearest",
    ):
        check_source("auto", str(path))
    assert paths(open_pairs("auto", str(path), columns={"rejected": "other"})) == [(0, 1)]
    with pytest.raises(ValueError, match=r"data.columns: no layout has worse; known columns are caption, jpg_0"):
        check_source("auto", str(path), columns={"worse": "other"})
    with pytest.raises(ValueError, match="there is no 'atuo'; did you mean 'auto'"):
        check_source("atuo", str(path))


def test_equal_fits_are_not_guessed() -> None:
    layouts = [Layout(name, ("a",), (), lambda place, record: None) for name in ("x", "y")]
    with pytest.raises(ValueError, match=r"its columns \(a\) fit x and y; name one"):
        recognize(layouts, ["a"], {"a": 1})


def test_two_columns_are_not_one(folder: Path) -> None:
    path = data_files.pick_a_pic(folder / "pairs.parquet")
    for columns in ({"jpg_0": "jpg_1"}, {"jpg_0": "x", "jpg_1": "x"}, {"label_1": "label_0"}, {"prompt": "jpg_0"}):
        with pytest.raises(ValueError, match=r"data.columns: pick_a_pic would read both"):
            check_source("pick_a_pic", str(path), columns=columns)
        with pytest.raises(ValueError, match=r"data.columns: pick_a_pic would read both"):
            check_source("auto", str(path), columns=columns)
    swapped = open_pairs("auto", str(path), columns={"jpg_0": "jpg_1", "jpg_1": "jpg_0"})
    plain = open_pairs("auto", str(path))
    assert [p.chosen.key for p in swapped] == [p.rejected.key for p in plain]


@pytest.mark.parametrize("value", [b"raw", 3, ["a", "b"], {"en": "a"}, None, "", " "])
def test_captions_that_are_no_text_are_dropped(value: Any, folder: Path) -> None:
    row = {"jpg_0": data_files.png(0), "jpg_1": data_files.png(1), "label_0": 1, "label_1": 0}
    pq.write_table(pa.Table.from_pylist([row | {"caption": value}]), folder / "a.parquet")
    check_source("pick_a_pic", str(folder / "a.parquet"))
    with pytest.raises(
        ValueError, match=r"1 row dropped: a.parquet: row 0: (caption is|has no caption|has a blank caption)"
    ):
        open_pairs("pick_a_pic", str(folder / "a.parquet"))


def test_text_that_is_no_unicode_is_dropped(folder: Path) -> None:
    rows = [
        {"caption": "a", "jpg_0": data_files.png(n), "jpg_1": data_files.png(9), "label_0": 1, "label_1": 0}
        for n in range(2)
    ]
    table = pa.Table.from_pylist(rows)
    raw = pa.array([b"cat \xff", b"dog"]).view(pa.string())
    pq.write_table(table.set_column(0, "caption", raw), folder / "a.parquet")
    pairs = open_pairs("auto", str(folder / "a.parquet"))
    assert [pair.prompt for pair in pairs] == ["dog"]
    assert [str(row) for row in pairs.skipped] == ["a.parquet: row 0: caption is not in UTF-8 (byte 0xff)"]


def test_commonest_reason_comes_first(folder: Path) -> None:
    path = folder / "rows.jsonl"
    rows = [
        SIDES | {"prompt": None},
        *[SIDES | {"chosen": f"{n}-missing.png"} for n in range(5)],
        SIDES | {"prompt": 3},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r'7 rows dropped: 5 for one reason: rows.jsonl: line 2: the image "0-missing.png" does not'
    ):
        open_pairs("folder", str(path))


DOC = Path(__file__).parents[3] / "docs" / "your_data.md"
SECTION = re.compile(r"^## Pairs of images\n(.*?)^### ", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^\*\*`?(\w+)`?\*\*|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, str, str]]:
    """Return (layout, language, text) of every example of image pairs in the documentation."""
    shown, layout = [], ""
    for name, language, text in EXAMPLE.findall(SECTION.findall(DOC.read_text(encoding="utf-8"))[0]):
        layout = name or layout
        if text:
            shown.append((layout, language, text))
    return shown


def make_files(folder: Path, names: Sequence[str]) -> Path:
    """Write the pictures and captions of a list of names, as a tar if they are members of one."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a fox" if path.suffix == ".txt" else data_files.png(seed))
    if "/" in names[0]:
        return folder / names[0].split("/")[0]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name)
    return folder / "a.tar"


@pytest.mark.skipif(not DOC.is_file(), reason="no checkout")
def test_documentation_shows_every_layout() -> None:
    assert {layout for layout, *_ in examples()} >= {layout.name for layout in LAYOUTS} | {"Webdataset"}


@pytest.mark.skipif(not DOC.is_file(), reason="no checkout")
@pytest.mark.parametrize("number", range(9))
def test_examples_of_the_documentation_are_read(number: int, tmp_path: Path) -> None:
    layout, language, text = examples()[number]
    if language == "text":
        path = make_files(tmp_path, text.split())
    else:
        make_files(tmp_path, re.findall(r"images/[\w-]+\.png", text))
        path = tmp_path / ("rows.jsonl" if language == "json" else "rows.csv")
        path.write_text(text)
    pairs = open_pairs("auto", str(path))
    assert len(pairs) == (3 if layout == "rankings" else 1) and not pairs.skipped
    assert f"read as {layout if layout in {known.name for known in LAYOUTS} else 'folder'} (" in pairs.summary()
