"""Reader of a gallery's page, for tests."""

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """A gallery's page as read without scripts.

    Attributes:
        text: the source.
        tags: every tag with its attributes.
        cards: section and title of each card, in order.
        answers: the answers as a screen reader reads them.
        marked: the marked words as a sighted reader sees them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[tuple[str | None, str | None]] = []
        self.section: str | None = None
        paragraphs = re.findall(r'<div class="answer">.*?<p>(.*?)</p>', self.text, re.DOTALL)
        self.answers = [visible(paragraph) for paragraph in paragraphs]
        marks = re.findall(r"<mark>(.*?)</mark>", self.text, re.DOTALL)
        self.marked = [visible(re.sub(r'<span class="hush">.*?</span>', "", mark)) for mark in marks]
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "section":
            self.section = values.get("id")
        if tag == "article":
            self.cards.append((self.section, values.get("data-title")))

    def values(self, tag: str, name: str) -> list[str]:
        """Return an attribute's values over the tags of one kind that have it."""
        return [str(values[name]) for text, values in self.tags if text == tag and name in values]


def digest(text: str) -> str:
    """Return the source by which a content policy allows an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def visible(markup: str) -> str:
    """Return a text without its tags."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))
