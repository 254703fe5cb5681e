"""Settings of evaluation, image sampling and text decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config.base import Resolution, Section

Files = str | dict[str, str]  # a file, or several by name


class RewardConfig(Section):
    """Reward model: a file in mmalign/rewards, and its weights."""

    name: str = Field("open_clip", description="file in mmalign/rewards, or module:Class (docs/extending.md)")
    path: str = Field(description="weights: a folder, a file or a Hub id; function: module:function; http: an address")
    options: dict[str, object] = Field(
        {}, description="keyword arguments of the reward model, such as {pretrained: laion2b_s34b_b79k}"
    )


class WeightedReward(RewardConfig):
    """One of several reward models: a term of the combination, or a constraint."""

    weight: float = Field(1.0, gt=0, description="factor of its scores, or of its votes")
    at_least: float | None = Field(
        None,
        description="makes it a constraint, as in CGPO: an output with a lower score gets the least combined score of "
        "its prompt",
    )


Rewards = RewardConfig | list[WeightedReward]
Combine = Annotated[
    Literal["sum", "zscore", "group_zscore", "vote"],
    Field(
        description="combination of several reward models' scores: weighted sum, weighted sum of standard scores, the "
        "same by the deviation of each prompt (GDPO), or weighted votes between images of one prompt"
    ),
]


def reward_models(reward: Rewards) -> list[WeightedReward]:
    """Return the reward models of a section that names one or several."""
    return [WeightedReward(**reward.model_dump())] if isinstance(reward, RewardConfig) else reward


def check_combine(reward: Rewards | None, combine: Combine) -> None:
    """Refuse a combination of a single reward model.

    Raises:
        ValueError: `combine` is not the default, and there is one reward model or none, besides constraints.
    """
    terms = [model for model in reward_models(reward) if model.at_least is None] if reward is not None else []
    if combine != "sum" and len(terms) < 2:
        raise ValueError(f"combine: {combine} needs two or more reward models; name them as a list, or leave it out")


class BestOf(Section):
    """Settings of best of n: the base model's best output of n, by a judge, without training."""

    n: list[Annotated[int, Field(ge=2)]] = Field(
        [4], min_length=1, description="outputs to choose from, one or several numbers"
    )
    reward: Rewards = Field(
        description="reward model that chooses, or a list of several; best not the one that measures"
    )
    combine: Combine = "sum"

    @model_validator(mode="after")
    def _combined(self) -> BestOf:
        check_combine(self.reward, self.combine)
        return self


class BestOfAnswers(BestOf):
    """Settings of best of n for answers."""

    temperature: float = Field(1.0, gt=0, description="sampling temperature of the answers to choose from")


class SamplingConfig(Section):
    """Settings of image sampling."""

    steps: int = Field(30, ge=1, description="denoising steps")
    guidance: float = Field(7.5, ge=1, description="scale of classifier-free guidance; 1 turns it off")
    resolution: Resolution = Field(
        None, description="pixels of an image: a side, or WIDTHxHEIGHT; default: the model's"
    )
    sampler: Literal["default", "ddim", "dpmsolver++"] = Field(
        "default", description="default: the checkpoint's scheduler"
    )
    batch_size: int = Field(16, ge=1, description="images generated at a time")


class Evaluate(Section):
    """Settings of the comparison of base and aligned model."""

    benchmark: str
    seed: int = Field(0, ge=0, description="seed of noise, sampling and choices of questions")


