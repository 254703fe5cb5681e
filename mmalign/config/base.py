"""Base class of a recipe's sections, and fields that choose one of several sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from mmalign.registry import check_known, import_class, is_outside

ResponseFormat = Literal[
    "trl",
    "povid",
    "realign",
    "mdpo",
    "rlhfv",
    "swift",
    "llama_factory",
    "alpaca",
    "answers",
    "rankings",
    "thumbs",
    "auto",
]  # layouts of response data


class Section(BaseModel):
    """Immutable part of a recipe, without unknown keys or silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ImageSize(NamedTuple):
    """Width and height of an image in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, resolution: int | str) -> ImageSize:
        """Return the size of a resolution in a recipe: the side of a square, or "WIDTHxHEIGHT".

        Raises:
            ValueError: it is neither, or a side is shorter than 8 pixels.
        """
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", str(resolution).lower())
        sides = [int(side) for side in match.groups(match[1])] if match else [0]
        if min(sides) < 8:
            raise ValueError(f"expected pixels, such as 1024 or 1216x832 (width x height), got {resolution!r}")
        return cls(*sides)


def _check_resolution(resolution: int | str | None) -> int | str | None:
    if resolution is not None:
        ImageSize.parse(resolution)
    return resolution


Resolution = Annotated[int | str | None, AfterValidator(_check_resolution)]


class LaggingConfig(Section):
    """Copy of the policy that follows it; the defaults are TR-DPO's (arXiv:2404.09656), as in TRL."""

    every: int = Field(512, ge=1, description="updates between two moves towards the policy")
    mix: float = Field(0.6, gt=0, le=1, description="share of the policy in the copy after a move; 1 makes them equal")
    ramp: float | None = Field(
        None, gt=0, description="with a ramp the share falls from 1 to mix, by this much an update; default: it is mix"
    )
    flat: int = Field(0, ge=0, description="updates before a ramp, with a share of 1")

    @model_validator(mode="after")
    def _ramps(self) -> LaggingConfig:
        if self.flat and self.ramp is None:
            raise ValueError(f"flat: {self.flat} updates come before a ramp; set ramp, or leave flat out")
        return self


class MethodConfig(Section):
    """Hyper-parameters of a method.

    Attributes:
        modality: the modality of a method from outside: text_to_image or vision_language.
    """

    modality: ClassVar[str] = ""

    name: str
    reference: LaggingConfig | None = Field(
        None,
        description="move a method's reference, if it has one, towards the policy (TR-DPO); {} takes the defaults; "
        "default: it stays",
    )


class Choice:
    """Annotation of a field that takes any subclass of its type: a section with its `name`, or the name alone.

    A new subclass is a new choice. It must be defined before the class that has the field. A subclass from outside is
    named as "module:Class". The type may be a union with a section of several: a mapping whose keys are names becomes
    that section.
    """

    @staticmethod
    def sections(kind: type[S]) -> dict[str, type[S]]:
        """Return the subclasses by name."""
        base = (*get_args(kind), kind)[0]
        names = {section: section.model_fields["name"].default for section in base.__subclasses__()}
        return {name: section for section, name in names.items() if isinstance(name, str)}

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        sections, (base, *several) = self.sections(kind), get_args(kind) or (kind,)

        def choose(
            value: object, validate: core_schema.ValidatorFunctionWrapHandler, info: core_schema.ValidationInfo
        ) -> object:
            # A name alone is a section of that name with its defaults
            section = {"name": value} if isinstance(value, str) else value
            # A section made in Python; classes from outside are not in the union
            if not isinstance(section, Mapping):
                outside = type(section) in base.__subclasses__() and type(section) not in sections.values()
                return section if outside or type(section) in several else validate(section)
            # Keys that are names make a sum of sections, where the field takes one
            if "name" not in section:
                if several and any(str(key) in sections or is_outside(str(key)) for key in section):
                    return _validated(several[0], section, "a sum")
                raise ValueError(f"needs a name, one of {', '.join(sections)}")
            # A name from outside is the class of its options, which is imported
            name = str(section["name"])
            if is_outside(name):
                return _validated(import_class(str(info.field_name), name, base), section, name)
            check_known("unknown name", name, sections)
            return validate(section)

        schemas = {name: handler.generate_schema(section) for name, section in sections.items()}
        return core_schema.with_info_wrap_validator_function(
            choose,
            core_schema.tagged_union_schema(schemas, discriminator="name"),
            serialization=core_schema.plain_serializer_function_ser_schema(Section.model_dump),
        )


def _validated(kind: type[Section], section: Mapping[str, object], name: str) -> Section:
    """Return a section of a class that the schema of its field does not have.

    Raises:
        ValueError: a key is unknown, missing or has a wrong value; the message is one sentence.
    """
    try:
        return kind.model_validate(dict(section))
    except ValidationError as error:
        reasons = (
            ": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, "))))
            for one in error.errors()
        )
        known = f" (it has {', '.join(kind.model_fields)})" if is_outside(name) else ""
        raise ValueError(f"{name}: {'; '.join(reasons)}{known}") from None
