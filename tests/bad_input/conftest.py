"""A recipe that works, the commands that run it, and a folder of broken things."""

import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import data_files, recipes
from tests.helpers.commands import EVALUATE, Commands, Content


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """What the command line sets by the environment, too late where a test has imported the library already."""
    datasets.disable_progress_bars()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return data_files.pick_a_pic(tmp_path / "pairs.parquet")


@pytest.fixture
def mmalign(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, capfd)


@pytest.fixture
def content(tiny_sd15: Path, pairs: Path, tmp_path: Path) -> Content:
    return recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"steps": 2}, evaluate=EVALUATE)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Path:
    """A folder of broken things."""
    folder = tmp_path_factory.mktemp("world")
    table = pq.read_table(data_files.pick_a_pic(folder / "good.parquet"))
    pq.write_table(table.slice(0, 0), folder / "empty.parquet")
    pq.write_table(table.drop_columns(["jpg_1"]), folder / "lacking.parquet")
    ties = [{**row, "label_0": 0.5, "label_1": 0.5} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(ties), folder / "ties.parquet")
    (folder / "cut.parquet").write_bytes((folder / "good.parquet").read_bytes()[:3000])
    (folder / "zero.parquet").touch()
    (folder / "lines.jsonl").write_text('{"prompt": "a fox", "chosen": "a.png"}\n')
    (folder / "comments.txt").write_text("# no prompt\n\n")
    (folder / "everyday.txt").write_text("a fox\n")
    (folder / "latin.txt").write_bytes("ein Fuchs mit Hüten".encode("latin-1"))
    for name in ("no_index", "bad_index", "list_index", "cascade", "no_tokenizer", "no_unet"):
        shutil.copytree(tiny_sd15, folder / name)
    (folder / "no_index" / "model_index.json").unlink()
    (folder / "bad_index" / "model_index.json").write_text("{")
    (folder / "list_index" / "model_index.json").write_text("[]")
    (folder / "cascade" / "model_index.json").write_text('{"_class_name": "StableCascadeCombinedPipeline"}')
    shutil.rmtree(folder / "no_unet" / "unet")
    for path in (folder / "no_tokenizer" / "tokenizer").iterdir():
        path.unlink()
    return folder
