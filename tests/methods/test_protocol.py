"""Every method satisfies the Method protocol: mypy checks the list, and the test that it is complete."""

from __future__ import annotations

from typing import Any

from mmalign import methods
from mmalign.methods import Method
from mmalign.methods.text_to_image import cca, diffusion_dpo, inpo, instruct_engine, mapo, sft, spo, step_preference
from mmalign.methods.vision_language import bdhs, dpo, mdpo, povid, realign, response_sft, rlhfv

METHODS: tuple[Method[Any], ...] = (
    bdhs,
    cca,
    diffusion_dpo,
    dpo,
    inpo,
    instruct_engine,
    mapo,
    mdpo,
    povid,
    realign,
    response_sft,
    rlhfv,
    sft,
    spo,
    step_preference,
)


def test_the_type_checker_sees_every_method() -> None:
    assert [methods.find(name) for name in methods.names()] == list(METHODS)
