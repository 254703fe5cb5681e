"""transformers' decoders with our backends: unpacked rows as before, packed rows as unpacked rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Phi3Config, Phi3Model

from mmalign.attention import PackedPrefixMask, PrefixGroup, decoders, kernels
from mmalign.config import DecodingConfig
from mmalign.families.loading import load_vision_language
from mmalign.families.types import Loading
from mmalign.language.chat import Turn
from mmalign.rng import KeyedRNG
from tests.helpers import Folders, first_fast, response_batches
from tests.helpers.loading import load_vlm
from tests.helpers.vlm_models import BUILDERS, NEWER, TEXT, llava
from tests.helpers.xformers_kernel import Kernel

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


def scored(family: Any) -> tuple[Tensor, Tensor]:
    """Scores of six responses to three prompts, and the gradient of all that learns."""
    batch = response_batches.batch(family)
    weights = [p for p in family.network.parameters() if p.requires_grad]
    logps = family.token_logps(family.network, batch.tokens, batch.features)
    grads = torch.autograd.grad(logps.square().sum(), weights, allow_unused=True)
    return logps.detach(), torch.cat([grad.flatten() for grad in grads if grad is not None])


def apart(family: Any) -> Any:
    """The same network, each response with its own prompt."""
    return replace(family, loading=replace(family.loading, pack_responses=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast([*BUILDERS, *NEWER]))
def test_every_family_calls_xformers_as_its_kernels_need(name: str, vlm_folders: Folders, kernel: Kernel) -> None:
    """Shapes, strides, dtypes and masks are checked by the stand-in; here the scores, recomputed for the gradient."""
    family: Any = load_vlm(vlm_folders(name))
    family.unfreeze()
    decoder = family.network.model.get_decoder()
    stock, grad = scored(apart(family))
    decoders.install(decoder, "xformers")
    family.enable_gradient_checkpointing()
    family.network.train()
    for packed in (True, False):
        actual, our_grad = scored(family if packed else apart(family))
        rows = 1 if packed and not decoders.packing_unsupported_reason(decoder, 0) else len(stock)
        assert {call.query.shape[0] for call in kernel.calls} == {rows}
        assert {call.query.shape[-1] for call in kernel.calls} == decoders.head_sizes(decoder)
        torch.testing.assert_close(actual, stock, rtol=0, atol=5e-6)  # float32, of log-probabilities of about 6
        assert (our_grad - grad).norm() < 1e-5 * grad.norm()
        kernel.calls.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast([*BUILDERS, *NEWER]))
def test_half_precision_calls_xformers_in_one_dtype(name: str, vlm_folders: Folders, kernel: Kernel) -> None:
    """In bfloat16 under autocast, in training and in generation: each call is compared with the formula."""
    half = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
    family: Any = load_vision_language(str(vlm_folders(name)), half)
    family.unfreeze()
    decoders.install(family.network.model.get_decoder(), "xformers")
    scored(family)
    assert {call.query.dtype for call in kernel.calls} == {torch.bfloat16}
    kernel.calls.clear()
    views = {"image": family.processor.preprocess_image(response_batches.picture(0))}
    asked = [[Turn("user", f"<image>{text}")] for text in ("What is it?", "Is there a dog in the image?")]
    rows = [family.processor.tokenize_prompt(turns, list(views.items()), "") for turns in asked]
    short, features = DecodingConfig(max_new_tokens=3), family.encode_images(views)
    family.generate(family.network, rows, features, short, rows=[0, 1], rng=KeyedRNG(0))
    assert {call.query.dtype for call in kernel.calls} == {torch.bfloat16}
    assert {1, max(len(row.ids) for row in rows)} == {call.query.shape[1] for call in kernel.calls}


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_of_any_size_are_measured(heads: int) -> None:
    """No kernel takes a head of 12 numbers; heads in one projection with queries and values are measured as well."""
    decoder = llava({**TEXT, "hidden_size": 12 * heads, "num_attention_heads": heads})[0].get_decoder()
    config = Phi3Config(
        vocab_size=8, pad_token_id=0, **{**TEXT, "hidden_size": 12 * heads, "num_attention_heads": heads}
    )
    for model in (decoder, Phi3Model(config)):
        sizes = decoders.head_sizes(model)
        assert sizes == {12}
        assert "head dimension is 12" in str(kernels.unsupported_reason(torch.device("cuda"), torch.float32, sizes))
