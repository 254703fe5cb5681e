"""Labels of pairs: columns of every layout, soft labels and scores, wrong values, and the identity of a run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.labels import Margins
from mmalign.data.formats.responses import open_responses
from mmalign.data.label import NO_LABEL, Label
from mmalign.data.loaders.batches import collate_labels
from mmalign.data.pairs import fingerprint_pairs, pair_key
from tests.helpers.data_files import png, write_jsonl

LABEL = {"preference": 0.7, "margin": -0.5, "weight": 2, "annotator": "kim"}
EXPECTED = Label(0.7, -0.5, 2.0, "kim")
SIDES = {"image": "0.png", "chosen": "A fox.", "rejected": "A dog."}
MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A fox."}]
SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A fox."}]
RESPONSES = {
    "trl": {"prompt": "What?", **SIDES},
    "llama_factory": {
        "conversations": SAID[:1],
        **SIDES,
        "chosen": SAID[1],
        "rejected": {**SAID[1], "value": "A dog."},
    },
    "alpaca": {"instruction": "What?", **SIDES},
    "povid": {
        "image": "0.png",
        "conversations": SAID,
        "rejected_conversations": [SAID[0], {**SAID[1], "value": "No."}],
    },
    "realign": {
        **SIDES,
        "retrieved_image": "1.png",
        "chosen": MESSAGES,
        "rejected": [MESSAGES[0], {**MESSAGES[1], "content": "No."}],
    },
    "mdpo": {"img_path": "0.png", "prompt": "USER: <image>What? ASSISTANT:", "chosen": "A fox.", "rejected": "A dog."},
    "rlhfv": {"question": "What?", **SIDES},
    "swift": {"images": ["0.png"], "messages": MESSAGES, "rejected_response": "A dog."},
}
PICKED = {"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 0, "label_1": 1}
IMAGES = {
    "pick_a_pic": PICKED,
    "folder": {"prompt": "a", "chosen": "0.png", "rejected": "1.png"},
    "rankings": {"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2]},
    "votes": {"prompt": "a", "path1": "0.png", "path2": "1.png", "choice_dist": [3, 1]},
}


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    """Return a function that writes rows beside two images."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return lambda *records: str(write_jsonl(tmp_path / "rows.jsonl", *records))


def labels(pairs: Any) -> list[Label]:
    return [pair.label for pair in pairs]


@pytest.mark.parametrize("layout", [*IMAGES, *RESPONSES])
def test_every_layout_of_pairs_has_labels(rows: Any, layout: str) -> None:
    row, opened = {**IMAGES, **RESPONSES}[layout], open_pairs if layout in IMAGES else open_responses
    labelled = opened(layout, rows({**row, **LABEL}))
    assert labels(labelled) == [EXPECTED] and labelled.annotators() == ["kim"]
    assert labels(opened(layout, rows(row))) == [NO_LABEL]
    renamed = {"preference": "strength", "annotator": "user_id"}
    pairs = opened(layout, rows({**row, "strength": "0.7", "user_id": 5}), columns=renamed)
    assert labels(pairs) == [Label(0.7, annotator="5")] and not pairs.unread


@pytest.mark.parametrize("layout", [*IMAGES, *RESPONSES, "auto"])
def test_a_renamed_column_that_files_lack_is_refused(rows: Any, layout: str) -> None:
    """Also if a row can do without it: the labels would otherwise be left out in silence."""
    row = {**IMAGES, **RESPONSES, "auto": RESPONSES["trl"]}[layout]
    opened: Any = open_pairs if layout in IMAGES else open_responses
    sentence = r"^data\.columns: .*rows\.jsonl has no 'prefs' for preference \(found .*strength.*\); name one of those"
    with pytest.raises(ValueError, match=sentence):
        opened(layout, rows({**row, "strength": 0.7}), columns={"preference": "prefs"})


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("preference", 1.5, "preference is 1.5; expected a number from 0 to 1"),
        ("preference", -0.1, "preference is -0.1; expected a number from 0 to 1"),
        ("preference", "high", 'preference is "high"; expected a number'),
        ("preference", float("nan"), "preference is NaN; expected a number"),
        ("margin", float("inf"), "margin is Infinity; expected a number"),
        ("margin", 1e9, "margin is 1000000000.0; expected a number from -1,000,000 to 1,000,000"),
        ("weight", -1, "weight is -1; expected a number from 0 to 1,000,000"),
        ("weight", [1], "weight is [1]; expected a number"),
        ("annotator", ["kim"], 'annotator is ["kim"]; expected a name or a whole number'),
        ("annotator", 1.5, "annotator is 1.5; expected a name or a whole number"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "trl"])
