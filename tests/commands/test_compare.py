"""Comparison of recipes: one table of several recipes and seeds, resumed where it was stopped."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mmalign import cli
from mmalign.commands import evaluate, prepare, train
from mmalign.commands.compare import compare
from mmalign.modalities.text_to_image.gallery import SHOWN
from mmalign.pages.comparison import short_names
from mmalign.pages.grid import fit
from mmalign.training import checkpoint
from tests.helpers import Folders, data_files, recipes

Content = dict[str, Any]
EVALUATE = {"benchmark": "crowds", "num_images": 3, "decoding": {"max_new_tokens": 4, "batch_size": 16}}


def recipe(folder: Path, name: str, content: Content) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def content(vlm_folders: Folders, tmp_path: Path) -> Content:
    rows = data_files.response_pairs(tmp_path / "rows")
    train = {"steps": 2, "save_every": 2, "lr": 0.1}
    return recipes.vlm(vlm_folders("llava"), rows, tmp_path / "unused", train=train, evaluate=EVALUATE)


@pytest.fixture
def sources(content: Content, tmp_path: Path) -> list[str]:
    return [
        recipe(tmp_path, "dpo", content),
        recipe(tmp_path, "hinge", {**content, "method": {"name": "dpo", "loss": "hinge"}}),
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, and where."""
    done: list[str] = []
    for module, name in ((prepare, "prepare"), (train, "train"), (evaluate, "evaluate")):
        work = getattr(module, name)

        def counted(recipe: Any, name: str = name, work: Any = work) -> Any:
            done.append(f"{name} {Path(recipe.output).parent.name} {Path(recipe.output).name}")
            return work(recipe)

        monkeypatch.setattr(module, name, counted)
    return done


@pytest.mark.slow
def test_table_has_the_numbers_of_every_evaluation(sources: list[str], tmp_path: Path, calls: list[str]) -> None:
    out, table = tmp_path / "compared", tmp_path / "assets" / "table.md"
    base, dpo, hinge = compare(sources, seeds=2, output=out, table=table)
    assert [row.name for row in (base, dpo, hinge)] == ["base", "dpo", "hinge"]
    assert calls == [
        f"{subject} {name} seed-{seed}"
        for name in ("dpo", "hinge")
        for seed in (0, 1)
        for subject in ("train", "evaluate")
    ]
    assert (base.runs, dpo.runs, dpo.pairs) == (1, 2, 4)  # 2 updates of 2 pairs
    assert len(list((out / "answers").iterdir())) == 5  # of the base model once, and of four runs
    written = json.loads(table.with_suffix(".json").read_text())
    assert written == json.loads((out / "comparison.json").read_text())
    for row in written[1:]:
        results = [
            json.loads((out / row["name"] / f"seed-{s}" / "evaluation" / "result.json").read_text()) for s in (0, 1)
        ]
        for label, (counts, name) in {
            "CHAIR_s": ("CHAIR", "CHAIR_s"),
            "recall": ("CHAIR", "recall"),
            "words per response": ("CHAIR", "words per response"),
            "POPE accuracy": ("POPE", "mean: accuracy"),
        }.items():
            each = [r["measures"][counts]["after"]["measures"][name]["estimate"] for r in results]
            before = results[0]["measures"][counts]["before"]["measures"][name]["estimate"]
            result = row["measures"][label]
            assert result["runs"] == pytest.approx(each) and result["estimate"] == pytest.approx(sum(each) / 2)
            assert result["change"]["estimate"] == pytest.approx(sum(each) / 2 - before)
            assert result["low"] <= result["estimate"] <= result["high"]


