"""Prompts as data: files, rows, batches, and the prompts of pairs."""

from pathlib import Path

import pytest

from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.prompts import Prompt, open_prompts, read_prompt_rows, unique_prompts
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.prompts import PromptReader
from mmalign.data.splits import split_by_group
from mmalign.toy.scenes import sample_prompts
from tests.helpers import data_files

SHIPPED = Path(__file__).parents[3] / "assets" / "prompts" / "scenes.txt"


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    return tmp_path / "prompts.txt"


def test_prompt_file_has_one_row_per_line(tmp_path: Path) -> None:
    pairs = open_prompts(str(written(tmp_path, "# said\na hen\n\n  an owl \na hen\n")))
    assert [p.prompt for p in pairs] == ["a hen", "an owl", "a hen"]
    assert len({p.row for p in pairs}) == 3
    assert pairs[1].location.endswith("prompts.txt: line 4")
    again = open_prompts(str(written(tmp_path, "an owl\na hen\na hen")))  # rows belong to texts, not to lines
    assert sorted(p.row for p in again) == sorted(p.row for p in pairs)
    assert len(open_prompts(str(tmp_path / "prompts.txt"), limit=2)) == 2


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    text = "\ufeffa hen\r\n#1 dad mug\r\n# a comment\r\n#\r\n## too\r\na\u2028b\x85c\x0cd\r\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    assert [p.prompt for p in open_prompts(str(tmp_path / "prompts.txt"))] == [
        "a hen",
        "#1 dad mug",
        "a\u2028b\x85c\x0cd",
    ]


@pytest.mark.parametrize("text", ["", "\n \n", "# nothing but this"])
def test_an_empty_list_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.path: .*prompts\.txt has none; expected one prompt a line"):
        open_prompts(str(written(tmp_path, text)))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt does not exist; expected a text file with one prompt a line"):
        open_prompts(str(tmp_path / "gone.txt"))
    (tmp_path / "image.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"image\.txt cannot be read .*expected a text file in UTF-8"):
        open_prompts(str(tmp_path / "image.txt"))


def test_pairs_give_their_prompts_once(tmp_path: Path) -> None:
    pairs = open_pairs("pick_a_pic", str(data_files.pick_a_pic(tmp_path / "pairs.parquet")))
    assert [p.prompt for p in unique_prompts(pairs, limit=3)] == [f"thing number {i}" for i in range(3)]
    twice = pairs.select([0, 0, 1])
    assert len(unique_prompts(twice)) == 2


def test_batches_are_shared_from_any_start(tmp_path: Path) -> None:
    prompts = open_prompts(str(written(tmp_path, "\n".join(f"thing {i}" for i in range(11)))))
    whole = list(Loader(prompts, PromptReader(), batch_size=2, seed=3).batches(epoch=1))
    assert [len(b.rows) for b in whole] == [2] * 5  # the last, half full, is left out
    later = list(Loader(prompts, PromptReader(), batch_size=2, seed=3).batches(epoch=1, start=3))
    assert [b.rows for b in later] == [b.rows for b in whole[3:]]
    both = [
        list(Loader(prompts, PromptReader(), batch_size=1, seed=3, rank=r, world_size=2).batches(1)) for r in (0, 1)
    ]
    assert [[a.rows[0], b.rows[0]] for a, b in zip(*both, strict=True)] == [b.rows for b in whole]
    kept = list(Loader(prompts, PromptReader(), batch_size=4, seed=3, keep_last=True).batches(0))
    assert [b.weights.tolist() for b in kept[-1:]] == [[1.0, 1.0, 1.0, 0.0]]
    loader = Loader(prompts, PromptReader(), batch_size=2, seed=3)
    assert loader.batch_locations(1, 0)[0].startswith(str(tmp_path)) and len(loader) == 5


def test_a_hold_out_keeps_equal_prompts_together(tmp_path: Path) -> None:
    prompts = open_prompts(str(written(tmp_path, "\n".join(f"thing {i % 10}" for i in range(40)))))
    train, validation = split_by_group(prompts, 0.3, seed=0)
    assert not set(train.prompts()) & set(validation.prompts()) and len(train) + len(validation) == 40


def test_bundled_prompts_are_the_worlds_training_split() -> None:
    """Made by: sample_prompts("train", 1600, seed=0), as the quickstart's pairs were."""
    assert [p.prompt for p in open_prompts(str(SHIPPED))] == [str(p) for p in sample_prompts("train", 1600, 0)]


def test_prompts_with_sources_are_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(data_files.png(1))
    rows = [{"instruction": "make it blue", "input_image": "1.png", "id": n} for n in (1, 2)]
    table = data_files.write_jsonl(tmp_path / "asked.jsonl", *rows)
    (first, second) = read_prompt_rows("evaluate.prompts", table)
    assert first.text == second.text == "make it blue" and first.source == second.source
    assert first.source is not None and first.source.read() == data_files.png(1)
    assert first.source.location.endswith("asked.jsonl: line 1, source")
    alone = data_files.write_jsonl(tmp_path / "alone.jsonl", {"prompt": "a hen"})
    assert read_prompt_rows("evaluate.prompts", alone) == [Prompt("a hen")]
    assert read_prompt_rows("evaluate.prompts", written(tmp_path, "a hen")) == [Prompt("a hen")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "source": "9.png"}, 'line 2 the image "9.png" does not exist'),
        ({"prompt": "a", "source": "../1.png"}, 'line 2 the image "../1.png" is outside'),
        ({"prompt": "a", "source": None}, "line 2 has no image"),
        ({"prompt": " ", "source": "1.png"}, "line 2 has a blank prompt"),
        ({"prompt": "a"}, "line 2 has no 'source'"),
    ],
)
def test_a_bad_row_of_prompts_is_named(row: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(data_files.png(1))
    table = data_files.write_jsonl(tmp_path / "asked.jsonl", {"prompt": "a", "source": "1.png"}, row)
    with pytest.raises(ValueError, match=r"^train.samples: .*asked.jsonl: line 2 .*; repair the row") as error:
        read_prompt_rows("train.samples", table)
    assert words in str(error.value)


def test_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    table = data_files.write_jsonl(tmp_path / "asked.jsonl", {"source": "1.png"})
    with pytest.raises(ValueError, match=r"^prepare.prompts: .*asked.jsonl has no 'prompt'"):
        read_prompt_rows("prepare.prompts", table)
