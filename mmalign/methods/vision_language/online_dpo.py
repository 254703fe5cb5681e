"""Online DPO (arXiv:2402.04792): the best against the worst of the policy's own answers, ordered by a judge.

    y^1 ... y^K ~ softmax((1 - mixture) policy + mixture reference logits)      the policy itself by default
    loss = DPO's, or another pair loss, of argmax R against argmin R      (`dpo`)

The policy is that of the batch's first update, the reference the model before training. TRL generates two answers.
With `loss: ipo` and a mixture it is IPO-MD (arXiv:2403.08635).

INPO (arXiv:2407.00617) has two references: the model before training, and the previous policy, a reference that moves.
With margins D = log p(chosen) - log p(rejected) of sums over tokens, eta as `beta` and tau / eta as `base_share`:

    loss = (D_policy - base_share D_base - (1 - base_share) D_previous - 1 / (2 beta)) ** 2      (`loss: ipo`)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mmalign.config.methods.online_responses import OnlineDPOConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.methods import Requirements
from mmalign.methods._pair_memory import pair_memory
from mmalign.methods.vision_language import dpo
from mmalign.methods.vision_language._online import answer, online_requirements
from mmalign.methods.vision_language._responses import Contrast, response_scores
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts, a judge, and the reference of the loss."""
    needs = online_requirements(cfg, reference=cfg.uses_reference or cfg.mixture > 0, learned=2)
    return replace(needs, memory=pair_memory(cfg))


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate and judge the answers to a batch; return the contrasts of one pass after another."""
    answered, contrasts = answer(policy, batch, cfg.generation, rng, cfg.mixture), list[Contrast]()
    ends = [answered.rewards.argmax(1).tolist(), answered.rewards.argmin(1).tolist()]
    for questions in answered.parts(cfg.generation.questions_per_contrast):
        # The best answers to all questions, then the worst
        given = answered.select(policy.family, questions, [(end[b], b) for end in ends for b in questions])
        contrasts.append(Contrast(given, _reference_scores(policy, given, cfg), summary=answered.summary))
    return contrasts * cfg.generation.updates


loss = dpo.loss


def _reference_scores(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config) -> Scores | None:
    """Return the reference's scores [B]; of one that moves, mixed with those of the model before training."""
    score = partial(response_scores, policy.family, batch=batch, mean=cfg.mean)
    scores = policy.on_reference(score)
    if not cfg.base_share or scores is None:
        return scores
    # The same reference before any update has moved it
    base = policy.against_base().on_reference(score)
    assert base is not None, "a reference that moves begins as one that stays"
    return {view: cfg.base_share * base[view] + (1 - cfg.base_share) * scores[view] for view in scores}
