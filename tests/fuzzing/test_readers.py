"""A few inputs of every reader; `python -m tests.fuzzing` is the long form."""

import time
from pathlib import Path

import pytest

from tests.fuzzing import rule
from tests.fuzzing.mutations import DEVICE, FOLDER, PIPE
from tests.fuzzing.rule import Reader, check
from tests.fuzzing.suite import READERS, fuzz

INPUTS = 12


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_reader_answers_or_names_the_place(reader: Reader) -> None:
    for files in reader.sound:
        assert check(reader, files) == ""
    fuzz(reader, INPUTS, shrink=False)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_reader_does_not_hang_on_what_is_no_file(reader: Reader) -> None:
    files = reader.sound[0]
    for name in files:
        for special in (DEVICE, PIPE, FOLDER):
            check(reader, {**files, name: special})


def test_hang_inside_a_handler_of_all_errors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that turns every error into a sentence hides none of its hangs."""

    def read(folder: Path) -> None:
        try:
            time.sleep(60)
        except Exception as error:
            raise ValueError("rows.jsonl: cannot be read") from error

    monkeypatch.setattr(rule, "HANGS", 1)
    with pytest.raises(AssertionError, match="hangs for 1 s"):
        check(Reader("sleeper", read, (), share=0), {"rows.jsonl": b""})
