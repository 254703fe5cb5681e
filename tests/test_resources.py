"""Names of bundled files mean the same in a checkout and in an installed wheel, and never leak to the Hub."""

from pathlib import Path

import pytest

from mmalign import resources


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one recipe and one bundled model, seen from a folder elsewhere."""
    root = tmp_path / "checkout"
    (root / "mmalign").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    for name in ("configs/text_to_image/quickstart.yaml", "models/tiny_sd/model_index.json", "models/sdxl.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(resources, "PACKAGE", root / "mmalign")
    return root


def test_a_path_as_given_wins_over_the_checkout(checkout: Path) -> None:
    assert resources.resolve("models/tiny_sd") == checkout / "models/tiny_sd"
    Path("models/tiny_sd").mkdir(parents=True)
    assert resources.resolve("models/tiny_sd") == Path("models/tiny_sd")
    assert resources.resolve(checkout / "models/sdxl.yaml") == checkout / "models/sdxl.yaml"


def test_the_packed_copy_is_found_without_a_checkout(checkout: Path) -> None:
    packed = checkout / "mmalign/_share/models/tiny_llava"
    packed.mkdir(parents=True)
    assert resources.resolve("models/tiny_llava") == packed
    (checkout / "pyproject.toml").unlink()  # now the parent is any site-packages
    assert resources.resolve("models/tiny_llava") == packed
    with pytest.raises(ValueError, match="no file or folder 'models/tiny_sd'"):
        resources.resolve("models/tiny_sd")


@pytest.mark.parametrize("name", ["quickstart", "text_to_image/quickstart", "configs/text_to_image/quickstart.yaml"])
def test_recipe_is_found_by_its_short_name(checkout: Path, name: str) -> None:
    assert resources.resolve_recipe(name) == checkout / "configs/text_to_image/quickstart.yaml"


def test_short_name_of_several_recipes_is_refused(checkout: Path) -> None:
    (checkout / "configs/vision_language").mkdir()
    (checkout / "configs/vision_language/quickstart.yaml").touch()
    with pytest.raises(ValueError, match="expected text_to_image/quickstart or vision_language/quickstart"):
        resources.resolve_recipe("quickstart")


def test_home_is_expanded(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkout))
    assert resources.resolve("~/models") == checkout / "models"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/tinysd", "models/tiny_sd"),
        ("quickstart", "configs/text_to_image/quickstart.yaml"),
        ("configs/text_to_imag/quickstart.yaml", "configs/text_to_image/quickstart.yaml"),
        ("tiny_sd", "models/tiny_sd"),
    ],
)
def test_a_missing_name_is_answered_with_places_and_near_names(checkout: Path, name: str, near: str) -> None:
    with pytest.raises(ValueError) as error:
        resources.resolve(name)
    assert f"did you mean {near!r}" in str(error.value)
    assert f"the current folder, {checkout}, {checkout / 'mmalign' / '_share'}" in str(error.value)


@pytest.mark.parametrize(
    "name", ["", "  ", "nothing/like/it.parquet", "x" * 10_000, "/no/such/folder", "~nobody-here/x"]
)
def test_hopeless_names_end_in_one_sentence(checkout: Path, name: str) -> None:
    with pytest.raises(ValueError) as error:
        resources.resolve(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


HUB = ["stabilityai/stable-diffusion-xl-base-1.0", "llava-hf/llava-1.5-7b-hf", "org/name.v2_x"]
PATHS = [
    "models/tiny_sdd",
    "configs/a",
    "runs/a",
    "./a/b",
    "../a",
    "/a/b",
    "~/a",
    "a/b/c",
    "gpt2",
    "org/",
    "a b/c",
    "org/é",
]


def test_hub_id_passes_and_missing_path_is_refused(checkout: Path) -> None:
    for name in HUB:
        assert resources.is_hub_id(name)
        assert resources.resolve_model(name) == name
    for name in PATHS:
        assert not resources.is_hub_id(name)
        with pytest.raises(ValueError, match="no file or folder"):
            resources.resolve_model(name)


def test_a_local_model_wins_over_a_hub_id_of_the_same_spelling(checkout: Path) -> None:
    Path("org/name").mkdir(parents=True)
    assert resources.resolve_model("org/name") == "org/name"
    assert resources.resolve_model("models/tiny_sd") == str(checkout / "models/tiny_sd")


def test_only_a_missing_recipe_leads_to_the_list_of_recipes() -> None:
    with pytest.raises(ValueError, match=r"give the path of an existing one$"):
        resources.resolve("qqq/zzz.json")
    with pytest.raises(ValueError, match=r"`mmalign list` shows the bundled recipes$"):
        resources.resolve_recipe("qqq_zzz")
