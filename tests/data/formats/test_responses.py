"""Every layout reads the same pair; what cannot be learned from is dropped by name, what is not a layout is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.responses import check_source, open_responses
from mmalign.data.images import decode
from mmalign.data.pairs import Pairs, ResponsePair
from mmalign.data.splits import split_by_group
from mmalign.language.chat import Turn
from tests.helpers import data_files

QUESTION, CHOSEN, REJECTED = "What is in it?", "A red cube.", "A red cube and a dog."


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with three pictures."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        (tmp_path / name).write_bytes(data_files.png(number))
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "rows.json") -> str:
    path = folder / name
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if name.endswith(".jsonl") else json.dumps(list(rows)))
    return str(path)


def said(text: str, *, old: bool = False, parts: bool = False, image: bool = False) -> list[dict[str, Any]]:
    """A question and an answer as messages."""
    asked: Any = ("<image>\n" if image else "") + QUESTION
    if parts:
        asked = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
    if old:
        return [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]


LAYOUT_ROWS: dict[str, list[dict[str, Any]]] = {
    "trl": [
        {"images": ["a.png"], "prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
        {"image": "a.png", "prompt": f"<image>{QUESTION}", "chosen": CHOSEN, "rejected": REJECTED},
        {"images": ["a.png"], "chosen": said(CHOSEN, parts=True), "rejected": said(REJECTED, parts=True)},
        {"images": ["a.png"], "prompt": said("", parts=True)[:1], "chosen": said(CHOSEN)[1:], "rejected": REJECTED},
    ],
    "povid": [
        {
            "id": "1",
            "image": "./a.png",
            "conversations": said(CHOSEN, old=True, image=True),
            "rejected_conversations": said(REJECTED, old=True, image=True),
        }
    ],
    "mdpo": [
        {
            "img_path": "a.png",
            "prompt": f"You help. USER: <image>\n{QUESTION} ASSISTANT:",
            "chosen": CHOSEN,
            "rejected": REJECTED,
        }
    ],
    "rlhfv": [
        {"image": "a.png", "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
        {"image": "a.png", "text": json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED})},
    ],
    "swift": [{"images": ["a.png"], "messages": said(CHOSEN, image=True), "rejected_response": REJECTED}],
    "realign": [
        {
            "image": "a.png",
            "retrieved_image": "b.png",
            "chosen": said(CHOSEN, image=True),
            "rejected": said(REJECTED, image=True),
        }
    ],
}


@pytest.mark.parametrize(("format", "row"), [(f, row) for f, rows in LAYOUT_ROWS.items() for row in rows])
def test_every_layout_reads_the_same_pair(format: str, row: dict[str, Any], here: Path) -> None:
    (pair,) = open_responses(format, written(here, row))
    assert [turn.role for turn in pair.turns] == ["user"]
    assert pair.turns[0].text.replace("\n", "") == f"<image>{QUESTION}"
    assert (pair.chosen, pair.rejected) == (CHOSEN, REJECTED)
    assert pair.images == pair.rejected_images and decode(pair.images[0]).size == (16, 16)
    assert pair.images[0].read() == (here / "a.png").read_bytes()
    assert [ref.read() for ref in pair.other_images] == ([(here / "b.png").read_bytes()] if format == "realign" else [])
    assert pair.location == "rows.json: entry 1"
    check_source(format, str(here / "rows.json"))


def test_swift_rejected_images_go_to_the_rejected_response(here: Path) -> None:
    """Also with no rejected response: then the same words are compared under two images."""
    row = {"images": ["a.png"], "messages": said(CHOSEN), "rejected_images": ["b.png"]}
    (pair,) = open_responses("swift", written(here, row))
    assert pair.rejected == pair.chosen == CHOSEN
    assert [ref.read() for ref in (*pair.images, *pair.rejected_images)] == [
        (here / "a.png").read_bytes(),
        (here / "b.png").read_bytes(),
    ]


def test_several_images_and_turns_keep_their_places(here: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> and <image>?"},
        {"role": "assistant", "content": "Cubes."},
        {"role": "user", "content": "Which is red?"},
    ]
    row = {"images": ["a.png", "b.png"], "prompt": turns, "chosen": CHOSEN, "rejected": REJECTED}
    (pair,) = open_responses("trl", written(here, row))
    assert pair.turns == tuple(Turn(t["role"], t["content"]) for t in turns)
    unplaced = {**row, "prompt": [turns[0], {"role": "user", "content": "Compare."}]}
    (pair,) = open_responses("trl", written(here, unplaced))
    assert pair.turns[1].text == "<image><image>Compare."


def test_conversations_are_compared_where_they_first_differ(here: Path) -> None:
    chosen_side, rejected_side = (
        said("A cube.", old=True) + said(CHOSEN, old=True),
        said("A cube.", old=True) + said(REJECTED, old=True),
    )
    (pair,) = open_responses(
        "povid",
        written(here, {"image": "a.png", "conversations": chosen_side, "rejected_conversations": rejected_side}),
    )
    assert len(pair.turns) == 3 and pair.chosen == CHOSEN


GOOD: dict[str, Any] = {"images": ["a.png"], "prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": []}, "has no image"),
        ({"images": None}, "has no image"),
        ({"images": ["z.png"]}, 'the image "z.png" does not exist'),
        ({"prompt": "<image><image>What?"}, "2 image placeholders in the prompt for 1 images"),
        ({"images": ["a.png", "b.png"], "prompt": "<image>?"}, "1 image placeholders in the prompt for 2 images"),
        ({"chosen": "  "}, "the chosen response is empty"),
        ({"rejected": ""}, "the rejected response is empty"),
        ({"rejected": None}, "the rejected response is empty"),
        ({"rejected": f"{CHOSEN} "}, "the chosen and the rejected response are the same"),
        ({"chosen": "An <image>."}, "the chosen response holds <image>"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_dropped_as_a_pair(
    change: dict[str, Any], reason: str, here: Path
) -> None:
    path = written(here, {**GOOD, **change}, GOOD, name="rows.jsonl")
    pairs = open_responses("trl", path)
    assert len(pairs) == 1 and [str(d) for d in pairs.skipped] == [f"rows.jsonl: line 1: {reason}"]
    assert f"1 row dropped (rows.jsonl: line 1: {reason})" in pairs.summary()
    with pytest.raises(ValueError, match=r"has no pair to learn from \(0 ties, 1 row dropped: rows\.jsonl: line 1: "):
        open_responses("trl", written(here, {**GOOD, **change}, name="rows.jsonl"))


def test_conversations_with_different_questions_are_no_pair(here: Path) -> None:
    other_turns = [{"from": "human", "value": "Else?"}, {"from": "gpt", "value": REJECTED}]
    row = {"image": "a.png", "conversations": said(CHOSEN, old=True), "rejected_conversations": other_turns}
    with pytest.raises(ValueError, match="the chosen and the rejected conversation have different prompts"):
        open_responses("povid", written(here, row))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {k: v for k, v in GOOD.items() if k != "chosen"},
            "rows.json has no 'chosen' (found images, prompt, rejected)",
        ),
        ({k: v for k, v in GOOD.items() if k != "images"}, "has no 'images'"),
        ({**GOOD, "chosen": 3}, "entry 1: chosen is 3; expected a text"),
        ({**GOOD, "prompt": []}, "entry 1: prompt is []; expected a text, or a list of messages"),
        ({**GOOD, "prompt": [{"text": "x"}]}, "expected messages with a role and a content"),
        ({**GOOD, "images": [3]}, "3 is not an image; expected a path"),
    ],
)
def test_a_row_that_is_not_of_the_layout_is_refused(row: dict[str, Any], sentence: str, here: Path) -> None:
    with pytest.raises(ValueError) as raised:
        open_responses("trl", written(here, row))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_slips_in_the_recipe_are_named(here: Path) -> None:
    path = written(here, GOOD)
    with pytest.raises(ValueError, match=r"data\.format: there is no 'tlr'; did you mean 'trl'\?"):
        open_responses("tlr", path)
    with pytest.raises(ValueError, match=r"data\.columns: trl has no column 'question' to rename"):
        open_responses("trl", path, columns={"question": "q"})
    with pytest.raises(ValueError, match=r"data\.group_by: .* has no 'scene'"):
        open_responses("trl", path, group_by="scene")
    with pytest.raises(
        ValueError, match=r"data\.path: .*nowhere\.json does not exist; expected \*\.parquet, .*\*\.json"
    ):
        open_responses("trl", str(here / "nowhere.json"))
    with pytest.raises(ValueError, match="has no 'conversations' and no 'rejected_conversations'"):
        check_source("povid", written(here, {"image": "a.png"}))


def test_columns_and_the_images_folder(here: Path) -> None:
    shutil.move(here / "a.png", (here / "deep").mkdir() or here / "deep" / "a.png")  # type: ignore[func-returns-value]
    row = {"pictures": ["a.png"], "q": QUESTION, "yes": CHOSEN, "no": REJECTED, "scene": "s1"}
    names = {"images": "pictures", "prompt": "q", "chosen": "yes", "rejected": "no"}
    (pair,) = open_responses("trl", written(here, row), images=here / "deep", columns=names, group_by="scene")
    assert pair.chosen == CHOSEN and pair.group == "s1"


def table(folder: Path, number: int = 4) -> Path:
    """As TRL's data are on the Hub: images as structs of bytes, messages as lists of structs."""
    rows = [
        {
            "images": [{"bytes": data_files.png(n), "path": None}],
            "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": f"{n} cubes."}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "" if n == 2 else "None."}]}],
        }
        for n in range(number)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-0.parquet")
    return folder / "train-0.parquet"


