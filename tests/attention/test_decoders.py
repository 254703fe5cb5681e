"""transformers' decoders with our backends: unpacked rows as before, packed rows as unpacked rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attention import PackedPrefixMask, PrefixGroup, decoders
from tests.helpers import first_fast
from tests.helpers.vlm_models import BUILDERS, NEWER

PACKED = PackedPrefixMask((PrefixGroup(5, (4, 3)), PrefixGroup(4, (2, 5, 1))))
LENGTHS = [length for tree in PACKED.prefix_groups for length in tree.branches]
PLAIN = sorted({**BUILDERS, "gemma4": NEWER["gemma4"], "llava_onevision": NEWER["llava_onevision"]})


def decoder_of(name: str) -> Any:
    torch.manual_seed(0)
    model, _ = {**BUILDERS, **NEWER}[name]()
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    return model.get_decoder().eval().requires_grad_(False)


def embeddings(decoder: Any, number: int) -> Tensor:
    width: int = decoder.get_input_embeddings().embedding_dim
    return torch.randn(1, number, width, generator=torch.Generator().manual_seed(number))


def states(decoder: Any, embeds: Tensor, **more: Any) -> Tensor:
    result: Tensor = decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
    return result


def inputs(decoder: Any, embeds: Tensor) -> dict[str, Any]:
    """Gemma 4 has embeddings for each layer besides, which are made of tokens."""
    if not getattr(decoder, "hidden_size_per_layer_input", 0):
        return {}
    config = decoder.config
    each = config.num_hidden_layers, config.hidden_size_per_layer_input
    return {"per_layer_inputs": embeds[..., :1, None].expand(-1, -1, *each)}


def said(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A number of the branches' states alone: a prefix's gradients come through what its branches see of it."""
    parts = zip(rows, weights, LENGTHS, strict=True)
    return torch.stack([(row * weight)[:, -length:].sum() for row, weight, length in parts]).sum()


@pytest.mark.parametrize("name", first_fast(sorted(set(PLAIN) - {"gemma4"}), 3))
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_a_packed_row_is_its_rows_apart(name: str, backend: str) -> None:
    decoder, both_ways = decoder_of(name), name == "paligemma"
    packed_mask = PackedPrefixMask(
        tuple(PrefixGroup(group.prefix, group.branches, both_ways) for group in PACKED.prefix_groups)
    )
    packed = embeddings(decoder, packed_mask.length).requires_grad_()
    apart = []
    for row, places in zip(packed_mask.split(packed, dim=1), packed_mask.row_positions, strict=True):
        seen = packed_mask.visible[places][:, places][None, None]
        apart.append(states(decoder, row, **inputs(decoder, row), **({"attention_mask": seen} if both_ways else {})))
    weights = [torch.randn_like(row) for row in apart]
    (expected,) = torch.autograd.grad(said(apart, weights), packed)
    decoders.install(decoder, backend)
    given = {**decoders.attention_kwargs(packed_mask, decoder), **inputs(decoder, packed)}
    unpacked = packed_mask.split(states(decoder, packed, position_ids=packed_mask.positions, **given), dim=1)
    for actual, row_apart in zip(unpacked, apart, strict=True):
        torch.testing.assert_close(actual, row_apart, rtol=1e-5, atol=2e-6)  # float32, in another order
    (result,) = torch.autograd.grad(said(unpacked, weights), packed)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", first_fast(PLAIN, 3))
def test_other_rows_have_the_numbers_that_they_had(name: str) -> None:
    decoder = decoder_of(name)
    embeds = embeddings(decoder, 12).view(2, 6, -1)
    more = inputs(decoder, embeds)
    seen = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    stock = [states(decoder, embeds, **more), states(decoder, embeds, attention_mask=seen, **more)]
    assert decoders.installed(decoder) is None
    decoders.install(decoder, "sdpa")
    assert decoders.installed(decoder) == "sdpa"
    for before, mask in zip(stock, [None, seen], strict=True):
        assert states(decoder, embeds, attention_mask=mask, **more).equal(before)
    decoders.install(decoder, "dense")
    for before, mask in zip(stock, [None, seen], strict=True):
        after = states(decoder, embeds, attention_mask=mask, **more)
        torch.testing.assert_close(after[seen.bool()], before[seen.bool()], rtol=1e-5, atol=2e-6)


