"""Methods that learn from their own answers: their laws, what a batch gives, and what a judge may not say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign import methods
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.response_pairs import ResponsePairReader, encode
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods.vision_language import dpo, grpo, online_dpo, raft
from mmalign.methods.vision_language._online import answer
from mmalign.modalities import modality_of
from mmalign.policy import Policy
from mmalign.policy.lagging import LaggingCopy, mixed_share
from mmalign.rng import KeyedRNG
from tests.helpers import STANDING_VLMS, Folders, data_files, recipes
from tests.helpers.loading import load_vlm
from tests.helpers.policies import DRAWS, POLICIES, adapted, frozen, full, gradient
from tests.helpers.runs import assert_resumes, trained

REWARD = {"name": "function", "path": "a:b"}
METHODS = {"online_dpo": online_dpo, "grpo": grpo, "raft": raft}
Scorer = Callable[[str], float]


def configured(method: Any, answers: int = 3, **settings: Any) -> Any:
    generation = {"answers": answers, "max_new_tokens": 5, **settings.pop("generation", {})}
    return method.Config(reward=REWARD, generation=generation, **settings)


def judged_by(score: Scorer) -> Any:
    """A judge of responses by their texts alone."""

    def judge(images: Sequence[Any], prompts: Sequence[str], responses: Sequence[str], truths: Any = None) -> Tensor:
        assert len(images) == len(prompts) == len(responses) == len(truths)
        assert all(len(shown) == 1 for shown in images)
        return torch.tensor([score(text) for text in responses])

    return judge


def by_letters(text: str) -> float:
    """A score that tells most texts apart."""
    return sum(map(ord, text)) % 97 / 97


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about three images, without answers."""
    folder = tmp_path_factory.mktemp("questions")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(data_files.png(number))
    texts = ("What is it?", "Is there a dog in the image?", "Describe it.")
    rows = [{"image": f"{n}.png", "prompt": text} for n, text in enumerate(texts)]
    return data_files.write_jsonl(folder / "rows.jsonl", *rows)


def batch(family: VisionLanguage, path: Path, score: Scorer = by_letters) -> EncodedResponses:
    """Return all questions of a file as one batch."""
    pairs = open_responses("auto", str(path), learning="prompts")
    reader = ResponsePairReader(family.processor, family.processor.max_length - 5, decoded_images=True)
    (read,) = Loader(pairs, reader, batch_size=len(pairs), seed=0).batches(0)
    return encode(family, read, judge=judged_by(score))


def contrasts(method: Any, policy: Policy[Any], given: EncodedResponses, cfg: Any, rng: KeyedRNG = DRAWS) -> list[Any]:
    policy.model.eval()
    with torch.no_grad():
        made: list[Any] = method.contrasts(policy, given, cfg, rng)
    return made


def test_answers_are_keyed_by_question_and_number(llava: VisionLanguage, questions: Path) -> None:
    policy, cfg = adapted(llava, moved=0.1), configured(grpo).generation
    given = batch(llava, questions)
    whole = answer(policy, given, cfg, DRAWS)
    assert [len(rows) for rows in whole.rows] == [3, 3, 3] and whole.rewards.shape == (3, 3)
    again = answer(policy, given, cfg.model_copy(update={"batch_size": 2}), DRAWS)
    assert again.rows == whole.rows and torch.equal(again.rewards, whole.rewards)
    assert answer(policy, given, cfg, KeyedRNG(6)).rows != whole.rows
    texts = [llava.processor.decode(row.response).strip() for rows in whole.rows for row in rows]
    torch.testing.assert_close(whole.rewards.T.flatten(), torch.tensor([by_letters(text) for text in texts]))
    torch.testing.assert_close(whole.summary["reward"], whole.rewards.mean(1))
    assert whole.weights.tolist() == [1.0] * 3 and (whole.summary["answer tokens"] <= 5).all()
    for rows in whole.rows:
        assert [row.ids[: row.start] for row in rows] == [prompt.ids for prompt in given.tokens.rows]


