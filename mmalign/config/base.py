"""Base class of a recipe's sections, and fields that choose one of several sections."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mmalign.registry import check_known


class Section(BaseModel):
    """Immutable part of a recipe, without unknown keys or silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
