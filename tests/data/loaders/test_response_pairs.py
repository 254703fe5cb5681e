"""Batches of responses: the same whatever reads them; what is bad keeps its place, weighs nothing, and is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.image_features import feature_dependencies, fill_features
from mmalign.data.formats.responses import open_responses
from mmalign.data.images import decode
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.response_pairs import ResponsePairBatch, ResponsePairLoader, ResponsePairReader, encode
from mmalign.data.pairs import SkippedRow
from mmalign.families.base import VisionLanguage
from mmalign.methods.vision_language._images import with_changed_images
from tests.helpers import Folders, data_files
from tests.helpers.chat_templates import ALTERNATING
from tests.helpers.loading import load_vlm

ALL = {"decoded_images": True, "other_images": True}


def loader(
    family: VisionLanguage,
    rows: Path,
    *,
    max_length: int | None = None,
    decoded_images: bool = False,
    other_images: bool = False,
    **options: Any,
) -> ResponsePairLoader:
    longest = max_length or family.processor.max_length
    reader = ResponsePairReader(family.processor, longest, decoded_images, other_images)
    return Loader(open_responses(rows.stem, str(rows)), reader, **{"batch_size": 2, "seed": 0, **options})


def changed(rows: Path, at: int, **fields: Any) -> Path:
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    content[at] |= fields
    rows.write_text("\n".join(json.dumps(row) for row in content))
    return rows


def assert_same(actual: ResponsePairBatch, expected: ResponsePairBatch) -> None:
    assert actual.rows == expected.rows and actual.views.keys() == expected.views.keys()
    assert torch.equal(actual.tokens.ids, expected.tokens.ids) and torch.equal(actual.weights, expected.weights)
    for key, view in actual.views.items():
        assert all(torch.equal(x, expected.views[key].tensors[name]) for name, x in view.tensors.items())
    assert [(p.row, p.turns, p.chosen, p.images) for p in actual.pairs] == [
        (p.row, p.turns, p.chosen, p.images) for p in expected.pairs
    ]
    assert actual.decoded_images == expected.decoded_images
    assert (actual.other_images is None) == (expected.other_images is None)
    if actual.other_images is not None and expected.other_images is not None:
        assert (
            torch.equal(actual.other_images.ids, expected.other_images.ids)
            and actual.other_images.images == expected.other_images.images
        )


def test_batches_depend_on_neither_workers_nor_start(llava: VisionLanguage, tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path)
    here = list(loader(llava, rows).batches(1))
    assert len(here) == 4 and len({row for batch in here for row in batch.rows}) == 8
    for batch, worked in zip(here, loader(llava, rows, num_workers=2).batches(1), strict=True):
        assert_same(batch, worked)
    for batch, late in zip(here[2:], loader(llava, rows).batches(1, start=2), strict=True):
        assert_same(batch, late)
    assert [b.rows for b in loader(llava, rows).batches(2)] != [b.rows for b in here]


def test_an_image_of_two_pairs_is_in_a_batch_once(llava: VisionLanguage, tmp_path: Path) -> None:
    """Eight pairs of four images: a batch of all has four, and the features of four."""
    (batch,) = loader(llava, data_files.response_pairs(tmp_path), batch_size=8).batches(0)
    assert len(batch.views) == 4 and len(batch.tokens) == 16
    encoded = encode(llava, batch)
    assert encoded.features.images.keys() == batch.views.keys()
    assert encoded.tokens.images[:8] == encoded.tokens.images[8:]


def test_chosen_side_comes_first_as_written(llava: Any, tmp_path: Path) -> None:
    pairs = {pair.row: pair for pair in open_responses("trl", str(data_files.response_pairs(tmp_path)))}
    decode = llava.processor.processor.tokenizer.decode
    for batch in loader(llava, tmp_path / "trl.jsonl").batches(0):
        tokens = batch.tokens
        responses = [decode(r[m]) for r, m in zip(tokens.responses, tokens.response_mask, strict=True)]
        expected = [pairs[row].chosen for row in batch.rows] + [pairs[row].rejected for row in batch.rows]
        assert responses == [f" {text}</s>" for text in expected]


def test_an_over_long_response_loses_its_tail_and_nothing_else(llava: Any, tmp_path: Path) -> None:
    long = "There is a red cube. " * 30
    rows = changed(data_files.response_pairs(tmp_path), 3, chosen=long)
    whole, cut = (next(iter(loader(llava, rows, batch_size=8, **o).batches(0))) for o in ({}, {"max_length": 60}))
    assert cut.tokens.ids.shape == (16, 60) and cut.weights.sum() == 8
    assert torch.equal(cut.tokens.starts, whole.tokens.starts)
    assert torch.equal(cut.tokens.ids, whole.tokens.ids[:, :60])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "What is in this image? " * 40}, r"the prompt with its images has \d+ tokens; the limit is 60"),
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
    good = list(loader(llava, data_files.response_pairs(tmp_path), max_length=60).batches(0))
    rows = changed(tmp_path / "trl.jsonl", 3, **fields)
    result = loader(llava, rows, max_length=60)
    batches = list(result.batches(0))
    assert len(batches) == len(good) and sum(b.weights.sum() for b in batches) == 7
    (dropped,) = result.skipped
    assert dropped.location == "trl.jsonl: line 4"
    with pytest.raises(ValueError, match=rf"max_bad = 0 rows and images are bad \(trl\.jsonl: line 4: {reason}\)"):
        list(loader(llava, rows, max_length=60, max_bad=0).batches(0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": [{"role": "system", "content": "Hi."}, {"role": "user", "content": "What?"}]}, "Only user and"),
        ({"prompt": "<image>[INST] What? [/INST]"}, r"the prompt holds the chat template's own \[INST\]"),
        ({"chosen": "A </s> dog."}, "a response holds the model's special token </s>"),
        ({"hallucinated": "A </s> dog."}, "a response holds the model's special token </s>"),
    ],
)
def test_a_row_that_the_chat_template_refuses_is_left_out(
    fields: dict[str, Any], reason: str, llava: Any, tmp_path: Path
) -> None:
    llava.processor.processor.chat_template = ALTERNATING
    result = loader(llava, changed(data_files.response_pairs(tmp_path), 3, **fields))
    assert sum(batch.weights.sum() for batch in result.batches(0)) == 7
    (dropped,) = result.skipped
    assert dropped.location == "trl.jsonl: line 4" and re.search(reason, dropped.reason)


def test_an_image_that_the_processor_refuses_drops_its_pairs(vlm_folders: Folders, tmp_path: Path) -> None:
    """Qwen2-VL refuses images of more than 200:1; also where features are cached."""
    family = load_vlm(vlm_folders("qwen2_5_vl"))
    rows = data_files.response_pairs(tmp_path)
    Image.new("RGB", (2000, 8)).save(tmp_path / "1.png")
    result = loader(family, rows)
    assert sum(batch.weights.sum() for batch in result.batches(0)) == 6
    assert {row.location for row in result.skipped} == {f"trl.jsonl: line {n}, image 0 (1.png)" for n in (3, 4)}
    assert all("refuses an image of 2000x8 (absolute aspect ratio must" in row.reason for row in result.skipped)
    images = {ref.key: ref for pair in result.pairs for ref in pair.images}
    cache = ArrayCache.open(tmp_path / "features", feature_dependencies(family))
    assert fill_features(family, list(images.values()), cache, Accelerator(cpu=True), num_workers=0)
    assert len([key for key in images if key in cache]) == 3


def test_an_unreadable_image_drops_its_pairs(llava: VisionLanguage, tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path)
    (tmp_path / "1.png").write_bytes(data_files.png(0)[:50])
    result = loader(llava, rows)
    batches = list(result.batches(0))
    assert sum(b.weights.sum() for b in batches) == 6
    assert {d.location for d in result.skipped} == {f"trl.jsonl: line {n}, image 0 (1.png)" for n in (3, 4)}
    assert all(torch.isfinite(view.tensors["pixel_values"]).all() for b in batches for view in b.views.values())


def test_data_of_which_nothing_can_be_used_are_refused(llava: VisionLanguage, tmp_path: Path) -> None:
    result = loader(llava, data_files.response_pairs(tmp_path), max_length=5)
    with pytest.raises(ValueError, match=r"none of 8 pairs can be used \(trl\.jsonl: line 1: the prompt with"):
        result.check_readable()


def test_rejected_images_of_their_own_are_the_rejected_rows(llava: VisionLanguage, tmp_path: Path) -> None:
    """The same words under two images."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data_files.png(ord(name[0])))
    responses = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    row = {"images": ["a.png"], "messages": responses, "rejected_images": ["b.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    rows = (tmp_path / "rows.json").rename(tmp_path / "swift.json")
    (batch,) = loader(llava, rows, max_length=99, batch_size=1).batches(0)
    (chosen_key,), (rejected_key,) = batch.tokens.images
    assert chosen_key != rejected_key and torch.equal(batch.tokens.ids[0], batch.tokens.ids[1])
    logps = llava.token_logps(llava.network, batch.tokens, llava.encode_images(batch.views))
    assert (logps[0] - logps[1]).abs().max() > 1e-4


@pytest.fixture
def realign(tmp_path: Path) -> Path:
    return data_files.response_pairs(tmp_path, layout="realign")


def test_what_no_method_asked_for_is_not_read(llava: VisionLanguage, realign: Path) -> None:
    """A retrieved image that cannot be read is no loss to DPO."""
    rows = [json.loads(line) for line in realign.read_text().splitlines()]
    (realign.parent / "bad.png").write_bytes(b"")
    realign.write_text("\n".join(json.dumps({**row, "retrieved_image": "bad.png"}) for row in rows))
    batches = list(loader(llava, realign).batches(0))
    assert all(b.other_images is None and not b.decoded_images and b.weights.all() for b in batches)
    assert len(batches[0].views) <= 2


def test_workers_read_the_same_pairs_and_images(llava: VisionLanguage, realign: Path) -> None:
    here = list(loader(llava, realign, **ALL).batches(1))
    for batch, worked in zip(here, loader(llava, realign, **ALL, num_workers=2).batches(1), strict=True):
        assert_same(batch, worked)
        assert batch.decoded_images and batch.other_images is not None


def test_pictures_are_what_was_decoded_and_pairs_what_was_said(llava: VisionLanguage, realign: Path) -> None:
    pairs = {pair.row: pair for pair in open_responses("realign", str(realign))}
    for batch in loader(llava, realign, **ALL).batches(0):
        encoded = encode(llava, batch)
        assert [pair.row for pair in encoded.pairs] == encoded.rows
        for pair in encoded.pairs:
            real = pairs[pair.row]
            assert pair == real and pair.turns[0].text.startswith("<image>")
            for ref in (*real.images, *real.other_images):
                assert encoded.decoded_images[ref.key] == decode(ref)
                assert ref.key in encoded.features.images
    with pytest.raises(AssertionError, match="is in its batch"):
        encoded.pairs[0].images[0].read()


def test_others_are_the_chosen_responses_to_the_other_images(llava: Any, realign: Path) -> None:
    pairs = {pair.row: pair for pair in open_responses("realign", str(realign))}
    for batch in loader(llava, realign, **ALL).batches(0):
        assert batch.other_images is not None and len(batch.other_images) == len(batch.rows)
        chosen = batch.tokens[: len(batch.rows)]
        assert torch.equal(batch.other_images.responses, chosen.responses)
        for row, own, other_keys in zip(batch.rows, chosen.images, batch.other_images.images, strict=True):
            assert own == tuple(ref.key for ref in pairs[row].images)
            assert other_keys == tuple(ref.key for ref in pairs[row].other_images) != own
        logps = [
            llava.token_logps(llava.network, tokens, llava.encode_images(batch.views))
            for tokens in (chosen, batch.other_images)
        ]
        assert (logps[0] - logps[1]).abs().max() > 1e-4


def test_both_images_are_answered_with_as_many_tokens(vlm_folders: Any, tmp_path: Path) -> None:
    """The other image takes more tokens than the pair's own, so that less room is left for the response."""

    family = load_vlm(vlm_folders("qwen2_5_vl"))
    (tmp_path / "small.png").write_bytes(data_files.png(0, 16))
    (tmp_path / "large.png").write_bytes(data_files.png(1, 48))
    turns = {
        side: [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": text * 9}]
        for side, text in (("chosen", "A red cube. "), ("rejected", "A green ball. "))
    }
    path = tmp_path / "realign.jsonl"
    path.write_text(json.dumps({"image": "small.png", "retrieved_image": "large.png", **turns}))
    (batch,) = loader(family, path, **ALL, batch_size=1, max_length=60).batches(0)
    assert batch.other_images is not None
    chosen, other_tokens = batch.tokens[:1], batch.other_images
    assert int(other_tokens.starts) > int(chosen.starts) and int(other_tokens.lengths) == 60
    assert torch.equal(other_tokens.responses, chosen.responses[:, : int(other_tokens.num_tokens)])
    assert int(chosen.num_tokens) == int(other_tokens.num_tokens) < int(batch.tokens[1:].num_tokens)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "has zero bytes"), (data_files.png(0)[:60], "is not a readable image")]
)
def test_an_other_image_that_is_bad_drops_its_pair(
    content: bytes, reason: str, llava: VisionLanguage, realign: Path
) -> None:
    """Counted and named, and no other pair moves for it."""
    good = [batch.rows for batch in loader(llava, realign, **ALL).batches(0)]
    (realign.parent / "bad.png").write_bytes(content)
    result = loader(llava, changed(realign, 2, retrieved_image="bad.png"), **ALL)
    batches = list(result.batches(0))
    assert sum(len(rows) for rows in good) == 8 and sum(b.weights.sum() for b in batches) == 7
    (dropped,) = result.skipped
    assert dropped.location == "realign.jsonl: line 3, image 1 (bad.png)" and dropped.reason.startswith(reason)
    assert all(len(b.other_images or ()) == len(b.rows) for b in batches)


