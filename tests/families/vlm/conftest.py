"""Models that no test may change."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import Folders, first_fast, vlm_models
from tests.helpers.loading import load_vlm


@pytest.fixture(scope="module")
def family_of(vlm_folders: Folders) -> Callable[[str], Any]:
    """A model that no test may change, loaded once."""
    return functools.cache(lambda name: load_vlm(vlm_folders(name)))


@pytest.fixture(params=first_fast(vlm_models.ALL, 2))
def family(request: pytest.FixtureRequest, family_of: Callable[[str], Any]) -> Any:
    return family_of(request.param)


@pytest.fixture
def llava(family_of: Callable[[str], Any]) -> Any:
    return family_of("llava")