def test_with_two_answers_online_dpo_is_dpo_on_that_pair(llava: VisionLanguage, questions: Path) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava, questions)
    cfg = configured(online_dpo, answers=2, beta=0.7, nll=0.1)
    (contrast,) = contrasts(online_dpo, policy, given, cfg)
    answered = answer(policy, given, cfg.generation, DRAWS)
    better = answered.rewards.argmax(1).tolist()
    rows = [answered.rows[k][b] for b, k in enumerate(better)] + [answered.rows[1 - k][b] for b, k in enumerate(better)]
    pairs = replace(given, tokens=llava.processor.collate(rows))
    expected = dpo.loss(policy, *_only(dpo.contrasts(policy, pairs, dpo.Config(beta=0.7, nll=0.1), DRAWS)), cfg)
    step = online_dpo.loss(policy, contrast, cfg)
    torch.testing.assert_close(step.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert (step.losses - math.log(2)).abs().min() > 1e-4 and step.weights.tolist() == [1, 1, 1]
    assert step.summary["reward"].tolist() == pytest.approx(answered.rewards.mean(1).tolist())


def test_ipo_md_generates_from_the_mixture(llava: VisionLanguage, questions: Path) -> None:
    """A share of 0 asks no other network; the answers are the reference's if nearly all of the logits are."""
    policy, given = adapted(llava, moved=0.5), batch(llava, questions)
    cfg = configured(online_dpo, answers=2, loss="ipo", mixture=0.999)
    assert methods.requirements_of(cfg).reference and cfg.mean
    alone = answer(policy, given, cfg.generation, DRAWS).rows
    assert alone == answer(replace(policy, reference=None), given, cfg.generation, DRAWS, 0.0).rows
    mixed = answer(policy, given, cfg.generation, DRAWS, cfg.mixture).rows
    small = cfg.generation.model_copy(update={"batch_size": 4})
    assert mixed == answer(policy, given, small, DRAWS, cfg.mixture).rows != alone
    with torch.no_grad():
        for p in policy.trainable():
            p.zero_()
    assert mixed == answer(policy, given, cfg.generation, DRAWS).rows
    assert methods.requirements_of(configured(online_dpo, loss="simpo", mixture=0.1)).reference
    assert not methods.requirements_of(configured(online_dpo, loss="simpo")).reference


def test_a_reference_that_caught_up_is_grpo_s_old_policy(llava: VisionLanguage, questions: Path) -> None:
    """The old scores are its own, and the same if that is not known."""
    policy, given = adapted(llava, moved=0.1), batch(llava, questions)
    moving = LaggingCopy(policy.trainable(), lambda step: 1.0)
    lagging, cfg = replace(policy, moving=moving), configured(grpo, generation={"updates": 2})
    (caught_up, *_) = contrasts(grpo, lagging, given, cfg)
    moving.load([weight.clone() for weight in moving.weights])
    (unknown, *_) = contrasts(grpo, lagging, given, cfg)
    assert caught_up.old is caught_up.reference and unknown.old is not unknown.reference
    assert torch.equal(caught_up.old, unknown.old) and torch.equal(caught_up.reference, unknown.reference)


@pytest.mark.slow
@pytest.mark.parametrize("policy_of", POLICIES.values(), ids=POLICIES)
def test_inpo_has_two_references(policy_of: Any, llava: VisionLanguage, questions: Path) -> None:
    """Its equation from three networks' scores, in two generations of two updates each."""
    moves = {"every": 2, "mix": 1.0}
    inpo = {"answers": 2, "loss": "ipo", "score": "sum", "beta": 0.5, "reference": moves, "generation": {"updates": 2}}
    policy, given, seen = policy_of(llava), batch(llava, questions), dict[float, list[Any]]()
    policy = replace(policy, moving=LaggingCopy(policy.trainable(), partial(mixed_share, ramp=None, flat=0, **moves)))
    base = previous = frozen(policy.unwrapped)
    for update in range(4):
        for share in (0.0, 1.0, 0.3):
            cfg = configured(online_dpo, base_share=share, **inpo)
            seen |= {share: contrasts(online_dpo, policy, given, cfg)} if update % 2 == 0 else {}
            contrast = seen[share][update % 2]
            margin = partial(margins, llava, contrast.batch)
            step, apart = online_dpo.loss(policy, contrast, cfg), share * margin(base) + (1 - share) * margin(previous)
            expected = (margin(policy.unwrapped) - apart - 1) ** 2
            torch.testing.assert_close(step.losses.detach(), expected, rtol=1e-4, atol=1e-4)
        assert (margin(base) - margin(previous)).abs().max() > 0.1 or update < 2
        slopes = gradient(policy, step)
        assert slopes.norm() > 0
        for p in policy.trainable():
            p.data.sub_(3e-3 * p.grad.sign() if p.grad is not None else 0.0)
        policy.lagging["method.reference"].update(policy.trainable(), update + 1)
        previous = frozen(policy.unwrapped) if update % 2 else previous


@torch.no_grad()
def margins(family: VisionLanguage, given: EncodedResponses, net: nn.Module) -> Tensor:
    """Return the log-probability of the chosen responses less that of the rejected ones [B]."""
    logps = family.token_logps(net, given.tokens, given.features)
    chosen, rejected = scores.total(logps, given.tokens.response_mask).chunk(2)
    return chosen - rejected


def _only(items: list[Any]) -> list[Any]:
    assert len(items) == 1
    return items


@pytest.mark.parametrize("settings", [{}, {"generation": {"updates": 2}}, {"importance": "sequence"}])
def test_on_policy_grpo_is_the_advantage_times_the_gradient_of_mean_log_p(
    settings: dict[str, Any], llava: VisionLanguage, questions: Path
) -> None:
    """Also against stored scores of the old policy; the reward's unbiased deviation is TRL's."""
    policy, given = full(llava, moved=0.05), batch(llava, questions)
    cfg = configured(grpo, beta=0.0, **settings)
    contrast = contrasts(grpo, policy, given, cfg)[0]
    assert (contrast.old is None) == ("generation" not in settings) and contrast.reference is not None
    step = grpo.loss(policy, replace(contrast, reference=None), cfg)
    rewards = answer(policy, given, cfg.generation, DRAWS).rewards
    values = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(contrast.advantages, values.T.flatten())
    torch.testing.assert_close(step.losses, -values.mean(1), rtol=1e-4, atol=1e-5)  # every ratio is 1
    assert step.metrics["clipped"].sum() == 0
    own = gradient(policy, step)
    tokens = contrast.batch.tokens
    logps = scores.mean(llava.token_logps(policy.model, tokens, given.features), tokens.response_mask)
    plain = gradient(policy, replace(step, losses=-(values.T * logps.view(3, 3)).mean(0)))
    torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-6)


