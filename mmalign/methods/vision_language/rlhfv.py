"""RLHF-V's dense DPO (arXiv:2312.00849): DPO in which the words that a person corrected weigh more.

    score = (sum of unchanged log p(y_t) + gamma * sum of changed log p(y_t)) / (unchanged + gamma * changed)
    loss = -log sigma(beta * (policy's margin - reference's margin))

An alignment of both responses finds common blocks of at least `min_block` tokens. Tokens outside these blocks are
changed. The release (Muffin) marks a span as changed only if both sides have one, so words that one side merely adds
have weight 1. We treat them as changed, because an invented object is most often such an addition; `insertions: false`
gives them weight 1. As in the release, the alignment includes the end of the prompt. Unlike the release's, it has no
rule for frequent tokens: difflib's autojunk, which marks 2 to 4 times as many tokens in responses of 200 or more.

The release's script also does not divide the sum (`score: sum`), with gamma 1.1 and beta 0.1. Our defaults are the
paper's 5 and 0.5.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mmalign.config.methods.vision_language import RLHFVConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language.tokens import Tokens
from mmalign.methods import Requirements, reference_scores
from mmalign.methods._pair_memory import pair_requirements
from mmalign.methods.vision_language import dpo
from mmalign.methods.vision_language._responses import Contrast, response_scores
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the reference of the loss, or its cached scores."""
    settings = {**cfg.model_dump(include={"gamma", "min_block", "insertions"}), "mean": cfg.mean}
    return pair_requirements(cfg, int(cfg.reference is None), settings)


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the unchanged pairs, with token weights."""
    weights = token_weights(batch.tokens, cfg.gamma, cfg.min_block, insertions=cfg.insertions)
    score = partial(response_scores, policy.family, batch=batch, weights=weights, mean=cfg.mean)
    return [Contrast(batch, reference_scores(policy, batch, score), weights)]


loss = dpo.loss


def token_weights(tokens: Tokens, gamma: float, min_block: int, *, insertions: bool) -> Tensor:
    """Return token weights [2B, R]: 1 for tokens that both responses of a pair share, `gamma` for changed ones."""
    weights = torch.ones(tokens.response_mask.shape)
    pairs, rows = len(tokens) // 2, tokens.rows
    for row in range(pairs):
        # The prompt's end makes a common beginning a block, however short
        chosen_ids, rejected_ids = rows[row], rows[row + pairs]
        starts = [max(0, ids.start - min_block) for ids in (chosen_ids, rejected_ids)]
        places = changed_positions(
            chosen_ids.ids[starts[0] :], rejected_ids.ids[starts[1] :], min_block, insertions=insertions
        )
        for ids, start, changed, place in zip(
            (chosen_ids, rejected_ids), starts, places, (row, row + pairs), strict=True
        ):
            # Positions are those in the aligned part, which begins before the response
            prompt = ids.start - start
            weights[place, [token - prompt for token in changed if token >= prompt]] = gamma
    return weights.to(tokens.ids.device)


def changed_positions(
    first: Sequence[int], second: Sequence[int], min_block: int, *, insertions: bool
) -> tuple[list[int], list[int]]:
    """Return the positions of changed tokens in the first and in the second row."""
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    alike = [block for block in blocks if block.size >= min_block]
    changed_places: tuple[list[int], list[int]] = ([], [])
    # Whatever lies between two common blocks; the empty block at the end closes the last gap
    a, b = 0, 0
    for start_a, start_b, size in [*alike, (len(first), len(second), 0)]:
        # Without insertions only what one side has in place of something else
        if insertions or (start_a > a and start_b > b):
            changed_places[0].extend(range(a, start_a))
            changed_places[1].extend(range(b, start_b))
        a, b = start_a + size, start_b + size
    return changed_places
