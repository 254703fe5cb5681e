"""Reward models that score images against their prompts, one file each, named like the file.

A reward model's file has a `Config` (its options in a recipe, a `JudgeConfig`), `check(key, path)` and `load(path,
device, cfg) -> RewardModel`. N is the number of images; higher scores are better. One from outside is named by the
class of its options, "module:Class", with `load` beside the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from types import SimpleNamespace
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor

from mmalign import registry
from mmalign.reading.weights import one_sentence, tensors_only
from mmalign.resources import located

Shown = Sequence[Sequence[Image.Image]]  # the images with each row's prompt
Truths = Sequence[Sequence[str]]  # the texts of each row's true answer; empty where there is none


class JudgeConfig(BaseModel):
    """Options of a judge in a recipe, and what is true of all judges of its kind.

    Attributes:
        of_images: its file has `check` and `load`.
        of_responses: its file has `check_responses` and `load_responses`.
        needs_truths: it judges only rows with a true answer.
        compares: scores depend on the other outputs of a prompt; a call needs all of them, and no score is stored.
        runs_path: `path` names a function, whose code is part of the judge.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    of_images: ClassVar[bool] = True
    of_responses: ClassVar[bool] = False
    needs_truths: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    runs_path: ClassVar[bool] = False

    def reads_truths(self, path: str) -> bool:
        """Return whether the judge at `path` reads the true answers of the data."""
        return self.needs_truths

    def served_model(self, path: str) -> str:
        """Return the name that a server at `path` gives its model; "" if it gives none, or without a server."""
        return ""


class BatchConfig(JudgeConfig):
    """Options of a judge that takes several outputs at once."""

    batch_size: PositiveInt = 64
    """Images that go through the network at once."""


class RewardModel(Protocol):
    """Scorer of images, each against the prompt of the same row.

    Only a reward model of noisy images reads the timesteps `t`. Without `t` images are taken as clean.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, without gradients; rows are independent. `t` has timesteps [N]."""


class RewardModule(Protocol):
    """Interface of a reward model's file."""

    @property
    def Config(self) -> type[JudgeConfig]:
        """The class of the options."""

    def check(self, key: str, path: str) -> None:
        """Check `path`, which the recipe names at `key`, before anything is loaded."""

    def load(self, path: str, device: torch.device, cfg: JudgeConfig) -> RewardModel:
        """Load the reward model from `path` to the device."""


class ResponseJudge(Protocol):
    """Scorer of responses, each to the prompt and the images of the same row.

    A judge that `compares` compares the responses to one prompt and images with one another. One that `reads_truths`
    reads what the data say of each row's true answer, such as its objects or yes; no other needs it.
    """

    def __call__(
        self, images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None
    ) -> Tensor:
        """Return scores [N], float32, without gradients."""


class ResponseModule(Protocol):
    """Interface of a file with a judge of responses."""

    def check_responses(self, key: str, path: str) -> None:
        """Check `path`, which the recipe names at `key`, before anything is loaded."""

    def load_responses(self, path: str, device: torch.device, cfg: JudgeConfig) -> ResponseJudge:
        """Load the judge from `path` to the device."""


PACKAGES = (__name__, "mmalign.judges")


def names() -> list[str]:
    """Return the names of all reward models: the files of this folder and of `mmalign.judges`."""
    return sorted(name for package in PACKAGES for name in registry.names(package))


def reward_module(name: str) -> RewardModule:
    """Return the module of a reward model; importing one of ours loads no heavy library.

    Raises:
        ValueError: no file has this name, or what is named from outside is no reward model.
    """
    if registry.is_outside(name):
        options = registry.import_class("reward", name, JudgeConfig)
        load = registry.module_of("reward", options, ["load"]).load
        return cast(RewardModule, SimpleNamespace(Config=options, check=check_files, load=load))
    return cast(RewardModule, registry.find(PACKAGES, name, "reward: there is no"))


def image_module(name: str) -> RewardModule:
    """Return the module of a reward model of images.

    Raises:
        ValueError: the kind judges responses alone, or `reward_module` refuses the name.
    """
    module = reward_module(name)
    if not module.Config.of_images:
        raise ValueError(f"reward: {name} judges responses; for images use another, such as open_clip")
    return module


def reward_config(name: str, options: Mapping[str, object]) -> JudgeConfig:
    """Check the options of a reward model.

    Raises:
        ValueError: the name or an option is unknown, or an option has an invalid value.
    """
    is_outside = registry.is_outside(name)
    kind = registry.import_class("reward", name, JudgeConfig) if is_outside else reward_module(name).Config
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.model_fields)
        raise ValueError(
            f"reward {name}: {key}: {first['msg'].lower()}, got {first['input']!r}; options: {known}"
        ) from None


def check_files(key: str, path: str) -> None:
    """Check that the files of a reward model exist, or that `path` may be a Hub id or the name of an architecture.

    Raises:
        ValueError: there is no such file or folder.
    """
    if "/" in path:  # not the name of an architecture in the reward model's library
        located(key, path)


