"""Attention backends (xformers, SDPA, dense reference) and masks of packed rows.

`packed_mask.py` describes a row in which several responses share a prefix (`PackedPrefixMask`, `PrefixGroup`);
`backends.py` computes attention; `kernels.py` checks whether xformers runs here; `choice.py` selects a backend for the
recipe's `train.attention`; `decoders.py` and `denoisers.py` install a backend in models of transformers and diffusers.

A prefix of 5 tokens with branches of 3 and 2, and one of 4 with a branch of 6:

    mask = PackedPrefixMask((PrefixGroup(5, (3, 2)), PrefixGroup(4, (6,))))
    mask.length               # L = 20, in the order [prefix | branch | branch | prefix | branch]
    mask.join(rows)           # the unpacked rows [5 + 3], [5 + 2], [4 + 6] as one [..., L]: ids, types, positions
    mask.positions            # [1, L], for models whose positions have one dimension
    mask.target_positions     # [3 + 2 + 6]: the indices of the branches' tokens, branch by branch
    mask.predictor_positions  # [3 + 2 + 6]: the indices whose hidden states predict them
    mask.split(x)             # the unpacked rows of a packed [..., L]
    mask.visible              # [L, L], bool: the equivalent dense mask

A decoder of transformers takes it after `decoders.install(decoder, "sdpa" | "xformers")`:

    hidden = decoder(inputs_embeds=embeds, position_ids=mask.positions, use_cache=False,
                     **decoders.attention_kwargs(mask, decoder)).last_hidden_state     # [1, L, D]

unless `decoders.packing_unsupported_reason(decoder, mask.longest)` gives a reason against it. For positions of several
dimensions (rows and columns), join the positions that the model computes for each unpacked row.
"""

from mmalign.attention.backends import BACKENDS as BACKENDS
from mmalign.attention.backends import Backend as Backend
from mmalign.attention.packed_mask import PackedPrefixMask as PackedPrefixMask
from mmalign.attention.packed_mask import PrefixGroup as PrefixGroup
