"""Images that a model draws become pairs, and a stop in the middle costs the batch that it came in."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmalign.commands import prepare as run
from mmalign.commands.load_recipe import Recipe, load_recipe
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.rewards.open_clip import OpenClip
from tests.helpers import recipes


@pytest.fixture
def recipe(tiny_sd15: Path, tmp_path: Path) -> Recipe:
    """Six images of three prompts, in three batches."""
    drawing = {"steps": 1, "guidance": 1.0, "batch_size": 2}
    prepare = {
        "prompts": 3,
        "images_per_prompt": 2,
        "min_confidence": 0.5,
        "reward": {"path": "models/tiny_clip"},
        "sampling": drawing,
    }
    return load_recipe(recipes.diffusion(tiny_sd15, tmp_path / "drawn.parquet", tmp_path / "out", prepare=prepare))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every batch that is drawn; a batch that is asked for where the list holds three raises."""
    batches: list[list[int]] = []
    sample = LatentModel.sample

    def counted(family: Any, net: Any, prompts: Any, seeds: list[int], *rest: Any) -> Any:
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(list(seeds))
        return sample(family, net, prompts, seeds, *rest)

    monkeypatch.setattr(LatentModel, "sample", counted)
    return batches


@pytest.mark.slow
def test_a_stop_costs_the_batch_that_it_came_in(recipe: Recipe, drawn: list[list[int]], tmp_path: Path) -> None:
    path, unfinished = tmp_path / "drawn.parquet", tmp_path / "drawn.parquet.unfinished"
    run.prepare(recipe)
    whole, all_of_them = path.read_bytes(), list(drawn)
    assert not unfinished.exists() and len(all_of_them) == 3
    path.unlink()
    drawn[:] = [[], []]  # so that the second batch of the next call is one too many
    with pytest.raises(KeyboardInterrupt):
        run.prepare(recipe)
    assert not path.exists() and len(list(unfinished.rglob("*.png"))) == 2
    drawn.clear()
    run.prepare(recipe)
    assert path.read_bytes() == whole and drawn == all_of_them[1:] and not unfinished.exists()


@pytest.mark.slow
def test_generated_images_survive_low_confidence(recipe: Recipe, drawn: list[list[int]], tmp_path: Path) -> None:
    """A lower `sure` costs no drawing; other drawing does."""

    def sure(share: float, **drawing: Any) -> Recipe:
        section: Any = recipe.prepare
        changed = section.sampling.model_copy(update=drawing)
        return recipe.model_copy(
            update={"prepare": section.model_copy(update={"min_confidence": share, "sampling": changed})}
        )

    with pytest.raises(ValueError, match=r"never 100% sure in 3 prompts; lower prepare\.min_confidence"):
        run.prepare(sure(0.999999))
    assert len(drawn) == 3
    run.prepare(sure(0.5))
    assert len(drawn) == 3
    (tmp_path / "drawn.parquet").unlink()
    with pytest.raises(KeyboardInterrupt):
        run.prepare(sure(0.5, guidance=2.0))


@pytest.mark.slow
def test_several_judges_judge_each_image_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote of three judges, of which two agree; a repeated run judges no image again."""
    judged, score = list[int](), OpenClip.__call__
    monkeypatch.setattr(OpenClip, "__call__", lambda *given: judged.append(len(given[1])) or score(*given))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "places.py").write_text("def late(images, prompts): return list(range(len(images)))")
    late = {"name": "function", "path": "places:late"}
    judges = [{"path": "models/tiny_clip"}, late, late]
    section: Any = recipe.prepare
    content = section.model_dump() | {"reward": judges, "combine": "vote"}

    def voted(min_confidence: float) -> Recipe:
        prepare = type(section).model_validate(content | {"min_confidence": min_confidence})
        return recipe.model_copy(update={"prepare": prepare})

    with pytest.raises(ValueError, match="never 100% sure"):  # a share of votes counts as 99 % at most
        run.prepare(voted(0.995))
    assert judged == [6]
    path = run.prepare(voted(0.6))
    assert judged == [6]
    rows = pq.read_table(path).to_pylist()
    assert [row["label_1"] for row in rows] == [1.0] * 3  # the two that favour the later image outvote the third
    log_odds = [pytest.approx(math.log(2)), pytest.approx(math.log(99))]  # of two votes of three, and of all
    assert all(row["score_1"] - row["score_0"] in log_odds for row in rows)