@pytest.mark.slow
def test_table_is_markdown(sources: list[str], tmp_path: Path) -> None:
    compare(sources, seeds=1, output=tmp_path / "compared")
    text = (tmp_path / "compared" / "comparison.md").read_text()
    header, rule, *rows = (line.split(" | ") for line in text.splitlines()[:5])
    assert [cell.strip("| ") for cell in header][:8] == [
        "",
        "method",
        "runs",
        "pairs seen",
        "seconds",
        "CHAIR_s, %",
        "CHAIR_i, %",
        "recall, %",
    ]
    assert len(header) == len(rule) and {len(row) for row in rows} == {len(header)}
    assert [[cell.strip("| ") for cell in row[:2]] for row in rows] == [["base", ""], ["dpo", "dpo"], ["hinge", "dpo"]]
    for cell in re.findall(r"[-+]?[\d.]+ \[[-\d.e]+, [-\d.e]+\]", text):
        estimate, low, high = map(float, re.findall(r"[-+]?[\d.]+(?:e-?\d+)?", cell))
        assert low <= estimate <= high
    for bold, low, high in re.findall(r"(\*\*)?[-+][\d.]+ \[([-\d.]+), ([-\d.]+)\]", text.partition("Change")[2]):
        assert bool(bold) == (float(low) > 0 or float(high) < 0) or 0 in (float(low), float(high))


