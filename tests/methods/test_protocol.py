"""Every method satisfies the Method protocol: mypy checks each, and the test that the list is complete."""

from __future__ import annotations

from mmalign import methods
from mmalign.methods import B, C, F, H, Method
from mmalign.methods.text_to_image import (
    awm,
    bradley_terry,
    cca,
    crd,
    dgpo,
    diffusion_dpo,
    diffusion_kto,
    diffusion_lpo,
    diffusion_online_dpo,
    flow_grpo,
    inpo,
    instruct_engine,
    mapo,
    nft,
    sft,
    spo,
    step_preference,
)
from mmalign.methods.vision_language import (
    bdhs,
    dpo,
    grpo,
    kto,
    lipo,
    mdpo,
    online_dpo,
    povid,
    raft,
    realign,
    response_sft,
    rlhfv,
)


def checked(method: Method[F, B, H, C]) -> object:
    """One family, batch, config and contrast fit all three functions."""
    return method


METHODS = [
    checked(awm),
    checked(bdhs),
    checked(bradley_terry),
    checked(cca),
    checked(crd),
    checked(dgpo),
    checked(diffusion_dpo),
    checked(diffusion_kto),
    checked(diffusion_lpo),
    checked(diffusion_online_dpo),
    checked(dpo),
    checked(flow_grpo),
    checked(grpo),
    checked(inpo),
    checked(instruct_engine),
    checked(kto),
    checked(lipo),
    checked(mapo),
    checked(mdpo),
    checked(nft),
    checked(online_dpo),
    checked(povid),
    checked(raft),
    checked(realign),
    checked(response_sft),
    checked(rlhfv),
    checked(sft),
    checked(spo),
    checked(step_preference),
]


def test_the_type_checker_sees_every_method() -> None:
    assert [methods.find(name) for name in methods.names()] == METHODS
