"""Recipes: every shipped one loads, numbers are numbers, and each slip is answered with one sentence."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmalign import methods
from mmalign.commands.load_recipe import RENAMED, dump_recipe, load_recipe
from mmalign.config import Recipe
from mmalign.config.base import Choice
from mmalign.config.evaluation import RewardConfig
from mmalign.config.losses import DPOLossConfig, IPOLossConfig, PairLossConfig, RobustLossConfig
from mmalign.modalities.loading import check_method_judge, check_reward_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*_*/*.yaml"))  # by modality
LOSSES = Choice.sections(PairLossConfig)
LEAST: dict[str, Any] = {
    "method": {"name": "diffusion_dpo"},
    "model": {"path": "somewhere/model"},
    "data": {"path": "pairs.parquet"},
    "train": {"steps": 10, "lr": 1e-5},
    "output": "runs/x",
}


def load(*overrides: str) -> Recipe:
    return load_recipe(copy.deepcopy(LEAST), overrides)


def slip(*overrides: str, of: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValueError) as raised:
        load_recipe(copy.deepcopy(LEAST) if of is None else of, overrides)
    return str(raised.value)


def file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_recipe_loads_and_survives_its_own_dump(path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert path.stem.startswith(f"{recipe.method.name}_") or path.stem in ("quickstart", "emoji")


def test_recipes_measure_the_scores_that_they_expect() -> None:
    """A published PickScore can be compared with PickScore only."""
    quoting = [path for path in CONFIGS if re.search(r"# Expect \(published.*PickScore", path.read_text())]
    assert len(quoting) >= 5
    for path in quoting:
        reward = load_recipe(path).evaluate.reward
        assert (reward.name, reward.path) == ("transformers_clip", "yuvalkirstain/PickScore_v1"), path.stem


def test_published_reward_models_of_comments_have_valid_options() -> None:
    lines = [line for path in CONFIGS for line in path.read_text().splitlines() if re.match(r" *# reward: \{", line)]
    assert len(lines) == 2
    for line in lines:
        reward = yaml.safe_load(line.replace("# ", "", 1).strip())["reward"]
        check_reward_model("method.reward", RewardConfig(**reward))


def test_unknown_options_of_a_reward_model_are_refused_before_it_loads() -> None:
    reward = RewardConfig(name="step_aware", path="models/tiny_clip_steps", options={"weight": "judge.bin"})
    with pytest.raises(ValueError, match=r"reward step_aware: weight: .* options: batch_size, weights, clip"):
        check_reward_model("method.reward", reward)


def test_a_judge_of_pairs_is_refused_where_images_come_in_batches() -> None:
    recipe = load_recipe("text_to_image/spo_tiny_sd", ["method.reward={name: vlm_pairs, path: models/tiny_llava}"])
    with pytest.raises(ValueError, match=r"method\.reward: reward vlm_pairs compares the images .* method\.name: spo"):
        check_method_judge(recipe)
    whole = load_recipe("text_to_image/nft_tiny_sd", ["method.reward={name: vlm_pairs, path: models/tiny_llava}"])
    check_method_judge(whole)  # all images of a prompt come together


def test_a_judge_of_images_is_refused_for_responses() -> None:
    settings = ["method.name=bdhs", "method.mode=mixed", "method.mixed.reward={path: models/tiny_clip}"]
    recipe = load_recipe("vision_language/quickstart", settings)
    with pytest.raises(ValueError, match="open_clip judges images; for responses use one of chair, function"):
        check_method_judge(recipe)


def test_an_empty_list_of_reward_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.reward: an empty list; name at least one reward model"):
        check_reward_model("method.reward", [])


METHOD_WITH = {  # a method whose recipes have the option, where not all have it
    "method.reward": "spo",
    "method.crop_area": "mdpo",
    "method.tie_margin": "step_preference",
    "method.online.max_similarity": "bdhs",
    "evaluate.num_images": "dpo",
    "prepare.bdhs.max_similarity": "dpo",
    "prepare.realign.max_similarity": "dpo",
}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_option_is_answered_with_its_new_name(old: str, new: str) -> None:
    recipe = {**copy.deepcopy(LEAST), "method": {"name": METHOD_WITH.get(new, "diffusion_dpo")}}
    assert f"{old}: is now called {new}; rename it" in slip(f"{old}=1", of=recipe)


def test_moved_option_is_offered_only_where_it_exists() -> None:
    recipe = {**copy.deepcopy(LEAST), "method": {"name": "mapo", "flip_rate": 0.1}}
    assert slip(of=recipe) == "recipe: method has no 'flip_rate'; it has name, reference, beta, snr, caption_dropout"


def test_a_loss_is_a_name_or_a_section() -> None:
    assert load("method.loss=ipo").method.loss == IPOLossConfig() == load("method.loss={name: ipo}").method.loss
    assert load().method.loss == DPOLossConfig() != load("method.loss=ipo").method.loss
    robust = load("method.loss.name=robust", "method.loss.flip_rate=0.1")
    assert robust.method.loss == RobustLossConfig(flip_rate=0.1)
    assert load_recipe(yaml.safe_load(dump_recipe(robust))) == robust


def test_there_are_shipped_recipes() -> None:
    assert len(CONFIGS) >= 10


def test_a_dump_is_complete_and_loads_equal(tmp_path: Path) -> None:
    """Also strings that YAML would read as numbers, and numbers that YAML 1.1 would read as strings."""
    recipe = load("output='1e-5'", "train.lr=1e-8", "data.columns={chosen: '3.0', prompt: 'yes'}", "evaluate=null")
    text = dump_recipe(recipe)
    assert load_recipe(file(tmp_path, text)) == recipe
    assert recipe.output == "1e-5" and recipe.train.lr == 1e-8
    assert "weight_decay: 0.01" in text and "caption_dropout: 0.2" in text  # defaults are written out


def test_equal_recipes_are_equal_and_others_are_not() -> None:
    assert load("train.lr=1e-5") == load("train.lr=0.00001")
    assert load("train.lr=1e-5") != load("train.lr=2e-5")
    assert load("method={name: sft}").method != load("method={name: mapo}").method


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-8", 1e-8),
        ("1.0e-8", 1e-8),
        ("1E+3", 1e3),
        (".5", 0.5),
        (".5e-3", 5e-4),
        ("5.", 5.0),
        ("+2e0", 2.0),
        ("3", 3.0),
    ],
)
def test_numbers_in_every_spelling(written: str, number: float, tmp_path: Path) -> None:
    assert load(f"train.lr={written}").train.lr == number
    text = yaml.safe_dump({**LEAST, "train": "TRAIN"}).replace("TRAIN", f"{{steps: 1, lr: {written}}}")
    recipe = load_recipe(file(tmp_path, text))
    assert recipe.train.lr == number and isinstance(recipe.train.lr, float)


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    before = copy.deepcopy(LEAST)
    recipe = load_recipe(
        LEAST, ["train.lr=2e-5", "model.lora.rank=4", "train.betas=[0.9, 0.99]", "train.max_grad_norm=null"]
    )
    assert before == LEAST
    assert (recipe.train.lr, recipe.train.steps, recipe.train.betas) == (2e-5, 10, [0.9, 0.99])
    assert recipe.model.lora.rank == 4 and recipe.train.max_grad_norm is None
    recipe = load("method={name: mapo}")
    assert recipe.method.name == "mapo" and recipe.method.beta == 0.1
    assert load("train.steps=3", "train.steps=4").train.steps == 4  # the last one counts
    assert load("output=a=b").output == "a=b"


def test_other_method_drops_the_former_s_hyper_parameters() -> None:
    """Both have a beta, four orders of magnitude apart."""
    content = {**LEAST, "method": {"name": "diffusion_dpo", "beta": 3000}}
    assert load_recipe(content, ["method.name=mapo"]).method.beta == 0.1
    assert load_recipe(content, ["method.name=mapo", "method.beta=0.2"]).method.beta == 0.2
    assert load_recipe(content, ["method.name=diffusion_dpo"]).method.beta == 3000


def test_a_section_that_is_absent_or_null() -> None:
    assert load("evaluate=null").evaluate is None and load().evaluate is None
    result = load("evaluate=null", "evaluate.benchmark=implicit").evaluate
    assert result is not None and result.benchmark == "implicit"


def test_losses_are_a_name_a_section_or_weights_of_several() -> None:
    both = load("method.loss={dpo: 0.8, robust: {weight: 0.2, flip_rate: 0.1}}")
    assert [(term.weight, term.loss) for term in both.method.terms] == [
        (0.8, DPOLossConfig()),
        (0.2, RobustLossConfig(flip_rate=0.1)),
    ]
    assert load_recipe(yaml.safe_load(dump_recipe(both))) == both
    for value, part in (
        ("{dpo: 0.8, robst: 0.2}", "there is no loss 'robst'; did you mean 'robust'?"),
        ("{dpo: -1}", "weight: Input should be greater than 0"),
        ("{dpo: 1, robust: {flip_rat: 0.1}}", "robust.flip_rat: Extra inputs are not permitted"),
        ("orpo", "orpo does not fit images"),
    ):
        assert part in slip(f"method.loss={value}")
    assert "biased on scores of one draw of noise" in slip("method.divergence=forward_kl")
    assert "needs a reference, which simpo has not" in slip("method.loss=simpo", "method.divergence=js")
    assert load("method.loss=simpo", "method.divergence=reverse_kl").method.uses_reference is False


def test_prompts_are_a_number_or_a_file() -> None:
    assert load("evaluate={benchmark: scenes, prompts: 7}").evaluate.prompts == 7  # type: ignore[union-attr]
    named = load("evaluate={prompts: a.txt, reward: {path: x}}").evaluate
    assert named is not None and named.prompts == "a.txt"
    text = slip("evaluate={benchmark: scenes, prompts: 1.5}")
    assert text == "recipe: evaluate.prompts: expected a whole number or text, got 1.5"
    assert slip("prepare={reward: {path: x}, prompts: true}").count("\n") == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trian.lr=1", "recipe: a recipe has no 'trian'; did you mean 'train'?"),
        ("train.lrr=1", "recipe: train has no 'lrr'; did you mean 'lr'?"),
        ("model.lora.rnk=1", "recipe: model.lora has no 'rnk'; did you mean 'rank'?"),
        ("method.betta=1", "recipe: method has no 'betta'; did you mean 'beta'?"),
        ("evaluate={reward: {path: a, nmae: b}}", "recipe: evaluate.reward has no 'nmae'; did you mean 'name'?"),
        ("gallery.zzz=1", "recipe: gallery has no 'zzz'; it has images, title"),
        ("method.loss={name: robust, flip_rat: 0}", "recipe: method.loss has no 'flip_rat'; did you mean 'flip_rate'?"),
        ("method.loss={name: ipo, flip_rate: 0}", "recipe: method.loss has no 'flip_rate'; it has name"),
        (
            "method.loss=ipp",
            f"recipe: method.loss: unknown name 'ipp'; did you mean 'ipo'? (there are {', '.join(sorted(LOSSES))})",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(override: str, sentence: str) -> None:
    assert slip(override) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr=fast", "recipe: train.lr: expected a number, got the text 'fast'"),
        ("train.lr='1e-5'", "recipe: train.lr: expected a number, got the text '1e-5'"),
        ("train.lr=true", "recipe: train.lr: expected a number, got true"),
        ("train.lr=", "recipe: train.lr: expected a number, got nothing"),
        ("train.lr=-1", "recipe: train.lr: expected greater than 0, got -1"),
        ("train.lr=.nan", "recipe: train.lr: expected a finite number, got nan"),
        ("train.lr=.inf", "recipe: train.lr: expected a finite number, got inf"),
        ("method.beta=.inf", "recipe: method.beta: expected a finite number, got inf"),
        ("train.steps=true", "recipe: train.steps: expected a whole number, got true"),
        ("train.steps=1.5", "recipe: train.steps: expected a whole number, got 1.5"),
        ("train.steps=1.0", "recipe: train.steps: expected a whole number, got 1.0"),
        ("data.flip=1", "recipe: data.flip: expected true or false, got 1"),
        ("output=3", "recipe: output: expected text, got 3; write it in quotes"),
        ("output=[a]", "recipe: output: expected text, got ['a']"),
        ("train=3", "recipe: train: expected a section, such as {key: value}, got 3"),
        ("train=null", "recipe: train: expected a section, such as {key: value}, got nothing"),
        ("train.trackers=wandb", "recipe: train.trackers: expected a list, such as [a, b], got the text 'wandb'"),
        ("train.betas=[0.9]", "recipe: train.betas: expected at least 2 items, got [0.9]"),
        ("train.betas=[0.9, 1.0]", "recipe: train.betas.1: expected less than 1, got 1.0"),
        ("data.columns={chosen: 3}", "recipe: data.columns.chosen: expected text, got 3; write it in quotes"),
        ("data.columns={3: a}", "recipe: data.columns.3: a key must be text, got 3; write it in quotes"),
        (
            "train.schedule=cosin",
            "recipe: train.schedule: expected 'constant', 'linear' or 'cosine', got the text 'cosin'; "
            "did you mean 'cosine'?",
        ),
        ("evaluate={}", "recipe: evaluate: benchmark preference needs a reward model; add evaluate.reward.path"),
        (
            "evaluate={benchmark: scenes, prompts: a}",
            "recipe: evaluate: benchmark scenes uses its own prompts; expected their number, got 'a'",
        ),
        (
            "prepare={}",
            "recipe: prepare needs 'reward', which is missing; expected judge that ranks the outputs to a prompt, or a "
            "list of several",
        ),
        ("prepare={reward: [{path: a, pth: b}]}", "recipe: prepare.reward.0 has no 'pth'; did you mean 'path'?"),
        (
            "prepare={reward: {path: a}, combine: vote}",
            "recipe: prepare: combine: vote needs two or more reward models; name them as a list, or leave it out",
        ),
        (
            "evaluate={reward: 3}",
            "recipe: evaluate.reward: expected a section, such as {key: value} or a list, such as [a, b], got 3",
        ),
        ("method.loss=", "recipe: method.loss: expected a name, or a section such as {name: NAME}, got nothing"),
        ("method.loss.flip_rate=0", f"recipe: method.loss: needs a name, one of {', '.join(LOSSES)}"),
        ("method.loss={name: robust, flip_rate: 1}", "recipe: method.loss.flip_rate: expected less than 0.5, got 1"),
    ],
)
def test_wrong_value_names_key_value_and_expectation(override: str, sentence: str) -> None:
    assert slip(override) == sentence


def test_a_long_value_is_shown_in_short() -> None:
    assert len(slip(f"train.steps={'x' * 10_000}")) < 200


def test_every_slip_is_named_at_once() -> None:
    responses = slip("train.lr=fast", "trian.lr=1", "data.flip=1").splitlines()
    assert len(responses) == 3 and all(line.startswith("recipe: ") for line in responses)


def test_what_is_missing_is_named_with_its_meaning() -> None:
    assert slip(of={**LEAST, "model": {}}) == (
        "recipe: model needs 'path', which is missing; expected diffusers pipeline: a folder, a Hub id, or a "
        "single file of weights"
    )
    without = {k: v for k, v in LEAST.items() if k != "data"}
    assert slip(of=without) == "recipe: a recipe needs 'data', which is missing"
    assert slip(of={**LEAST, 3: 4}) == "recipe: 3: a key must be text, got 3; write it in quotes"  # type: ignore[dict-item]


def test_an_unknown_method_is_answered_with_the_list() -> None:
    text = slip("method.name=diffusion_dop")
    assert "there is no method 'diffusion_dop'; did you mean 'diffusion_dpo'?" in text
    assert f"(there are {', '.join(methods.names())})" in text
    for wrong in ("__init__", "../losses", "os"):
        assert "there is no method" in slip(f"method={{name: {wrong}}}")
    for wrong in ("mapo", "null", "{}", "{name: 3}", "[]"):
        assert "method: expected a mapping with a name, such as {name: diffusion_dpo}, got" in slip(f"method={wrong}")


def test_an_override_that_is_none() -> None:
    for wrong in ("lr", "=3", "train..lr=3", ".=1"):
        assert slip(wrong) == f"{wrong!r}: expected section.key=value, such as train.lr=1e-5"
    assert slip("train.lr.x=3") == "train.lr.x: train.lr is no section but 1e-05; set train.lr itself"
    assert slip("output.x=3") == "output.x: output is no section but the text 'runs/x'; set output itself"
    assert slip("train.lr=[") == (
        "train.lr: is not a recipe in YAML: line 1, column 2: expected the node content, but found '<stream end>'"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected a mapping of sections, got nothing"),
        ("# a comment alone", "expected a mapping of sections, got nothing"),
        ("- a\n- b", "expected a mapping of sections, got ['a', 'b']"),
        ("hello", "expected a mapping of sections, got the text 'hello'"),
        ("train: {lr: 1", "is not a recipe in YAML: line 1, column 14: expected ',' or '}', but got '<stream end>'"),
        (
            "a: 1\nb:\n\t- c",
            "is not a recipe in YAML: line 3, column 1: found character '\\t' that cannot start any token",
        ),
        ("a: 1\nb: 2\na: 3", "is not a recipe in YAML: line 3, column 1: 'a' is given twice"),
        ("a: 2024-13-01", "is not a recipe in YAML: month must be in 1..12"),
        ("a: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("a: \x00", "is not a recipe in YAML: unacceptable character"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, sentence: str, tmp_path: Path) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ValueError) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{path}: ") and sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"image\.yaml: cannot be read .*; expected a recipe"):
        load_recipe(tmp_path / "image.yaml")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); expected a recipe, a short file in YAML"):
        load_recipe(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_judge_is_trained_whole_and_from_two_models() -> None:
    judge = {**LEAST, "method": {"name": "step_preference"}, "model": {"path": "a", "denoiser": "b"}}
    assert load_recipe(judge, ["model.lora={}", "model.revision=null"]) == load_recipe(judge)
    assert slip("model.lora.rank=4", of=judge) == (
        "recipe: model: lora does not apply to a step judge, whose weights are all trained; leave it out"
    )
    assert "revision: 'main' is ambiguous between the two models, path and denoiser; leave it out, and give" in slip(
        "model.revision=main", of=judge
    )


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.lr = 1.0


def test_yaml_s_merge_keys_still_work(tmp_path: Path) -> None:
    text = yaml.safe_dump({k: v for k, v in LEAST.items() if k != "train"})
    assert load_recipe(file(tmp_path, f"train: {{<<: &t {{steps: 3, lr: 1e-5}}, lr: 2e-5}}\n{text}")).train.lr == 2e-5


def test_a_bare_off_is_a_word_and_no_truth_value() -> None:
    """YAML reads it as false, and people write it as the documents do."""
    recipe = load_recipe(LEAST, ["data.cache=off", "train.pack_responses=off"])
    assert (recipe.data.cache, recipe.train.pack_responses) == ("off", "off")
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert slip("train.pack_responses=on") == "recipe: train.pack_responses: expected 'auto' or 'off', got true"