def test_padding_is_masked_by_the_registered_mask_function() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    decoder = decoder_of("llava")
    embeds = embeddings(decoder, 6)
    alone = states(decoder, embeds)[:, -1]
    padded, mask = F.pad(embeds, (0, 0, 3, 0), value=1.0), F.pad(torch.ones(1, 6, dtype=torch.long), (3, 0))
    for backend in ("sdpa", "dense"):
        decoders.install(decoder, backend)
        actual = states(decoder, padded, attention_mask=mask)[:, -1]
        torch.testing.assert_close(actual, alone, rtol=1e-5, atol=2e-6)
    AttentionInterface.register("attention_alone", sdpa_attention_forward)
    decoder.set_attn_implementation("attention_alone")
    assert (states(decoder, padded, attention_mask=mask)[:, -1] - alone).abs().max() > 0.01


def test_stock_attention_hides_the_prefix_of_branches() -> None:
    decoder = decoder_of("llava")
    packed = embeddings(decoder, PACKED.length)
    second = states(decoder, packed[:, PACKED.row_positions[1]])[:, -1]
    place = int(PACKED.row_positions[1][-1])
    stock = states(decoder, packed, position_ids=PACKED.positions)[:, place]
    assert (stock - second).abs().max() > 0.1
    masked = states(decoder, packed, position_ids=PACKED.positions, attention_mask=PACKED.visible[None, None])
    torch.testing.assert_close(masked[:, place], second, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        ("qwen3_5", {}, "its linear_attention layers do not use"),
        ("gemma4", {}, "the tokens of an image attend to each other"),
        (
            "gemma4",
            {"use_bidirectional_attention": None, "sliding_window": 8},
            "its attention window is 8 tokens",
        ),
        ("llava", {"attn_logit_softcapping": 50.0}, "its attention has a soft cap"),
    ],
)
def test_decoders_that_cannot_be_packed_say_why(name: str, changed: dict[str, Any], why: str) -> None:
    decoder = decoder_of(name)
    for key, value in changed.items():
        setattr(decoder.config, key, value)
    decoders.install(decoder, "sdpa")
    with pytest.raises(ValueError, match=f"cannot take rows that share a prefix: {why}"):
        decoders.attention_kwargs(PACKED, decoder)


def test_a_window_that_hides_nothing_does_not_matter() -> None:
    decoder = decoder_of("gemma4")
    decoder.config.use_bidirectional_attention = None
    decoder.config.sliding_window = PACKED.longest
    assert decoders.packing_unsupported_reason(decoder, PACKED.longest) is None


def test_a_layer_with_a_window_refuses_rows_that_are_longer() -> None:
    decoder = decoder_of("gemma4")  # with windows of 32 tokens in every other layer
    packed_mask = PackedPrefixMask((PrefixGroup(30, (2, 3)),))
    decoders.install(decoder, "sdpa")
    packed = embeddings(decoder, packed_mask.length)
    no_mask = torch.ones(1, 1, 0, 0, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"a window of 32 tokens .* of up to 33 tokens"):
        states(decoder, packed, attention_mask=no_mask, mmalign_packed_mask=packed_mask, **inputs(decoder, packed))


def test_gradients_go_through_layers_that_are_computed_again() -> None:
    decoder = decoder_of("llava").train()
    decoders.install(decoder, "sdpa")
    packed, results = embeddings(decoder, PACKED.length).requires_grad_(), []
    for again in (False, True):
        if again:
            decoder.activation_checkpointing_enable({"use_reentrant": False})
        out = states(decoder, packed, position_ids=PACKED.positions, **decoders.attention_kwargs(PACKED, decoder))
        results += torch.autograd.grad(out.square().sum(), packed)
    assert results[0].equal(results[1])


def test_a_saved_model_does_not_know_of_it(tmp_path: Path) -> None:
    decoder = decoder_of("llava")
    decoders.install(decoder, "sdpa")
    decoder.save_pretrained(tmp_path)
    assert "mmalign" not in (tmp_path / "config.json").read_text()


def test_a_layer_that_does_not_take_the_packed_mask_fails() -> None:
    decoder = decoder_of("llava")
    packed = embeddings(decoder, PACKED.length)
    with pytest.raises(ValueError, match="transformers' own attention"):
        decoders.attention_kwargs(PACKED, decoder)
    decoders.install(decoder, "sdpa")
    given = decoders.attention_kwargs(PACKED, decoder)
    decoder.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="must match"):
        states(decoder, packed, position_ids=PACKED.positions, **given)
    decoders.install(decoder, "sdpa")
    del given["mmalign_packed_mask"]
    with pytest.raises(RuntimeError, match="must match"):
        states(decoder, packed, position_ids=PACKED.positions, **given)
