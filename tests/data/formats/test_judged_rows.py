"""Rows of one output with a label, and of several with scores, from every layout that has them."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.config import ImageSize
from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.formats.labels import Margins
from mmalign.data.formats.responses import open_responses
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.image_pairs import ImagePairReader
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.sampler import Balance, EpochSampler
from mmalign.data.pairs import ImagePair, Pairs, pair_key
from mmalign.data.shapes import Shapes
from mmalign.synthesis.write_image_pairs import write_pairs
from tests.helpers import data_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six pictures."""
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(data_files.png(seed))
    return tmp_path


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def images(pairs: Pairs) -> list[tuple[list[int], tuple[float, ...]]]:
    """Return the numbers of the pictures of every row, and their scores."""
    return [([int(Path(ref.path).stem) for ref in row.outputs], row.scores) for row in pairs]


def thumb(seed: int, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{seed}", "image": f"{seed}.png", "label": label, **more}


# --------------------------------------------------------------------------------------------------------- image thumbs


@pytest.mark.parametrize("labels", [(True, False), (1, 0), (1, -1), ("liked", "disliked"), ("yes", "no")])
def test_image_thumbs_are_recognized(labels: tuple[Any, Any], folder: Path) -> None:
    path = written(folder, [thumb(0, labels[0]), thumb(1, labels[1])])
    check_source("auto", path, learning="thumbs")
    pairs = open_pairs("auto", path, learning="thumbs")
    assert images(pairs) == [([0], (1.0,)), ([1], (0.0,))] and pairs.liked() == [True, False]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (thumb(1, None), "has no label"),
        (thumb(1, 3.5), "label is 3.5; expected true or false"),
        (thumb(1, 1e300), "label is 1e+300"),
        (thumb(1, True, prompt=" "), "has a blank prompt"),
        (thumb(1, True, image="../x.png"), "is outside"),
        (thumb(1, True, image=None), "has no image"),
    ],
)
def test_bad_thumbs_are_dropped_by_name(row: dict[str, Any], reason: str, folder: Path) -> None:
    pairs = open_pairs("auto", written(folder, [thumb(0, True), row]), learning="thumbs")
    assert len(pairs) == 1
    assert [reason in skipped.reason for skipped in pairs.skipped] == [True]


def test_thumbs_of_a_table_hold_their_images(folder: Path) -> None:
    cells = [{"bytes": data_files.png(seed), "path": None} for seed in range(3)]
    table = pa.table({"text": ["a", "b", "c"], "image": cells, "liked": [True, False, True]})
    pq.write_table(table, folder / "rows.parquet")
    pairs = open_pairs("auto", str(folder / "rows.parquet"), learning="thumbs")
    assert [row.scores for row in pairs] == [(1.0,), (0.0,), (1.0,)]
    assert pairs[1].outputs[0].read() == data_files.png(1)


def test_every_image_of_two_folders_is_a_thumb(tmp_path: Path) -> None:
    """Without a partner of its name; one without a caption is dropped."""
    for side, seeds in (("liked", (0, 1)), ("disliked", (2,))):
        (tmp_path / "data" / side).mkdir(parents=True)
        for seed in seeds:
            (tmp_path / "data" / side / f"{seed}.png").write_bytes(data_files.png(seed))
            (tmp_path / "data" / side / f"{seed}.txt").write_text(f"prompt {seed}")
    (tmp_path / "data" / "liked" / "5.png").write_bytes(data_files.png(5))
    pairs = open_pairs("auto", str(tmp_path / "data"), learning="thumbs")
    assert images(pairs) == [([0], (1.0,)), ([1], (1.0,)), ([2], (0.0,))]
    assert [row.prompt for row in pairs] == ["prompt 0", "prompt 1", "prompt 2"]
    assert "has no caption" in pairs.skipped[0].reason


