"""Runs whose reference moves: bits, files, verdict, caches, plan, and what does not fit it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.commands._plan_memory import estimate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.policy import Policy, Scores
from mmalign.training import checkpoint
from tests.commands.test_export import adapted
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_diffusion
from tests.helpers.runs import assert_resumes, assert_same, responses, train_weights, trained

Content = dict[str, Any]
MOVES: Content = {"every": 2, "mix": 0.5}


def content(model: Path, folder: Path, output: str, tune: str = "lora", **reference: Any) -> Content:
    """Return the recipe of a run whose updates are large enough to tell references apart."""
    pairs = folder / "pairs.parquet"
    method = {"name": "diffusion_dpo", "beta": 100.0, **({"reference": reference} if reference else {})}
    sections: Content = {"model": {"tune": tune}, "train": {"lr": 0.03 if tune == "lora" else 1e-3}, "method": method}
    rows = pairs if pairs.exists() else data_files.pick_a_pic(pairs)
    return recipes.diffusion(model, rows, folder / output, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_with_a_moving_reference_resumes_bit_for_bit(tune: str, tiny_sd15: Path, tmp_path: Path) -> None:
    """A reference that never moves leaves the bits of a run as they are; one that does changes them."""
    moving = assert_resumes(content(tiny_sd15, tmp_path, "moving", tune, **MOVES))
    fixed, never = (
        train_weights(content(tiny_sd15, tmp_path, name, tune, **reference))
        for name, reference in (("fixed", {}), ("never", {"every": 99}))
    )
    assert_same(never, fixed)
    assert any(not torch.allclose(moving[name], fixed[name], rtol=0, atol=1e-6) for name in fixed)


@pytest.mark.slow
def test_a_checkpoint_keeps_the_trained_weights_of_the_reference_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    """Those of the policy, right after a move that makes them equal."""
    recipe = content(tiny_sd15, tmp_path, "run", every=2, mix=1.0)
    train(load_recipe(recipe, ["train.steps=2"]))
    (path,) = checkpoint.complete(Path(recipe["output"]))
    saved = checkpoint.read(path, None)
    copied, weights = saved.state["lagging"]["method.reference"], saved.weights.values()
    assert sorted(x.flatten().tolist() for x in copied) == sorted(x.flatten().tolist() for x in weights)


@pytest.mark.slow
def test_a_verdict_is_against_the_base_model(tiny_sd15: Path, tmp_path: Path) -> None:
    """Also where the last update makes reference and policy equal."""
    held_out, moves = "data.validation_fraction=0.3", Content(every=4, mix=1.0)
    hard, fixed = (
        trained(content(tiny_sd15, tmp_path, name, **reference), held_out)[0]
        for name, reference in (("hard", moves), ("fixed", {}))
    )
    assert "against base" in hard.verdict and hard.verdict == fixed.verdict and hard.history == fixed.history


@pytest.mark.slow
def test_responses_are_scored_by_the_reference_of_now(vlm_folders: Folders, tmp_path: Path) -> None:
    """Scores of a fixed reference are cached; those of a moving one are not, and all other caches stay.

    After a move by a half the logits are about half as large.
    """
    logits = {}
    for name, method in (("fixed", {}), ("never", {"reference": {"every": 99}}), ("moving", {"reference": MOVES})):
        recipe = responses(vlm_folders("llava"), tmp_path, name, method={"name": "dpo", **method})
        logits[name] = [update["logit"] for update in trained(recipe, "train.lr=0.005")[0].history]
    caches = {name: {path.name for path in (tmp_path / name / "cache").iterdir()} for name in logits}
    assert caches["fixed"] - caches["moving"] == {"reference"} and caches["moving"]
    assert logits["never"] == pytest.approx(logits["fixed"], abs=1e-4) and logits["never"][2] > 0.01
    assert logits["moving"][:3] == pytest.approx([*logits["never"][:2], 0.5 * logits["never"][2]], rel=0.05, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["merged", "int8", "dora"])
def test_its_scores_after_a_move(start: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the first weights, and after a move by a half of the mean of the first and the new ones."""
    first = adapted(load_diffusion(tiny_sd15))
    first.export(tmp_path, first.network, "diffusers", None)
    models: Content = {
        "merged": {"adapter": {"path": str(tmp_path), "use": "merge"}},
        "int8": {"quantize": "int8"},
        "dora": {"lora": {"rank": 2, "dora": True}},
    }
    seen, score = list[list[Tensor]](), Policy.on_reference

    def checked(policy: Policy[Any], run: Callable[[nn.Module], Scores]) -> Scores | None:
        if policy.moving is None:
            return score(policy, run)
        parameters = policy.trainable()
        seen.append([p.detach().clone() for p in parameters])
        means = [a if len(seen) < 3 else (a + b) / 2 for a, b in zip(seen[0], seen[-1], strict=True)]
        _write(parameters, means)
        expected = run(policy.unwrapped)
        _write(parameters, seen[-1])
        scores = score(policy, run)
        assert scores is not None
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)
        if len(seen) == 1:
            base = policy.against_base()
            torch.testing.assert_close(scores, score(base, run), rtol=1e-6, atol=0)
            if start == "merged":
                torch.testing.assert_close(scores, run(first.network), rtol=1e-4, atol=1e-5)
        else:
            assert all((scores[side] != run(policy.unwrapped)[side]).all() for side in scores)
        return scores

    recipe = content(tiny_sd15, tmp_path, "run", **MOVES)
    recipe["model"] |= models[start]
    with monkeypatch.context() as patched:
        patched.setattr(Policy, "on_reference", torch.no_grad()(checked))
        train(load_recipe(recipe, ["train.steps=3"]))
    assert len(seen) == 3


def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


@pytest.mark.slow
def test_a_reference_does_not_begin_to_move_in_the_middle(tiny_sd15: Path, tmp_path: Path) -> None:
    train(load_recipe(content(tiny_sd15, tmp_path, "run"), ["train.steps=2"]))
    with pytest.raises(ValueError, match=r"method\.reference: .*checkpoint-00000002 has no lagging copy; leave it out"):
        train(load_recipe(content(tiny_sd15, tmp_path, "run", **MOVES)))


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_plan_counts_the_copy(tune: str, tiny_sd15: Path, tmp_path: Path) -> None:
    """In memory it is as large as the gradients, and so it is in a checkpoint; the frozen reference is counted too."""
    fixed, moving = (
        estimate(load_recipe(content(tiny_sd15, tmp_path, "run", tune, **reference)), None, on_card=False)
        for reference in ({}, MOVES)
    )
    assert fixed.lagging == 0 and moving.lagging == fixed.gradients > 0
    assert moving.checkpoint - fixed.checkpoint == moving.lagging and moving.reference == fixed.reference
