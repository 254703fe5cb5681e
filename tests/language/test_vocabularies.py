"""Vocabularies by name."""

from pathlib import Path

import pytest

from mmalign.language.objects import coco_vocabulary
from mmalign.language.vocabularies import load_vocabulary
from mmalign.toy.crowds import KINDS, describe


def test_names(tmp_path: Path) -> None:
    assert load_vocabulary("key", "refined") is coco_vocabulary("refined")
    assert load_vocabulary("key", "published") is coco_vocabulary("published")
    world = load_vocabulary("key", "crowds")
    assert [mention.object for mention in world.mentions(describe(KINDS))] == list(KINDS)
    (tmp_path / "own.json").write_text('{"dog": ["puppy"], "red circle": []}')
    own = load_vocabulary("key", str(tmp_path / "own.json"))
    assert [m.object for m in own.mentions("Two puppies in a red circle.")] == ["dog", "red circle"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not JSON in UTF-8"),
        ('["dog"]', "does not hold lists of words by object"),
        ('{"dog": "puppy"}', "does not hold lists of words by object"),
        ('{"dog": [1]}', "does not hold lists of words by object"),
        ("{}", "no objects"),
        ('{"dog": ["pet"], "cat": ["pet"]}', "'pet' is a word for 'dog' and for 'cat'"),
    ],
)
def test_a_file_that_is_no_vocabulary(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        load_vocabulary("prepare.povid.vocabulary", str(tmp_path / "own.json"))
    message = str(raised.value)
    assert message.startswith(f"prepare.povid.vocabulary: {tmp_path / 'own.json'}") and sentence in message


def test_a_file_of_the_project_has_its_name_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text('{"dog": []}')
    monkeypatch.setattr("mmalign.resources.roots", lambda: [Path(), tmp_path])
    assert load_vocabulary("key", "own.json").objects == ("dog",)
