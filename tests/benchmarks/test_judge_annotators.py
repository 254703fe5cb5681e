"""The world of planted tastes: who prefers what, and what the table counts."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.benchmarks.judge_annotators import Pair, Person, draw_pair, draw_person, outcomes, table, write


@pytest.mark.parametrize("taste", range(3))
def test_labels_follow_the_tastes_of_a_person(taste: int) -> None:
    """Somebody of one taste follows it in most pairs; the other two tell as good as nothing."""
    rng = np.random.default_rng(0)
    pairs = [draw_pair(np.eye(3)[taste], rng) for _ in range(100)]
    right = [outcomes(np.array([pair.gains[k] for pair in pairs]), pairs).mean() for k in range(3)]
    assert right[taste] > 0.7 and max(np.delete(right, taste)) < 0.65


def test_people_are_drawn_the_same_again(tmp_path: Path) -> None:
    kim, again = (draw_person("kim", 3, learning=2, test=1) for _ in range(2))
    assert kim.learning[0].images == again.learning[0].images and kim.shares.sum() == pytest.approx(1)
    rows = pq.read_table(write(tmp_path / "pairs.parquet", {"kim": kim.learning})).to_pylist()
    assert [row["annotator"] for row in rows] == ["kim", "kim"]
    assert [row["label_0"] for row in rows] == [float(pair.first) for pair in kim.learning]


def test_the_table_compares_with_the_mean_taste() -> None:
    pairs = [Pair("star", (b"", b""), np.array([gain, 0, 0]), True) for gain in (1.0, 1.0, 1.0, -1.0)]
    people = [Person(name, np.array([1.0, 0, 0]), [], pairs) for name in ("kim", "lee")]
    mean, added = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]]), np.array([[1.0, 1, 1, 0], [1, 1, 1, 0]])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(people, mean, {("added", 4): added})[2:]]
    assert [row[0] for row in rows] == ["mean", "added, 4 pairs", "the planted taste itself"]
    assert [row[1].split(" [")[0] for row in rows] == ["37.5", "75.0", "75.0"]
    assert [row[2].split(" [")[0] for row in rows] == ["", "+37.5", "+37.5"]