class EvaluateImages(Evaluate):
    """Settings of the comparison of text-to-image models."""

    benchmark: Literal["scenes", "preference", "implicit"] = Field(
        "preference",
        description="win rate by a reward model, the bundled world's prompts read exactly (scenes), or accuracy of the "
        "implicit reward on the validation split",
    )
    prompts: int | str = Field(
        256, description="number of bundled prompts, a text file with one a line, or a table of prompt and source"
    )
    split: Literal["validation", "test"] = Field("test", description="split of the bundled prompts")
    sampling: SamplingConfig = SamplingConfig()
    images_per_prompt: int = Field(
        1, ge=1, description="images per prompt; with two or more, diversity is measured too"
    )
    reward: Rewards | None = Field(
        None, description="reward model for the win rate, or a list of several; optional for scenes"
    )
    combine: Combine = "sum"
    best_of: BestOf | None = Field(None, description="best of n images of the base model, measured alike")
    num_noise_samples: int = Field(10, ge=1, description="implicit: draws of (t, noise) per pair")
    cache: str = Field("auto", description="folder for generated images, or auto (in the output)")

    @model_validator(mode="after")
    def _judged(self) -> EvaluateImages:
        if self.benchmark == "preference" and self.reward is None:
            raise ValueError("benchmark preference needs a reward model; add evaluate.reward.path")
        check_combine(self.reward, self.combine)
        if self.benchmark == "implicit" and self.best_of is not None:
            raise ValueError("benchmark implicit generates no images to choose from; leave best_of out")
        if self.benchmark == "scenes" and isinstance(self.prompts, str):
            raise ValueError(f"benchmark scenes uses its own prompts; expected their number, got {self.prompts!r}")
        return self


class EvaluateSteps(Evaluate):
    """Settings of a step judge's accuracy on the validation split, at several timesteps."""

    benchmark: Literal["steps"] = Field("steps", description="accuracy on noisy images")
    times: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 251, 501, 701, 951], min_length=1, description="timesteps of the noise, of 1000"
    )


class EvaluateJudge(Evaluate):
    """Settings of the audit of a judge of images on the validation split."""

    benchmark: Literal["judge"] = Field("judge", description="accuracy, calibration and audit of the judge")
    reward: Rewards | None = Field(
        None, description="another judge, or a list of several, whose verdicts are compared with the judge's"
    )
    bins: int = Field(10, ge=1, le=100, description="bins of the judge's confidence, between 1/2 and 1")

    @model_validator(mode="after")
    def _draws_nothing(self) -> EvaluateJudge:
        if self.seed:
            raise ValueError(f"seed: {self.seed} means nothing here: an audit draws no random numbers; leave it out")
        return self


class DecodingConfig(Section):
    """Settings of text decoding."""

    max_new_tokens: int = Field(128, ge=1, description="maximum number of generated tokens")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily")
    batch_size: int = Field(16, ge=1, description="texts generated at a time")


class Coco(Section):
    """MSCOCO's own annotations: an object is in an image if it has a mask there, or a human caption names it."""

    instances: list[str] = Field(min_length=1, description="instances_train2014.json, instances_val2014.json")
    captions: list[str] = Field([], description="captions_train2014.json, captions_val2014.json")


class AnswerFiles(Section):
    """Files of existing answers, which are scored without a model."""

    before: Files | None = Field(None, description="answers of the base model; if missing, only `after` is scored")
    after: Files = Field(description="answers of the aligned model; for pope, one file per split")


