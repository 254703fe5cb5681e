"""Base class of a recipe's sections, and fields that choose one of several sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mmalign.registry import check_known

ResponseFormat = Literal[
    "trl", "povid", "realign", "mdpo", "rlhfv", "swift", "llama_factory", "alpaca", "answers", "auto"
]  # layouts of response data


class Section(BaseModel):
    """Immutable part of a recipe, without unknown keys or silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class MethodConfig(Section):
    """Hyper-parameters of a method."""

    name: str


class Choice:
    """Annotation of a field that takes any subclass of its type: a section with its `name`, or the name alone.

    A new subclass is a new choice. It must be defined before the class that has the field.
    """

    @staticmethod
    def sections(kind: type[Section]) -> dict[str, type[Section]]:
        """Return the subclasses by name."""
        return {section.model_fields["name"].default: section for section in kind.__subclasses__()}

    def __get_pydantic_core_schema__(self, kind: type[Section], handler: GetCoreSchemaHandler) -> CoreSchema:
        sections = self.sections(kind)

        def named(value: object) -> object:
            section = {"name": value} if isinstance(value, str) else value
            if isinstance(section, Mapping):
                if "name" not in section:
                    raise ValueError(f"needs a name, one of {', '.join(sections)}")
                check_known("unknown name", str(section["name"]), sections)
            return section

        schemas = {name: handler.generate_schema(section) for name, section in sections.items()}
        union = core_schema.tagged_union_schema(schemas, discriminator="name")
        return core_schema.no_info_before_validator_function(named, union)
