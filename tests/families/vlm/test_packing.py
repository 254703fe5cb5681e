"""Responses that share a run of their prompt are scored as in rows apart: values, and the gradients of all weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import PackedPrefixMask
from mmalign.attention.packed_mask import Block
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.families.types import ImageFeatures, LoraSettings
from mmalign.families.vlm.packing import build_packed_mask
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.losses.pairwise import Pair, dpo
from mmalign.modalities.loading import load_model
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from tests.helpers import STANDING_VLMS, Folders, data_files, first_fast, recipes
from tests.helpers.loading import CPU, load_vlm
from tests.helpers.logged import recorded_lines
from tests.helpers.vlm_models import BUILDERS
from tests.helpers.vlm_reference import PICTURES

PACKED = [*BUILDERS, "llava_onevision"]
LONG = "There is a red cube and a green ball on the table, and two cats sit on a blue mat near a car."
# Prompts with one, two and three responses of very different length; two share an image, two share their words.
ASKED = [
    ("wide", "What is it?", [LONG, "Yes.", "No, there is no dog."]),
    ("tall", "What is it?", ["A car.", LONG]),
    ("wide", "Is there a dog in the image?", ["No."]),
]


def rows(family: Any, asked: Sequence[tuple[str, str, list[str]]] = ASKED) -> list[TokenizedResponse]:
    views = {key: family.processor.preprocess_image(PICTURES[key]) for key, _, _ in asked}
    read = family.processor.tokenize_responses
    return [
        row
        for key, text, responses in asked
        for row in read([Turn("user", f"<image>{text}")], responses, [(key, views[key])])
    ]


def batch(family: Any, responses: Sequence[TokenizedResponse]) -> tuple[Tokens, ImageFeatures]:
    views = {key: family.processor.preprocess_image(PICTURES[key]) for row in responses for key in row.images}
    return family.processor.collate(responses), family.encode_images(views)


def mixed(family: Any) -> tuple[Tokens, ImageFeatures]:
    """All rows, those of a prompt far from one another."""
    responses = rows(family)
    return batch(family, [responses[n] for n in (0, 3, 5, 1, 4, 2)])


def apart(family: Any) -> Any:
    """The same network, each response with its own prompt."""
    return replace(family, loading=replace(family.loading, pack_responses=False))


def scored(family: Any, tokens: Tokens, features: ImageFeatures) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of all that learns of a sum of them with weights."""
    logps = family.token_logps(family.network, tokens, features)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    family.network.zero_grad()
    (logps * weights).sum().backward()
    results = {name: p.grad.clone() for name, p in family.network.named_parameters() if p.grad is not None}
    return logps.detach(), results


@contextmanager
def given(family: Any) -> Iterator[list[dict[str, Any]]]:
    """Record the decoder's inputs in each forward pass."""
    seen: list[dict[str, Any]] = []
    hook = family._model.get_decoder().register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("name", first_fast(PACKED, 2))
def test_packed_is_apart(name: str, vlm_folders: Folders) -> None:
    """float32, in another order of sums: 5e-6 of log-probabilities of about 6, 1e-5 of gradients of up to about 10."""
    family: Any = load_vlm(vlm_folders(name))
    family.unfreeze()
    tokens, features = mixed(family)
    with given(family) as seen:
        packed, policy_scores = scored(family, tokens, features)
        expected, reference_scores = scored(apart(family), tokens, features)
    packed_mask = build_packed_mask(tokens, family.processor.quirks)
    assert [one["inputs_embeds"].shape[:2] for one in seen] == [(1, packed_mask.length), tokens.ids.shape]
    assert len(packed_mask.prefix_groups) == 3 and len(packed_mask.spans) == 6
    torch.testing.assert_close(packed, expected, rtol=0, atol=5e-6)
    assert policy_scores.keys() == reference_scores.keys() and len(policy_scores) > 15
    assert max(float(grad.abs().max()) for grad in reference_scores.values()) > 1
    for weight, grad in reference_scores.items():
        torch.testing.assert_close(policy_scores[weight], grad, rtol=1e-4, atol=1e-5, msg=weight)


