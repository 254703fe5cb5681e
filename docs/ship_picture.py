"""Copy a gallery's picture to assets/gallery/, with a manifest of the numbers that it shows.

python docs/ship_picture.py runs/quickstart quickstart --command "mmalign quickstart"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

GALLERY = Path(__file__).resolve().parent.parent / "assets" / "gallery"
COPIED = ("score", "provenance", "summary", "counts")  # from the page's own manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the picture of a run's output folder and write its manifest."""
    parser = argparse.ArgumentParser(description="Copy a gallery's picture to assets/gallery/.")
    parser.add_argument("output", type=Path, help="the run's output folder, with gallery/ in it")
    parser.add_argument("name", help="of the picture, without .png")
    parser.add_argument("--command", required=True, help="the command that made the page")
    options = parser.parse_args(arguments)
    ship(options.output, GALLERY / f"{options.name}.png", options.command)


def ship(output: Path, picture: Path, command: str) -> None:
    """Write `picture` and, beside it, its manifest."""
    page = json.loads((output / "gallery" / "manifest.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    shutil.copyfile(output / "gallery" / "gallery.png", picture)
    shown = [page["entries"][index] for indices in page["picture"]["entries"].values() for index in indices]
    manifest = {
        "picture": picture.name,
        "sha256": hashlib.sha256(picture.read_bytes()).hexdigest(),
        "command": command,
        "seed": recipe["train"].get("seed", 0),
        "lines": page["picture"]["lines"],
        **{key: page[key] for key in COPIED},
        "entries": shown,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    picture.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
