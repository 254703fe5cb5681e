"""Studies of judged outputs: their data and recipes."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmalign.commands.load_recipe import load_recipe
from tests.benchmarks.studies import STUDIES, flip_labels

PAIRS = Path("assets/quickstart-pairs.parquet")


def test_flipped_labels_swap_both_columns(tmp_path: Path) -> None:
    number = flip_labels(PAIRS, tmp_path / "flipped.parquet", 0.2)
    before, after = (pq.read_table(path).to_pylist() for path in (PAIRS, tmp_path / "flipped.parquet"))
    swapped = [a for a, b in zip(before, after, strict=True) if a != b]
    assert len(swapped) == number and 0.15 < number / len(before) < 0.25
    for a, b in zip(before, after, strict=True):
        if a != b:
            assert [a[f"{kind}_{side}"] for kind in ("label", "score") for side in (0, 1)] == [
                b[f"{kind}_{side}"] for kind in ("label", "score") for side in (1, 0)
            ]
        assert a["jpg_0"] == b["jpg_0"] and a["caption"] == b["caption"]


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_arm_is_a_recipe(name: str, tmp_path: Path) -> None:
    study = STUDIES[name](tmp_path)
    for arm in study.arms.values():
        rates = [f"train.lr={study.rates[0]}"] if study.rates else []
        assert load_recipe(arm.recipe, [*arm.overrides, *rates]).evaluate is not None
