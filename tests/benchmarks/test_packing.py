"""The benchmark of shared prompts, run once on short responses: its numbers hang together."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import packing
from tests.benchmarks.packing import PROMPT, Case


def test_packed_runs_the_tokens_that_it_should_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token costs more operations outside attention than in it, so that their ratio is about that of the tokens."""
    file = tmp_path / "packing.json"
    (row,) = packing.measure((Case((12, 4)),), repeats=1)
    prefix = 576 + PROMPT
    assert row.tokens == (prefix + 16, 2 * (prefix + 12))
    assert 1.9 < row.expected < 2.1 and len(row.seconds) == 1 and min(row.seconds[0]) > 0
    assert row.gradient_error < 1e-4
    monkeypatch.setattr(packing, "measure", lambda **_: [row])
    packing.main(["--json", str(file)])
    (told,) = json.loads(file.read_text())
    assert told["ratio"] == row.ratio and told["tokens"] == list(row.tokens)
    assert "12/4" in capsys.readouterr().out
