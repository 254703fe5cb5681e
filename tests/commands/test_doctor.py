"""The command `doctor`: planted defects are found, clean twins stay clean, and the exit code says which."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mmalign import cli
from mmalign.commands.doctor import open_files, open_recipe
from mmalign.doctor.checks import CHECKS
from mmalign.doctor.report import Report, examine
from tests.helpers import Folders, data_files, doctor_data, recipes
from tests.helpers.chromium import rendered
from tests.helpers.page_reader import Page, digest

HOSTILE = "</dd></style><script>document.title=1</script><img src=x onerror=alert(1)>"


def run(*arguments: object) -> tuple[int, str]:
    """Return the exit code of the command, and what it prints."""
    result = CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def rows_found(report: Report) -> dict[str, list[int]]:
    """Return the numbers of the rows at which each check found something."""
    return {
        finding.check.name: sorted(
            {int(number) for place in finding.places for number in re.findall(r"line (\d+)", place.location)}
        )
        for finding in report.problems
    }


def examined(recipe: dict[str, Any], folder: Path) -> Report:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return examine(open_recipe(str(path)), "test")


@pytest.fixture(params=["images", "responses"])
def write(request: pytest.FixtureRequest, vlm_folders: Folders) -> Callable[..., Any]:
    """Return the function that writes a corpus of one modality, with its recipe."""
    if request.param == "images":
        return lambda folder, planted: doctor_data.image_corpus(folder, Path("models/tiny_sd"), planted)
    return lambda folder, planted: doctor_data.response_corpus(folder, vlm_folders("llava"), planted)


def test_every_planted_defect_is_found(write: Callable[..., Any], tmp_path: Path) -> None:
    corpus, recipe = write(tmp_path / "corpus", True)
    report = examined(recipe, tmp_path)
    places = rows_found(report)
    assert places == {name: sorted(rows) for name, rows in corpus.planted.items()}
    assert [finding.check.name for finding in report.findings if finding.not_checked] == []


def test_nothing_is_found_in_the_clean_twin(write: Callable[..., Any], tmp_path: Path) -> None:
    report = examined(write(tmp_path / "corpus", False)[1], tmp_path)
    assert report.problems == [] and len(report.clean) == len(report.findings) >= 12


def test_every_check_has_a_planted_defect(tmp_path: Path) -> None:
    made = [doctor_data.image_corpus, doctor_data.response_corpus]
    names = {name for n, write in enumerate(made) for name in write(tmp_path / str(n), tmp_path, True)[0].planted}
    assert names == {check.name for check in CHECKS}


def test_exit_code_follows_the_findings(tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path / "rows", 4)
    assert run(rows)[0] == 0
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines, lines[0].replace('"chosen": "', '"chosen": " ')]))  # the same label twice
    assert run(rows)[0] == 0
    bad = json.loads(lines[0])
    data_files.write_jsonl(rows, *map(json.loads, lines), {**bad, "rejected": bad["chosen"].upper()})
    code, printed = run(rows, "--json", tmp_path / "report.json")
    assert code == 1 and "near_identical (1)" in printed and "trl.jsonl: line 5" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    places = {check["name"]: check["places"] for check in report["checks"] if check["status"] == "found"}
    assert [place["location"] for place in places.pop("near_identical")] == ["trl.jsonl: line 5"] and not places
    assert {check["status"] for check in report["checks"] if check["name"] == "template"} == {"not checked"}
    for option in (["--fail-on", "error"], ["--fail-on", "none"], ["--ignore", "near_identical"]):
        assert run(rows, *option)[0] == 0
    (tmp_path / "rows" / "0.png").write_bytes(b"no image")
    assert run(rows, "--fail-on", "error")[0] == 1


def test_errors_give_exit_code_2(tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "a", "chosen": ')
    colours = data_files.write_jsonl(tmp_path / "colours.jsonl", {"red": 1})
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    rows = data_files.response_pairs(tmp_path / "rows")
    recipe = "configs/text_to_image/quickstart.yaml"
    for arguments, words in (
        ([torn], "is not JSON"),
        ([colours], "expected a known layout"),
        ([tmp_path / "none.jsonl"], "does not exist"),
        ([tmp_path / "none.yaml"], "there is no file"),
        ([pairs, rows], "image pairs and response pairs"),
        ([recipe, pairs], "one recipe alone"),
        ([pairs, "--set", "data.limit=2"], "--set"),
        ([pairs, "--ignore", "tie"], "did you mean 'ties'"),
        ([pairs, "--format", "trl"], "has no"),
        ([rows, "--format", "answers"], "there is no 'answers'"),
        ([rows, "--json", rows / "report.json"], "--json"),
        ([rows, "--html", rows / "report.html"], "--html"),
    ):
        code, printed = run(*arguments)
        assert code == 2 and "error: " in printed and words in printed, printed


@pytest.mark.parametrize("layout", ["trl", "povid", "realign", "mdpo", "rlhfv"])
def test_formats_are_guessed(layout: str, tmp_path: Path) -> None:
    """Read the rows of each layout, two per image; they are clean."""
    assert len(open_files([str(data_files.response_pairs(tmp_path, layout=layout))]).cases) == 8


@pytest.mark.parametrize("format", [None, "named"])
def test_thumbs_and_lists_need_no_recipe(format: str | None, tmp_path: Path) -> None:
    """Images and responses have layouts of one name, and columns may have other names."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(data_files.png(number, 16))
    images = [f"{number}.png" for number in range(3)]
    thumbs = [{"caption": "a fox", "image": images[n // 2], "label": n % 2} for n in range(3)]
    liked = [{"image": "0.png", "prompt": "What?", "completion": "A fox.", "label": n > 0} for n in range(3)]
    ranked = [{"prompt": "a fox", "image_path": images, "rank": [1, 2, 3]}]
    scored = [{"image": "0.png", "prompt": "What?", "responses": ["A fox.", "A cat."], "scores": [2, 1]}]
    winners = [{"caption": "a fox", "winner_path": "0.png", "loser_path": "1.png"}]
    for rows, kind, layout, number, contradictory in (
        (thumbs, "image pairs", "thumbs", 3, 1),
        (liked, "response pairs", "thumbs", 3, 1),
        (ranked, "image pairs", "rankings", 3, 0),
        (scored, "response pairs", "rankings", 1, 0),
        (winners, "image pairs", None, 1, 0),
    ):
        path = data_files.write_jsonl(tmp_path / "rows.jsonl", *rows)
        named = layout if format is not None and rows is not thumbs else None  # a named layout needs its own columns
        corpus = open_files([str(path)], named)
        names = {finding.check.name: finding.places for finding in examine(corpus, "test").problems}
        assert corpus.kind == kind and len(corpus.cases) == number
        assert len(names.get("contradictions", ())) == contradictory


def test_tables_of_image_pairs_are_examined(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    clean = data_files.pick_a_pic(tmp_path / "clean.parquet")
    rows = pq.read_table(clean).to_pylist()
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    rows[2] |= {"label_0": 1.0, "label_1": None}
    rows[3] |= {"jpg_0": rows[3]["jpg_1"]}
    rows[4] |= {"jpg_1": b""}
    rows[5] |= {"jpg_0": rows[5]["jpg_0"][:-30]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    # The helper's chosen images are all larger or smaller than the rejected ones, in odd rows
    report = examine(open_files([str(tmp_path / "bad.parquet")]), "test", ignore=["image_sizes"])
    places = {finding.check.name: [place.location for place in finding.places] for finding in report.problems}
    assert places == {
        "ties": ["bad.parquet: row 1"],
        "unusable": ["bad.parquet: row 2"],
        "identical": ["bad.parquet: row 3"],
        "unreadable": ["bad.parquet: row 4, jpg_1", "bad.parquet: row 5, jpg_0"],
    }
    assert not examine(open_files([str(clean)]), "test", ignore=["image_sizes"]).problems


def test_images_of_both_sides_are_compared(tmp_path: Path) -> None:
    """Rows of swift may ask one question about two images."""
    corpus = doctor_data.Corpus(tmp_path / "swift")
    messages = [{"role": "user", "content": "What is here?"}, {"role": "assistant", "content": "A car."}]
    for other in (doctor_data.drawing(90), doctor_data.drawing(91, 128), doctor_data.jpeg(doctor_data.drawing(1))):
        images = ["1.png"] if corpus.rows else [corpus.image(doctor_data.drawing(1))]
        corpus.add(images=images, messages=messages, rejected_images=[corpus.image(other)])
    report = examine(open_files([str(corpus.write())]), "test")
    assert rows_found(report) == {"image_sizes": [2], "near_identical": [3]}


def test_plain_images_are_shared_only_if_equal(tmp_path: Path) -> None:
    """Failed generations of one colour are no leak; a copy of the file is one."""
    corpus = doctor_data.Corpus(tmp_path / "corpus")
    for number, colour in enumerate([(200, 0, 0), (201, 0, 0), (200, 0, 0)]):
        plain = corpus.image(Image.new("RGB", (64, 64), colour))
        corpus.add(prompt=f"thing {number}", chosen=corpus.image(), rejected=plain, held_out=number == 0)
    data = {"format": "folder", "group_by": "group", "validation_fraction": doctor_data.FRACTION}
    recipe = recipes.diffusion(Path("models/tiny_sd"), corpus.write(), tmp_path / "out", data=data)
    assert rows_found(examined(recipe, tmp_path)) == {"shared_images": [3]}


def test_a_prompt_file_is_examined(tmp_path: Path) -> None:
    """SPO generates its images: only its prompts are read."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" + "a blue star " * 40 + "\n")
    (tmp_path / "held.txt").write_text("A red circle.\na green star\n")
    settings = [f"data.path={prompts}", f"evaluate.prompts={tmp_path / 'held.txt'}", "evaluate.benchmark=preference"]
    settings += ["evaluate.reward.path=models/tiny_clip", f"output={tmp_path}"]
    recipe = "configs/text_to_image/spo_tiny_sd.yaml"
    report = examine(open_recipe(recipe, ["data.format=prompts", *settings]), "test")
    assert rows_found(report) == {"shared_prompts": [1], "long_captions": [2]}
    assert [finding.check.name for finding in report.findings] == ["shared_prompts", "long_captions"]


def test_missing_models_and_files_are_said(tmp_path: Path) -> None:
    """A model that is not here, and evaluation files that are not there, leave other checks alone."""
    rows = data_files.response_pairs(tmp_path / "rows")
    settings = [f"data.path={rows}", "data.format=trl", "model.path=org/absent", f"output={tmp_path / 'out'}"]
    asked = f"evaluate={{benchmark: chair, annotations: {tmp_path / 'none.json'}, images: {tmp_path}}}"
    report = examine(open_recipe("configs/vision_language/quickstart.yaml", [*settings, asked]), "test")
    reasons = {finding.check.name: finding.not_checked for finding in report.findings if finding.not_checked}
    assert reasons.keys() == {"shared_images", "over_budget", "template", "length_bias"}
    assert "org/absent" in reasons["over_budget"] and "none.json" in reasons["shared_images"]


def test_the_page_shows_places_and_their_images(tmp_path: Path) -> None:
    corpus, _ = doctor_data.response_corpus(tmp_path / "corpus", tmp_path, True)
    corpus.rows[0]["prompt"] = HOSTILE
    corpus.rows[0]["rejected"] = corpus.rows[0]["chosen"] + "!"
    code, _ = run(corpus.write(), "--html", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert code == 1
    assert {"unreadable", "cycles", "contradictions"} <= set(page.values("section", "id"))
    assert (
        all(uri.startswith("data:image/webp;base64,") for uri in page.values("img", "src"))
        and "<img src=x" not in page.text
    )
    (style,) = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
    (policy,) = (str(values["content"]) for _, values in page.tags if "http-equiv" in values)
    assert "default-src 'none'" in policy and f"style-src {digest(style)}" in policy
    assert not {"style", "onerror"} & {name for _, values in page.tags for name in values}
    document, complaints = rendered(tmp_path / "report.html", tmp_path / "profile")
    assert complaints == [] and document.count("<article") == page.text.count("<article") >= 8
