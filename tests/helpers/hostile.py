"""Objects whose pickles run code."""

import os
from pathlib import Path


class Hostile:
    """Object whose pickle makes a folder when it is read without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)
