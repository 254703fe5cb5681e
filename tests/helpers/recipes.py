"""Recipes for tiny models: `train={...}` and so on extend a section; `method={...}` replaces it."""

from pathlib import Path
from typing import Any

from tests.helpers.data_files import SIDE, pick_a_pic

TRAIN: dict[str, Any] = {"steps": 4, "batch_size": 2, "save_every": 2, "log_every": 1, "trackers": []}


def diffusion(model: Path, pairs: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    base = {
        "method": {"name": "diffusion_dpo", "beta": 100.0},
        "model": {"path": str(model), "tune": "full"},
        "data": {"path": str(pairs), "resolution": SIDE},
        "train": {**TRAIN, "lr": 1e-3},
    }
    return _changed(base, output, sections)


def diffusion_in(model: Path, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with its own pairs, all in a folder."""
    folder.mkdir(exist_ok=True)
    return diffusion(model, pick_a_pic(folder / "pairs.parquet"), folder / "output", **sections)


def vlm(model: Path, rows: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    base = {
        "method": {"name": "dpo"},
        "model": {"path": str(model), "tune": "lora", "lora": {"rank": 2}},
        "data": {"format": "trl", "path": str(rows)},
        "train": {**TRAIN, "lr": 1e-2},
    }
    return _changed(base, output, sections)


def _changed(base: dict[str, Any], output: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for name, section in sections.items():
        base[name] = section if name == "method" else {**base.get(name, {}), **section}
    return {**base, "output": str(output)}