def test_pair_without_a_needed_image_is_dropped(llava: VisionLanguage, realign: Path) -> None:
    result = loader(llava, changed(realign, 5, retrieved_image=None), **ALL)
    assert sum(b.weights.sum() for b in result.batches(0)) == 7
    assert result.skipped == [SkippedRow("realign.jsonl: line 6", "has no other image, which the method compares with")]


def test_a_bad_pair_s_place_is_taken_by_another_s_pictures_too(llava: VisionLanguage, realign: Path) -> None:
    """A method that disturbs pictures or reads pairs finds all of the pair that stands in."""
    (realign.parent / "1.png").write_bytes(b"")
    for read in loader(llava, realign, **ALL).batches(0):
        batch = encode(llava, read)
        tokens, features = with_changed_images(llava, batch, lambda picture, row, place: picture)
        assert tokens.ids.shape[0] == len(batch.rows) == len(batch.pairs)
        for row, pair in zip(tokens.images, batch.pairs, strict=True):
            assert len(row) == len(pair.images) and all(key in features.images for key in row)


def test_disturbed_rows_are_the_chosen_ones_with_other_features(llava: VisionLanguage, realign: Path) -> None:
    """Each picture is given with its pair's row and its place; one left as it is has the features it had."""
    batch = encode(llava, next(iter(loader(llava, realign, **ALL, batch_size=8).batches(0))))
    given = list[tuple[int, int]]()

    def darker(picture: Any, row: int, place: int) -> Any:
        given.append((row, place))
        return picture.point(lambda level: level // 2) if row == batch.rows[0] else picture

    tokens, features = with_changed_images(llava, batch, darker)
    assert given == [(row, 0) for row in batch.rows]
    chosen = batch.tokens[:8]
    assert torch.equal(tokens.ids, chosen.ids) and torch.equal(tokens.lengths, chosen.lengths)
    before, after = (llava.token_logps(llava.network, *x) for x in ((chosen, batch.features), (tokens, features)))
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_every_image_of_a_prompt_is_disturbed_in_its_own_place(llava: VisionLanguage, tmp_path: Path) -> None:
    """Also where the same picture stands there twice: each place has a draw of its own."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data_files.png(ord(name[0])))
    row = {"images": ["a.png", "b.png", "a.png"], "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    (tmp_path / "trl.jsonl").write_text(json.dumps(row))
    read = next(iter(loader(llava, tmp_path / "trl.jsonl", decoded_images=True, batch_size=1).batches(0)))
    batch = encode(llava, read)
    tokens, features = with_changed_images(llava, batch, lambda picture, row, place: picture.rotate(90 * place))
    (keys,) = tokens.images
    assert len(set(keys)) == len(features.images) == 3 and len(batch.features.images) == 2
    pooled = [features.images[key].pooler_output[0] for key in keys]
    own = [batch.features.images[key].pooler_output[0] for key in batch.tokens.images[0]]
    assert torch.equal(pooled[0], own[0]) and not torch.equal(pooled[2], own[2])
