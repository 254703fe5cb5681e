"""Batches of responses: the same whatever reads them; what is bad keeps its place, weighs nothing, and is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vlm
import torch

from mmalign.data.responses import open_responses
from mmalign.encode_responses import ReadBatch, ResponseLoader, encode
from mmalign.families import VisionLanguage


def loader(family: VisionLanguage, rows: Path, **options: Any) -> ResponseLoader:
    options = {"max_length": family.reader.max_length, "batch_size": 2, "seed": 0, **options}
    return ResponseLoader(open_responses("trl", str(rows)), family.reader, **options)


def changed(rows: Path, at: int, **fields: Any) -> Path:
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    content[at] |= fields
    rows.write_text("\n".join(json.dumps(row) for row in content))
    return rows


def assert_same(one: ReadBatch, other: ReadBatch) -> None:
    assert one.rows == other.rows and one.views.keys() == other.views.keys()
    assert torch.equal(one.tokens.ids, other.tokens.ids) and torch.equal(one.weights, other.weights)
    for key, view in one.views.items():
        assert all(torch.equal(x, other.views[key].tensors[name]) for name, x in view.tensors.items())


def test_batches_are_the_same_read_here_or_by_workers_and_from_any_start(llava: VisionLanguage, tmp_path: Path) -> None:
    rows = tiny_vlm.pairs(tmp_path)
    here = list(loader(llava, rows).batches(1))
    assert len(here) == 4 and len({row for batch in here for row in batch.rows}) == 8
    for batch, worked in zip(here, loader(llava, rows, num_workers=2).batches(1), strict=True):
        assert_same(batch, worked)
    for batch, late in zip(here[2:], loader(llava, rows).batches(1, start=2), strict=True):
        assert_same(batch, late)
    assert [b.rows for b in loader(llava, rows).batches(2)] != [b.rows for b in here]


def test_processes_share_an_epoch(llava: VisionLanguage, tmp_path: Path) -> None:
    rows = tiny_vlm.pairs(tmp_path)
    parts = [loader(llava, rows, rank=rank, world_size=2) for rank in (0, 1)]
    together = [row for part in parts for batch in part.batches(0) for row in batch.rows]
    assert sorted(together) == sorted(row for batch in loader(llava, rows).batches(0) for row in batch.rows)


def test_an_image_of_two_pairs_is_in_a_batch_once(llava: VisionLanguage, tmp_path: Path) -> None:
    """Eight pairs of four images: a batch of all has four, and the features of four."""
    (batch,) = loader(llava, tiny_vlm.pairs(tmp_path), batch_size=8).batches(0)
    assert len(batch.views) == 4 and len(batch.tokens) == 16
    encoded = encode(llava, batch)
    assert encoded.features.images.keys() == batch.views.keys()
    assert encoded.tokens.images[:8] == encoded.tokens.images[8:]


def test_the_chosen_side_comes_first_and_responses_read_as_they_were_written(llava: Any, tmp_path: Path) -> None:
    pairs = {pair.row: pair for pair in open_responses("trl", str(tiny_vlm.pairs(tmp_path)))}
    decode = llava.reader.processor.tokenizer.decode
    for batch in loader(llava, tmp_path / "trl.jsonl").batches(0):
        tokens = batch.tokens
        said = [decode(r[m]) for r, m in zip(tokens.responses, tokens.response_mask, strict=True)]
        expected = [pairs[row].chosen for row in batch.rows] + [pairs[row].rejected for row in batch.rows]
        assert said == [f" {text}</s>" for text in expected]


def test_an_over_long_response_loses_its_tail_and_nothing_else(llava: Any, tmp_path: Path) -> None:
    long = "There is a red cube. " * 30
    rows = changed(tiny_vlm.pairs(tmp_path), 3, chosen=long)
    whole, cut = (next(iter(loader(llava, rows, batch_size=8, **o).batches(0))) for o in ({}, {"max_length": 60}))
    assert cut.tokens.ids.shape == (16, 60) and not cut.dropped and cut.weights.sum() == 8
    assert torch.equal(cut.tokens.starts, whole.tokens.starts)
    assert torch.equal(cut.tokens.ids, whole.tokens.ids[:, :60])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "What is in this image? " * 40}, r"the prompt has \d+ tokens, its images' included, of 60 in all"),
        (
            {"chosen": "There is a dog. " * 20 + "Yes.", "rejected": "There is a dog. " * 20 + "No."},
            "the responses first differ after data.max_length = 60 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_left_out_counted_and_named(
    fields: dict[str, str], reason: str, llava: VisionLanguage, tmp_path: Path
) -> None:
    """No other pair moves for it."""
    good = list(loader(llava, tiny_vlm.pairs(tmp_path), max_length=60).batches(0))
    rows = changed(tmp_path / "trl.jsonl", 3, **fields)
    found = loader(llava, rows, max_length=60)
    batches = list(found.batches(0))
    assert len(batches) == len(good) and sum(b.weights.sum() for b in batches) == 7
    (dropped,) = found.dropped
    assert dropped.where == "trl.jsonl: line 4"
    with pytest.raises(ValueError, match=rf"max_bad = 0 images are bad \(trl\.jsonl: line 4: {reason}\)"):
        list(loader(llava, rows, max_length=60, max_bad=0).batches(0))


def test_an_unreadable_image_drops_its_pairs(llava: VisionLanguage, tmp_path: Path) -> None:
    rows = tiny_vlm.pairs(tmp_path)
    (tmp_path / "1.png").write_bytes(tiny.picture(0)[:50])
    found = loader(llava, rows)
    batches = list(found.batches(0))
    assert sum(b.weights.sum() for b in batches) == 6
    assert {d.where for d in found.dropped} == {f"trl.jsonl: line {n}, image 0 (1.png)" for n in (3, 4)}
    assert all(torch.isfinite(view.tensors["pixel_values"]).all() for b in batches for view in b.views.values())


def test_data_of_which_nothing_can_be_used_are_refused(llava: VisionLanguage, tmp_path: Path) -> None:
    found = loader(llava, tiny_vlm.pairs(tmp_path), max_length=5)
    with pytest.raises(ValueError, match=r"none of 8 pairs can be used \(trl\.jsonl: line 1: the prompt has"):
        found.check_readable()


def test_the_last_batch_is_filled_up_for_evaluation(llava: VisionLanguage, tmp_path: Path) -> None:
    batches = list(loader(llava, tiny_vlm.pairs(tmp_path), batch_size=3, keep_last=True).batches(0))
    assert [int(b.weights.sum()) for b in batches] == [3, 3, 2]
    assert len(loader(llava, tmp_path / "trl.jsonl", batch_size=3)) == 2


def test_rejected_images_of_their_own_are_the_rejected_rows(llava: VisionLanguage, tmp_path: Path) -> None:
    """The same words under two images."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(tiny.picture(ord(name[0])))
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    row = {"images": ["a.png"], "messages": said, "rejected_images": ["b.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    pairs = open_responses("swift", str(tmp_path / "rows.json"))
    (batch,) = ResponseLoader(pairs, llava.reader, max_length=99, batch_size=1, seed=0).batches(0)
    (one,), (other,) = batch.tokens.images
    assert one != other and torch.equal(batch.tokens.ids[0], batch.tokens.ids[1])
    logps = llava.token_logps(llava.network, batch.tokens, llava.encode_images(batch.views))
    assert (logps[0] - logps[1]).abs().max() > 1e-4
