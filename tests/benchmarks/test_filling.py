"""Time of filling caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from mmalign import methods
from mmalign.commands._bench_run import build
from mmalign.commands.load_recipe import load_recipe
from mmalign.families.diffusion import pipeline
from mmalign.modalities import text_to_image
from tests.benchmarks import filling
from tests.helpers import recipes

OFF = "data.cache='off'"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 2),  # both images of a pair
        (["method.num_cached_draws=2"], 2 + 4 / 8),  # and the four batches of one epoch's eight pairs
        ([OFF], 0),
    ],
)
def test_filling_is_that_of_one_epoch(
    overrides: list[str], expected: float, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock ticks with every encoded image and with every batch that the reference scores."""
    ticks, modality = [0], text_to_image.MODALITY

    def slow(*arguments: Any, **options: Any) -> Any:
        ticks[0] += 100  # opening time, which is not filling: it is the same with nothing to fill
        return modality.build_data_module(*arguments, **options)

    def ticking(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            ticks[0] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(pipeline, "encode", ticking(pipeline.encode))
    monkeypatch.setattr(methods, "compute_precomputed", ticking(methods.compute_precomputed))
    monkeypatch.setattr(text_to_image, "MODALITY", replace(modality, build_data_module=slow))
    monkeypatch.setattr(filling, "now", lambda _: float(ticks[0]))
    recipe, timed = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path), overrides), filling.TimedFilling()
    run = build(recipe, Accelerator(), tmp_path / "run", 8, fill=timed)
    assert timed.seconds == expected
    before = ticks[0]
    run.updates(run, 8, None)
    assert ticks[0] == before + (8 * 2 * 2 if OFF in overrides else 0)  # the caches have all that the updates need
