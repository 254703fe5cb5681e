"""Files that commands write where the user says: made with their folders, or refused before the work."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmalign.cli import app
from tests.helpers import data_files, recipes

# Words before the file's path, with R for a recipe and D for its data
COMMANDS = {
    "bench": ["bench", "R", "--json"],
    "compare": ["compare", "R", "R2", "--table"],
    "doctor": ["doctor", "D", "--json"],
    "doctor-page": ["doctor", "D", "--html"],
    "init": ["init", "M", "D", "--output"],
    "plan": ["plan", "R", "--json"],
    "show": ["show", "R", "--html"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("place", "expected"),
    [("file.txt/report", "is not writable"), ("", "is a folder; name a file")],
    ids=["in a file", "a folder"],
)
def test_refused_before_the_work(words: list[str], place: str, expected: str, tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("taken")
    data = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    named = {"D": data, "M": tiny_sd15, "R": tmp_path / "one.yaml", "R2": tmp_path / "two.yaml"}
    for name in ("R", "R2"):
        named[name].write_text(yaml.dump(recipes.diffusion(tiny_sd15, data, tmp_path / "run")))
    result = CliRunner().invoke(app, [*(str(named.get(word, word)) for word in words), str(tmp_path / place)])
    # 1 is what `doctor` returns for findings
    assert result.exit_code == (2 if words[0] == "doctor" else 1) and words[-1] in result.output, result.output
    assert expected in " ".join(result.output.split()), result.output
    assert not (tmp_path / "run").exists()


def test_folders_are_made(tmp_path: Path) -> None:
    data, report = data_files.response_pairs(tmp_path, layout="trl"), tmp_path / "new" / "folder" / "report"
    arguments = ["doctor", str(data), "--json", f"{report}.json", "--html", f"{report}.html"]
    assert CliRunner().invoke(app, arguments).exit_code in (0, 1)
    assert sorted(file.name for file in report.parent.iterdir()) == ["report.html", "report.json"]
