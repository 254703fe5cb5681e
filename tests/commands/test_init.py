"""`mmalign init`: recipes from a model and data, which load, and train as they are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mmalign.commands import _init_settings, plan
from mmalign.commands.init import init
from mmalign.commands.load_recipe import load_recipe
from mmalign.families.loading import PIPELINES
from mmalign.resources import bundled_recipes
from tests.helpers import Folders
from tests.helpers.data_files import pick_a_pic, png, response_pairs

Folder = Callable[..., Path]


def sorted_pictures(folder: Path, number: int, side: int = 16, wide: bool = False) -> Path:
    """Write pictures sorted into good and bad, with a caption each."""
    import io

    from PIL import Image

    for place, upper in (("good", True), ("bad", False)):
        (folder / place).mkdir(parents=True)
        for n in range(number):
            content = png(2 * n + upper, side, upper)
            if wide:
                image = Image.open(io.BytesIO(content))
                image.resize((2 * side, side)).save(folder / place / f"{n}.png")
            else:
                (folder / place / f"{n}.png").write_bytes(content)
            (folder / place / f"{n}.txt").write_text(f"thing {n}")
    return folder


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_folder_of_good_and_bad_pictures(tiny_sdxl: Path, tmp_path: Path, no_model: None) -> None:
    folder, output = sorted_pictures(tmp_path / "mine", 30), tmp_path / "mine.yaml"
    init(str(tiny_sdxl), str(folder), output=output)
    recipe: Any = load_recipe(output)
    shipped: Any = load_recipe("diffusion_dpo_sdxl_lora")
    assert recipe.method == shipped.method and recipe.model.lora == shipped.model.lora
    assert (recipe.train.lr, recipe.train.precision) == (shipped.train.lr, shipped.train.precision)
    assert (recipe.data.format, recipe.data.resolution, recipe.data.fit) == ("folder", 16, "crop")
    # 30 pairs: batches of 3, three epochs, about a tenth held out
    assert recipe.train.batch_size * recipe.train.gradient_accumulation_steps == 3
    assert (recipe.train.steps, recipe.data.validation_fraction, recipe.evaluate.benchmark) == (30, 0.1, "implicit")
    assert 15 <= len(lines_of(output)) <= 30
    assert sum("#" in line for line in lines_of(output)) >= 8
    assert "text_to_image/diffusion_dpo_sdxl_lora" in output.read_text()


def test_file_is_never_replaced_unasked(tiny_sdxl: Path, tmp_path: Path) -> None:
    data, output = pick_a_pic(tmp_path / "pairs.parquet"), tmp_path / "new" / "mine.yaml"
    init(str(tiny_sdxl), str(data), output=output)
    output.write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        init(str(tiny_sdxl), str(data), output=output)
    assert output.read_text() == "precious"
    init(str(tiny_sdxl), str(data), output=output, overwrite=True)
    assert load_recipe(output).data.path == str(data)


def test_wide_and_small_pictures_get_buckets_and_their_size(tiny_sd15: Path, tmp_path: Path) -> None:
    wide = sorted_pictures(tmp_path / "wide", 4, wide=True)
    recipe: Any = load_recipe(init(str(tiny_sd15), str(wide), output=tmp_path / "a.yaml"))
    assert recipe.data.fit == "buckets"
    small = sorted_pictures(tmp_path / "small", 4, side=10)
    recipe = load_recipe(init(str(tiny_sd15), str(small), output=tmp_path / "b.yaml"))
    assert (recipe.data.resolution, recipe.data.fit) == (8, "crop")


def test_few_pairs_are_all_trained_on_and_said_to_be_few(tiny_sd15: Path, tmp_path: Path) -> None:
    data, output = pick_a_pic(tmp_path / "pairs.parquet", 8), tmp_path / "mine.yaml"
    recipe: Any = load_recipe(init(str(tiny_sd15), str(data), output=output))
    assert (recipe.data.format, recipe.data.validation_fraction, recipe.evaluate) == ("pick_a_pic", 0.0, None)
    assert (recipe.train.steps, recipe.train.batch_size) == (24, 1)
    assert "# Unknown: gain" in output.read_text()


def test_renamed_columns_and_given_values_are_written(tiny_sd15: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(len(name), 16, name == "a"))
    (tmp_path / "mine.csv").write_text("query,winner,loser\na thing,a.png,b.png\n")
    output = tmp_path / "mine.yaml"
    init(str(tiny_sd15), str(tmp_path / "mine.csv"), ["train.lr=3e-6", "output=runs/x"], output=output)
    recipe: Any = load_recipe(output)
    assert recipe.data.columns == {"prompt": "query", "chosen": "winner", "rejected": "loser"}
    assert (recipe.data.format, recipe.train.lr, recipe.output) == ("folder", 3e-6, "runs/x")


def test_other_method_and_its_kin(vlm_folders: Folders, tmp_path: Path) -> None:
    """A method that no recipe has for the family gets the family's settings, and says so."""
    data, output = response_pairs(tmp_path / "rows"), tmp_path / "mine.yaml"
    recipe = load_recipe(init(str(vlm_folders("qwen2_5_vl")), str(data), method="mdpo", output=output))
    assert recipe.method == load_recipe("mdpo_llava15").method
    assert recipe.train.lr == load_recipe("dpo_qwen25vl").train.lr
    assert "# Unknown: settings of mdpo" in output.read_text()