def test_reductions_count_tokens_as_published(llava: VisionLanguage, questions: Path) -> None:
    """By hand from the losses of tokens: the mean of means, a sum over the limit, and the mean of all tokens."""
    policy, given, results = adapted(llava, moved=0.1), batch(llava, questions), {}
    for reduction in ("grpo", "dr_grpo", "dapo"):
        cfg = configured(grpo, reduction=reduction, beta=0.5, generation={"updates": 2})
        contrast = contrasts(grpo, policy, given, cfg)[1]
        shifted = replace(contrast, old=contrast.old - 0.1)  # ratios of e^0.1, none clipped
        results[reduction] = grpo.loss(policy, shifted, cfg)
    mask = contrast.batch.tokens.response_mask
    logps = llava.token_logps(policy.model, contrast.batch.tokens, given.features).detach()
    d = contrast.reference - logps
    tokens = (-math.exp(0.1) * contrast.advantages[:, None] + 0.5 * (d.exp() - d - 1)) * mask
    lengths = mask.sum(1).view(3, 3)
    sums = tokens.sum(1).view(3, 3)
    expected = {
        "grpo": (sums / lengths).mean(0),
        "dr_grpo": sums.mean(0) / 5,
        "dapo": sums.sum(0) / lengths.sum(0),
    }
    for reduction, losses in expected.items():
        torch.testing.assert_close(results[reduction].losses.detach(), losses, rtol=1e-4, atol=1e-5)
    assert results["dapo"].weights.tolist() == lengths.sum(0).tolist() and results["grpo"].weights.tolist() == [1, 1, 1]


