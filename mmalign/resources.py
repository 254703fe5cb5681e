"""Where things are: files that travel with the project (recipes, model cards, bundled models) and models on the Hub.

`configs/`, `models/` and `assets/` stand beside the package in a checkout and in `mmalign/_share/` in the wheel. A name
such as `models/tiny_sd` means the same in both.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHARED = ("configs", "models", "assets")

# A Hub id is ORG/NAME, in the characters that the Hub allows.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Folders of the project: a misspelt name in one of them is a missing file, never a question to the Hub.
_OURS = (*SHARED, "runs")


def roots() -> list[Path]:
    """Where a relative name is looked up: the current folder, the checkout if there is one, the packed copy."""
    checkout = [PACKAGE.parent] if (PACKAGE.parent / "pyproject.toml").is_file() else []
    return [Path(), *checkout, PACKAGE / "_share"]


def resolve(name: str | Path) -> Path:
    """The existing file or folder that a name means: a path as given, else in the checkout, else in the packed copy.

    Raises:
        ValueError: there is none; the message names the places looked in and what is there with a similar name.
    """
    if not str(name).strip():
        raise ValueError("an empty name is no file; expected a path such as 'configs/text_to_image/quickstart.yaml'")
    path = Path(os.path.expanduser(name))
    for root in roots():
        if os.path.exists(root / path):  # unlike Path.exists, False for a name that is too long
            return root / path
    near = _similar_names(path.as_posix())
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give a path, or see `mmalign list`"
    places = ["the current folder", *map(str, roots()[1:])]
    roots_text = "" if path.is_absolute() else f" in {', '.join(places)}"
    raise ValueError(f"there is no file or folder {str(name)[:200]!r}{roots_text}; {hint}")


def locate(name: str) -> str:
    """Where data lie: the name in the first of `roots` that has it, else as it is: a glob, or a Hub id."""
    paths = (str(root / name) for root in roots() if os.path.exists(root / name))
    return next(paths, name)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no local path reads as ORG/NAME on the Hub; `models/x`, `./x/y` and `~/x` do not."""
    return bool(_HUB_ID.fullmatch(name)) and name.split("/")[0] not in _OURS


def resolve_model(name: str) -> str:
    """A local model's path, or the Hub id as it came. A local path wins over a Hub id of the same spelling.

    Raises:
        ValueError: neither; a name in `models/` or one that begins with `.`, `/` or `~` is not looked for on the Hub.
    """
    try:
        return str(resolve(name))
    except ValueError as missing:
        if is_hub_id(name):
            return name
        raise ValueError(f"model: {missing}; on the Hub a model is named 'organisation/name'") from None


def _similar_names(name: str) -> list[str]:
    """Up to three names of shared files and folders like this one, compared whole or by their last part."""
    known = sorted({known for root in roots()[1:] for known in _bundled_names(root)})
    whole = get_close_matches(name, known, n=3, cutoff=0.75)
    stems = get_close_matches(Path(name).stem, {Path(path).stem for path in known}, n=3, cutoff=0.75)
    last = [path for stem in stems for path in known if Path(path).stem == stem]
    return list(dict.fromkeys(whole + last))[:3]


def _bundled_names(root: Path) -> list[str]:
    """What a person names: recipes, cards, and the folders directly in `models/` and `assets/`."""
    paths = [path for folder in SHARED for path in (root / folder).rglob("*.yaml")]
    paths += [path for folder in ("models", "assets") for path in (root / folder).glob("[!.]*/")]
    return [path.relative_to(root).as_posix() for path in paths]