def load_reward_model(
    name: str, path: str, device: torch.device | str = "cpu", *, allow_pickle: bool = False, **options: object
) -> RewardModel:
    """Load a reward model by its file's name, and wrap it in `checked_reward_model`; `options` are of its `Config`.

    `allow_pickle` reads weights from pickles too (see `mmalign.reading.weights`).

    Raises:
        ValueError: the name or an option is unknown, or the weights are missing, refused or do not fit.
    """
    cfg = reward_config(name, options)
    with tensors_only(allow_pickle):
        return checked_reward_model(name, image_module(name).load(path, torch.device(device), cfg))


def load_response_judge(
    name: str, path: str, device: torch.device | str = "cpu", *, allow_pickle: bool = False, **options: object
) -> ResponseJudge:
    """Load a judge of responses by its file's name; the arguments are those of `load_reward_model`.

    Raises:
        ValueError: the kind judges images alone, an option is unknown, or the judge cannot be loaded. When called: a
            score is not finite.
    """
    cfg = reward_config(name, options)
    with tensors_only(allow_pickle):
        judge = response_module(name).load_responses(path, torch.device(device), cfg)

    def call(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        return as_scores(f"reward {name}", judge(images, prompts, responses, truths), prompts, "check the judge")

    return call


def response_module(name: str) -> ResponseModule:
    """Return the module of a judge of responses.

    Raises:
        ValueError: the kind judges images alone, or what is named from outside is no judge of responses.
    """
    # A judge from outside has its loader beside its options, and no check of its own
    if registry.is_outside(name):
        options = registry.import_class("reward", name, JudgeConfig)
        load = registry.module_of("reward", options, ["load_responses"]).load_responses
        return cast(ResponseModule, SimpleNamespace(check_responses=check_files, load_responses=load))
    module = registry.find(PACKAGES, name, "reward: there is no")
    if not cast(RewardModule, module).Config.of_responses:
        known = ", ".join(name for name in names() if reward_module(name).Config.of_responses)
        raise ValueError(f"reward: {name} judges images; for responses use one of {known}")
    return cast(ResponseModule, module)


def readable(name: str, path: str, mend: str) -> AbstractContextManager[None]:
    """Turn any error of a library that loads a reward model into a ValueError of one sentence; `mend` is its end."""
    return one_sentence(f"reward {name}: cannot load {path!r}", path, mend)


def in_batches(score: Callable[[slice], Tensor], number: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the scores [N] of a number N of rows, scored at most `size` at a time; of no rows on the device."""
    batches = (slice(start, start + size) for start in range(0, number, size))
    return torch.cat([torch.empty(0, device=device), *map(score, batches)])


def as_scores(source: str, values: object, prompts: Sequence[str], remedy: str) -> Tensor:
    """Convert the numbers that a foreign program returned for a batch to scores [N], float32.

    Args:
        source: the program, for messages.
        values: its result: a list, tuple, array or tensor of numbers or truth values, one for each prompt.
        prompts: the batch's prompts [N].
        remedy: the end of a message.

    Raises:
        ValueError: the result is no list, has another length, or an entry is not a finite number.
    """
    numbers = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes):
        raise ValueError(
            f"{source} returned {type(values).__name__}; expected a list of {len(prompts)} numbers; {remedy}"
        )
    if len(numbers) != len(prompts):
        raise ValueError(
            f"{source} returned {len(numbers)} scores for {len(prompts)} prompts; expected one each; {remedy}"
        )
    entries = [_as_float(number) for number in numbers]
    for entry, prompt in zip(entries, prompts, strict=True):
        if not isinstance(entry, float) or not math.isfinite(entry):
            raise ValueError(
                f"{source} returned {entry!r:.60} for the prompt {prompt[:80]!r}; expected a finite number; {remedy}"
            )
    return torch.tensor(entries, dtype=torch.float32)


def _as_float(number: object) -> object:
    """Return a number as a float, true as 1, one beyond the range of floats as infinity, anything else as it is."""
    if not isinstance(number, Real | np.bool_):
        return number
    try:
        return float(number)
    except OverflowError:
        return math.inf


def checked_reward_model(name: str, reward_model: RewardModel) -> RewardModel:
    """Return the reward model with a check of its scores at every call.

    Raises:
        ValueError: (when called) images and prompts differ in number, or scores are not float32 [N], or not all finite.
    """

    def call(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(
                f"reward {name}: {len(images)} images and {len(prompts)} prompts; give one prompt for each image"
            )
        scores = reward_model(images, prompts, t)
        if scores.shape != (len(images),) or scores.dtype != torch.float32:
            raise ValueError(
                f"reward {name}: scores of shape {list(scores.shape)} and {scores.dtype} for {len(images)} images; "
                f"expected [{len(images)}] and torch.float32; correct its function"
            )
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            rows = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise ValueError(
                f"reward {name}: {len(bad)} of {len(images)} scores are not finite (rows {rows}; the first prompt is "
                f"{prompts[bad[0]][:80]!r}); check these images, and the reward model's weights if all rows are listed"
            )
        return scores

    return call
