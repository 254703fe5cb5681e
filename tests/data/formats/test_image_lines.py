"""Image pairs from JSON lines and rankings."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.images import decode
from tests.helpers.image_files import level, lines, pictures, png, write


def test_a_folder_of_json_lines(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "images", 3)
    good = {"prompt": "ein Bär", "chosen": "images/2.png", "rejected": "images/0.png", "row": 5}
    lines(tmp_path / "set" / "pairs.jsonl", [good, "", good | {"chosen": "images/9.png"}])
    pairs = open_pairs("folder", str(tmp_path / "set"))
    assert len(pairs) == 1 and level(pairs, 0) == (2, 0) and pairs[0].prompt == "ein Bär"
    assert [str(d) for d in pairs.skipped] == ['pairs.jsonl: line 3: the image "images/9.png" does not exist']
    assert pairs[0].chosen.location == "pairs.jsonl: line 1, chosen (images/2.png)"
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    (tmp_path / "copy" / "images" / "2.png").write_bytes(png(7))
    copy = open_pairs("folder", str(tmp_path / "copy" / "pairs.jsonl"))
    assert copy[0].row == pairs[0].row  # the same draws
    before = copy[0].chosen.key
    assert before != pairs[0].chosen.key
    (tmp_path / "copy" / "images" / "2.png").write_bytes(png(7) + b" ")
    again = open_pairs("folder", str(tmp_path / "copy" / "pairs.jsonl"))
    assert again[0].chosen.key != before  # other content, other latents
    (tmp_path / "copy" / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"line 1, chosen .*: cannot be read"):
        decode(copy[0].chosen)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    pictures(tmp_path, 2)
    for bad, message in (
        ('{"prompt": "a", "cho', "line 2: is not JSON"),
        ([1, 2], r"line 2: is \[1, 2\]; expected a record"),
        ({"prompt": "a", "chosen": "0.png"}, r"line 2: has no 'rejected' \(found prompt, chosen\)"),
        (good | {"prompt": None}, "line 2: has no prompt"),
        (good | {"chosen": 3}, "line 2: 3 is not an image; expected a path"),
    ):
        path = lines(tmp_path / "pairs.jsonl", [good, bad])
        check_source("folder", str(path))
        (skipped,) = open_pairs("folder", str(path)).skipped
        assert re.search(message, str(skipped))
    with pytest.raises(ValueError, match=r"pairs.jsonl has no rows"):
        open_pairs("folder", str(lines(tmp_path / "pairs.jsonl", [""])))
    with pytest.raises(ValueError, match=r"pairs.jsonl has no 'chosen' and no 'rejected' \(found prompt, win, lose\)"):
        check_source("folder", str(lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "win": "0.png", "lose": "1.png"}])))
    renamed = open_pairs("folder", str(tmp_path), columns={"chosen": "win", "rejected": "lose"})
    assert level(renamed, 0) == (0, 1)


def test_rankings_make_every_ordered_pair(tmp_path: Path) -> None:
    """Ranks 2, 1, 3, 1: image 1 and 3 tie; 1 > 0, 1 > 2, 3 > 0, 3 > 2, 0 > 2."""
    pictures(tmp_path / "test", 4)  # HPDv2 keeps the images of test.json in test/
    record = {"prompt": "a", "image_path": [f"{i}.png" for i in range(4)], "rank": [2, 1, 3, 1]}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    pairs = open_pairs("rankings", str(tmp_path / "test.json"))
    assert {level(pairs, i) for i in range(len(pairs))} == {(1, 0), (1, 2), (3, 0), (3, 2), (0, 2)}
    assert len(pairs) == 5 and pairs.ties == 1 and set(pairs.groups()) == {"a"} and len({p.row for p in pairs}) == 5


def test_rankings_as_preferences(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    two = {"prompt": "a", "image_path": ["0.png", "1.png"]}
    path = lines(tmp_path / "train.jsonl", [two | {"human_preference": [0, 1]}, two | {"human_preference": [1, 1]}])
    pairs = open_pairs("rankings", str(path))
    assert level(pairs, 0) == (1, 0) and len(pairs) == pairs.ties == 1
    for bad, message in ((two, "has no 'rank'"), (two | {"rank": [1]}, "one as long"), (two | {"rank": 1}, "a list")):
        with pytest.raises(ValueError, match=message):
            open_pairs("rankings", str(lines(tmp_path / "train.jsonl", [bad])))
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train.json has no 'prompt'"):
        check_source("rankings", str(tmp_path / "train.json"))


def test_a_table_s_second_prompts_are_of_the_rejected_images(tmp_path: Path) -> None:
    seconds = ["ein Wal", None, ""]
    path = write(tmp_path / "a.parquet", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)], rejected_caption=seconds)
    pairs = open_pairs("pick_a_pic", str(path))
    assert [p.rejected_prompt for p in pairs] == ["ein Wal", "", ""] and not pairs.skipped
    assert pairs.prompts() == ["prompt 0", "prompt 1", "prompt 2", "ein Wal"]
    assert pairs[1:].prompts() == ["prompt 1", "prompt 2"]
    needed = open_pairs("pick_a_pic", str(path), prompt_pairs="x needs two")
    assert [p.prompt for p in needed] == ["prompt 0"]
    assert [str(d) for d in needed.skipped] == [f"a.parquet: row {i}: has no rejected_caption" for i in (1, 2)]
    plain = open_pairs("pick_a_pic", str(write(tmp_path / "b.parquet", [(1.0, 0.0), (0.0, 1.0)])))
    assert plain[1].row == pairs[1].row
    assert plain[0].row != pairs[0].row  # another pair, with other draws


def test_second_prompts_may_be_called_otherwise_and_must_be_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(1.0, 0.0)], contrast=["a whale"])
    pairs = open_pairs("pick_a_pic", str(path), columns={"rejected_prompt": "contrast"})
    assert pairs[0].rejected_prompt == "a whale"
    numbers = write(tmp_path / "b.parquet", [(1.0, 0.0)], rejected_caption=[3])
    with pytest.raises(ValueError, match=r"b.parquet: row 0: rejected_caption is 3; expected a text"):
        open_pairs("pick_a_pic", str(numbers))
    pictures(tmp_path / "set", 2)
    good = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    lines(tmp_path / "set" / "pairs.jsonl", [good | {"rejected_prompt": 3}])
    with pytest.raises(ValueError, match=r"pairs.jsonl: line 1: rejected_prompt is 3; expected a text"):
        open_pairs("folder", str(tmp_path / "set"))


def test_lines_may_have_a_second_prompt(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    good = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    lines(tmp_path / "pairs.jsonl", [good | {"rejected_prompt": "b"}, good, good | {"rejected_prompt": None}])
    pairs = open_pairs("folder", str(tmp_path))
    assert [p.rejected_prompt for p in pairs] == ["b", "", ""] and pairs.prompts() == ["a", "a", "a", "b"]
    assert pairs[0].row != pairs[1].row == pairs[2].row
    needed = open_pairs("folder", str(tmp_path), prompt_pairs="x needs two")
    assert len(needed) == 1 and "2 rows dropped (pairs.jsonl: line 2: has no rejected_prompt; " in needed.summary()
    lines(tmp_path / "pairs.jsonl", [good])
    with pytest.raises(ValueError, match=r"dropped: pairs.jsonl: line 1: has no rejected_prompt\); .*: x needs two$"):
        open_pairs("folder", str(tmp_path), prompt_pairs="x needs two")


def test_rankings_have_one_prompt(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    record = {"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2], "rejected_prompt": "b"}
    lines(tmp_path / "train.jsonl", [record])
    assert open_pairs("rankings", str(tmp_path / "train.jsonl"))[0].rejected_prompt == ""
    with pytest.raises(ValueError, match="line 1: has no second prompt"):
        open_pairs("rankings", str(tmp_path / "train.jsonl"), prompt_pairs="x needs two")
