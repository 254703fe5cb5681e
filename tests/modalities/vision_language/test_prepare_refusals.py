"""What `prepare` of responses cannot use is left out or refused, in a sentence, before anything is made."""

from pathlib import Path
from typing import Any

import pytest

from mmalign.commands import prepare
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import PrepareResponses
from mmalign.modalities.vision_language.prepare import _open
from tests.helpers import Folders
from tests.helpers.preparation import REALIGN, answers, prepared, refused


def test_what_gives_no_pair_is_left_out_counted_and_named(content: Any, tmp_path: Path) -> None:
    source = answers(tmp_path / "odd", ["A dog.", "Nice.", "A cat."])
    (source.parent / "2.png").write_bytes(b"no picture")
    rows, responses = prepared(content("povid", "a.jsonl", source={"path": str(source)}))
    assert len(rows) == 2
    assert "2 pairs of 3 answers; 1 left out (answers.jsonl: line 2: the completion is empty)" in responses[-1]
    rows, responses = prepared(content("bdhs", "b.jsonl", source={"path": str(source)}))
    assert "1 left out (answers.jsonl: line 3: image 0 (2.png): is not a readable" in responses[-1]


def test_rows_that_cannot_be_used_are_named_too(content: Any, tmp_path: Path) -> None:
    source = answers(tmp_path / "odd", ["A dog.", " ", "A cat.", "A bus."])
    (source.parent / "3.png").unlink()
    rows, responses = prepared(content("povid", source={"path": str(source)}))
    assert len(rows) == 2
    assert "2 rows of the source cannot be used (answers.jsonl: line 2: the chosen response is empty; " in responses[-1]
    assert 'answers.jsonl: line 4: the image "3.png" does not exist' in responses[-1]


def test_nothing_at_all_is_an_error_that_leaves_nothing(content: Any, tmp_path: Path) -> None:
    source = answers(tmp_path / "odd", ["Nice.", "Good."])
    message = refused(content("povid", source={"path": str(source)}))
    assert message.startswith(
        f"prepare: none of 2 answers of {source} gave a pair: answers.jsonl: line 1: the completion is empty"
    )
    assert not list(tmp_path.glob("made*"))


def test_an_answer_that_is_too_long_is_left_out(content: Any, tmp_path: Path) -> None:
    source = answers(tmp_path / "odd", ["A dog.", "A dog and a cat. " * 60])
    rows, responses = prepared(content("bdhs", source={"path": str(source)}))
    assert len(rows) == 1 and "line 2: prompt and answer have " in responses[-1] and "reads 256" in responses[-1]


def test_existing_pairs_are_never_replaced(content: Any, tmp_path: Path) -> None:
    (tmp_path / "made.jsonl").write_text("mine")
    assert "already exists; move it away" in refused(content("povid"))
    assert (tmp_path / "made.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "changed", "overrides", "sentence"),
    [
        ("bdhs", {}, ["data.format=povid"], "data.format: kind bdhs writes trl, got povid; set it to trl"),
        (
            "povid",
            {},
            ["data.path=made.csv"],
            "data.path: expected the file that prepare is to write, *.jsonl or *.parquet",
        ),
        ("povid", {}, ["data.images=nowhere"], "data.images: nowhere is not a folder"),
        ("povid", {"source": {"path": "no.jsonl"}}, [], "prepare.source.path: no.jsonl does not exist"),
        ("povid", {"povid": {"vocabulary": "no.json"}}, [], "prepare.povid.vocabulary: no.json cannot be read"),
        ("bdhs", {"bdhs": {"keep_rejected": True}}, [], "rows of answers have no rejected responses"),
        ("own", {}, ["data.format=povid"], "data.format: kind own writes trl, got povid; set it to trl"),
        ("bdhs", {"bdhs": {"similarity": "no/model"}}, [], "prepare.bdhs.similarity: no/model"),
        ("realign", {"realign": {**REALIGN, "retriever": "models/no"}}, [], "prepare.realign.retriever: cannot load"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(
    kind: str, changed: dict[str, Any], overrides: list[str], sentence: str, content: Any, tmp_path: Path
) -> None:
    assert sentence in refused(content(kind, **changed), *overrides)
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    ("kind", "changed", "sentence"),
    [
        ("bdhs", {"povid": {}}, "prepare: kind bdhs takes no section 'povid'; leave it out"),
        (
            "realign",
            {"realign": None},
            "prepare: kind realign needs a model that compares images; add realign.retriever",
        ),
        ("own", {"bdhs": {}}, "prepare: kind own takes no section 'bdhs'; leave it out"),
        ("own", {"own": {"max_new_tokens": 0}}, "prepare.own.max_new_tokens"),
        ("bdhs", {"bdhs": {"rho": 0.5, "keep_tokens": 3}}, "rho and keep_tokens both set how many"),
        ("bdhs", {"reward": {"path": "models/tiny_clip"}}, "prepare has no 'reward'"),
        (
            "bdhs",
            {"kind": "bhds"},
            "prepare.kind: expected 'bdhs', 'realign', 'povid', 'own' or 'judged', got the text 'bhds'",
        ),
    ],
)
def test_a_recipe_whose_settings_do_not_fit_is_refused(
    kind: str, changed: dict[str, Any], sentence: str, content: Any
) -> None:
    with pytest.raises(ValueError) as raised:
        load_recipe(content(kind, **changed))
    assert sentence in str(raised.value)


def test_images_in_a_table_cannot_be_named_in_json(content: Any, tmp_path: Path) -> None:
    prepare.prepare(load_recipe(content("povid", "a.parquet")))
    message = refused(content("povid", "b.jsonl", source={"path": str(tmp_path / "a.parquet"), "format": "trl"}))
    assert "would name images, and those of" in message and "*.parquet" in message


def test_a_model_that_cannot_be_blinded_is_refused(content: Any, vlm_folders: Folders, tmp_path: Path) -> None:
    message = refused(content("bdhs"), f"model.path={vlm_folders('qwen3_5')}")
    assert message.startswith("model.path: BDHS masks an image for ") and not list(tmp_path.glob("made*"))


def test_images_of_the_project_have_their_name_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = answers(tmp_path / "rows", ["A dog."])
    (tmp_path / "pictures").mkdir()
    for picture in source.parent.glob("*.png"):
        picture.rename(tmp_path / "pictures" / picture.name)
    monkeypatch.setattr("mmalign.resources.roots", lambda: [Path(), tmp_path])
    section = PrepareResponses.model_validate(
        {"kind": "povid", "source": {"path": "rows/answers.jsonl", "images": "pictures"}}
    )
    assert len(_open(section)) == 1