def test_a_table_s_images_are_read_with_their_pair(here: Path) -> None:
    pairs = open_responses("trl", str(table(here)))
    assert [pair.chosen for pair in pairs] == ["0 cubes.", "1 cubes.", "3 cubes."]
    assert [str(d) for d in pairs.skipped] == ["train-0.parquet: row 2: the rejected response is empty"]
    assert pairs[2].images[0].read() == data_files.png(3) and pairs[0].turns[0].text == "<image>?"


def test_a_table_may_name_files(here: Path) -> None:
    rows = [{"image": "a.png", "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}]
    pq.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    for images in (None, here):
        (pair,) = open_responses("rlhfv", str(here / "rows.parquet"), images=images)
        assert pair.images[0].read() == data_files.png(0) and pair.group == "a.png"


def test_a_column_of_bytes_and_json_in_text(here: Path) -> None:
    """As RLHF-V has it."""
    message = json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED})
    rows = [{"image": {"bytes": data_files.png(0), "path": "x.png"}, "text": message}, {"image": None, "text": message}]
    pq.write_table(pa.Table.from_pylist(rows), here / "rlhfv.parquet")
    pairs = open_responses("rlhfv", str(here / "rlhfv.parquet"))
    assert len(pairs) == 1 and "row 1: has no image" in str(pairs.skipped[0])
    assert pairs[0].images[0].read() == data_files.png(0)


