"""Published values, computed by the papers' own releases."""

import json
from pathlib import Path
from typing import Any


def golden(name: str) -> Any:
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())
