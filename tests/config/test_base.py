"""Fields that choose one of several sections: every subclass is a choice, and nothing else lists them."""

from typing import Annotated, Literal

import pytest

from mmalign.config.base import Choice, Section


class Shape(Section):
    name: str


class Circle(Shape):
    name: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Shape):
    name: Literal["square"] = "square"


class Drawing(Section):
    shape: Annotated[Shape, Choice()] = Square()


@pytest.mark.parametrize("value", ["circle", {"name": "circle"}, {"name": "circle", "radius": 1.0}, Circle()])
def test_a_choice_is_a_name_a_section_or_an_object(value: object) -> None:
    drawing = Drawing(shape=value)
    assert drawing.shape == Circle() and drawing != Drawing()
    assert drawing.model_dump() == {"shape": {"name": "circle", "radius": 1.0}}
    assert Drawing(**drawing.model_dump()) == drawing


@pytest.mark.parametrize(
    "value", ["circel", {"name": "circel"}, {"radius": 1.0}, 3, None, {"name": 3}, Shape(name="circle")]
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="shape"):
        Drawing(shape=value)