@pytest.mark.parametrize("name", first_fast(STANDING_VLMS))
def test_a_plain_causal_mask_would_not_do(name: str, vlm_folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same row, with each token seeing all before it: the first response is right, if its prompt is, and no other.

    PaliGemma's prompts see both ways, so that there nothing is right.
    """
    family: Any = load_vlm(vlm_folders(name))
    tokens, features = batch(family, rows(family))

    def causal(packed_mask: PackedPrefixMask) -> tuple[Block, ...]:
        whole = (0, packed_mask.length)
        return (Block(whole, (whole,), causal=True),)

    with torch.no_grad():
        expected = apart(family).token_logps(family.network, tokens, features)
        monkeypatch.setattr(PackedPrefixMask, "blocks", property(causal))
        wrong = family.token_logps(family.network, tokens, features)
    off = (wrong - expected).abs().amax(1)
    assert (off[1:] > 1e-2).all()
    assert (off[0] < 1e-5) == (name != "paligemma")


@pytest.mark.parametrize("name", first_fast(PACKED, 2))
def test_every_token_has_the_position_that_it_has_apart(name: str, vlm_folders: Folders) -> None:
    """In rows and columns too, and from 1 on where a model counts so, which its scores would not show."""
    family: Any = load_vlm(vlm_folders(name))
    tokens, features = batch(family, rows(family))
    with torch.no_grad(), given(family) as seen:
        for model in (family, apart(family)):
            model.token_logps(family.network, tokens, features)
    packed, positions_apart = (one["position_ids"] for one in seen)
    if positions_apart is None:
        positions_apart = torch.arange(tokens.ids.shape[1])[None]
    packed_mask = build_packed_mask(tokens, family.processor.quirks)
    for row, actual in enumerate(packed_mask.split(packed)):  # the rows of each prompt are side by side
        expected = positions_apart.expand(*positions_apart.shape[:-2], len(tokens), -1)[
            ..., row, : int(tokens.lengths[row])
        ]
        actual = actual[..., 0, :]
        assert torch.equal(actual[-3:] if expected.dim() == 2 else actual, expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma"])
def test_packed_rows_score_other_targets_and_argmax(name: str, vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders(name))
    tokens, features = mixed(family)
    targets = torch.stack([tokens.responses, (tokens.responses + 7) % 300], -1)
    with torch.no_grad():
        actual, expected = (
            one.token_logps(family.network, tokens, features, targets) for one in (family, apart(family))
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)
    likeliest = [one.argmax(family.network, tokens, features) for one in (family, apart(family))]
    assert torch.equal(*likeliest) and likeliest[0].shape == tokens.responses.shape


def test_packed_rows_whose_activations_are_computed_again(vlm: Any) -> None:
    vlm.unfreeze()
    vlm.network.train()
    tokens, features = mixed(vlm)
    kept, policy_scores = scored(vlm, tokens, features)
    vlm.enable_gradient_checkpointing()
    again, reference_scores = scored(vlm, tokens, features)
    assert torch.equal(kept, again)
    for weight, grad in policy_scores.items():
        torch.testing.assert_close(grad, reference_scores[weight], rtol=1e-5, atol=1e-6, msg=weight)


def test_policy_equals_reference_before_training(vlm: Any) -> None:
    """They are packed alike: the loss is ln 2, by adapters and by a copy."""
    tokens, features = mixed(vlm)
    copied = Policy(vlm, vlm.network, vlm.network, FrozenCopy(vlm.frozen_copy()))
    vlm.add_lora(LoraSettings(rank=2, alpha=4.0, targets=vlm.default_lora_targets, seed=0))
    adapted = Policy(vlm, vlm.network, vlm.network, AdaptersOff())
    for policy in (copied, adapted):

        def score(net: Any) -> Any:
            total = vlm.token_logps(net, tokens, features).sum(1)
            return {"chosen": total[:3], "rejected": total[3:]}

        actual, expected = score(policy.model), policy.on_reference(score)
        losses = dpo(*(Pair(one["chosen"], one["rejected"]) for one in (actual, expected)), beta=0.1)
        assert torch.equal(losses, torch.full_like(losses, math.log(2)))


def test_what_has_nothing_to_share_and_no_padding_stays_as_it_is(llava: Any) -> None:
    same = rows(llava, [("wide", "What is it?", ["Yes."]), ("tall", "What is it?", ["Yes."])])
    with torch.no_grad(), given(llava) as seen:
        for responses in (same, same[:1], [*same, *same]):
            llava.token_logps(llava.network, *batch(llava, responses))
    length = len(same[0].ids)
    shapes = [tuple(one["inputs_embeds"].shape[:2]) for one in seen]
    assert shapes == [(2, length), (1, length), (1, 2 * (length + len(same[0].response)))]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_5", "its linear_attention layers do not use an attention mask"),
        ("gemma4", "the tokens of an image attend to each other in both directions"),
    ],
)
def test_a_decoder_that_cannot_pack_runs_as_ever_and_is_named(name: str, why: str, vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders(name))
    assert family.packing == f"packing: off; each response runs with its own prompt and images, since {why}"
    tokens, features = mixed(family)
    with torch.no_grad(), given(family) as seen:
        actual, expected = (one.token_logps(family.network, tokens, features) for one in (family, apart(family)))
    assert torch.equal(actual, expected)
    assert all(one["inputs_embeds"].shape[:2] == tokens.ids.shape for one in seen)


def test_rows_as_long_as_a_window_run_apart_and_others_do_not(llava: Any) -> None:
    short, long = (batch(llava, rows(llava, [("wide", "What?", ["Yes.", text])])) for text in ("No.", LONG))
    window = int(short[0].lengths.max())
    llava._model.get_decoder().config.sliding_window = window  # which Llama itself does not look at
    assert llava.packing == (
        "packing: the responses to a prompt share one run of it and its images, unless rows are too long: "
        f"its attention window is {window} tokens, and a row has 256"
    )
    with torch.no_grad(), given(llava) as seen:
        for tokens, features in (short, long):
            llava.token_logps(llava.network, tokens, features)
    assert [one["inputs_embeds"].shape[0] for one in seen] == [1, 2]


def test_a_run_says_once_whether_responses_share_their_prompt(vlm_folders: Folders, tmp_path: Path) -> None:
    pairs = data_files.response_pairs(tmp_path / "rows")
    output = {
        ("llava", "auto"): "the responses to a prompt share one run of it and its images",
        ("llava", "off"): "off; each response runs with its own prompt and images, since train.pack_responses is off",
        (
            "qwen3_5",
            "auto",
        ): "off; each response runs with its own prompt and images, since its linear_attention",
    }
    for (name, pack), expected in output.items():
        recipe = load_recipe(recipes.vlm(vlm_folders(name), pairs, tmp_path / "run", train={"pack_responses": pack}))
        with recorded_lines() as lines:
            load_model(recipe, CPU.device)
        (line,) = [line for line in lines if line.startswith("packing")]
        assert line.startswith(f"packing: {expected}")


def test_a_run_learns_what_it_learns_unpacked(vlm_folders: Folders, tmp_path: Path) -> None:
    """Within the rounding of float32, which AdamW enlarges: its first steps divide small gradients by themselves."""
    pairs, losses = data_files.response_pairs(tmp_path / "rows"), {}
    for pack in ("auto", "off"):
        short = {"steps": 3, "save_every": 3, "pack_responses": pack}
        recipe = load_recipe(recipes.vlm(vlm_folders("llava"), pairs, tmp_path / pack, train=short))
        losses[pack] = [report["loss"] for report in train(recipe).history]
    assert losses["auto"][0] == losses["off"][0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses["auto"] == pytest.approx(losses["off"], abs=1e-4)
    assert losses["auto"][-1] != losses["auto"][0]


def test_images_have_nothing_to_pack(tiny_sd15: Path, tmp_path: Path) -> None:

    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    recipe = load_recipe(recipes.diffusion(tiny_sd15, pairs, tmp_path / "run", train={"pack_responses": "off"}))
    with pytest.raises(
        ValueError, match=r"^train.pack_responses: off is for responses .* compares images; leave it out$"
    ):
        train(recipe)
