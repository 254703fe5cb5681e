"""Whole vision-language models: a row that responses share gives the states that its rows have apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import PackedPrefixMask, PrefixGroup, decoders
from mmalign.families.types import ImageFeatures
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.language.chat import Turn
from mmalign.language.tokens import Tokens
from tests.helpers import Folders, first_fast
from tests.helpers.loading import load_vlm
from tests.helpers.vlm_models import BUILDERS
from tests.helpers.vlm_reference import PICTURES

ASKED = [Turn("user", "<image>\nWhat is in this image?")]
SAID = [["There is a red cube.", "No, there is no dog.", "Yes."], ["A cat and a car.", "A green ball on the table."]]


@pytest.mark.parametrize("name", first_fast(sorted(BUILDERS)))
@pytest.mark.parametrize("executor", ["sdpa", "dense"])
def test_a_packed_row_is_its_rows_apart(name: str, executor: str, vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders(name))
    reader, model = family.processor, family.network.model
    views = {key: reader.preprocess_image(PICTURES[key]) for key in ("wide", "square")}
    features = family.encode_images(views)
    samples = [
        reader.tokenize_responses(ASKED, responses, [(key, views[key])])
        for key, responses in zip(views, SAID, strict=True)
    ]
    rows = [reader.collate([row]) for sample in samples for row in sample]
    apart = [states(model, family._inputs(row, features)[1]) for row in rows]
    both_ways = reader.quirks.prefix_attention
    packed_mask = PackedPrefixMask(
        tuple(PrefixGroup(rows[0].start, tuple(len(row.response) for row in rows), both_ways) for rows in samples)
    )

    decoders.install(model.get_decoder(), executor)
    ids, is_response = (packed_mask.join([getattr(row, key) for row in rows]) for key in ("ids", "is_response"))
    images = [features.images[key] for key in views]
    inputs = decoder_inputs(model, reader.quirks, ids, torch.ones_like(ids), is_response, images)
    inputs |= {"position_ids": packed_mask.join([positions(family, row, features) for row in rows])}
    inputs |= decoders.attention_kwargs(packed_mask, model.get_decoder())
    actual = states(model, inputs)
    for one, other in zip(packed_mask.split(actual, dim=1), apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # float32, in another order
    said = torch.cat([row.responses[0] for row in rows])
    assert ids[0, packed_mask.target_positions].equal(said)


def states(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return result


def positions(family: Any, row: Tokens, features: ImageFeatures) -> Tensor:
    """The model's own, of a row apart: in rows and columns where it has these, and from 1 where it counts so."""
    own: Tensor = family._model._prepare_position_ids_for_generation(row.ids, family._inputs(row, features)[1])
    return own
