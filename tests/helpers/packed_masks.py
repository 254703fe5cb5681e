"""Random masks of packed rows."""

import random

from mmalign.attention import PackedPrefixMask, PrefixGroup


def random_mask(seed: int) -> PackedPrefixMask:
    """Return one to four trees of up to 20 tokens a part, with and without prefixes that see both ways."""
    draw = random.Random(seed)

    def tree() -> PrefixGroup:
        branches = tuple(draw.randint(1, 20) for _ in range(draw.randint(1, 4)))
        return PrefixGroup(draw.randint(1, 20), branches, bidirectional_prefix=draw.random() < 0.4)

    return PackedPrefixMask(tuple(tree() for _ in range(draw.randint(1, 4))))
