"""Pages of the documentation, and what they contain."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mmalign

ROOT = Path(mmalign.__file__).parent.parent


README = ROOT / "README.md"


PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


ANY_RECIPE = "configs/text_to_image/quickstart.yaml"  # stands for RECIPE in a command, and for what `init` writes


MADE = ("runs", "site", "dist")  # folders that commands write


@dataclass(frozen=True)
class Piece:
    """Part of a page: a block, a command, a name or a link, with its line."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text.strip().splitlines()[0]}"


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def prose(page: Path) -> str:
    """Return a page without its fenced blocks; lines keep their numbers."""
    return FENCED.sub(lambda block: re.sub(r"[^\n]", "", block[0]), read(page))


def line_number(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def blocks(language: str) -> list[Piece]:
    """Return the fenced blocks of a language on all pages."""
    return [
        Piece(page, line_number(read(page), match.start(2)), match[2])
        for page in PAGES
        for match in FENCED.finditer(read(page))
        if match[1] == language
    ]


def spans() -> list[Piece]:
    """Return the text between backticks in the prose of all pages."""
    return [
        Piece(page, line_number(prose(page), match.start()), " ".join(match[1].split()))
        for page in PAGES
        for match in re.finditer(r"`([^`]+)`", prose(page))
    ]


def links() -> list[Piece]:
    """Return the targets of links and images, except for web addresses."""
    target = re.compile(r"\]\(([^)\s]+)[^)]*\)|\b(?:src|href)=\"([^\"]+)\"")
    pieces = [
        Piece(page, line_number(prose(page), match.start()), match[1] or match[2])
        for page in PAGES
        for match in target.finditer(prose(page))
    ]
    return [link for link in pieces if "://" not in link.text]


def commands() -> Iterator[Piece]:
    """Yield every line of a bash block, and every command of ours in the prose."""
    for block in blocks("bash"):
        for match in re.finditer(r"(?:.*\\\n)*.+", block.text):
            text = match[0].replace("\\\n", " ")
            if shlex.split(text, comments=True):
                yield Piece(block.page, block.line + block.text.count("\n", 0, match.start()), text)
    yield from (span for span in spans() if re.match(r"(make|mmalign|accelerate launch|python \S+) ", span.text))


def split_command(text: str) -> tuple[str, list[str]]:
    """Return the program of a command line, without its folder, and the arguments as a shell would pass them."""
    words = shlex.split(text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # an environment variable
        words = words[1:]
    arguments = [ANY_RECIPE if word in ("RECIPE", "recipe.yaml") else word for word in words[1:]]
    return words[0].rpartition("/")[2], [word for argument in arguments for word in expand(argument)]


def expand(word: str) -> list[str]:
    """Expand {braces,with,alternatives} and stars as bash does."""
    if braces := re.fullmatch(r"([^{}\s]*)\{([^{}\s]*,[^{}\s]*)\}([^{}\s]*)", word):
        return [f"{braces[1]}{part}{braces[3]}" for part in braces[2].split(",")]
    if "*" in word and "=" not in word:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(word)) or [word]
    return [word]
