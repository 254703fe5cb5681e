"""All checks, in the order of a report. A check is one function and its entry in this list."""

from __future__ import annotations

from functools import partial

from mmalign.doctor.checks import inputs, preferences, rows, sharing, sizes
from mmalign.doctor.findings import PAIRS, Check

CHECKS = (
    Check(
        "unreadable",
        "error",
        "images that cannot be read",
        "Write these images again, or remove their rows; training skips their pairs.",
        PAIRS,
        rows.unreadable,
    ),
    Check(
        "missing",
        "error",
        "rows without their image",
        "Put the files in place, or name their folder (data.images); training skips these rows.",
        PAIRS,
        partial(rows.skipped, defect="missing image"),
    ),
    Check(
        "unusable",
        "warning",
        "rows that cannot be used",
        "Repair or remove these rows; training skips them.",
        PAIRS,
        partial(rows.skipped, defect="unusable"),
    ),
    Check(
        "identical",
        "error",
        "pairs with two equal sides",
        "Remove these pairs; they teach nothing.",
        PAIRS,
        preferences.identical,
    ),
    Check(
        "near_identical",
        "warning",
        "pairs with two nearly equal sides",
        "Look at these pairs. Remove those without a difference that a person would judge.",
        PAIRS,
        preferences.near_identical,
    ),
    Check(
        "contradictions",
        "error",
        "pairs labelled both ways",
        "Keep the label that most annotators gave, or remove all rows of the pair.",
        PAIRS,
        preferences.contradictions,
    ),
    Check(
        "cycles",
        "error",
        "cycles of preferences",
        "Remove the doubtful row of each cycle; no reward fits all of them.",
        PAIRS,
        preferences.cycles,
    ),
    Check(
        "ties",
        "warning",
        "ties",
        "Training skips them; remove them if you expected none.",
        PAIRS,
        preferences.ties,
    ),
    Check(
        "shared_prompts",
        "error",
        "prompts in both training and evaluation",
        "Remove them from one of the two; for the validation split, group by the prompt (data.group_by).",
        ("image pairs", "prompts"),
        sharing.shared_prompts,
    ),
    Check(
        "shared_images",
        "error",
        "images in both training and evaluation",
        "Remove them from one of the two; for the validation split, group by the image (data.group_by).",
        PAIRS,
        sharing.shared_images,
    ),
    Check(
        "image_sizes",
        "warning",
        "pairs with images of different sizes",
        "Scale or crop both images alike; otherwise the size tells the chosen one.",
        PAIRS,
        sizes.image_sizes,
    ),
    Check(
        "length_bias",
        "warning",
        "lengths that predict the chosen response",
        "Balance the lengths, or evaluate with a measure that length cannot raise.",
        ("response pairs",),
        sizes.length_bias,
    ),
    Check(
        "long_captions",
        "warning",
        "prompts beyond the text encoder's window",
        "Shorten these prompts; the model does not read their ends.",
        ("image pairs", "prompts"),
        inputs.long_captions,
    ),
    Check(
        "over_budget",
        "warning",
        "rows beyond the maximum length",
        "Raise data.max_length up to the model's limit, or shorten these rows.",
        ("response pairs",),
        inputs.over_budget,
    ),
    Check(
        "template",
        "error",
        "rows that the chat template renders unequally",
        "Give both responses one prompt, and remove what the chat template changes in them.",
        ("response pairs",),
        inputs.template,
    ),
)

NAMES = tuple(check.name for check in CHECKS)
assert len(set(NAMES)) == len(NAMES)
