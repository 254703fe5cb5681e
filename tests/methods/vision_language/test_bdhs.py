"""BDHS as a method: its two losses, what the policy writes itself, and who may learn by it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.responses import open_responses
from mmalign.methods.vision_language import bdhs, dpo
from mmalign.modalities.loading import build_response_judge
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import Completion
from mmalign.training import checkpoint
from tests.helpers import Folders, recipes
from tests.helpers.bdhs_batches import DRAWS, VOCABULARY, batch, made, rows, said, stepped
from tests.helpers.runs import assert_resumes

ONLINE = {"similarity": "trigrams", "max_new_tokens": 5, "tries": 2}


@pytest.fixture
def policy(vlm_folders: Folders) -> Policy[Any]:
    return made(vlm_folders)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of sums in float32 that other rows of a batch change."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_without_hallucinated_responses_it_is_dpo(policy: Policy[Any], tmp_path: Path) -> None:
    given = batch(policy.family, rows(tmp_path))
    actual, expected = (stepped(method, policy, given)[1] for method in (bdhs, dpo))
    assert torch.equal(actual.losses, expected.losses) and (actual.losses - math.log(2)).abs().min() > 1e-3
    assert actual.metrics.keys() == expected.metrics.keys()


def test_preference_belongs_to_the_data_s_own_responses(policy: Policy[Any], tmp_path: Path) -> None:
    """Labels in the file weigh both terms, and soften the one of the data's own rejected response alone."""
    soft, weight = {"preference": "0.5", "weight": "2"}, {"weight": "2"}
    own = stepped(dpo, policy, batch(policy.family, rows(tmp_path / "own", **soft)))[1].losses
    other = rows(tmp_path / "other", rejected="There is a mat {n}.", **weight)
    hallucinated = stepped(dpo, policy, batch(policy.family, other))[1].losses
    further = {n: f"There is a mat {n}." for n in range(8)}
    both = batch(policy.family, rows(tmp_path / "both", further, **soft))
    close(stepped(bdhs, policy, both, gamma=0.3)[1].losses, 0.3 * own + 0.7 * hallucinated)
    close(stepped(bdhs, policy, both, gamma=0.0)[1].losses, hallucinated)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge"])
def test_equation_5(loss: str, policy: Policy[Any], tmp_path: Path) -> None:
    """gamma DPO(y+, y-) + (1 - gamma) DPO(y+, y~-), each of them DPO's own on pairs of just these two."""
    further = {n: f"There is a mat {n}." for n in range(8)}
    own = stepped(dpo, policy, batch(policy.family, rows(tmp_path / "own")), loss=loss)[1].losses
    hallucinated = rows(tmp_path / "other", rejected="There is a mat {n}.")
    hallucinated_losses = stepped(dpo, policy, batch(policy.family, hallucinated), loss=loss)[1].losses
    both = batch(policy.family, rows(tmp_path / "both", further))
    for gamma in (0.0, 0.3, 1.0):
        step = stepped(bdhs, policy, both, gamma=gamma, loss=loss)[1]
        close(step.losses, gamma * own + (1 - gamma) * hallucinated_losses)
        assert torch.equal(step.weights, torch.ones(8))


def test_a_pair_without_a_hallucinated_response_has_one_loss(policy: Policy[Any], tmp_path: Path) -> None:
    own = stepped(dpo, policy, batch(policy.family, rows(tmp_path / "own")))[1].losses
    given = batch(policy.family, rows(tmp_path / "some", {2: "No.", 5: "A car."}))
    contrast, step = stepped(bdhs, policy, given)
    numbers = [open_responses("trl", str(tmp_path / "own" / "trl.jsonl"))[n].row for n in (2, 5)]
    with_both = torch.tensor([row in numbers for row in given.rows])
    assert with_both.sum() == 2
    close(step.losses[~with_both], own[~with_both])
    assert (step.losses[with_both] - own[with_both]).abs().min() > 1e-3
    assert contrast.shares.tolist() == [0.5 if both else 1.0 for both in with_both]
    assert step.metrics.keys() == stepped(dpo, policy, given)[1].metrics.keys()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_before_the_first_update_every_loss_is_ln_2(gamma: float, vlm_folders: Folders, tmp_path: Path) -> None:
    policy = made(vlm_folders, size=0.0)
    given = batch(policy.family, rows(tmp_path, {n: "A car." for n in range(8)}))
    for settings in ({}, {"mode": "online", "online": ONLINE}):
        if gamma < 1 or not settings:
            _, step = stepped(bdhs, policy, given, gamma=gamma, **settings)
            close(step.losses, torch.full((8,), math.log(2)))


