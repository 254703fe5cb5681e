"""Published values, computed by the papers' own releases."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def golden(name: str) -> Any:
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())
