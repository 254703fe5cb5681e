"""Every layout of responses with good, bad and hostile rows, recognized by its columns."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.conversations import LAYOUTS
from mmalign.data.formats.layouts import find_layout
from mmalign.data.formats.responses import open_responses
from mmalign.data.splits import split_by_group
from mmalign.language.chat import Turn
from tests.helpers import data_files

Q, C, R = "What is in it?", "A red cube.", "A red cube and a dog."
Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def bot(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def old(role: str, value: Any) -> Row:
    return {"from": role, "value": value}


def part(text: str) -> Row:
    return {"type": "text", "text": text}


PAIR: Row = {"images": ["a.png"], "prompt": Q, "chosen": C, "rejected": R}
SHARE_GPT = {
    "conversations": [old("human", f"<image>{Q}")],
    "chosen": old("gpt", C),
    "rejected": old("gpt", R),
    "images": ["a.png"],
}
SWIFT = {"messages": [user(f"<image>{Q}"), bot(C)], "images": ["a.png"], "rejected_response": R}
POVID = {
    "image": "a.png",
    "conversations": [old("human", f"<image>\n{Q}"), old("gpt", C)],
    "rejected_conversations": [old("human", f"<image>\n{Q}"), old("gpt", R)],
}
LLAVA = {"image": "a.png", "conversations": POVID["conversations"]}
GOOD: dict[str, list[Row]] = {
    "trl": [
        PAIR,
        {"image": "a.png", "prompt": Q, "chosen": bot(C), "rejected": [bot(R)]},
        {**PAIR, "prompt": [user([{"type": "image"}, part(Q)])], "chosen": [bot([part(C)])], "rejected": [bot(R)]},
        {"chosen": [user(["<image>", Q]), bot(C)], "rejected": [user(["<image>", Q]), bot(R)], "image": "a.png"},
        {**PAIR, "chosen": [user(Q), bot(C)], "rejected": [user(Q), bot(R)]},
        {**PAIR, "chosen": [user(Q), bot(C)]},
        {**PAIR, "prompt": [{"role": "User", "content": Q}], "chosen": [{"role": "bot", "content": C}]},
        {"prompt": [user([{"type": "image", "image": "a.png"}, part(Q)])], "chosen": C, "rejected": R},
        {"prompt": [user([{"type": "image_url", "image_url": {"url": "a.png"}}, part(Q)])], "chosen": C, "rejected": R},
        {**PAIR, "prompt": [user([{"type": "input_image", "image_url": "http://x/y.png"}, part(Q)])]},
        {**PAIR, "tools": "[]", "videos": [], "audios": None, "system": None},
        {"image_path": "a.png", "question": Q, "chosen_response": C, "rejected_response": R},
    ],
    "llama_factory": [
        SHARE_GPT,
        {**SHARE_GPT, "chosen": bot(C), "rejected": bot(R)},
        {"messages": [user(Q)], "chosen": bot(C), "rejected": bot(R), "image": "a.png"},
    ],
    "alpaca": [{"instruction": Q, "input": "", "chosen": C, "rejected": R, "images": ["a.png"]}],
    "povid": [POVID],
    "realign": [
        {"image": "a.png", "retrieved_image": "b.png", "chosen": [user(Q), bot(C)], "rejected": [user(Q), bot(R)]},
    ],
    "mdpo": [{"img_path": "a.png", "prompt": f"You help. USER: <image>\n{Q} ASSISTANT:", "chosen": C, "rejected": R}],
    "rlhfv": [
        {"image": "a.png", "question": Q, "chosen": C, "rejected": R, "ds_name": "x", "idx": 3},
        {"image": "a.png", "text": json.dumps({"question": Q, "chosen": C, "rejected": R})},
    ],
    "swift": [
        SWIFT,
        {**SWIFT, "rejected_response": None, "rejected_messages": [user(f"<image>{Q}"), bot(R)]},
        {**SWIFT, "rejected_response": None, "rejected_messages": [bot(R)]},
    ],
    "answers": [
        LLAVA,
        {"image": "a.png", "prompt": Q, "answer": C},
        {"images": ["a.png"], "messages": [user(Q), bot(C)]},
        {"image": "a.png", "question": Q, "response": C},
    ],
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(data_files.png(number))
    return tmp_path


def opened(folder: Path, *rows: Any, format: str = "auto") -> Any:
    path = data_files.write_jsonl(folder / "rows.jsonl", *rows)
    return open_responses(format, str(path))


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in GOOD.items() for row in rows])
def test_auto_recognizes_every_layout(name: str, row: Row, here: Path) -> None:
    pairs = opened(here, row)
    (pair,) = pairs
    assert pairs.layout.startswith(f"{name} (") and f"read as {name} (" in pairs.summary()
    assert pair.turns[0].text.replace("\n", "") == f"<image>{Q}" and pair.turns[0].role == "user"
    assert (pair.chosen, pair.rejected) == (C, "" if name == "answers" else R)
    assert [ref.read() for ref in pair.images] == [data_files.png(0)]
    if not find_layout(LAYOUTS, name, {}).missing(row) and "image_path" not in row and "response" not in row:
        (same,) = opened(here, row, format=name)
        assert same.content == pair.content


@pytest.mark.parametrize("name", GOOD)
def test_a_bad_or_hostile_row_is_dropped_alone(name: str, here: Path) -> None:
    """Each column in turn has another type, a path outside, or a value as deep as JSON may be."""
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    row, bad = GOOD[name][0], list[Row]()
    for column in row:
        bad += [{**row, column: value} for value in (None, 3, [3], {"a": 1}, deep, [[]], "\0", [{"role": "user"}])]
    bad += [{**row, column: "../../secret.png"} for column in ("image", "images") if column in row]
    bad += [{}, {"chosen": C}]
    pairs = opened(here, row, *bad, row, format=name)
    assert pairs[0].content == pairs[len(pairs) - 1].content
    assert len(pairs) + len(pairs.skipped) == len(bad) + 2 and len(pairs.skipped) >= len(bad) / 2
    assert all(len(str(skipped)) < 400 and skipped.location.startswith("rows.jsonl: line") for skipped in pairs.skipped)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"videos": ["x.mp4"]}, "has videos, which are not trained on"),
        ({"audios": ["x.wav"]}, "has audios"),
        ({"tools": '[{"name": "f"}]'}, "has tools"),
        ({"prompt": [user([{"type": "video", "video": "x.mp4"}])]}, "expected a part of the type text or image"),
        ({"prompt": [user([{"type": "input_audio"}, Q])]}, "expected a part of the type text or image"),
        ({"prompt": [user(Q), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "prompt holds tool_calls"),
        ({"prompt": [user(Q), {"role": "tool_response", "content": "3"}]}, "of the role 'tool_response'"),
        ({"prompt": [user(Q), {"role": "narrator", "content": "3"}]}, "of the role 'narrator'"),
        ({"prompt": [user(Q), bot("It is")]}, "ends with the assistant's own words"),
        ({"prompt": [user(None)]}, "expected messages with a role and a content"),
        ({"chosen": []}, "chosen is \\[\\]; expected a text, or a list of messages"),
        ({"rejected": []}, "rejected is empty"),
        ({"system": 3}, "system is 3; expected a text"),
        ({"images": ["http://host/a.png"]}, "a URL, which is never fetched"),
        ({"images": ["data:image/png;base64,%%%"]}, "not base64"),
        ({"images": []}, "has no image"),
        ({"images": None}, "has no image"),
    ],
)  # fmt: skip
def test_a_row_of_trl_that_cannot_be_trained_on_is_named(change: Row, reason: str, here: Path) -> None:
    pairs = opened(here, {**PAIR, **change}, PAIR)
    assert len(pairs) == 1
    (skipped,) = pairs.skipped
    assert skipped.location == "rows.jsonl: line 1"
    assert reason.replace("\\", "") in skipped.reason
    with pytest.raises(ValueError, match=reason):
        opened(here, {**PAIR, **change}, format="trl")


def test_a_row_without_the_column_of_images_is_dropped_alone(here: Path) -> None:
    """As the text rows of LLaVA's mix665k."""
    text = {"conversations": LLAVA["conversations"]}
    pairs = opened(here, LLAVA, text, LLAVA)
    assert len(pairs) == 2 and [str(row) for row in pairs.skipped] == [
        "rows.jsonl: line 2: has no 'images', nor an image in its messages"
    ]