def test_differences_beyond_max_length_are_ignored(policy: Policy[Any], tmp_path: Path) -> None:
    long = "There is a dog. " * 9
    path = rows(tmp_path, {n: f"{long}Yes." for n in range(8)}, chosen=long, rejected="No {n}.")
    contrast, step = stepped(bdhs, policy, batch(policy.family, path, max_length=60))
    assert contrast.batch.tokens.ids.shape[1] == 60
    assert contrast.shares.tolist() == [1.0] * 8
    close(step.losses, stepped(dpo, policy, batch(policy.family, path, max_length=60))[1].losses)


@pytest.mark.slow
def test_the_policy_writes_what_it_learns_from(vlm_folders: Folders, tmp_path: Path) -> None:
    """Anew for every epoch and by what it has learned so far; the same again gives the same."""
    first, second = made(vlm_folders), made(vlm_folders, seed=1)
    given = batch(first.family, rows(tmp_path))
    settings = {"mode": "online", "online": ONLINE}
    texts = [
        said(stepped(bdhs, policy, given, rng, **settings)[0], policy.family, 2)
        for policy, rng in ((first, DRAWS), (first, DRAWS), (first, KeyedRNG(0, 1)), (second, DRAWS))
    ]
    assert texts[0] == texts[1] and texts[0] != texts[2] and texts[0] != texts[3]
    chosen = {pair.row: pair.chosen for pair in given.pairs}
    assert all(text and text != chosen[row] for text, row in zip(texts[0], given.rows, strict=True))


def test_its_loss_is_equation_5_of_what_was_written(policy: Policy[Any], tmp_path: Path) -> None:
    given = batch(policy.family, rows(tmp_path / "own"))
    own = stepped(dpo, policy, given)[1].losses
    for gamma in (0.0, 0.25):
        contrast, step = stepped(bdhs, policy, given, mode="online", gamma=gamma, online=ONLINE)
        written = dict(zip(given.rows, said(contrast, policy.family, 2 if gamma else 1), strict=True))
        pairs = open_responses("trl", str(tmp_path / "own" / "trl.jsonl"))
        again = rows(tmp_path / f"{gamma}", {n: written[pair.row] for n, pair in enumerate(pairs)})
        offline = stepped(bdhs, policy, batch(policy.family, again), gamma=0.0)[1].losses
        close(step.losses, gamma * own + (1 - gamma) * offline)
        assert set(step.summary["tries"].tolist()) <= {1.0, 2.0}


