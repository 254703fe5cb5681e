"""KTO (arXiv:2402.01306, eq. 8) on responses to images, each liked or not.

    gain = sum_t log p(y_t | image, prompt, y_<t)      of the policy, minus the reference's
    z = beta * (gain - baseline)
    loss = weight * sigma(-z) for a liked response, weight * sigma(z) for another

`loss: bco` and `loss: apo_zero_unpaired` replace the sigmoid. The paper's baseline is the mean gain of mismatched
responses in a batch, at least 0, which costs a third forward pass. Ours is the average gain of the responses of earlier
updates (`Memory`), read one update late: a response's loss then does not depend on its batch, and a resumed run repeats
an uninterrupted one. The paper advises weights such that the liked and disliked responses together weigh 1 to 4/3 of
each other.

KB rows: prompts with the first responses, then with the second ones of lists.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from mmalign.config.methods.vision_language import KTOConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods import Requirements, Step, cached_scores, reference_scores
from mmalign.methods._judged import OUTPUTS, Judged, thumbs_requirements, thumbs_step
from mmalign.methods.vision_language._responses import Contrast
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

TOKENS = "tokens"  # name of the means over tokens


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: thumbs, and a reference or its cached scores."""
    return thumbs_requirements(cfg, cached_scores(int(cfg.reference is None), {}))


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: object, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the unchanged rows."""
    return [Contrast(batch, reference_scores(policy, batch, partial(_output_scores, policy.family, batch)))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the unpaired loss on the log-probabilities of policy and reference."""
    return thumbs_step(cfg, policy.memory, judge(policy, contrast, OUTPUTS))


def judge(policy: Policy[VisionLanguage], contrast: Contrast, by: str) -> Judged:
    """Run the policy, and return the scores of all responses: `OUTPUTS`, or the means over tokens, `TOKENS`."""
    batch, reference = contrast.batch, contrast.reference
    assert batch.scores is not None, "judged responses have scores"
    number, most = batch.scores.shape
    own = _output_scores(policy.family, batch, policy.model)
    lengths = batch.tokens.num_tokens.float().reshape(-1, number).T
    more = {"output log-probability": own[OUTPUTS].detach(), "output tokens": lengths}
    # Cached scores may be those of a batch with longer lists
    if reference is not None:
        more["output token gain"] = (own[TOKENS] - reference[TOKENS][:, :most]).detach()
    compared = reference[by][:, :most] if reference is not None else None
    return Judged(own[by], compared, batch.scores, batch.weights, more, lengths)


def _output_scores(family: VisionLanguage, batch: EncodedResponses, net: nn.Module) -> Scores:
    """Return the log-probabilities [B, K] of the responses, in nats, and their means over tokens."""
    logps, mask = family.token_logps(net, batch.tokens, batch.features), batch.tokens.response_mask
    each = {OUTPUTS: scores.total(logps, mask), TOKENS: scores.mean(logps, mask)}
    return {name: values.reshape(-1, len(batch.rows)).T for name, values in each.items()}