def test_interleaved_parts_keep_their_places(here: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(data_files.png(2)).decode()
    parts = [part("Before. "), {"type": "image_url", "image_url": {"url": uri}}, part(" And "), {"type": "image"}, "?"]
    (pair,) = opened(here, {**PAIR, "images": ["b.png"], "prompt": [user(parts)]})
    assert pair.turns == (Turn("user", "Before. <image> And <image>?"),)
    assert [ref.read() for ref in pair.images] == [data_files.png(2), data_files.png(1)]
    few = opened(here, PAIR, {**PAIR, "images": [], "prompt": [user(parts)]})
    assert "2 image placeholders in the prompt for 0 images" in str(few.skipped[0])


def test_a_system_column_is_the_first_turn(here: Path) -> None:
    for row in (PAIR, SWIFT, SHARE_GPT, LLAVA):
        (pair,) = opened(here, {**row, "system": "Be brief."})
        assert pair.turns[0] == Turn("system", "Be brief.") and [turn.role for turn in pair.turns[1:]] == ["user"]
    (pair,) = opened(
        here, {**PAIR, "prompt": [{"role": "developer", "content": "Own."}, user(Q)], "system": "Be brief."}
    )
    assert pair.turns[0] == Turn("system", "Own.")


def test_several_rejected_responses_are_several_pairs(here: Path) -> None:
    pairs = opened(here, {**PAIR, "rejected": [R, "A dog.", C]})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(C, R), (C, "A dog.")]
    assert [pair.location for pair in pairs] == [f"rows.jsonl: line 1, rejected response {n}" for n in (1, 2)]
    assert [str(row) for row in pairs.skipped] == [
        "rows.jsonl: line 1, rejected response 3: the chosen and the rejected response are the same"
    ]
    assert [pair.rejected for pair in opened(here, {**SWIFT, "rejected_response": [R, "A dog."]})] == [R, "A dog."]
    assert [pair.rejected for pair in opened(here, {**PAIR, "rejected": [[bot(R)], [bot("A dog.")]]})] == [R, "A dog."]