@pytest.mark.slow
def test_stopped_comparison_resumes(sources: list[str], tmp_path: Path, calls: list[str]) -> None:
    """Stopped in the second run's evaluation; the same command; and then one more recipe, and one more seed."""
    out = tmp_path / "compared"
    measure = evaluate.evaluate

    def killed(recipe: Any) -> Any:
        if recipe.train.seed == 1:
            raise KeyboardInterrupt
        return measure(recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(sources[:1], seeds=2, output=out)
    calls.clear()
    compare(sources[:1], seeds=2, output=out)
    assert calls == ["evaluate dpo seed-1"]
    first = (out / "comparison.md").read_text()
    calls.clear()
    compare(sources[:1], seeds=2, output=out)
    assert not calls and (out / "comparison.md").read_text() == first
    compare(sources, seeds=2, output=out)
    assert {call.split()[1] for call in calls} == {"hinge"}
    calls.clear()
    compare(sources[:1], seeds=3, output=out)
    assert {call.split()[2] for call in calls} == {"seed-2"}


@pytest.mark.slow
def test_runs_are_evaluated_at_equal_numbers_of_pairs(sources: list[str], tmp_path: Path, calls: list[str]) -> None:
    """After 2, 4 (the recipes' end) and 6 pairs; each length goes on from the one before."""
    out, long = tmp_path / "compared", tmp_path / "long"
    rows = compare(sources, seeds=1, output=out, pairs=[6, 2, 4])
    assert [(row.name, row.num_pairs, row.pairs) for row in rows[1:]] == [
        (name, index, pairs) for index, pairs in ((None, 4), (2, 2), (4, 4), (6, 6)) for name in ("dpo", "hinge")
    ]
    lengths = ["seed-0-2-pairs", "seed-0", "seed-0-6-pairs"]
    assert calls == [
        f"{subject} {name} {run}" for name in ("dpo", "hinge") for run in lengths for subject in ("train", "evaluate")
    ]
    end, at_end = (next(r for r in rows if (r.name, r.num_pairs) == ("dpo", at)) for at in (None, 4))
    assert end.measured is not at_end.measured and {**end.as_dict(), "at": 4} == at_end.as_dict()
    assert 0 < rows[3].seconds < end.seconds < rows[7].seconds  # those of the shorter run are in the longer one
    compare(sources[:1], seeds=1, output=long, overrides=["train.steps=3"])
    assert weights(long / "dpo" / "seed-0") == weights(out / "dpo" / "seed-0-6-pairs")
    text = (out / "comparison.md").read_text()
    headings = [line for line in text.splitlines() if re.match("(At the end|After).*:$", line)]
    assert headings == ["At the end of each recipe:", *(f"After {n} pairs each:" for n in (2, 4, 6))]
    assert " --seeds 1 --pairs 6 --pairs 2 --pairs 4`" in text
    calls.clear()
    compare(sources, seeds=1, output=out, pairs=[6, 2, 4])
    assert not calls


def weights(folder: Path) -> bytes:
    return (checkpoint.latest(folder) or folder).joinpath("model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("pairs", "override", "sentence"),
    [
        (3, "train.batch_size=2", "--pairs 3 is not a whole number of updates of dpo, which takes 2 pairs at a time"),
        (2, "train.schedule=cosine", "dpo has train.schedule cosine.* leave --pairs out, or set train.schedule=consta"),
    ],
)
def test_refuses_a_number_of_pairs_that_no_run_ends_at(
    pairs: int, override: str, sentence: str, sources: list[str], tmp_path: Path, calls: list[str]
) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare(sources, seeds=1, output=tmp_path / "c", pairs=[pairs], overrides=[override])
    assert not calls


@pytest.mark.slow
def test_pictures_are_those_of_the_evaluation(tiny_sd15: Path, tmp_path: Path) -> None:
    """The table has the benchmark's numbers, and the pictures are those of the evaluation."""
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    evaluate = {"benchmark": "scenes", "prompts": SHOWN, "sampling": {"steps": 1}}
    result = recipes.diffusion(tiny_sd15, pairs, tmp_path / "unused", train={"steps": 1}, evaluate=evaluate)
    out, table = tmp_path / "compared", tmp_path / "assets" / "images.md"
    base, dpo, *_ = compare([recipe(tmp_path, "dpo", result)], seeds=1, output=out, pairs=[4], table=table)
    rates = json.loads((out / "dpo" / "seed-0" / "evaluation" / "result.json").read_text())["overall"]
    for row, side in ((base, "before"), (dpo, "after")):
        assert row.as_dict()["measures"]["prompts rendered correctly"]["estimate"] == rates[side]["estimate"]
    for folder, name in ((out, "comparison"), (table.parent, "images")):
        suffixes = {".md", ".json", ".png", "-pictures.png", "-pictures.json"}
        assert {path.name for path in folder.glob(f"{name}*")} == {f"{name}{suffix}" for suffix in suffixes}
    with Image.open(table.with_suffix(".png")) as curve:
        assert len(set(curve.convert("RGB").get_flattened_data())) > 10
    with Image.open(out / "comparison-pictures.png") as picture:
        pixels, description = np.asarray(picture), picture.info["Description"]
    manifest = json.loads((out / "comparison-pictures.json").read_text())
    assert description.split("\n") == manifest["picture"]["lines"]
    assert len(manifest["prompts"]) == SHOWN and list(manifest["notes"]) == ["base", "dpo"]
    with Image.open(out / "dpo" / "seed-0" / "evaluation" / "after" / "00001.png") as image:
        expected = np.asarray(fit(image, 128))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, expected.shape)[:, :, 0]
    rows, columns = np.nonzero((windows[:, :, ::8, ::8] == expected[::8, ::8]).all((2, 3, 4)))
    assert any(np.array_equal(windows[place], expected) for place in zip(rows, columns, strict=True))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["sft_tiny_sd", "inpo_tiny_sd"], ["sft", "inpo"]),
        (["sft_tiny_sd", "quickstart"], ["sft_tiny_sd", "quickstart"]),
        (["sd", "dpo_sd"], ["sd", "dpo_sd"]),
        (["dpo_tiny_sd"], ["dpo_tiny_sd"]),
    ],
)
def test_short_names_drop_common_words(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))