def test_a_row_with_a_wrong_label_is_dropped_and_named(
    tmp_path: Path, rows: Any, layout: str, column: str, value: Any, reason: str
) -> None:
    row, opened = {**IMAGES, **RESPONSES}[layout], open_pairs if layout in IMAGES else open_responses
    good, bad = {**row, column: None}, {**row, column: value}
    pairs = opened(layout, rows(good, bad))
    assert labels(pairs) == [NO_LABEL] and len(pairs.skipped) == 1
    assert pairs.skipped[0].reason == reason and "line 2" in pairs.skipped[0].location
    assert reason in pairs.summary()


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.3, 0.7), 0.7), ((0.9, 0.1), 0.9), ((1, 0), 1.0), ((0.6, 0.3), 1.0), ((7, 3), 1.0), ((-1, 2), 1.0)],
)
def test_labels_that_are_probabilities_are_the_preference(rows: Any, values: Any, expected: float) -> None:
    pairs = open_pairs("pick_a_pic", rows({**PICKED, "label_0": values[0], "label_1": values[1]}))
    assert labels(pairs) == [Label(expected)]
    stated = open_pairs("pick_a_pic", rows({**PICKED, "label_0": values[0], "label_1": values[1], "preference": 0.55}))
    assert labels(stated) == [Label(0.55)]


def test_scores_are_margins_on_request(rows: Any) -> None:
    picked, scored = (
        {**PICKED, "score_0": 1.0, "score_1": 3.0},
        {**RESPONSES["trl"], "score_chosen": 5, "score_rejected": 1},
    )
    assert labels(open_pairs("auto", rows(picked))) == [NO_LABEL]
    assert labels(open_pairs("auto", rows(picked), margins=Margins("score", 0.5))) == [Label(margin=1.0)]
    log = open_responses("trl", rows(scored), margins=Margins("log_score", 2.0))
    assert labels(log)[0].margin == pytest.approx(2.772588722239781)  # 2 ln 4
    ranked = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "human_preference": [5, 2, 1]}
    assert [x.margin for x in labels(open_pairs("rankings", rows(ranked), margins=Margins("score")))] == [3.0, 4.0, 1.0]
    # Without scores, or with equal ones for a logarithm, a row is dropped
    pairs = open_pairs("pick_a_pic", rows(picked, PICKED), margins=Margins("score"))
    assert len(pairs) == 1 and "has no scores, which data.margin: score takes" in pairs.skipped[0].reason
    even = {**scored, "score_rejected": 5}
    pairs = open_responses("trl", rows(scored, {**even, "chosen": "Foxes."}), margins=Margins("log_score"))
    assert len(pairs) == 1 and "exceeds the rejected one by 0" in pairs.skipped[0].reason


@pytest.mark.parametrize("worth", ["scores", "ranks"])
def test_ranked_responses_have_margins(rows: Any, worth: str) -> None:
    """The gap of each couple; a column of margins has its own."""
    ranked = {"image": "0.png", "prompt": "What?", "responses": ["A fox.", "A dog.", "A cat."], worth: [4.0, 1.0, 2.0]}
    gaps = [2.0, 3.0, 1.0] if worth == "scores" else [1.0, 3.0, 2.0]
    pairs = open_responses("rankings", rows(ranked), margins=Margins("score", 0.5))
    assert [x.margin for x in labels(pairs)] == [gap / 2 for gap in gaps]
    pairs = open_responses("rankings", rows({**ranked, **LABEL}))
    assert labels(pairs) == [EXPECTED] * 3 and not pairs.unread


