"""The one entry to attention: who computes it, and which tokens see which.

`forest.py` says which tokens see which in a row that several responses share (`PackedPrefixMask`, `PrefixGroup`);
`executors.py` computes attention, by xformers, by PyTorch's own function, or by a plain reference; `kernels.py` knows
whether xformers can run here and, if not, why; `choice.py` decides by the recipe's `train.attention`; `decoders.py` and
`denoisers.py` put an executor into the models of transformers and diffusers.

A row of a prefix of 5 tokens with branches of 3 and 2, and one of 4 with a branch of 6:

    forest = Forest((Tree(5, (3, 2)), Tree(4, (6,))))
    forest.length            # L = 20, in the order [prefix | branch | branch | prefix | branch]
    forest.join(rows)        # packed [..., L] of the rows apart, [5 + 3], [5 + 2], [4 + 6]: ids, types, positions
    forest.positions         # [1, L], for models whose positions have one dimension
    forest.before            # [3 + 2 + 6]: the places whose hidden states predict the tokens at ...
    forest.said              # [3 + 2 + 6]: ... these places, branch by branch
    forest.split(x)          # the rows apart, of a packed [..., L]
    forest.visible           # [L, L], bool: the mask that all of this means

and through a decoder of transformers, which `decoders.use(decoder, "sdpa" | "xformers")` has prepared:

    hidden = decoder(inputs_embeds=embeds, position_ids=forest.positions, use_cache=False,
                     **decoders.of(forest, decoder)).last_hidden_state         # [1, L, D]

unless `decoders.why_not_packed(decoder, forest.longest)` says that this decoder cannot take such rows.
For other positions than those, such as in rows and columns, join the ones that the model gives to each row apart.
tests/attention/test_models.py does all of it with whole models and their images.

`PrefixGroup(..., both_ways=True)` lets the prefix's tokens see one another in both directions (PaliGemma).
"""

from mmalign.attention.executors import BACKENDS as BACKENDS
from mmalign.attention.executors import Backend as Backend
from mmalign.attention.forest import PackedPrefixMask as PackedPrefixMask
from mmalign.attention.forest import PrefixGroup as PrefixGroup
