"""Gallery layout for images before and after alignment, of the same prompt and noise, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mmalign.pages.grid import INK, MUTED, Cell, Piece, Text, Tile
from mmalign.pages.page import GalleryEntry, PageLayout
from mmalign.pages.ranking import Scores, format_change, format_scores, kind


def picture_entry(
    prompt: str,
    seed: int,
    images: Sequence[Image.Image],
    scores: Scores,
    notes: tuple[str, str] = ("", ""),
    source: Image.Image | None = None,
) -> GalleryEntry:
    """Return the gallery entry of one prompt and seed, with images, scores and notes before and after alignment.

    `source` is the image that both are edits of.
    """
    by_name = dict(zip(("before_image", "after_image"), images, strict=True))
    by_name |= {"source_image": source} if source is not None else {}
    # A tile with the prompt above its images, and scores, change and notes below them
    cells = [Cell([Text([Piece("source", MUTED)])], source)] if source is not None else []
    for side, image, score, note in zip(("before", "after"), images, format_scores(scores), notes, strict=True):
        pieces = [Piece(f"{side} {score}")]
        if side == "after":
            pieces.append(Piece(f" ({format_change(scores)})", INK[kind(scores)]))
        cells.append(Cell([Text(pieces), Text([Piece(note, MUTED)], 16)], image))
    tile = Tile(cells, heading=[Text([Piece(prompt)], 21, num_lines=2)])
    return GalleryEntry(prompt, f"seed {seed}", scores, notes, by_name, {"prompt": prompt, "seed": seed}, tile)


LAYOUT = PageLayout(
    template="pictures.html.jinja",
    lead="The same prompts, seeds and starting noise, before and after.",
    noun="prompt",
    columns=4,
    num_in_grid=24,
)