def test_scores_that_are_the_labels_are_margins_too(rows: Any) -> None:
    picked = {"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "score_0": 1.0, "score_1": 3.0}
    pairs = open_pairs("auto", rows(picked), margins=Margins("score"))
    assert labels(pairs) == [Label(margin=2.0)] and not pairs.unread


@pytest.mark.parametrize("layout", ["folder", "trl"])
def test_fields_of_labels_that_are_not_read_drop_no_row(rows: Any, layout: str) -> None:
    row, opened = {**IMAGES, **RESPONSES}[layout], open_pairs if layout in IMAGES else open_responses
    path = rows({**row, "preference": "left", "weight": 2, "margin": "wide"})
    assert labels(opened(layout, path, labels=())) == [NO_LABEL]
    pairs = opened(layout, path, labels=("weight",), margins=Margins("score"))
    assert labels(pairs) == [Label(weight=2.0)] and pairs.unread == ("preference", "margin")


def test_a_score_that_is_no_number_drops_a_row_only_for_margins(rows: Any) -> None:
    path = rows({**PICKED, "score_0": "n/a", "score_1": 3}, {**PICKED, "caption": "b", "score_0": 1, "score_1": 3})
    pairs = open_pairs("pick_a_pic", path)
    assert labels(pairs) == [NO_LABEL] * 2 and pairs.unread == ("score_0", "score_1")
    pairs = open_pairs("pick_a_pic", path, margins=Margins("score"))
    assert labels(pairs) == [Label(margin=2.0)]
    assert 'the rejected score is "n/a"; expected a number' in pairs.skipped[0].reason


def test_integer_annotators_of_a_column_with_empty_cells_are_names(rows: Any) -> None:
    (label,) = labels(open_pairs("folder", rows({**IMAGES["folder"], "annotator": 7.0})))
    assert label.annotator == "7"


def test_columns_that_nothing_reads_are_told(rows: Any) -> None:
    extra = {**IMAGES["folder"], **LABEL, "created_at": "today", "score_chosen": 1, "score_rejected": 0}
    pairs = open_pairs("folder", rows(extra))
    assert pairs.unread == ("created_at", "score_chosen", "score_rejected")
    assert "nothing reads columns created_at, score_chosen, score_rejected" in pairs.summary()
    assert pairs.select([0]).unread == pairs.unread
    assert open_pairs("folder", rows(extra), labels=()).unread == (*LABEL, *pairs.unread)
    assert open_pairs("folder", rows(extra), margins=Margins("score")).unread == ("margin", "created_at")
    assert open_pairs("folder", rows(extra), group_by="created_at").unread == pairs.unread[1:]
    assert open_responses("trl", rows({**RESPONSES["trl"], "model": "x"})).unread == ("model",)
    assert "nothing reads" not in open_responses("trl", rows(RESPONSES["trl"])).summary()


@pytest.mark.parametrize("layout", ["folder", "trl"])
def test_labels_belong_to_a_run_and_not_to_its_caches(rows: Any, layout: str) -> None:
    row, opened = {**IMAGES, **RESPONSES}[layout], open_pairs if layout in IMAGES else open_responses
    plain, labelled = opened(layout, rows(row)), opened(layout, rows({**row, "weight": 2}))
    others = [opened(layout, rows({**row, name: value})) for name, value in LABEL.items()]
    prints = {fingerprint_pairs(pairs) for pairs in (plain, labelled, *others[:2], others[3])}
    assert len(prints) == 5 and fingerprint_pairs(labelled) == fingerprint_pairs(others[2])
    assert {pair_key(pairs[0]) for pairs in (plain, labelled, *others)} == {pair_key(plain[0])}
    assert plain[0].row == labelled[0].row


def test_tables_keep_their_labels(tmp_path: Path) -> None:
    """The columns of labels are copied to the memory map, and empty cells have the defaults."""
    record = {"caption": "a", "jpg_0": png(0), "jpg_1": png(1), "label_0": 1.0, "label_1": 0.0}
    table = pa.Table.from_pylist([{**record, **LABEL, "extra": 1}, {**record, "caption": "b", "annotator": None}])
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = open_pairs("auto", str(tmp_path / "pairs.parquet"))
    assert labels(pairs) == [EXPECTED, NO_LABEL] and pairs.unread == ("extra",)
    collated = collate_labels(list(pairs))
    assert collated is not None and json.dumps([x.tolist() for x in collated[:3]])  # plain numbers
    assert collated.weight.tolist() == [2.0, 1.0] and list(collated.annotators) == ["kim", ""]
    assert collate_labels([pairs[1]]) is None
