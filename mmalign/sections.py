"""The sections of a recipe: what may stand in its YAML file, with types, limits and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    """Pairs of images for a text-to-image model."""

    format: Literal["pick_a_pic", "folder", "rankings"] = "pick_a_pic"
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

    benchmark: Literal["scenes", "preference", "implicit"] = "preference"
    prompts: int | str = Field(
        256, description="a number of the bundled world's prompts, or a file with one prompt a line"
    )
    split: Literal["validation", "test"] = Field("test", description="of the bundled world's prompts")
    seed: int = Field(0, ge=0)
    drawing: Drawing = Drawing()
    judge: JudgeConfig | None = None
    draws: int = Field(10, ge=1, description="implicit: (t, noise) draws a pair")

    @model_validator(mode="after")
    def _judged(self) -> Evaluate:
        if self.benchmark == "preference" and self.judge is None:
            raise ValueError("benchmark preference needs a judge; add evaluate.judge.path")
        if self.benchmark == "scenes" and isinstance(self.prompts, str):
            raise ValueError(f"benchmark scenes makes its own prompts; expected their number, got {self.prompts!r}")
        return self


class Gallery(Section):
    """The pictures that are shown."""

    images: int = Field(96, ge=1, description="pairs of pictures on the page")
    title: str = "Before and after"


class Prepare(Section):
    """Preference pairs drawn from the model itself and judged: several images a prompt, best against worst."""

    prompts: int | str = Field(
        450, description="a number of the bundled world's training prompts, or a file with one prompt a line"
    )
    images: int = Field(4, ge=2, description="drawn for every prompt")
    judge: JudgeConfig
    sure: float = Field(
        0.9, ge=0.5, lt=1, description="keep a pair if the judge prefers the best to the worst at least this surely"
    )
    seed: int = Field(1, ge=0)
    drawing: Drawing = Drawing()


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


# What a recipe says of the model and of the data, by what its method compares.
SECTIONS: dict[str, tuple[type[Model], type[Data]]] = {
    "text_to_image": (ImageModel, ImageData),
    "vision_language": (Model, ResponseData),
}
