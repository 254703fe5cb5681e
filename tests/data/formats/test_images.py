"""Three layouts of preference pairs, and what is said of files that do not follow them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.splits import split_by_group
from tests.helpers.image_files import level, lines, pictures, png, write


def test_labels_choose_ties_are_counted_and_nonsense_is_dropped(tmp_path: Path) -> None:
    labels = [
        (1.0, 0.0),
        (0.0, 1.0),
        (0.5, 0.5),
        (4.0, 2.0),
        (-1.0, 1.0),
        (None, 1.0),
        (1.0, float("inf")),
        (1.0, 0.0),
        (1.0, 0.0),
        (0.0, 1.0),
    ]
    path = write(
        tmp_path / "pairs.parquet",
        labels,
        has_label=[True] * 7 + [False, True, True],
        are_different=[True] * 8 + [False, True],
    )
    pairs = open_pairs("pick_a_pic", str(path))
    assert [level(pairs, i) for i in range(len(pairs))] == [(0, 1), (11, 10), (30, 31), (41, 40), (91, 90)]
    assert pairs.ties == 1
    assert [str(d) for d in pairs.skipped] == [
        "pairs.parquet: row 5: label_0 is null; expected a number",
        "pairs.parquet: row 6: label_1 is Infinity; expected a number",
        "pairs.parquet: row 7: has_label is false",
        "pairs.parquet: row 8: both images are the same",
    ]
    assert pairs[4].location == "pairs.parquet: row 9"
    assert pairs[4].chosen.location == "pairs.parquet: row 9, jpg_1"
    assert pairs[0].prompt == pairs[0].group == "prompt 0"
    assert (
        pairs.summary().startswith("5 pairs in 5 groups from ") and "1 tie left out; 4 rows dropped" in pairs.summary()
    )


def test_ties_are_pairs_for_those_who_ask(tmp_path: Path) -> None:
    """A tie has a preference of 1/2, or that of a column; equal ranks in a longer list say nothing."""
    path = write(tmp_path / "pairs.parquet", [(1.0, 0.0), (0.5, 0.5), (0.3, 0.7)], preference=[None, None, 0.6])
    pairs = open_pairs("pick_a_pic", str(path), labels=["preference"], ties=True)
    assert [pair.label.preference for pair in pairs] == [1.0, 0.5, 0.6] and pairs.ties == 0
    assert level(pairs, 1) == (10, 11)
    pictures(tmp_path / "test", 3)
    record = {"prompt": "a", "image_path": [f"{i}.png" for i in range(3)], "rank": [1, 2, 2]}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    ranked = open_pairs("rankings", str(tmp_path / "test.json"), ties=True)
    assert (len(ranked), ranked.ties) == (2, 1)


def test_images_may_be_structs_of_bytes_and_path(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    raw = {"caption": ["a"], "label_0": [0], "label_1": [1]}
    structs = {c: [{"bytes": png(n), "path": "x.png"}] for n, c in enumerate(("jpg_0", "jpg_1"))}
    pq.write_table(pa.table(raw | structs), tmp_path / "plain.parquet")
    labels = {"label_0": Value("int64"), "label_1": Value("int64")}
    kinds = {"caption": Value("string"), **labels, "jpg_0": ImageFeature(), "jpg_1": ImageFeature()}
    Dataset.from_dict(raw | structs, features=Features(kinds)).to_parquet(tmp_path / "feature.parquet")
    for name in ("plain", "feature"):
        assert level(open_pairs("pick_a_pic", str(tmp_path / f"{name}.parquet")), 0) == (1, 0)


def test_a_folder_a_glob_and_a_split(tmp_path: Path) -> None:
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        write(tmp_path / "data" / f"{name}.parquet", [(1.0, 0.0)] * (i + 1))
    with pytest.raises(ValueError, match=r"data.split: .* has files of several splits; expected one of test, train"):
        open_pairs("pick_a_pic", str(tmp_path))
    train = open_pairs("pick_a_pic", str(tmp_path), split="train")
    assert [p.location for p in train] == [
        "data/train-00000-of-00002.parquet: row 0",
        "data/train-00001-of-00002.parquet: row 0",
        "data/train-00001-of-00002.parquet: row 1",
    ]
    assert len(open_pairs("pick_a_pic", str(tmp_path / "data" / "test-*.parquet"))) == 3
    assert len(open_pairs("pick_a_pic", str(tmp_path), split="test", limit=2)) == 2
    with pytest.raises(ValueError, match=r"no file of split 'val'; expected one of test, train"):
        check_source("pick_a_pic", str(tmp_path), split="val")


@pytest.mark.parametrize("split", [None, "train"])
def test_split_of_a_hub_recipe_takes_a_folder_without_splits(split: str | None, tmp_path: Path) -> None:
    for name in ("mine", "more"):
        write(tmp_path / "data" / f"{name}.parquet", [(1.0, 0.0)])
    assert len(open_pairs("pick_a_pic", str(tmp_path / "data"), split=split)) == 2


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_either_side_of_a_split_has_a_group(fraction: float, tmp_path: Path) -> None:
    pairs = open_pairs("pick_a_pic", str(write(tmp_path / "a.parquet", [(1.0, 0.0)] * 7, caption=list("abcdefg"))))
    for seed in range(5):
        sides = split_by_group(pairs, fraction, seed)
        assert sorted(len(side) for side in sides) == [1, 6]


def test_columns_can_have_other_names_and_groups_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(1.0, 0.0)] * 2, caption=None, text=["a", "b"], kind=["x", "x"])
    with pytest.raises(ValueError, match=r"has no 'caption' \(found jpg_0, .*, text, kind\); expected caption, jpg_0"):
        check_source("pick_a_pic", str(path))
    pairs = open_pairs("pick_a_pic", str(path), columns={"prompt": "text"}, group_by="kind")
    assert [p.prompt for p in pairs] == ["a", "b"] and pairs.groups() == ["x", "x"] and pairs[1].group == "x"
    with pytest.raises(ValueError, match=r"data.columns: pick_a_pic has no column 'promt' to rename; it has caption"):
        check_source("pick_a_pic", str(path), columns={"promt": "text"})
    with pytest.raises(ValueError, match=r"data.group_by: .* has no 'sort' \(found"):
        check_source("pick_a_pic", str(path), columns={"prompt": "text"}, group_by="sort")


def test_keys_name_content_and_rows_name_pairs(tmp_path: Path) -> None:
    labels = [(1.0, 0.0), (0.0, 1.0)]
    plain = open_pairs("pick_a_pic", str(write(tmp_path / "a.parquet", labels)))
    moved = open_pairs("pick_a_pic", str(write(tmp_path / "other" / "b.parquet", [(0.5, 0.5), *labels][1:])))
    assert [p.row for p in plain] == [p.row for p in moved] and plain[0].chosen.key == moved[0].chosen.key
    swapped = open_pairs("pick_a_pic", str(write(tmp_path / "c.parquet", [(0.0, 1.0), (0.0, 1.0)])))
    assert swapped[0].row != plain[0].row and swapped[1].row == plain[1].row
    assert swapped[0].chosen.key == plain[0].rejected.key
    uids = {"image_0_uid": ["u", "v"], "image_1_uid": ["w", "u"]}
    named = open_pairs("pick_a_pic", str(write(tmp_path / "d.parquet", labels, **uids)))
    assert [(p.chosen.key, p.rejected.key) for p in named] == [(p.chosen.key, p.rejected.key) for p in plain]
    others = open_pairs("pick_a_pic", str(write(tmp_path / "e.parquet", labels[::-1], **uids)))
    assert {p.row for p in others}.isdisjoint(p.row for p in named)
    assert all(0 <= p.row < 2**63 for p in (*plain, *named))


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(1.0, 0.0)])
    assert level(open_pairs("pick_a_pic", str(path)), 0) == (0, 1)
    write(path, [(0.0, 1.0)])
    os.utime(path, ns=(1, 1))
    assert level(open_pairs("pick_a_pic", str(path)), 0) == (1, 0)


def test_pairs_travel_to_a_worker(tmp_path: Path) -> None:
    pairs = open_pairs("pick_a_pic", str(write(tmp_path / "a.parquet", [(1.0, 0.0), (0.0, 1.0)])))
    assert level(pickle.loads(pickle.dumps(pairs)), 1) == (11, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "has no rows; expected one a pair"),
        ([(0.5, 0.5)] * 3, "no pair to learn from \\(3 ties, 0 rows dropped\\)"),
        ([(None, 1.0)], "no pair to learn from \\(0 ties, 1 row dropped: a.parquet: row 0: label_0 is null"),
    ],
)
def test_nothing_to_learn_from(tmp_path: Path, labels: list[tuple[float, float]], message: str) -> None:
    floats = {c: pa.array([pair[i] for pair in labels], pa.float64()) for i, c in enumerate(("label_0", "label_1"))}
    blobs = {c: pa.array([b"x"] * len(labels), pa.binary()) for c in ("jpg_0", "jpg_1")}
    path = write(tmp_path / "a.parquet", labels, **floats, **blobs)
    if labels:
        check_source("pick_a_pic", str(path))
    with pytest.raises(ValueError, match=message):
        open_pairs("pick_a_pic", str(path))


def test_wrong_types_and_files_are_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'row 0: the image "a.png" does not exist'):
        open_pairs("pick_a_pic", str(write(tmp_path / "a.parquet", [(1.0, 0.0)], jpg_0=["a.png"])))
    with pytest.raises(ValueError, match='label_0 is "left"; expected a number'):
        open_pairs("pick_a_pic", str(write(tmp_path / "b.parquet", [("left", 0.0)])))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"c.parquet is not a readable Parquet file"):
        check_source("pick_a_pic", str(tmp_path / "c.parquet"))
    with pytest.raises(
        ValueError, match=r"d.parquet does not exist; expected \*.parquet, .* a folder of them, or a glob"
    ):
        check_source("pick_a_pic", str(tmp_path / "d.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no file with rows"):
        check_source("pick_a_pic", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="there is no 'pickapic'; did you mean 'pick_a_pic'"):
        check_source("pickapic", str(tmp_path))


@pytest.mark.parametrize(("path", "arguments"), [("a/b", ("a/b", None)), ("a/b:small", ("a/b", "small"))])
def test_a_configuration_of_a_hub_dataset(
    path: str, arguments: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[tuple[object, ...]]()

    def load(*given: object, split: str) -> object:
        calls.append((*given, split))
        raise ValueError("Config name is missing")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match=r"Config name is missing.*owner/name:configuration"):
        open_pairs("auto", path, split="test")
    assert calls == [(*arguments, "test")]


def test_a_slip_in_a_local_path_does_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine/pears does not exist"):
        check_source("pick_a_pic", "mine/pears")
    check_source("pick_a_pic", "yuvalkirstain/pickapic_v2")


def test_split_keeps_groups_together_when_data_grows(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    records = [{"prompt": f"prompt {i // 2}", "chosen": "0.png", "rejected": "1.png"} for i in range(400)]
    few = open_pairs("folder", str(lines(tmp_path / "few.jsonl", records[:200])))
    many = open_pairs("folder", str(lines(tmp_path / "many.jsonl", records)))
    train, validation = split_by_group(many, 0.2, seed=1)
    assert len(train) + len(validation) == 400 and not set(train.groups()) & set(validation.groups())
    assert 40 <= len(validation) <= 120  # 40 of 200 groups on average, deviation 5.7: within five
    assert set(split_by_group(few, 0.2, seed=1)[1].groups()) <= set(validation.groups())
    assert set(split_by_group(many, 0.2, seed=2)[1].groups()) != set(validation.groups())
    assert train[0].prompt == train[:1][0].prompt and len(train[5:7]) == 2
    with pytest.raises(ValueError, match="has 1 group, which cannot be split"):
        split_by_group(many[:2], 0.2, seed=1)


def test_selection_keeps_the_order_asked_for(tmp_path: Path) -> None:
    pairs = open_pairs("pick_a_pic", str(write(tmp_path / "a.parquet", [(1.0, 0.0)] * 5)))
    selected = pairs.select(np.array([4, 0, 2])).select([2, 0])
    assert [p.prompt for p in selected] == ["prompt 2", "prompt 4"] and selected.groups() == ["prompt 2", "prompt 4"]
    assert selected[-1].prompt == "prompt 4"
    with pytest.raises(IndexError):
        selected[2]