class EvaluateResponses(Evaluate):
    """Settings of the comparison of vision-language models."""

    benchmark: Literal["crowds", "pope", "chair", "object_halbench", "amber", "implicit"] = Field(
        description="bundled world (crowds), published benchmark, or accuracy of the implicit reward on the validation "
        "split"
    )
    num_images: int = Field(256, ge=2, description="crowds: number of bundled held-out images")
    split: Literal["validation", "test"] = Field("test", description="crowds: split of the bundled images")
    questions: Files | None = Field(
        None,
        description="records with image and question, or Parquet files that hold the images too; for pope one file, or "
        "one per split, such as {random: a.json}",
    )
    labels: Files | None = Field(
        None, description="pope: files of the release, for questions without labels, such as llava_pope_test.jsonl"
    )
    suffix: str | None = Field(
        None,
        description="pope, amber: text below every yes/no question, such as 'Answer the question using a single word "
        "or phrase.'",
    )
    annotations: str | Coco | None = Field(
        None,
        description="objects of the images: records with image and objects, or MSCOCO's files; for amber its folder",
    )
    images: str | None = Field(None, description="folder of the images")
    prompt: str = Field("Describe this image.", description="prompt for questions without text")
    vocabulary: str = Field(
        "refined", description="refined or published (MSCOCO), crowds, or a JSON file {object: [synonyms]}"
    )
    parse: Literal["auto", "published", "strict"] = Field(
        "auto",
        description="pope, amber: parser of yes and no: the release's (published; auto for pope), or one to which a "
        "hedge, a refusal or another unclear answer is neither (strict; auto for amber)",
    )
    answers: AnswerFiles | None = None
    reward: Rewards | None = Field(None, description="judge of responses for a win rate, or a list of several")
    combine: Combine = "sum"
    best_of: BestOfAnswers | None = Field(None, description="best of n answers of the base model, measured alike")
    decoding: DecodingConfig = DecodingConfig()
    cache: str = Field("auto", description="folder for generated answers, or auto (in the output)")

    @model_validator(mode="after")
    def _fits(self) -> EvaluateResponses:
        # Options that the benchmark does not read
        takes = {"benchmark", "seed", *_TAKES[self.benchmark]}
        for name in self.model_dump(exclude=takes, exclude_defaults=True):
            raise ValueError(
                f"benchmark {self.benchmark} takes no {name!r} but {', '.join(sorted(takes))}; leave it out"
            )
        check_combine(self.reward, self.combine)
        if self.answers is not None and (self.reward is not None or self.best_of is not None):
            raise ValueError("answers are scored without a model; leave reward and best_of out, or answers")
        # Files that it needs, in the form that it reads
        if self.benchmark in ("chair", "object_halbench", "amber") and self.annotations is None:
            raise ValueError(f"benchmark {self.benchmark} needs the objects of the images; add annotations")
        if self.benchmark == "pope" and self.questions is None and self.annotations is None:
            raise ValueError("benchmark pope needs questions, or annotations to generate them from; add one of the two")
        if self.benchmark == "amber" and not isinstance(self.annotations, str):
            raise ValueError(
                "benchmark amber reads its annotations from its folder 'data'; set annotations to that folder"
            )
        if self.benchmark == "pope" and isinstance(self.annotations, Coco):
            raise ValueError(
                "benchmark pope generates questions from records with image and objects, not from MSCOCO's files"
            )
        if self.benchmark != "pope" and isinstance(self.questions, dict):
            raise ValueError(f"benchmark {self.benchmark} has no splits; expected one file of questions")
        if self.benchmark == "pope" and self.labels is not None and self.questions is None:
            raise ValueError("labels: expected with questions; questions from annotations have labels")
        # Questions that are not in JSON are in Parquet files, which may hold the images
        named = [self.questions] if isinstance(self.questions, str) else list((self.questions or {}).values())
        in_files = bool(named) and all(not name.endswith((".json", ".jsonl")) for name in named)
        if "images" in takes and self.images is None and self.answers is None and not in_files:
            raise ValueError("images: expected the folder of the images, Parquet questions with images, or answers")
        return self


# Settings of each benchmark of responses besides its name and a seed.
_JUDGED = ("reward", "combine", "best_of", "decoding", "cache")
_ASKED = ("annotations", "images", "answers", *_JUDGED)
_TAKES: dict[str, tuple[str, ...]] = {
    "crowds": ("num_images", "split", *_JUDGED),
    "pope": (*_ASKED, "questions", "labels", "suffix", "parse"),
    "chair": (*_ASKED, "questions", "prompt", "vocabulary"),
    "object_halbench": (*_ASKED, "questions", "prompt", "vocabulary"),
    "amber": (*_ASKED, "suffix", "parse"),
    "implicit": (),
}


class Gallery(Section):
    """Settings of the gallery page."""

    images: int = Field(96, ge=1, description="number of image pairs on the page")
    title: str | None = Field(None, description="heading of the page; the run's model and method by default")
