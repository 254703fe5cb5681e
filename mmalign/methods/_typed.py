"""For the type checker: every method, of either modality, is a Method. A test compares the list with the folder."""

from __future__ import annotations

from typing import Any

from mmalign.methods import (
    Method,
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
