"""The documented errors of InPO's inversion are those that the program prints."""

from pathlib import Path

import pytest

from tests.benchmarks import inversion_error

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_documented_inversion_errors_are_the_measured_ones(capsys: pytest.CaptureFixture[str]) -> None:
    inversion_error.main()
    assert capsys.readouterr().out in PAGE.read_text(encoding="utf-8")
