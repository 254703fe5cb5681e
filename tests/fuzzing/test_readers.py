"""A few inputs of every reader; `python -m tests.fuzzing` is the long form."""

import pytest

from tests.fuzzing.mutations import DEVICE, FOLDER, PIPE
from tests.fuzzing.rule import Reader, check
from tests.fuzzing.suite import READERS, fuzz

INPUTS = 12


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_reader_answers_or_names_the_place(reader: Reader) -> None:
    for files in reader.sound:
        assert check(reader, files) == ""
    fuzz(reader, INPUTS, shrink=False)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_reader_refuses_what_is_no_file(reader: Reader) -> None:
    files = reader.sound[0]
    for name in files:
        for special in (DEVICE, PIPE, FOLDER):
            check(reader, {**files, name: special})
