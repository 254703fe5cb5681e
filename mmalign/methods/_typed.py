"""For the type checker: every method, of either modality, is a Method. A test compares the list with the folder."""

from __future__ import annotations

from typing import Any

from mmalign.methods import Method, diffusion_dpo, dpo, mapo, rlhfv, sft

METHODS: tuple[Method[Any], ...] = (diffusion_dpo, dpo, mapo, rlhfv, sft)
