"""An output folder that belongs to another run is refused and left alone."""

from pathlib import Path

import pytest

from tests.helpers import diffusion_models
from tests.helpers.commands import Commands, Content, contains, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        (["model.path=OTHER"], "model "),
        (["method={name: sft}"], "method diffusion_dpo; this one has method sft"),
        (["model.tune=lora"], "tune full; this one has tune lora of rank 16"),
        (["train.optimizer=adafactor"], "optimizer adamw; this one has optimizer adafactor"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(
    settings: list[str], differs: str, mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    mmalign("train", content)
    out, other_model = tmp_path / "out", diffusion_models.stable_diffusion(tmp_path / "other", seed=1)
    recipe, before = (out / "recipe.yaml").read_text(), weights(out)
    mmalign.capfd.readouterr()
    message = mmalign.refused(
        "train", content, "train.steps=4", *(s.replace("OTHER", str(other_model)) for s in settings)
    )
    contains(message, f"{out / 'checkpoint-00000002'}: belongs to another run ({differs}", "use another output folder")
    assert (out / "recipe.yaml").read_text() == recipe and weights(out) == before


@pytest.mark.slow
def test_adapters_of_another_rank_are_refused(mmalign: Commands, content: Content) -> None:
    mmalign("train", content, "model.tune=lora")
    message = mmalign.refused("train", content, "model.tune=lora", "model.lora.rank=4", "train.steps=4")
    contains(message, "belongs to another run (tune lora of rank 16", "this one has tune lora of rank 4")


@pytest.mark.slow
def test_a_checkpoint_that_goes_further_or_has_no_average(mmalign: Commands, content: Content) -> None:
    mmalign("train", content)
    message = mmalign.refused("train", content, "train.steps=1")
    contains(message, "train.steps: ", "has done 2 updates already, more than the 1 asked for; raise train.steps")
    message = mmalign.refused("train", content, "train.steps=4", "train.ema=0.9")
    contains(message, "train.ema: ", "has no moving average")


@pytest.mark.slow
def test_a_trained_model_is_not_compared_with_another_base(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    other_base = diffusion_models.stable_diffusion(tmp_path / "other", seed=1)
    mmalign.capfd.readouterr()
    message = mmalign.refused("evaluate", content, f"model.path={other_base}")
    contains(message, f"{tmp_path / 'out' / 'model'}: was trained from another model than {other_base} (fingerprint ")
    assert not (tmp_path / "out" / "evaluation").exists()
