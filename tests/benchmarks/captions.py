"""Cost of long captions: CPU seconds of a page with captions of 10,000 characters, and of one with short captions.

    python -m tests.benchmarks.captions --repeats 9

Pages of pictures, pages of answers and the side-by-side picture of a comparison are measured, each with long texts of
words, of one word, and for answers of many marked spans. Short and long pages alternate; the printed ratio is that of
the fastest ones. It ends with exit code 1 if a ratio exceeds `LIMIT`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mmalign.evaluation.benchmarks.base import RatedAnswer
from mmalign.pages import answers, pictures
from mmalign.pages.comparison import RatedImage, render_side_by_side
from mmalign.pages.page import GalleryEntry, PageLayout, write_page

LIMIT = 1.5
LENGTHS = (200, 10_000)  # characters
NUM_ENTRIES = 8
TEXTS: dict[str, Callable[[int], str]] = {
    "words": lambda length: ("a red circle above a blue star " * length)[:length],
    "one word": lambda length: "w" * length,
}
IMAGES = (Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"))


def picture(text: str, number: int) -> GalleryEntry:
    """Return an entry of a page of pictures whose prompt and notes are the text."""
    return pictures.picture_entry(text, number, IMAGES, (number % 2, 0.5), (text, text))


def answer(text: str, number: int, spans: tuple[tuple[int, int], ...] = ()) -> GalleryEntry:
    """Return an entry of a page of answers whose question and answers are the text."""
    before, after = (RatedAnswer(text, score, "note", spans) for score in (number % 2, 0.5))
    return answers.answer_entry(IMAGES[0], "image", text, text, before, after)


def marked_answer(text: str, number: int) -> GalleryEntry:
    """Return an entry with five marked letters of every hundred."""
    return answer(text, number, tuple((start, start + 5) for start in range(0, len(text) - 5, 100)))


def page(layout: PageLayout, entry: Callable[[str, int], GalleryEntry], text: str) -> None:
    """Write a page of entries."""
    entries = [entry(text, number) for number in range(NUM_ENTRIES)]
    with tempfile.TemporaryDirectory() as folder:
        write_page(Path(folder), entries, layout, title=text, summary=[], score_name="score", provenance={"a": text})


def comparison(text: str) -> None:
    """Render a comparison's images side by side."""
    rated = [RatedImage(image, text, True) for image in IMAGES * (NUM_ENTRIES // 2)]
    render_side_by_side([text] * NUM_ENTRIES, {"base": rated, text[:400]: rated}, text, [text])


KINDS: dict[str, Callable[[str], None]] = {
    "pictures": lambda text: page(pictures.LAYOUT, picture, text),
    "answers": lambda text: page(answers.LAYOUT, answer, text),
    "answers, marked": lambda text: page(answers.LAYOUT, marked_answer, text),
    "comparison": comparison,
}


def measure(write: Callable[[str], None], text: Callable[[int], str], repeats: int) -> list[float]:
    """Return the fewest CPU seconds for a text of each length, measured in turn."""
    seconds = [list[float]() for _ in LENGTHS]
    for _ in range(repeats):
        for times, length in zip(seconds, LENGTHS, strict=True):
            started = time.process_time()
            write(text(length))
            times.append(time.process_time() - started)
    return [min(times) for times in seconds]


def main() -> int:
    """Print a table of all kinds of pages and texts; return 1 if a ratio exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats, worst = parser.parse_args().repeats, 0.0
    print(f"| page | text | {LENGTHS[0]} characters, s | {LENGTHS[1]:,} characters, s | ratio |\n|---|---|---|---|---|")
    for kind, write in KINDS.items():
        for name, text in TEXTS.items():
            short, long = measure(write, text, repeats)
            worst = max(worst, long / short)
            print(f"| {kind} | {name} | {short:.3f} | {long:.3f} | {long / short:.2f} |", flush=True)
    print(f"largest ratio {worst:.2f}; limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