def test_pair_without_new_response_keeps_the_data_s(
    policy: Policy[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model writes nothing for the first pair, the true answer for the second, and something for the others."""

    def scripted(speaker: Any, asked: Any, *rest: Any) -> list[Completion]:
        texts = ["", asked[1].answer, *["A car."] * (len(asked) - 2)]
        return [Completion(text, 2, 0.5) for text in texts]

    monkeypatch.setattr(bdhs, "bdhs", scripted)
    given = batch(policy.family, rows(tmp_path))
    own = stepped(dpo, policy, given)[1].losses
    contrast, step = stepped(bdhs, policy, given, mode="online", online=ONLINE)
    assert contrast.shares.tolist() == [1.0, 1.0, *[0.5] * 6] and step.weights.tolist() == [1.0] * 8
    close(step.losses[:2], own[:2])
    contrast, step = stepped(bdhs, policy, given, mode="online", gamma=0.0, online=ONLINE)
    assert step.weights.tolist() == [0.0, 0.0, *[1.0] * 6]
    assert said(contrast, policy.family, 1)[2:] == ["A car."] * 6


def test_a_response_that_the_template_would_change_is_not_trained_on(
    policy: Policy[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model happens to write an end token's text, which the tokenizer would read as the token."""

    def scripted(speaker: Any, asked: Any, *rest: Any) -> list[Completion]:
        return [Completion("A </s> car.", 2, 0.5), *[Completion("A car.", 2, 0.5)] * (len(asked) - 1)]

    monkeypatch.setattr(bdhs, "bdhs", scripted)
    given = batch(policy.family, rows(tmp_path))
    contrast, _ = stepped(bdhs, policy, given, mode="online", online=ONLINE)
    assert contrast.shares.tolist() == [1.0, *[0.5] * 7]
    assert said(contrast, policy.family, 1)[0] == given.pairs[0].rejected


def test_every_batch_has_the_same_metrics(policy: Policy[Any], tmp_path: Path) -> None:
    given = {
        "none": batch(policy.family, rows(tmp_path / "none")),
        "some": batch(policy.family, rows(tmp_path / "some", {1: "A car."})),
    }
    for settings in ({}, {"mode": "online", "online": ONLINE}, {"mode": "mixed", "mixed": {"max_new_tokens": 4}}):
        names = [stepped(bdhs, policy, one, **settings)[1].metrics.keys() for one in given.values()]
        assert names[0] == names[1]


def test_padding_is_not_written_for(policy: Policy[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def counted(speaker: Any, rows: Any, *rest: Any) -> list[Completion]:
        asked.extend(rows)
        return [Completion("A car.", 1, 0.5) for _ in rows]

    monkeypatch.setattr(bdhs, "bdhs", counted)
    path = rows(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    given = batch(policy.family, path)
    _, step = stepped(bdhs, policy, given, mode="online", online=ONLINE)
    assert len(asked) == 6 == step.weights.sum()


def test_answer_at_the_length_limit_keeps_its_pair(policy: Policy[Any], tmp_path: Path) -> None:
    given = batch(policy.family, rows(tmp_path))
    online = {**ONLINE, "max_new_tokens": 250}
    contrast, step = stepped(bdhs, policy, given, mode="online", online=online)
    assert contrast.shares.tolist() == [1.0] * 8
    close(step.losses, stepped(dpo, policy, given)[1].losses)


def test_with_no_share_of_its_own_it_is_dpo(policy: Policy[Any], tmp_path: Path) -> None:
    given = batch(policy.family, rows(tmp_path))
    _, step = stepped(bdhs, policy, given, mode="mixed", mixed={"share": 0.0})
    assert torch.equal(step.losses, stepped(dpo, policy, given)[1].losses)


def test_an_annotator_orders_what_the_policy_says(
    policy: Policy[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opposite annotator exchanges the two; where the answers are of one length the pair stays."""
    (tmp_path / "judges.py").write_text(
        "def longer(pair, pictures, first, second):\n"
        "    assert len(pictures) == len(pair.images) and pictures[0].size[0] >= 16\n"
        "    return len(first) - len(second)\n"
        "def shorter(*given):\n"
        "    return -longer(*given)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    given, result = batch(policy.family, rows(tmp_path / "rows")), {}
    for name in ("longer", "shorter"):
        mixed = {"share": 1.0, "annotator": f"judges:{name}", "max_new_tokens": 5}
        contrast, step = stepped(bdhs, policy, given, mode="mixed", mixed=mixed)
        result[name] = list(zip(said(contrast, policy.family, 0), said(contrast, policy.family, 1), strict=True))
        own = step.summary["own pairs"].bool().tolist()
    assert sum(own) >= 6
    for index, (longer, shorter) in enumerate(zip(result["longer"], result["shorter"], strict=True)):
        if own[index]:
            assert longer == shorter[::-1] and len(longer[0]) >= len(longer[1])
        else:
            assert longer == shorter == (given.pairs[index].chosen, given.pairs[index].rejected)


@pytest.mark.parametrize("combine", ["sum", "vote"])
def test_a_judge_orders_what_the_policy_says(
    combine: Any, policy: Policy[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two judges, of which the heavier one decides: the longer answer is chosen."""
    (tmp_path / "scoring.py").write_text(
        "def longer(images, prompts, responses):\n"
        "    assert all(len(shown) == 1 and shown[0].size[0] >= 16 for shown in images)\n"
        "    assert all('<image>' not in prompt and prompt for prompt in prompts)\n"
        "    return [len(text) for text in responses]\n"
        "def shorter(*given):\n"
        "    return [-score for score in longer(*given)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"longer": 2.0, "shorter": 1.0}
    reward = [{"name": "function", "path": f"scoring:{name}", "weight": weight} for name, weight in names.items()]
    mixed = {"share": 1.0, "reward": reward, "max_new_tokens": 5, "combine": combine}
    cfg = bdhs.Config(mode="mixed", mixed=mixed)
    assert (bdhs.requirements(cfg).reward, bdhs.requirements(cfg).combine) == (cfg.mixed.reward, combine)
    judge = build_response_judge(cfg.mixed.reward, torch.device("cpu"), allow_pickle=False, combine=combine)
    given = replace(batch(policy.family, rows(tmp_path / "rows")), judge=judge)
    contrast, step = stepped(bdhs, policy, given, mode="mixed", mixed=mixed)
    own = step.summary["own pairs"].bool().tolist()
    assert sum(own) >= 6
    sides = zip(said(contrast, policy.family, 0), said(contrast, policy.family, 1), strict=True)
    assert all(len(chosen) >= len(rejected) for (chosen, rejected), of_ours in zip(sides, own, strict=True) if of_ours)


def test_an_annotator_and_a_judge_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="annotator and reward both order the answers; leave one out"):
        bdhs.Config(mode="mixed", mixed={"annotator": "a:b", "reward": {"path": "x"}})
    with pytest.raises(ValueError, match="zscore would compare the two answers in units of the other pairs"):
        bdhs.Config(mode="mixed", mixed={"reward": [{"path": "x"}, {"path": "y"}], "combine": "zscore"})


@pytest.mark.parametrize(
    ("first", "second", "better"),
    [
        ("A dog.", "A dog and a cat.", 1),
        ("A dog and a cat.", "A dog.", -1),
        ("A dog and a cat.", "A cat and a car.", 1),  # one invention against two
        ("A cat.", "A cat, a cat.", 1),  # each as often as it is named
        ("A dog.", "A dog on a mat with a car.", 1),
        ("A dog and a person.", "A dog.", 1),  # no invention, and more of what is there
        ("A dog.", "Dogs.", 0),
        ("Yes.", "No.", 0),  # the chosen response says neither
    ],
)
def test_the_bundled_annotator(first: str, second: str, better: int, tmp_path: Path) -> None:
    pair = open_responses("trl", str(rows(tmp_path, chosen="There is a dog beside a man.")))[0]
    assert bdhs.fewer_inventions(VOCABULARY, pair, [], first, second) == better


def test_the_bundled_annotator_takes_verdicts_for_what_they_are(tmp_path: Path) -> None:
    pair = open_responses("trl", str(rows(tmp_path, chosen="No, there is none.")))[0]
    assert bdhs.fewer_inventions(VOCABULARY, pair, [], "No.", "Yes.") == 1
    assert bdhs.fewer_inventions(VOCABULARY, pair, [], "Yes!", "no") == -1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "mixed"])
def test_going_on_from_a_checkpoint_equals_never_stopping(mode: str, vlm_folders: Folders, tmp_path: Path) -> None:
    """Bit for bit, although the policy's own words depend on its weights."""
    own = {"online": ONLINE} if mode == "online" else {"mixed": {"max_new_tokens": 4, "share": 1.0}}
    content = recipes.vlm(
        vlm_folders("llava"),
        rows(tmp_path / "rows"),
        tmp_path / "whole",
        method={"name": "bdhs", "mode": mode, **own},
        train={"steps": 3, "save_every": 1, "keep_checkpoints": 5},
    )
    assert_resumes(content)


def test_model_without_image_masking_is_refused_early(vlm_folders: Folders, tmp_path: Path) -> None:
    content = recipes.vlm(
        vlm_folders("qwen3_5"), rows(tmp_path / "rows"), tmp_path / "out", method={"name": "bdhs", "mode": "online"}
    )
    with pytest.raises(ValueError, match=r"^model\.path: BDHS masks an image for "):
        mmalign.train(load_recipe(content))
    assert checkpoint.latest(tmp_path / "out") is None
    offline = load_recipe({**content, "method": {"name": "bdhs"}}, ["train.steps=1"])
    assert mmalign.train(offline).steps == 1  # what was written elsewhere any model can learn from


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"online": {"tries": 3}}, "mode offline takes no settings of 'online'; leave them out"),
        ({"mode": "online", "mixed": {"share": 0.1}}, "mode online takes no settings of 'mixed'"),
        ({"mode": "online", "gamma": 1.0}, "mode online with gamma 1 does not use the generated responses"),
        ({"mode": "mixed", "gamma": 0.1}, "mode mixed has one rejected response for each pair and takes no gamma"),
        ({"online": {"rho": 2.0}}, "method.online.rho: expected less than or equal to 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    content = recipes.vlm(Path("x"), Path("y"), Path("z"), method={"name": "bdhs", **settings})
    with pytest.raises(ValueError) as raised:
        load_recipe(content)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "online", "online": {"similarity": "no/model"}}, "method.online.similarity: no/model"),
        (
            {"mode": "mixed", "mixed": {"annotator": "no_such:f"}},
            "method.mixed.annotator: no_such:f cannot be imported",
        ),
        ({"mode": "mixed", "mixed": {"vocabulary": "no.json"}}, "method.mixed.vocabulary: no.json cannot be read"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_is_missing_is_said_before_a_model_is_loaded(
    settings: dict[str, Any], sentence: str, tmp_path: Path, vlm_folders: Folders
) -> None:
    content = recipes.vlm(
        vlm_folders("llava"), rows(tmp_path / "rows"), tmp_path / "out", method={"name": "bdhs", **settings}
    )
    with pytest.raises(ValueError) as raised:
        mmalign.train(load_recipe(content))
    assert str(raised.value).startswith(sentence)


def test_the_measure_is_named_in_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.synthesis import similarity

    monkeypatch.setattr(similarity, "_missing", lambda package: True)
    (message,) = bdhs.check(bdhs.Config(mode="online"))
    assert (
        "similarity of completions and answers: trigrams" in message
        and "since no sentence-transformers model is installed" in message
    )
    assert bdhs.check(bdhs.Config()) == []