def test_later_turns_are_left_out_and_counted(here: Path, log_lines: list[str]) -> None:
    first, more = [bot("A cube."), user("And?")], [user("Else?"), bot("No.")]
    row = {**PAIR, "chosen": [*first, bot(C), *more], "rejected": [*first, bot(R), *more]}
    (pair,) = opened(here, row)
    assert [turn.text for turn in pair.turns] == [f"<image>{Q}", "A cube.", "And?"]
    assert (pair.chosen, pair.rejected) == (C, R)
    assert any("1 conversations have later turns" in line for line in log_lines)


def test_rows_of_one_image_in_a_table_stay_together(here: Path) -> None:
    """Twelve rows with the bytes of three images, with and without a path."""
    images = [{"bytes": data_files.png(n % 3), "path": [None, "x.png"][n % 2]} for n in range(12)]
    rows = [{"image": image, "question": f"{n}?", "chosen": C, "rejected": R} for n, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    pairs = open_responses("auto", str(here / "rows.parquet"))
    train, validation = split_by_group(pairs, 0.3, 0)
    keys = [{ref.key for pair in side for ref in pair.images} for side in (train, validation)]
    assert not keys[0] & keys[1] and all(keys) and len(set(pairs.groups())) == 3


def test_typed_parts_of_a_table_hold_images(here: Path) -> None:
    """As pyarrow writes them, every part with the fields of all."""
    content = [
        {"type": "image", "text": None, "image": {"bytes": data_files.png(1), "path": None}},
        {"type": "text", "text": Q, "image": None},
    ]
    rows = [{"prompt": [user(content)], "chosen": [bot(C)], "rejected": [bot(R)]}]
    pq.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    (pair,) = open_responses("auto", str(here / "rows.parquet"))
    assert pair.turns[0].text == f"<image>{Q}" and pair.images[0].read() == data_files.png(1)


def test_a_table_of_llama_factory(here: Path) -> None:
    """As llamafactory/RLHF-V has it."""
    rows = [{**SHARE_GPT, "images": [{"bytes": data_files.png(1), "path": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    (pair,) = open_responses("auto", str(here / "rows.parquet"))
    assert (pair.chosen, pair.rejected, pair.images[0].read()) == (C, R, data_files.png(1))


def test_trl_reads_what_llama_factory_has(here: Path) -> None:
    (pair,) = opened(here, SHARE_GPT, format="trl")
    assert (pair.turns, pair.chosen, pair.rejected) == ((Turn("user", f"<image>{Q}"),), C, R)


def test_a_wrong_guess_is_one_option_away(here: Path) -> None:
    row = {"image": "a.png", "question": Q, "chosen": R, "rejected": C, "better": C, "worse": R}
    path = data_files.write_jsonl(here / "rows.jsonl", row)
    (pair,) = open_responses("auto", str(path))
    assert pair.chosen == R
    (pair,) = open_responses("auto", str(path), columns={"chosen": "better", "rejected": "worse"})
    assert (pair.chosen, pair.rejected) == (C, R)
    with pytest.raises(ValueError, match=r"\(found image, caption\); expected a known layout, of which .* data.format"):
        open_responses("auto", str(data_files.write_jsonl(here / "rows.jsonl", {"image": "a.png", "caption": Q})))
    with pytest.raises(ValueError, match="expected a known layout"):  # captions are not RLHF-V's JSON
        open_responses("auto", str(data_files.write_jsonl(here / "rows.jsonl", {"image": "a.png", "text": Q})))