def rows_of(pairs: Pairs[ResponsePair]) -> list[int]:
    return [pair.row for pair in pairs]


def test_a_row_s_id_is_its_content(here: Path) -> None:
    """Not its place, its file, or the time of its image; and every part of it counts."""
    rows = [GOOD, {**GOOD, "chosen": "Two."}, {**GOOD, "images": ["b.png"]}, {**GOOD, "prompt": "Else?"}]
    ids = rows_of(open_responses("trl", written(here, *rows)))
    assert len(set(ids)) == 4 and all(0 <= i < 2**63 for i in ids)
    copy_folder = here / "copy"
    copy_folder.mkdir()
    for name in ("a.png", "b.png"):
        (copy_folder / name).write_bytes((here / name).read_bytes())
    assert rows_of(open_responses("trl", written(copy_folder, *reversed(rows), name="x.jsonl"))) == ids[::-1]


def test_a_table_row_s_id_is_its_images_bytes(here: Path) -> None:
    ids = rows_of(open_responses("trl", str(table(here))))
    (here / "again").mkdir()
    assert rows_of(open_responses("trl", str(table(here / "again", 8))))[:3] == ids and len(set(ids)) == 3


def test_rows_of_one_image_stay_on_one_side_of_a_hold_out(here: Path) -> None:
    rows = [{**GOOD, "images": [f"{name}.png"], "prompt": f"{n}?"} for n in range(4) for name in "abc"]
    train, validation = split_by_group(open_responses("trl", written(here, *rows)), 0.5, 1)
    sides = [{pair.images[0].location.split("(")[1] for pair in side} for side in (train, validation)]
    assert len(train) + len(validation) == 12 and not sides[0] & sides[1] and all(sides)


def test_a_limit_keeps_the_first(here: Path) -> None:
    rows = [{**GOOD, "prompt": f"{n}?"} for n in range(5)]
    assert [p.turns[0].text for p in open_responses("trl", written(here, *rows), limit=2)] == ["<image>0?", "<image>1?"]


@pytest.mark.parametrize("empty", [None, [], ""])
def test_images_come_from_the_column_that_has_them(empty: Any, here: Path) -> None:
    sides = {"image": "a.png", "images": empty}
    pair = {**sides, "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    swift = {**sides, "messages": said("A dog."), "rejected_response": "A cat."}
    answer = {**sides, "prompt": "What?", "answer": "A dog."}
    for format, row in (("trl", pair), ("swift", swift), ("answers", answer)):
        (read,) = open_responses(format, written(here, row))
        assert [Path(image.path).name for image in read.images] == ["a.png"], format