@pytest.mark.slow
def test_runs_share_a_folder_of_different_caches(tiny_sd15: Path, tmp_path: Path) -> None:
    """Seeds that keep draws of their own, and recipes of other sizes."""
    method = {"name": "inpo", "inverter": "reference", "num_cached_draws": 1, "steps": 2}
    evaluate = {"benchmark": "scenes", "prompts": 2, "sampling": {"steps": 1}}
    pairs, common = data_files.pick_a_pic(tmp_path / "pairs.parquet"), {"train": {"steps": 1}, "evaluate": evaluate}
    result = recipes.diffusion(tiny_sd15, pairs, tmp_path / "unused", method=method, **common)
    sizes = {"small": {}, "large": {"resolution": 24}, "half": {}}
    contents = {name: {**result, "data": {**result["data"], **size}} for name, size in sizes.items()}
    contents["half"]["train"] = {**result["train"], "precision": "bfloat16"}
    sources = [recipe(tmp_path, name, content) for name, content in contents.items()]
    rows = compare(sources, seeds=2, output=tmp_path / "compared")
    assert [row.runs for row in rows] == [1, 2, 2, 2]
    number = {kind: len(list((tmp_path / "compared" / "cache" / kind).iterdir())) for kind in ("kept", "latents")}
    assert number == {"kept": 6, "latents": 2}


@pytest.mark.slow
def test_lora_and_full_runs_share_a_folder_of_caches(content: Content, tmp_path: Path) -> None:
    """In bfloat16 the tower of one is in half precision, and that of the other is not."""
    half = {**content, "train": {**content["train"], "precision": "bfloat16"}}
    sources = [
        recipe(tmp_path, tune, {**half, "model": {**content["model"], "tune": tune}}) for tune in ("lora", "full")
    ]
    assert len(compare(sources, seeds=1, output=tmp_path / "compared")) == 3
    assert len(list((tmp_path / "compared" / "cache" / "features").iterdir())) == 2


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"evaluate": None}, "has no benchmark with generated images or answers"),
        ({"evaluate": {"benchmark": "implicit"}}, "has no benchmark with generated images or answers"),
        ({"evaluate": {**EVALUATE, "num_images": 4}}, "evaluate differs between dpo and other"),
        ({"model": {"path": "models/tiny_sd"}}, "model.path differs between dpo and other"),
        ({"model": {"variant": "fp16"}}, "model.variant differs between dpo and other"),
        (
            {"model": {"adapter": {"path": "runs/first/model", "use": "merge"}}},
            "model.adapter differs between dpo and other",
        ),
        ({"model": {"template_arguments": {"enable_thinking": False}}}, "model.template_arguments differs"),
    ],
)
def test_refuses_recipes_of_different_benchmarks(
    changed: Content, sentence: str, content: Content, sources: list[str], tmp_path: Path, calls: list[str]
) -> None:
    changed = {**changed, "model": {**content["model"], **changed.get("model", {})}}
    other_recipe = recipe(tmp_path, "other", {**content, **changed})
    with pytest.raises(ValueError, match=sentence):
        compare([sources[0], other_recipe], seeds=1, output=tmp_path / "compared")
    assert not calls


def test_refuses_two_recipes_of_one_name(content: Content, sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match="two recipes are called dpo; rename one"):
        compare([sources[0], recipe(tmp_path / "more", "dpo", content)], seeds=1, output=tmp_path / "c")


@pytest.mark.slow
def test_runs_of_another_recipe_are_not_taken_for_this_ones(sources: list[str], tmp_path: Path) -> None:
    compare(sources[:1], seeds=1, output=tmp_path / "compared")
    with pytest.raises(
        ValueError, match=r"seed-0 was trained with train.lr 0.1, and now it is 0.2; name another --output"
    ):
        compare(sources[:1], seeds=1, output=tmp_path / "compared", overrides=["train.lr=0.2"])


@pytest.mark.slow
def test_compare_command(sources: list[str], tmp_path: Path) -> None:
    arguments = ["compare", *sources, "--seeds", "1", "--output", str(tmp_path / "c"), "--set", "train.steps=1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert f"table: {tmp_path / 'c' / 'comparison.md'}" in result.stdout
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())[1]["pairs"] == 2
