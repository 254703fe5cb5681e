"""Names that occur twice in a source, and names of columns that are no plain line."""

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.formats.files import read_rows
from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.responses import open_responses
from tests.helpers import data_files
from tests.helpers.sources import add


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    """Write good and bad pictures a and b, with captions; the good a is there as .jpg and as .png."""
    for side, first in (("good", 0), ("bad", 3)):
        (tmp_path / side).mkdir()
        for seed, name in enumerate(["a.png", "b.png"], start=first):
            (tmp_path / side / name).write_bytes(data_files.png(seed))
            (tmp_path / side / name).with_suffix(".txt").write_text(f"caption {name}")
    (tmp_path / "good" / "a.jpg").write_bytes(data_files.png(2))
    return tmp_path


def test_two_pictures_of_one_name_are_no_pair(sides: Path) -> None:
    pairs = open_pairs("auto", str(sides))
    assert [pair.prompt for pair in pairs] == ["caption b.png"]
    (row,) = pairs.skipped
    assert row.location == f"{sides.name}: a" and row.reason == "has good/a.jpg and good/a.png; keep one"


def test_two_pictures_of_one_name_are_two_thumbs(sides: Path) -> None:
    thumbs = open_pairs("auto", str(sides), learning="thumbs")
    assert len(thumbs) == 5 and not thumbs.skipped
    assert sum(thumbs.liked()) == 3


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"7.jpg": data_files.png(2)}, "has two members for image; remove one"),
        ({"7.caption": b"another"}, "has two members for prompt; remove one"),
        ({"7.json": b'{"prompt": "another"}'}, "has two members for prompt; remove one"),
        ({"7.json": b'{"prompt": "fox"}'}, ""),
    ],
)
def test_members_of_an_archive_that_contradict_each_other(
    members: dict[str, bytes], reason: str, tmp_path: Path
) -> None:
    rows = {"6": 0, "7": 1}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, seed in rows.items():
            add(archive, f"{key}.png", data_files.png(seed))
            add(archive, f"{key}.txt", b"fox")
            add(archive, f"{key}.label", b"1")
        for name, data in members.items():
            add(archive, name, data)
    thumbs = open_pairs("auto", str(tmp_path / "a.tar"), learning="thumbs", images=tmp_path)
    assert [row.reason for row in thumbs.skipped] == ([reason] if reason else [])
    assert len(thumbs) == 2 - len(thumbs.skipped)


def test_a_column_s_name_may_have_two_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,"a\nlabel"\nq,x\n"q\n2"\nq3,y\n')
    rows = dict(read_rows(tmp_path / "a.csv"))
    assert rows.pop("a.csv: line 5").reason == "has 1 fields; expected 2 (question, a\nlabel)"
    assert rows == {
        "a.csv: line 3": {"question": "q", "a\nlabel": "x"},
        "a.csv: line 6": {"question": "q3", "a\nlabel": "y"},
    }


@pytest.mark.parametrize(("name", "pack"), [("a.csv", bytes), ("a.csv.gz", gzip.compress)])
def test_a_first_line_that_cannot_be_read(
    name: str, pack: Callable[[Any], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.data.formats.files.MAX_LINE", 40)
    (tmp_path / name).write_bytes(pack(b"prompt,chosen,rejected" + b" " * 40 + b"\nq,good,bad\n"))
    with pytest.raises(ValueError, match="has more than 40 characters in a line"):
        open_responses("auto", str(tmp_path / name))
    (tmp_path / name).write_bytes(pack(b'"prompt\n' + b"x" * 30 + b"\n" + b"x" * 30 + b'",b\nq,good\n'))
    with pytest.raises(ValueError, match=r"does not begin with the names of its columns \(field larger"):
        open_responses("auto", str(tmp_path / name))
