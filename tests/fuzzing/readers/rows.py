"""Rows of JSON, JSON lines, CSV, tars and folders, in every layout of image pairs and of response pairs."""

import csv
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mmalign.data.formats import images, prompts, responses
from mmalign.data.pairs import Pairs
from tests.fuzzing.mutations import SCALARS, VALUES
from tests.fuzzing.rule import Files, Reader
from tests.helpers.data_files import png

IMAGES = {"a.png": png(0), "b.png": png(1)}
TURNS = {
    side: [{"role": "user", "content": "Say."}, {"role": "assistant", "content": [{"type": "text", "text": side}]}]
    for side in ("yes", "no")
}
SPOKEN = {side: [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": side}] for side in ("yes", "no")}
TEXTS = {"chosen": "yes", "rejected": "no"}
IMAGE_ROWS: dict[str, list[dict[str, Any]]] = {
    "folder": [{"prompt": "a fox", "chosen": "a.png", "rejected": "b.png", "rejected_prompt": "a cat"}],
    "rankings": [
        {"prompt": "a fox", "image_path": ["a.png", "b.png"], "rank": [1, 2]},
        {"prompt": "a cat", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]},
    ],
    "votes": [{"prompt": "a fox", "path1": "a.png", "path2": "b.png", "choice_dist": [4, 2]}],
    "scores": [{"prompt": "a fox", "image": f"{name}.png", "score": n, "rank": 2 - n} for n, name in enumerate("ab")],
}
RESPONSE_ROWS: dict[str, list[dict[str, Any]]] = {
    "trl": [
        {"images": ["a.png"], "prompt": "Say.", **TEXTS, "hallucinated": "maybe"},
        {"image": "a.png", "chosen": TURNS["yes"], "rejected": TURNS["no"]},
        {"images": ["a.png"], "prompt": TURNS["yes"][:1], "chosen": TURNS["yes"][1:], "rejected": TURNS["no"][1:]},
    ],
    "llama_factory": [
        {
            "images": ["a.png"],
            "conversations": SPOKEN["yes"][:1],
            "chosen": SPOKEN["yes"][1],
            "rejected": SPOKEN["no"][1],
        }
    ],
    "alpaca": [{"images": ["a.png"], "instruction": "Say.", "input": "It.", "history": [["Hm?", "Ah."]], **TEXTS}],
    "povid": [{"image": "a.png", "conversations": SPOKEN["yes"], "rejected_conversations": SPOKEN["no"]}],
    "realign": [{"image": "a.png", "retrieved_image": "b.png", "chosen": SPOKEN["yes"], "rejected": SPOKEN["no"]}],
    "mdpo": [{"img_path": "a.png", "prompt": "USER: <image>\nSay. ASSISTANT:", **TEXTS}],
    "rlhfv": [
        {"image": "a.png", "question": "Say.", **TEXTS},
        {"image": {"path": "b.png"}, "text": json.dumps({"question": "Say.", **TEXTS})},
    ],
    "swift": [
        {"images": ["a.png"], "messages": TURNS["yes"], "rejected_response": "no", "rejected_images": ["b.png"]},
        {"images": ["a.png"], "messages": TURNS["yes"], "rejected_messages": TURNS["no"], "system": "Be brief."},
    ],
    "answers": [
        {"images": ["a.png"], "prompt": "Say.", "answer": "yes"},
        {"image": "a.png", "messages": TURNS["yes"]},
        {"image": "a.png", "conversations": SPOKEN["yes"]},
    ],
}
NAMES = sorted({key for rows in (*IMAGE_ROWS.values(), *RESPONSE_ROWS.values()) for row in rows for key in row})
ANY_ROWS = st.lists(
    st.dictionaries(st.sampled_from([*NAMES, ""]), VALUES | SCALARS, max_size=6), min_size=1, max_size=3
)


def in_lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def in_csv(rows: list[Any]) -> bytes:
    """Return rows as CSV, lists as JSON."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows([{key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()} for row in rows])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def in_tar(row: dict[str, Any], images: Files) -> bytes:
    """Return one row as a webdataset tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        members = {"1.json": json.dumps(row).encode(), "1.txt": b"a fox", "1.chosen.png": images["a.png"]}
        for name, content in {**members, "1.rejected.png": images["b.png"]}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def both_forms(rows: list[Any], suffix: str) -> tuple[Files, ...]:
    """Return rows as a list and as lines, each with the images."""
    if suffix == "csv":
        return ({"rows.csv": in_csv(rows), **IMAGES},)
    listed = ({f"rows.{suffix}": json.dumps(rows).encode(), **IMAGES},) if suffix == "json" else ()
    return (*listed, {f"rows.{suffix}": in_lines(rows), **IMAGES})


def use(pairs: Pairs[Any]) -> None:
    """Use what a source offers to training and evaluation: pairs with images, groups, prompts."""
    pairs.groups(), pairs.prompts(), pairs.summary()
    for pair in pairs:
        _ = pair.content, pair.location


def rows_file(folder: Path, suffix: str) -> str:
    """Return the rows' file, or its folder if the file is missing."""
    path = folder / f"rows.{suffix}"
    return str(path if path.exists() else folder)


def read_images(layout: str, suffix: str, folder: Path) -> None:
    path = rows_file(folder, suffix)
    images.check_source(layout, path)
    pairs = images.open_pairs(layout, path, group_by="prompt" if suffix == "json" else None)
    use(pairs)
    prompts.unique_prompts(pairs)


def read_responses(layout: str, suffix: str, folder: Path) -> None:
    use(responses.open_responses(layout, rows_file(folder, suffix), images=folder if suffix == "json" else None))


def readers(layouts: dict[str, list[Any]], read: Any, suffixes: str) -> list[Reader]:
    return [
        Reader(
            f"rows: {layout}, {suffix}",
            partial(read, layout, suffix),
            both_forms(rows, suffix),
            share=30,
            places=("data.path", "data.group_by"),
            generated=ANY_ROWS.map(
                lambda made, suffix=suffix: {
                    f"rows.{suffix}": (in_csv if suffix == "csv" else in_lines)(made),
                    **IMAGES,
                }
            ),
        )
        for layout, rows in layouts.items()
        for suffix in suffixes.split()
    ]


SIDES = {"good/1.png": IMAGES["a.png"], "bad/1.png": IMAGES["b.png"], "good/1.txt": b"a fox"}
CAPTIONS = in_csv([{"file_name": "good/1.png", "prompt": "a fox"}])
READERS = (
    *readers(IMAGE_ROWS, read_images, "json jsonl csv"),
    *readers(RESPONSE_ROWS, read_responses, "json jsonl"),
    Reader(
        "rows: archive",
        partial(read_images, "auto", "tar"),
        ({"rows.tar": in_tar({}, IMAGES)}, {"rows.tar": in_tar({"id": 3}, IMAGES)}),
        share=30,
        places=("data.path",),
    ),
    Reader(
        "rows: sides",
        partial(read_images, "auto", "none"),
        (SIDES, {**SIDES, "good/1.txt": b"a cat", "metadata.csv": CAPTIONS}),
        share=30,
        places=("data.path",),
    ),
)