@pytest.mark.parametrize(
    ("model", "method", "expected"),
    [
        ("sdxl", "dpo", "dpo trains vision-language models"),
        ("sdxl", "diffusion_dop", "did you mean 'diffusion_dpo'"),
        ("sdxl", None, "rows of povid, which are vision-language data"),
        ("qwen2_5_vl", "response", "there is no method 'response'"),
    ],
)
def test_what_does_not_go_together(
    diffusion_folders: Folders, vlm_folders: Folders, tmp_path: Path, model: str, method: str | None, expected: str
) -> None:
    folder = diffusion_folders(model) if model == "sdxl" else vlm_folders(model)
    data = (
        response_pairs(tmp_path / "r", layout="povid")
        if model != "sdxl" or method is None
        else pick_a_pic(tmp_path / "p.parquet")
    )
    with pytest.raises(ValueError, match=expected):
        init(str(folder), str(data), method=method, output=tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_neither_pipeline_nor_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json nor config\.json"):
        init(str(tmp_path), str(pick_a_pic(tmp_path / "pairs.parquet")), output=tmp_path / "mine.yaml")


def test_settings_that_need_a_card_are_replaced_without_one(tiny_sd15: Path, tmp_path: Path) -> None:
    """The shipped recipe of Stable Diffusion 1.5 has Adam in 8 bit, which the CPU does not run."""
    output = tmp_path / "mine.yaml"
    recipe = load_recipe(init(str(tiny_sd15), str(pick_a_pic(tmp_path / "pairs.parquet")), output=output))
    assert load_recipe("diffusion_dpo_sd15_lora").train.optimizer == "adamw_8bit"
    assert recipe.train.optimizer == "adamw"
    assert "# adamw_8bit, as shipped" in output.read_text() and "whether it trains here" not in output.read_text()


def test_what_keeps_it_from_training_is_said(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    output = tmp_path / "mine.yaml"
    recipe: Any = load_recipe(init(str(tiny_sdxl), str(tmp_path / "prompts.txt"), output=output))
    assert (recipe.method.name, recipe.data.format) == ("spo", "prompts")
    assert "# Unknown: whether it trains here: method.reward" in output.read_text()


def test_single_file_asks_for_a_pipeline_of_its_layout(tiny_sdxl: Path, tmp_path: Path) -> None:
    single, data = tmp_path / "model.safetensors", str(pick_a_pic(tmp_path / "pairs.parquet"))
    single.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.config=MODEL"):
        init(str(single), data, output=tmp_path / "mine.yaml")
    recipe: Any = load_recipe(init(str(single), data, [f"model.config={tiny_sdxl}"], output=tmp_path / "mine.yaml"))
    assert (recipe.model.config, recipe.method.name) == (str(tiny_sdxl), "diffusion_dpo")


def test_given_layout_is_not_recognized_again(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "mine.csv").write_text("x,y,z\na thing,a.png,b.png\n")
    given = ["data.format=folder", "data.columns={prompt: x, chosen: y, rejected: z}"]
    recipe: Any = load_recipe(init(str(tiny_sd15), str(tmp_path / "mine.csv"), given, output=tmp_path / "mine.yaml"))
    assert (recipe.data.format, recipe.data.columns["chosen"]) == ("folder", "y")


def test_names_cannot_leave_their_comment(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a # b: [c\nallow_pickle: true"
    folder.mkdir()
    output = tmp_path / "mine.yaml"
    init(str(tiny_sd15), str(pick_a_pic(folder / "pairs.parquet")), output=output)
    assert yaml.safe_load(output.read_text()).keys() == {"method", "model", "data", "train", "output"}
    assert not load_recipe(output).allow_pickle


@pytest.mark.slow
def test_every_family_and_method_has_settings() -> None:
    from mmalign.config.methods import METHODS

    assert set(PIPELINES.values()) <= _init_settings.RECIPES.keys()
    for model in _init_settings.RECIPES.values():
        assert any(model in name for name in bundled_recipes())
    for modality, families in (("text_to_image", ["sdxl", "sana"]), ("vision_language", ["qwen2_5_vl", "molmo"])):
        for config in METHODS[modality]:
            for family in families:
                name = str(config.model_fields["name"].default)
                settings = _init_settings.find_settings(modality, family, name)
                tree = {"model": {"path": "x"} | settings.model, "data": {"path": "x"} | settings.data, "output": "x"}
                tree |= {"method": settings.method, "train": settings.train}
                assert load_recipe(tree).method.name == name
                is_guessed = "the judge: " in " ".join(settings.unknown)
                assert is_guessed == (name in ("awm", "nft", "dgpo", "crd", "flow_grpo", "online_dpo", "grpo", "raft"))


@pytest.mark.parametrize(("peak", "fits"), [(0.5, True), (0.95, False)])
def test_memory_of_the_card_decides_what_is_switched_on(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float, fits: bool
) -> None:
    """The remedies of a plan, whose own tests measure it, stand in the recipe; a tenth of the card stays free."""
    remedy = plan.Remedy(("train.batch_size=1", "train.gradient_accumulation_steps=2"), int(peak * plan.GIB))
    cost = SimpleNamespace(peak=2 * plan.GIB, remedies=[remedy])
    monkeypatch.setattr("mmalign.commands.init.compute", lambda *_: cost)
    data, output = str(pick_a_pic(tmp_path / "pairs.parquet", 20)), tmp_path / "mine.yaml"
    recipe: Any = load_recipe(init(str(tiny_sdxl), data, output=output, memory=1.0))
    assert (recipe.train.batch_size, recipe.train.gradient_accumulation_steps) == (1, 2)
    assert "batch_size: 1  # to fit 1 GiB" in output.read_text()
    assert ("a setting that fits" not in output.read_text()) == fits


def test_what_the_user_gives_is_not_lowered_to_fit(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a remedy would make another batch."""
    smaller = plan.Remedy(("train.batch_size=1", "train.gradient_accumulation_steps=8"), plan.GIB // 2)
    checkpoints = plan.Remedy(("train.gradient_checkpointing=true",), plan.GIB)
    cost = SimpleNamespace(peak=2 * plan.GIB, remedies=[checkpoints, smaller])
    monkeypatch.setattr("mmalign.commands.init.compute", lambda *_: cost)
    given, data = "train.batch_size=2", str(pick_a_pic(tmp_path / "pairs.parquet", 20))
    before: Any = load_recipe(init(str(tiny_sdxl), data, [given], output=tmp_path / "before.yaml"))
    output = tmp_path / "mine.yaml"
    recipe: Any = load_recipe(init(str(tiny_sdxl), data, [given], output=output, memory=1.0))
    assert recipe.train == before.train.model_copy(update={"gradient_checkpointing": True})
    assert "# Unknown: memory: to fit 1 GiB" in output.read_text()


def test_the_given_revision_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def recognize(*given: object) -> None:
        asked.extend(given)
        raise ValueError("asked")

    monkeypatch.setattr("mmalign.commands.init.loading.recognize", recognize)
    with pytest.raises(ValueError, match="asked"):
        init("owner/name", str(tmp_path), ["model.revision=v2"], output=tmp_path / "mine.yaml")
    assert asked == ["owner/name", "v2"]
