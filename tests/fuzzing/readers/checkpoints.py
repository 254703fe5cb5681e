"""Checkpoints and the record of a trained model."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import strategies as st

from mmalign.commands._trained import TrainedModel
from mmalign.training import checkpoint
from mmalign.training.export import RUN_INFO, RunInfo, read_run_info
from mmalign.training.record import Change, Record
from tests.fuzzing.mutations import VALUES
from tests.fuzzing.readers.recipes import SECTIONS
from tests.fuzzing.rule import Files, Reader

IDENTITY = {"model": "m", "pairs": "p", "pairs of a batch": "2", "batches of an update": "1"}
RECIPE = {"method": {"name": "diffusion_dpo"}, **SECTIONS}
RECORD = Record(RECIPE, (Change(2, "train.lr", 1e-3, 1e-4),))


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written() -> Files:
    state = {"progress": {"step": 2, "pending": 0}, "generator": torch.get_rng_state(), "reports": {"loss": [0.5]}}
    with tempfile.TemporaryDirectory() as name:
        weights = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.zeros(3)}
        checkpoint.write(Path(name), 2, weights, state, IDENTITY, keep_checkpoints=1, score=0.5, record=RECORD)
        return files_in(Path(name))


def read(folder: Path) -> None:
    checkpoint.best(folder)
    path = checkpoint.latest(folder, resumable=True) or folder / "checkpoint-00000002"
    checkpoint.read(path, IDENTITY)


def read_hashed(folder: Path) -> None:
    """Read a checkpoint whose hashes are those of its files, whatever they hold."""
    path = folder / "checkpoint-00000002"
    about = json.loads(written()["checkpoint-00000002/checkpoint.json"])
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    about["hashes"] = {file.name: checkpoint._hash(file) for file in files}
    path.mkdir(exist_ok=True)
    if (path / "checkpoint.json") in files:
        (path / "checkpoint.json").write_text(json.dumps(about))
    checkpoint.read(path, IDENTITY)


def read_trained(folder: Path) -> None:
    info = read_run_info(folder)
    _ = TrainedModel(folder, info, None).pairs_per_update, str(info.record.changes)


SOUND = written()
TRAINED = json.dumps(asdict(RunInfo(2, 1.5, IDENTITY, RECORD))).encode()

READERS = (
    Reader("checkpoints", read, (SOUND,), share=60),
    Reader("checkpoints with right hashes", read_hashed, (SOUND,), share=40),
    Reader(
        "trained.json",
        read_trained,
        ({RUN_INFO: TRAINED},),
        share=60,
        places=("there is no trained model",),
        generated=st.builds(lambda value: {RUN_INFO: json.dumps(value).encode()}, VALUES),
    ),
)