def test_rows_with_metadata_beside_images_are_thumbs(folder: Path) -> None:
    """As a folder of images on the Hub has them."""
    rows = [{"file_name": f"{seed}.png", "text": "a", "label": seed % 2} for seed in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_pairs("auto", str(folder), learning="thumbs").liked() == [False, True, False]


def test_pairs_are_cut_into_thumbs(folder: Path) -> None:
    """Of more images the best is liked and the worst disliked; a tie is left out."""
    rows = [
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]},
        {"prompt": "b", "image_path": ["3.png", "4.png"], "rank": [1, 1]},
    ]
    pairs = open_pairs("auto", written(folder, rows), learning="thumbs", cut_pairs=True)
    assert images(pairs) == [([2], (1.0,)), ([1], (0.0,))]
    assert pairs.ties == 1


def test_the_rejected_image_s_prompt_is_its_thumb_s(folder: Path) -> None:
    row = {"prompt": "a fox", "rejected_prompt": "a dog", "chosen": "0.png", "rejected": "1.png"}
    pairs = open_pairs("auto", written(folder, [row]), learning="thumbs", cut_pairs=True)
    assert [one.prompt for one in pairs] == ["a fox", "a dog"]


def test_pairs_without_the_option_are_refused_with_it(folder: Path) -> None:
    path = written(folder, [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    for format in ("auto", "folder"):
        with pytest.raises(ValueError, match=r"data\.cut_pairs: true"):
            open_pairs(format, path, learning="thumbs")


# ---------------------------------------------------------------------------------------------------------- image lists


def test_rankings_are_lists_best_first(folder: Path) -> None:
    rows = [
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]},
        {"prompt": "b", "image_path": ["3.png", "4.png"], "rank": [2, 1]},
    ]
    pairs = open_pairs("auto", written(folder, rows), learning="lists")
    assert images(pairs) == [([2, 0, 1], (-1.0, -2.0, -3.0)), ([4, 3], (-1.0, -2.0))]


@pytest.mark.parametrize(
    ("preferences", "scores"), [([0.5, 0.1, 9.0], (9.0, 0.5, 0.1)), ([0.1, 0.1, 9.0], (-1.0, -2.0, -3.0))]
)
def test_a_ranking_with_ranks_and_preferences_has_the_finer_ones(
    preferences: list[float], scores: tuple[float, ...], folder: Path
) -> None:
    row = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]}
    path = written(folder, [row | {"human_preference": preferences}])
    assert images(open_pairs("rankings", path, learning="lists")) == [([2, 0, 1], scores)]
    gaps = [pair.label.margin for pair in open_pairs("rankings", path, margins=Margins("score"))]
    assert len(gaps) == 3 and max(gaps) == 9.0 - 0.1


@pytest.mark.parametrize("learning", ["pairs", "thumbs", "lists"])
def test_a_ranking_of_one_image_is_dropped_by_name(learning: Any, folder: Path) -> None:
    rows = [
        {"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2]},
        {"prompt": "b", "image_path": ["2.png"], "rank": [1]},
    ]
    pairs = open_pairs("rankings", written(folder, rows), learning=learning, cut_pairs=learning == "thumbs")
    assert {row.prompt for row in pairs} == {"a"}
    assert [row.reason for row in pairs.skipped] == ["has the only image of its prompt; expected several to compare"]


def test_rows_of_one_image_with_scores_are_lists_of_their_prompts(folder: Path) -> None:
    rows = [{"prompt": "a", "image": f"{n}.png", "score": n / 2} for n in range(3)]
    rows += [{"prompt": "b", "image": f"{n}.png", "score": 1} for n in (3, 4)]
    pairs = open_pairs("auto", written(folder, rows), learning="lists")
    assert images(pairs) == [([2, 1, 0], (1.0, 0.5, 0.0))] and pairs.ties == 1


def test_prepared_lists_are_read_best_first(tmp_path: Path) -> None:
    """The second prompt's images are too close to be sure of."""
    images = [Image.open(io.BytesIO(data_files.png(seed))) for seed in range(4)]
    path, scores = tmp_path / "lists.parquet", [0.0, 3.0, 1.0, 1.1]
    kept = write_pairs(path, ["a", "a", "b", "b"], images, scores, group=2, min_confidence=0.9, keep_all=True)
    (row,) = open_pairs("auto", str(path), learning="lists")
    assert kept == (1, 2) and row.scores == (3.0, 0.0)
    assert Image.open(io.BytesIO(row.outputs[0].read())).tobytes() == images[1].tobytes()


def test_another_score_makes_another_row(folder: Path) -> None:
    """Its caches are not mistaken for the other's."""
    keys = set()
    for score in (1, 2):
        rows = [{"prompt": "a", "image": f"{n}.png", "score": n * score} for n in range(3)]
        keys.add(pair_key(open_pairs("auto", written(folder, rows), learning="lists")[0]))
    assert len(keys) == 2


def loader(pairs: Pairs, **options: Any) -> Loader[ImagePair, Any, Any]:
    size = ImageSize(16, 16)
    reader = ImagePairReader(Shapes((size,), {}), ImageTransform(), 0)
    return Loader(pairs, reader, **{"batch_size": 2, "seed": 0, **options})


def test_lists_of_different_lengths_share_a_batch(folder: Path) -> None:
    """[KB], the first images first; a missing image is its row's first one, and its score NaN."""
    rows = [
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]},
        {"prompt": "b", "image_path": ["3.png", "4.png"], "rank": [2, 1]},
    ]
    pairs = open_pairs("auto", written(folder, rows), learning="lists")
    (batch,) = loader(pairs).read_pairs(0, [0, 1])
    assert batch.pixels.shape == (6, 3, 16, 16)
    assert batch.scores[0].tolist() == [-1.0, -2.0, -3.0]
    assert batch.scores[1, :2].tolist() == [-1.0, -2.0] and batch.scores[1, 2].isnan()
    assert torch.equal(batch.pixels[5], batch.pixels[1]) and not torch.equal(batch.pixels[4], batch.pixels[0])


