"""Samplers of diffusers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.diffusion.flow import is_flow

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SAMPLERS = ("default", "ddim", "dpmsolver++")


def sampler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """Return a diffusers scheduler by name, with the noise schedule of the checkpoint's `own`.

    Raises:
        ValueError: the name is unknown, or the sampler does not support flow matching.
    """
    import diffusers

    classes = {
        "default": type(own),
        "ddim": diffusers.DDIMScheduler,
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    }
    if name not in classes:
        raise ValueError(f"sampler: {name!r} is unknown; expected one of {', '.join(SAMPLERS)}")
    if name != "default" and is_flow(own):
        raise ValueError(
            f"sampler: {name!r} does not support flow-matching models; use default, the checkpoint's own "
            f"{type(own).__name__}"
        )
    return classes[name].from_config(own.config)
