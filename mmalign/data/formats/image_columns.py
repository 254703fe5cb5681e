"""Names by which columns of image preference pairs are recognized."""

from __future__ import annotations

from collections.abc import Sequence


def of_two(first: bool, stems: Sequence[str]) -> list[str]:
    """Return names such as image_a or left_image; those that count from 1 come last."""
    places = ("0", "a", "left", "first", "1") if first else ("1", "b", "right", "second", "2")
    return [name for place in places for stem in stems for name in (f"{stem}_{place}", f"{place}_{stem}")]


def of_side(names: Sequence[str]) -> list[str]:
    """Return names such as winner_image or image_winner."""
    parts = ("image", "img", "path", "file", "jpg", "file_name", "image_path", "img_path")
    return [*names, *(name for n in names for part in parts for name in (f"{n}_{part}", f"{part}_{n}"))]


PROMPTS = ("prompt", "caption", "text", "prompts", "captions", "description", "instruction", "query", "title")
IMAGES = ("image", "img", "jpg", "path", "file", "picture", "image_path", "img_path")
LABELS = ("label", "score", "rating", "votes", "vote", "reward", "preference", "num_votes")
CHOSEN = ("chosen", "winner", "win", "preferred", "better", "good", "best", "positive", "accepted")
REJECTED = ("rejected", "loser", "lose", "loss", "dispreferred", "unpreferred", "worse", "bad", "worst", "negative")
WORTHS: tuple[str, ...] = ("overall_rating", "overall_score", "overall", "rating", "reward", "human_score", "votes")
WORTHS += (
    "likes",
    "elo",
    "preference",
    "aesthetic_score",
    "aesthetics_score",
    "quality",
    "mos",
    "label",
    "liked",
    "good",
)
THUMB = ("liked", "like", "is_liked", "thumb", "thumbs_up", "good", "is_good", "vote", "feedback", "preference")
SOURCES: tuple[str, ...] = ("source_image", "input_image", "original_image", "reference_image", "control_image")
SOURCES += ("source_img", "input_img", "original", "input", "image_before", "before", "control", "image")
