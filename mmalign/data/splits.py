"""Splits of pairs into training and validation."""

from __future__ import annotations

import numpy as np

from mmalign.data.pairs import P, Pairs, count, stable_hash


def split(pairs: Pairs[P], fraction: float, seed: int) -> tuple[Pairs[P], Pairs[P] | None]:
    """Return (training, validation), as `split_by_group` does; a fraction of 0 has no validation split."""
    return split_by_group(pairs, fraction, seed) if fraction else (pairs, None)


def split_by_group(pairs: Pairs[P], fraction: float, seed: int) -> tuple[Pairs[P], Pairs[P]]:
    """Split the pairs by group into (training, validation).

    A group's side depends on its name and the seed alone. Adding data therefore moves no pair to the other side, and
    the validation share is `fraction` only on average. A side that would be empty gets one group.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or there is one group only.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction: {fraction} is not a share; expected a number between 0 and 1")
    groups = pairs.groups()
    hashes = {g: stable_hash(str(seed), "hold out", g) for g in groups}
    if len(hashes) < 2:
        raise ValueError(
            f"data.validation_fraction: {pairs.source} has {count(len(hashes), 'group')}, which cannot be split; "
            "expected data.group_by with a column of more values, or a fraction of 0"
        )
    first, *middle, _ = sorted(hashes, key=lambda g: (hashes[g], g))  # the last one is always for training
    # Hashes have 63 bits, so this share of all names lies below
    held_groups = {first, *(g for g in middle if hashes[g] < fraction * 2**63)}
    held = np.array([g in held_groups for g in groups], dtype=bool)
    return pairs.select(np.flatnonzero(~held)), pairs.select(np.flatnonzero(held))
