"""For the type checker: every method, of either modality, is a Method. A test compares the list with the folder."""

from __future__ import annotations

from typing import Any

from mmalign.methods import (
    Method,
    bdhs,
    diffusion_dpo,
    dpo,
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
    diffusion_dpo,
    dpo,
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