def test_pairs_have_no_scores_and_the_row_ids_that_they_had(folder: Path) -> None:
    path = written(folder, [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    (pair,) = open_pairs("auto", path)
    (batch,) = loader(open_pairs("auto", path)).batches(0)
    assert pair.scores == () and batch.scores.isnan().all()
    assert pair.content == ("a", "", pair.chosen.key, pair.rejected.key)


# -------------------------------------------------------------------------------------------------------------- balance


def test_balance_repeats_the_scarcer_label() -> None:
    """Two of ten are liked: 80 % of an epoch are draws of these, each as often as the other, within one."""
    liked = [n < 2 for n in range(10)]
    sampler = EpochSampler(10, 5, 0, balance=Balance(liked, 0.8))
    epochs = [sampler.order(epoch) for epoch in range(20)]
    assert all(sum(liked[n] for n in order) == 8 and len(order) == 10 for order in epochs)
    assert all(Counter(order)[0] == 4 for order in epochs)
    assert {n for order in epochs for n in order} == set(range(10))
    assert epochs[0] == sampler.order(0) != epochs[1]


def test_balance_keeps_the_numbers_of_each_image_size() -> None:
    shapes = ["wide", "tall"] * 10
    sampler = EpochSampler(20, 2, 0, shapes=shapes, balance=Balance([n % 5 == 0 for n in range(20)], 0.5))
    assert Counter(shapes[n] for n in sampler.order(3)) == {"wide": 10, "tall": 10}
    assert len(sampler.plan(3)) == len(sampler)
    # Each place of the epoch keeps its size, so that sizes alternate as they do without a balance
    plain = EpochSampler(20, 2, 0, shapes=shapes)
    assert [shapes[n] for n in sampler.order(3)] == [shapes[n] for n in plain.order(3)]


def test_labels_that_are_all_equal_cannot_be_balanced(folder: Path) -> None:
    pairs = open_pairs("auto", written(folder, [thumb(0, True), thumb(1, True)]), learning="thumbs")
    with pytest.raises(ValueError, match="liked_share"):
        loader(pairs, liked_share=0.8)


# ------------------------------------------------------------------------------------------------------------ responses

ROW = {"images": ["0.png"], "prompt": "What is it?"}


def test_trl_s_unpaired_rows_are_thumbs(folder: Path) -> None:
    answer = [{"role": "assistant", "content": "A dog."}]
    rows = [ROW | {"completion": "A cube.", "label": True}, ROW | {"completion": answer, "label": False}]
    pairs = open_responses("auto", written(folder, rows), learning="thumbs")
    assert [(row.responses, row.scores) for row in pairs] == [(("A cube.",), (1.0,)), (("A dog.",), (0.0,))]
    assert pairs.liked() == [True, False]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"completion": "A cube."}, "has no 'label'"),
        ({"completion": "A cube.", "label": "perhaps"}, 'label is "perhaps"'),
        ({"completion": " ", "label": True}, "response is empty"),
        ({"completion": None, "label": True}, "response is empty"),
        ({"completion": "A cube.", "label": True, "images": []}, "has no image"),
    ],
)
def test_bad_response_thumbs_are_dropped_by_name(more: dict[str, Any], reason: str, folder: Path) -> None:
    rows = [ROW | {"completion": "A cube.", "label": True}, ROW | more]
    pairs = open_responses("auto", written(folder, rows), learning="thumbs")
    assert len(pairs) == 1 and reason in pairs.skipped[0].reason