def test_raft_trains_on_the_best_and_rso_on_what_is_accepted(llava: VisionLanguage, questions: Path) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava, questions)
    for select in ("best", "rejection"):
        cfg = configured(raft, answers=4, select=select, temperature=0.3)
        (contrast,) = contrasts(raft, policy, given, cfg)
        answered = answer(policy, given, cfg.generation, DRAWS)
        uniform = DRAWS.uniform(given.rows, (4,), "rejection")
        kept = raft.selected(cfg, answered.rewards, uniform)
        best = answered.rewards.argmax(1)
        assert kept[range(3), best].all() and (kept.sum() == 3) == (select == "best")
        step = raft.loss(policy, contrast, cfg)
        for b in range(3):
            rows = [answered.rows[k][b] for k in range(4) if kept[b, k]]
            tokens = llava.processor.collate(rows)
            mean = scores.mean(llava.token_logps(policy.model, tokens, given.features), tokens.response_mask)
            torch.testing.assert_close(step.losses[b], -mean.mean(), rtol=1e-4, atol=1e-5)
        assert step.metrics["answers trained on"].tolist() == kept.sum(1).tolist()


def test_rejection_has_the_published_probabilities() -> None:
    rewards, uniform = torch.tensor([[1.2, 0.4, 0.9, -0.3]]), torch.rand(200_000, 4, generator=torch.manual_seed(0))
    cfg = configured(raft, select="rejection", temperature=0.5)
    share = raft.selected(cfg, rewards.expand(200_000, 4), uniform).float().mean(0)
    assert share.tolist() == pytest.approx([1, 0.201896518, 0.548811636, 0.049787068], abs=4e-3)  # 4 standard errors


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_equal_rewards_weigh_nothing_and_are_counted(method: Any, llava: VisionLanguage, questions: Path) -> None:
    policy, cfg = adapted(llava, moved=0.1), configured(method)
    (contrast,) = contrasts(method, policy, batch(llava, questions, lambda _: 0.5), cfg)
    step = method.loss(policy, contrast, cfg)
    assert step.weights.sum() == 0 and torch.isfinite(step.losses).all()
    assert step.summary["equal rewards"].tolist() == [1.0] * 3
    assert gradient(policy, step).abs().max() == 0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_batch_is_learned_from_in_parts_and_passes(method: Any, llava: VisionLanguage, questions: Path) -> None:
    policy, given = adapted(llava, moved=0.1), batch(llava, questions)
    (whole,) = contrasts(method, policy, given, configured(method))
    cfg = configured(method, generation={"updates": 2, "questions_per_contrast": 2})
    made = contrasts(method, policy, given, cfg)
    assert methods.requirements_of(cfg).contrasts(3).number == len(made) == 4
    steps = [method.loss(policy, contrast, cfg) for contrast in made]
    if method is grpo:
        assert all(contrast.old is not None for contrast in made)
        once = configured(grpo, generation={"questions_per_contrast": 2})
        first, second = contrasts(grpo, policy, given, once)
        assert first.old is None and second.old is not None
        torch.testing.assert_close(grpo.loss(policy, first, once).losses, steps[0].losses, rtol=1e-4, atol=1e-5)
    expected = method.loss(policy, whole, configured(method)).losses
    for first in (0, 2):
        torch.testing.assert_close(
            torch.cat([x.losses for x in steps[first : first + 2]]), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", STANDING_VLMS)
def test_two_updates_on_every_family(name: str, vlm_folders: Folders, questions: Path) -> None:
    """Every method learns from the same family, one after another; all numbers are finite and the weights move."""
    family = load_vlm(vlm_folders(name))
    policy, given = adapted(family, moved=0.02), batch(family, questions)
    for method in METHODS.values():
        cfg = configured(method, answers=2, generation={"updates": 2})
        for contrast in contrasts(method, policy, given, cfg):
            step = method.loss(policy, contrast, cfg)
            assert torch.isfinite(step.losses).all() and all(torch.isfinite(x).all() for x in step.metrics.values())
            if step.weights.sum() > 0:
                assert gradient(policy, step).norm() > 0
                for p in policy.trainable():
                    p.data.sub_(1e-3 * p.grad.sign() if p.grad is not None else 0.0)
        assert step.summary["unusable questions"].mean() < 1


@pytest.fixture
def content(vlm_folders: Folders, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose judge is a function that tells answers apart, and others that do not what they should."""
    (tmp_path / "taste.py").write_text(
        "def letters(images, prompts, responses): return [sum(map(ord, text)) % 97 for text in responses]\n"
        "def constant(images, prompts, responses): return [1.0] * len(responses)\n"
        "def nan(images, prompts, responses): return [float('nan')] * len(responses)\n"
        "def shape(images, prompts, responses): return [1.0]\n"
        "def fails(images, prompts, responses): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    method = {"name": "grpo", "reward": {"name": "function", "path": "taste:letters"}}
    method["generation"] = {"answers": 2, "max_new_tokens": 4, "updates": 2}
    train = {"steps": 4, "batch_size": 3, "save_every": 2}
    return recipes.vlm(
        vlm_folders("llava"), questions, tmp_path / "out", method=method, data={"format": "auto"}, train=train
    )


def test_a_stopped_run_resumes_between_generations(content: dict[str, Any]) -> None:
    assert_resumes(content)


@pytest.mark.slow
def test_a_run_with_a_mixture_and_two_references_resumes(content: dict[str, Any]) -> None:
    method = {"loss": "ipo", "mixture": 0.25, "base_share": 0.3, "reference": {"every": 2, "mix": 1.0}}
    assert_resumes({**content, "method": {**content["method"], "name": "online_dpo", **method}})


def test_prompts_are_shown_and_planned_as_they_will_be_used(llava: VisionLanguage, content: dict[str, Any]) -> None:
    recipe = load_recipe(content)
    needs, modality = methods.requirements_of(recipe.method), modality_of(recipe)
    splits = modality.open_pairs(recipe, needs)
    view = modality.show(recipe, splits, 2)
    assert len(view.facts) == 1 and [side.name for side in view.examples[0].sides] == ["prompt"]
    assert modality.encode_example is not None
    for given in (splits, None):
        example = modality.encode_example(llava, recipe, needs, given)
        tokens = example.batch(2).tokens
        assert len(tokens) == 4 and (tokens.num_tokens == needs.new_tokens).all()


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (
            "constant",
            "had nothing to learn from|nothing to learn from.*the judge gave all answers to a question the same",
        ),
        ("nan", "reward function: taste:nan returned nan for the prompt"),
        ("shape", "reward function: taste:shape returned 1 scores for 6 prompts"),
        ("fails", r"reward function: taste:fails failed for 6 prompts.*ZeroDivisionError"),
    ],
)
def test_rewards_that_cannot_be_used_end_in_a_sentence(function: str, sentence: str, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=sentence):
        trained(content, f"method.reward.path=taste:{function}")


def test_what_does_not_fit_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: 400 leaves no room for a prompt in 256 tokens"):
        trained(content, "method.generation.max_new_tokens=400")
    with pytest.raises(ValueError, match="reduction: dapo would weigh a response's ratio by its length"):
        configured(grpo, importance="sequence", reduction="dapo")
    with pytest.raises(ValueError, match="combine: vote needs two or more reward models"):
        configured(raft, combine="vote")
    with pytest.raises(ValueError, match=r"base_share: 0\.3 mixes .*; set method\.reference, or leave"):
        configured(online_dpo, loss="ipo", base_share=0.3)
    with pytest.raises(ValueError, match="base_share: needs a loss with a reference"):
        configured(online_dpo, loss="simpo", base_share=0.3, reference={})
