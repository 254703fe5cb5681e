"""Paths of bundled recipes, model cards and models by name, and ids of models on the Hub.

`configs/`, `models/` and `assets/` are beside the package in a checkout and in `mmalign/_share/` in the wheel. A name
such as `models/tiny_sd` works in both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHARED = ("configs", "models", "assets")
RECIPES = "*_*/*.yaml"  # the recipes in configs/, by modality; configs/accelerate/ holds no recipes

# A Hub id: ORG/NAME, of the characters that the Hub allows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Folders of the project: a misspelt name in one of them is a missing file, never a Hub id.
_OURS = (*SHARED, "runs")


def roots() -> list[Path]:
    """Return the folders to search for a relative name: the current one, the checkout if any, the wheel's copy."""
    checkout = [PACKAGE.parent] if (PACKAGE.parent / "pyproject.toml").is_file() else []
    return [Path(), *checkout, PACKAGE / "_share"]


def resolve(name: str | Path) -> Path:
    """Return the existing file or folder of a name: the path as given, else in the checkout, else in the wheel's copy.

    Raises:
        ValueError: none exists; the message lists the searched folders and similar names.
    """
    if not str(name).strip():
        raise ValueError("an empty name; expected a path such as 'configs/text_to_image/quickstart.yaml'")
    path = Path(os.path.expanduser(name))
    for root in roots():
        if os.path.exists(root / path):  # unlike Path.exists, False for a name that is too long
            return root / path
    near = _similar_names(path.as_posix())
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give the path of an existing one"
    places = ["the current folder", *map(str, roots()[1:])]
    roots_text = "" if path.is_absolute() else f" in {', '.join(places)}"
    raise ValueError(f"there is no file or folder {str(name)[:200]!r}{roots_text}; {hint}")


def resolve_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or a bundled recipe's name without folder and suffix.

    Raises:
        ValueError: there is no such file, or several bundled recipes have the name.
    """
    try:
        return resolve(name)
    except ValueError as missing:
        files = {short: path for short, path in bundled_recipes().items() if str(name) in (short, path.stem)}
        if len(files) > 1:
            expected = " or ".join(files)
            raise ValueError(f"{name}: several bundled recipes have this name; expected {expected}") from None
        if not files and str(missing).endswith("?"):  # similar names
            raise
        if not files:
            raise ValueError(f"{missing}; `mmalign list` shows the bundled recipes") from None
        return next(iter(files.values()))


def bundled_recipes() -> dict[str, Path]:
    """Return the files of all bundled recipes by name, such as "text_to_image/quickstart", sorted."""
    folder = next((root / "configs" for root in roots()[1:] if (root / "configs").is_dir()), None)
    paths = sorted(folder.glob(RECIPES)) if folder is not None else []
    return {path.relative_to(path.parents[1]).with_suffix("").as_posix(): path for path in paths}


def locate(name: str) -> str:
    """Return the path of data in the first of `roots` that has the name; else the name itself, a glob or a Hub id."""
    name = os.path.expanduser(name)
    paths = (str(root / name) for root in roots() if os.path.exists(root / name))
    return next(paths, name)


def is_hub_id(name: str) -> bool:
    """Return whether a name that is not a local path is a Hub id ORG/NAME; `models/x`, `./x/y` and `~/x` are not."""
    return bool(_HUB_ID.fullmatch(name)) and name.split("/")[0] not in _OURS


def resolve_model(name: str) -> str:
    """Return a local model's path, or the unchanged Hub id; a local path precedes a Hub id of the same spelling.

    The schemas of open_clip's names, `hf-hub:` and `local-dir:`, are left out.

    Raises:
        ValueError: the name is neither. A name in `models/` or with a leading `.`, `/` or `~` is never a Hub id.
    """
    name = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    try:
        return str(resolve(name))
    except ValueError as missing:
        if is_hub_id(name):
            return name
        raise ValueError(f"model: {missing}; on the Hub a model is named 'organisation/name'") from None


def located(key: str, name: str, find: Callable[[str], str | Path] = resolve_model) -> str:
    """Return the location of a name of the recipe; an error begins with the name's key."""
    try:
        return str(find(name))
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).removeprefix('model: ')}") from None


def _similar_names(name: str) -> list[str]:
    """Return up to three similar names of bundled files and folders, compared whole or by their last part."""
    known = sorted({known for root in roots()[1:] for known in _bundled_names(root)})
    whole = get_close_matches(name, known, n=3, cutoff=0.75)
    stems = get_close_matches(Path(name).stem, {Path(path).stem for path in known}, n=3, cutoff=0.75)
    last = [path for stem in stems for path in known if Path(path).stem == stem]
    return list(dict.fromkeys(whole + last))[:3]


def _bundled_names(root: Path) -> list[str]:
    """Return the names that a user may give: recipes, cards, and the folders directly in `models/` and `assets/`."""
    paths = [path for folder in SHARED for path in (root / folder).rglob("*.yaml")]
    paths += [path for folder in ("models", "assets") for path in (root / folder).glob("[!.]*/")]
    return [path.relative_to(root).as_posix() for path in paths]