def test_response_pairs_are_cut_into_thumbs(folder: Path) -> None:
    path = written(folder, [ROW | {"chosen": "A cube.", "rejected": "A dog."}])
    pairs = open_responses("auto", path, learning="thumbs", cut_pairs=True)
    assert [(row.responses, row.scores) for row in pairs] == [(("A cube.",), (1.0,)), (("A dog.",), (0.0,))]


RANKED = ROW | {"responses": ["A dog.", "A cube.", "Nothing."], "scores": [0.5, 2, -1]}


def test_ranked_responses_are_a_list_or_pairs(folder: Path) -> None:
    path = written(folder, [RANKED])
    (row,) = open_responses("auto", path, learning="lists")
    assert row.responses == ("A cube.", "A dog.", "Nothing.") and row.scores == (2.0, 0.5, -1.0)
    pairs = [(pair.chosen, pair.rejected) for pair in open_responses("auto", path)]
    assert pairs == [("A cube.", "A dog."), ("A cube.", "Nothing."), ("A dog.", "Nothing.")]


def test_ranks_are_smaller_for_the_better(folder: Path) -> None:
    row = {name: value for name, value in RANKED.items() if name != "scores"} | {"ranks": [2, 1, 3]}
    assert open_responses("auto", written(folder, [row]), learning="lists")[0].responses[0] == "A cube."


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"scores": [1, 2]}, "has 3 responses and 2 scores"),
        ({"scores": [1, 2, "x"]}, 'scores is "x"'),
        ({"scores": [1, 2, float("inf")]}, "scores is Infinity"),
        ({"responses": ["A dog."], "scores": [1]}, "has 1 responses"),
        ({"responses": ["A dog.", "", "x"]}, "response is empty"),
    ],
)
def test_bad_lists_are_dropped_by_name(more: dict[str, Any], reason: str, folder: Path) -> None:
    pairs = open_responses("auto", written(folder, [RANKED, RANKED | more]), learning="lists")
    assert len(pairs) == 1 and reason in pairs.skipped[0].reason


def test_pairs_are_lists_of_two(folder: Path) -> None:
    (row,) = open_responses("auto", written(folder, [ROW | {"chosen": "A", "rejected": "B"}]), learning="lists")
    assert (row.responses, row.scores) == (("A", "B"), (1.0, 0.0))


@pytest.mark.parametrize("learning", ["thumbs", "lists"])
def test_an_answer_alone_is_no_judged_row(learning: Any, folder: Path) -> None:
    path = written(folder, [ROW | {"answer": "A cube."}])
    with pytest.raises(ValueError, match="has an answer alone; expected several responses"):
        open_responses("answers", path, learning=learning, cut_pairs=learning == "thumbs")
    assert len(open_responses("answers", path)) == 1


def test_an_image_without_the_column_to_group_by_is_dropped(folder: Path) -> None:
    rows = [{"prompt": f"p{n // 2}", "image": f"{n}.png", "score": n} for n in range(4)]
    pairs = open_pairs(
        "auto", written(folder, [*rows[:2], *({**row, "user": "u"} for row in rows[2:])]), group_by="user"
    )
    assert pairs.groups() == ["u"] and ["'user'" in row.reason for row in pairs.skipped] == [True, True]
