"""Settings of the model, the data and the training."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmalign.config.base import Resolution, ResponseFormat, Section

# YAML reads a bare `off` as false.
_OFF = BeforeValidator(lambda value: "off" if value is False else value)


class Lora(Section):
    """Settings of low-rank adapters."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: float | None = Field(None, gt=0, description="adapter scale times rank; default: rank")
    targets: list[str] | Literal["all-linear"] | None = Field(
        None,
        description="suffixes of the layers to adapt, or all-linear for every linear layer of the trained network; in "
        "vision-language models also decoder, vision_tower, projector, or a layer of them, as vision_tower.q_proj; "
        "default: a diffusion model's attention projections, or all linear layers of a vision-language model's decoder",
    )
    rank_stabilized: bool = Field(
        False, description="scale adapters by alpha over the root of the rank, not over the rank (arXiv:2312.03732)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the adapters' inputs; the reference and all measurements have none"
    )

    dora: bool = Field(
        False, description="also train the norm of each row of the adapted weights (DoRA, arXiv:2402.09353)"
    )

    @property
    def scaled_alpha(self) -> float:
        """Alpha that gives the scale of the adapters after division by the rank."""
        return (self.alpha or self.rank) * (math.sqrt(self.rank) if self.rank_stabilized else 1.0)


class Adapter(Section):
    """Settings of an existing adapter to start from."""

    path: str = Field(
        description="file or folder of diffusers, kohya, ComfyUI or peft, such as `model` of a run; or a Hub id"
    )
    use: Literal["continue", "merge"] = Field(
        "continue",
        description="continue trains it further, with the bare model as the reference; merge adds it to the weights of "
        "policy and reference",
    )


Adapting = Annotated[Literal["lora", "full"], Field(description="low-rank adapters, or all weights of the network")]


class Model(Section):
    """Settings of the model to align."""

    path: str = Field(description="model of diffusers or transformers: a folder or a Hub id")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub; default: main")
    variant: str | None = Field(
        None, description="variant of the weight files, such as fp16 for model.fp16.safetensors"
    )
    family: str | None = Field(
        None, description="family from outside, as module:function (docs/extending.md); default: by the checkpoint"
    )
    tune: Literal["lora", "full", "annotators"] = Field(
        "lora", description="low-rank adapters, or all weights of the network"
    )
    lora: Lora = Lora()
    quantize: Literal["int8", "nf4", "fp8"] | None = Field(
        None, description="weights of the frozen base under adapters, in 8 or 4 bits (docs/one_gpu.md); default: none"
    )
    adapter: Adapter | None = None

    @property
    def configurations(self) -> tuple[str, str]:
        """Key and name of the folder or Hub id with the configurations of the model's parts."""
        return "path", self.path

    @model_validator(mode="after")
    def _fits_its_adapter(self) -> Model:
        if self.adapter is not None and self.adapter.use == "continue":
            if self.tune != "lora":
                raise ValueError("adapter.use: continue trains an adapter, got tune full; use merge, or tune: lora")
            if self.lora != Lora():
                raise ValueError("lora: the adapter to continue has its own rank, alpha and layers; leave lora out")
        if self.quantize is not None and self.tune == "full":
            raise ValueError(
                f"quantize: {self.quantize} holds weights that no update can change, and tune: full changes all; use "
                "tune: lora, or leave quantize out"
            )
        if self.quantize is not None and self.adapter is not None and self.adapter.use == "merge":
            raise ValueError(f"adapter.use: merge changes weights that quantize: {self.quantize} holds; use continue")
        return self


class ImageModel(Model):
    """Settings of a text-to-image model."""

    path: str = Field(description="diffusers pipeline: a folder, a Hub id, or a single file of weights")
    tune: Adapting = "lora"
    config: str | None = Field(
        None, description="for a single file, a folder or Hub id of a pipeline with the same layout"
    )
    vae: str | None = Field(None, description="replacement autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="precision of the autoencoder")
    offload: bool = Field(
        False,
        description="keep networks on the CPU while a stage does not use them: encoding, generating or decoding images "
        "(docs/one_gpu.md)",
    )

    @property
    def configurations(self) -> tuple[str, str]:
        """Key and name of the pipeline with the configurations, which for a single file is another one."""
        return ("path", self.path) if self.config is None else ("config", self.config)


class ResponseModel(Model):
    """Settings of a vision-language model."""

    tune: Adapting = "lora"
    template_arguments: dict[str, bool | int | float | str] = Field(
        {}, description="variables of the model's chat template, such as {enable_thinking: false}"
    )


class JudgeModel(Model):
    """Settings of a step judge, a reward model of noisy images, and of the frozen model that generates them."""

    path: str = Field(description="CLIP to start from, or a step judge: a folder or a Hub id")
    denoiser: str = Field(description="frozen diffusers pipeline: a folder or a Hub id")
    tune: Literal["full"] = Field("full", description="all weights of the judge")
    vae: str | None = Field(None, description="replacement autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="precision of the autoencoder")

    @model_validator(mode="after")
    def _takes(self) -> JudgeModel:
        if self.lora != Lora():
            raise ValueError("lora does not apply to a step judge, whose weights are all trained; leave it out")
        if self.family is not None:
            raise ValueError(f"family: {self.family!r} does not apply to a step judge; leave it out")
        for name, value in (("revision", self.revision), ("variant", self.variant), ("adapter", self.adapter)):
            if value is not None:
                raise ValueError(
                    f"{name}: {value!r} is ambiguous between the two models, path and denoiser; leave it out, and "
                    "give a local folder"
                )
        return self


class AnnotatorsConfig(Section):
    """Tastes of annotators as mixtures of a few prototypes that all share (PAL, arXiv:2406.08469)."""

    prototypes: int = Field(2, ge=1, description="prototypes that annotators mix; one gives all of them one judge")
    form: Literal["angle", "distance"] = Field(
        "angle",
        description="angle: cosine of the image and the annotator's map of the prompt (PAL's model B); distance: minus "
        "the distance to the annotator's point (model A)",
    )
    names: list[str] = Field(
        [], description="annotators with shares of their own; all others have their mean; default: all of the data"
    )


class ImageJudgeModel(Model):
    """Settings of a judge of images: a CLIP to start from."""

    path: str = Field(description="CLIP of open_clip or transformers to start from: a folder or a Hub id")
    tune: Literal["lora", "full", "annotators"] = Field(
        "full",
        description="low-rank adapters, or all weights of both towers; annotators adds people to a judge trained with "
        "`annotators`, and trains their shares alone",
    )
    head: Literal["linear"] | None = Field(
        None,
        description="linear trains the last linear layer of both towers and the scale alone, on features that are "
        "computed once",
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random starts anew, with a network of the shape of `path`"
    )
    attributes: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        {},
        description="columns with a list of the images' ratings, and their lowest and highest value; each has a head",
    )
    annotators: AnnotatorsConfig | None = Field(
        None,
        description="learn the taste of each annotator of the data (PAL); {} takes the defaults; default: one judge",
    )

    @model_validator(mode="after")
    def _takes(self) -> ImageJudgeModel:
        given = list(self.model_dump(include={"head", "weights", "attributes", "lora"}, exclude_defaults=True))
        if self.tune == "annotators" and given:
            raise ValueError(
                f"{given[0]}: tune: annotators keeps all that the judge has, and trains the shares of new annotators "
                f"alone; leave {given[0]} out"
            )
        if self.head is not None and (self.tune, self.weights) != ("full", "pretrained"):
            raise ValueError(
                "head: linear trains the last layers of pretrained towers; leave out head, or tune and weights"
            )
        for name, (low, high) in self.attributes.items():
            if not low < high:
                raise ValueError(
                    f"attributes.{name}: got {low:g} and {high:g}; expected the lowest rating, then the highest"
                )
        others = {"revision", "variant", "family", "quantize", "adapter"}
        for name, value in self.model_dump(include=others, exclude_none=True).items():
            raise ValueError(f"{name}: {value!r} does not apply to a judge of images; leave it out")
        return self


class Data(Section):
    """Settings of the preference pairs of any modality."""

    path: str = Field(description="file, folder, glob or Hub id; owner/name:configuration names its configuration")
    images: str | None = Field(None, description="folder of the images' paths; default: the file's folder")
    split: str | None = Field(None, description="split of a Hub data set (default: train) or of a folder's files")
    columns: dict[str, str] = Field({}, description="mmalign's column name: the table's")
    group_by: str | None = Field(
        None,
        description="column whose equal values stay in one split; default: the prompt of image pairs, the image files "
        "of response pairs",
    )
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of the groups in the validation split")
    limit: int | None = Field(None, ge=1, description="use the first pairs only")
    cut_pairs: bool = Field(
        False,
        description="for methods that learn from single outputs with labels: make them of pairs; of more outputs the "
        "best is liked and the worst disliked",
    )
    max_bad: int | None = Field(None, ge=0, description="stop if more rows and images are bad")
    margin: Literal["column", "score", "log_score"] = Field(
        "column",
        description="margin of a pair's logit: the column margin, or the chosen score minus the rejected one, or its "
        "logarithm, times margin_scale",
    )
    margin_scale: float = Field(1.0, description="factor of margins from scores")
    num_workers: int = Field(0, ge=0, description="processes that read images; 0 reads in the training process")
    cache: Annotated[str, _OFF] = Field(
        "auto",
        description="cache of latents, text embeddings, image features and reference scores: auto (in the output), "
        "off, or a folder",
    )

    @model_validator(mode="after")
    def _scales_scores_alone(self) -> Data:
        if self.margin == "column" and self.margin_scale != 1:
            raise ValueError(
                f"margin_scale: {self.margin_scale} scales margins from scores, and margin: column takes them as they "
                "are; set margin: score or log_score, or leave margin_scale out"
            )
        return self


class ImageData(Data):
    """Settings of image pairs, or of a text file with one prompt a line for methods that generate their images."""

    format: Literal["auto", "pick_a_pic", "folder", "rankings", "votes", "scores", "thumbs", "prompts"] = Field(
        "auto", description="layout of the rows, recognized by their columns; docs/your_data.md shows each"
    )
    resolution: Resolution = Field(
        None, description="pixels of an image: a side, or WIDTHxHEIGHT; default: the model's"
    )
    fit: Literal["crop", "pad", "buckets"] = Field(
        "crop",
        description="crop images to the resolution, pad them with white, or crop each pair to the bucket of the "
        "resolution's area that cuts the least (docs/your_data.md)",
    )
    crop: Literal["center", "random"] = Field("center", description="place of the part that is cut out of an image")
    flip: bool = Field(False, description="mirror half of the pairs, both images of a pair together")

    @property
    def has_prompts_only(self) -> bool:
        """True for a text file with one prompt a line."""
        return self.format == "prompts" or (self.format == "auto" and self.path.endswith(".txt"))


class ResponseData(Data):
    """Settings of pairs of a vision-language model's responses."""

    format: ResponseFormat = Field(
        "auto", description="layout of the rows; docs/your_data.md shows each, and auto recognizes it by the columns"
    )
    max_length: int | None = Field(
        None, ge=2, description="maximum tokens of prompt, images and response together; default: the model's"
    )


class Limits(Section):
    """Limits of a run, after which it saves its state and stops; the same command resumes it."""

    hours: float | None = Field(None, gt=0, description="hours of training, from the first update of this command on")
    rank_timeout: float = Field(
        30.0, gt=0, description="minutes after which the others stop waiting for a process that does not answer"
    )


class GuardConfig(Section):
    """Guard against bad updates; a loss or gradient that is not finite is always bad."""

    action: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="stop with an error, skip the update, or go back to the last checkpoint and on with the next batch",
    )
    max_loss: float | None = Field(None, description="largest mean loss of a good update")
    max_grad_norm_ratio: float | None = Field(
        None, gt=1, description="largest gradient norm of a good update, relative to its moving mean"
    )


class Train(Section):
    """Settings of the optimization."""

    steps: int = Field(ge=1, description="updates of the weights")
    batch_size: int = Field(1, ge=1, description="pairs per micro-batch and device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per update")
    lr: float = Field(gt=0, description="learning rate after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up: constant, or falling to 0"
    )
    warmup_steps: int = Field(0, ge=0, description="updates in which the learning rate rises from 0")
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw", description="adamw_8bit needs bitsandbytes and a GPU; adafactor has the smallest state"
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="decay of AdamW's two moments"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are clipped to this norm")
    guard: GuardConfig = GuardConfig()
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the computation; trained weights are always float32"
    )
    attention: Literal["auto", "xformers", "sdpa"] = Field(
        "auto", description="attention backend; auto uses xformers if supported, else PyTorch (sdpa)"
    )
    pack_responses: Annotated[Literal["auto", "off"], _OFF] = Field(
        "auto", description="auto runs a prompt and its images once for all responses, if the model supports it"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    compile: bool = Field(
        False,
        description="compile the network's blocks with torch.compile; slower first updates, gain depends on the device "
        "(docs/performance.md)",
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="fsdp2 splits policy, reference and optimizer over the processes of the launch (docs/clusters.md)",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the weights, which is saved in their place",
    )
    seed: int = Field(0, ge=0, description="seed of order, split, noise and new adapters")
    log_every: int = Field(10, ge=1, description="updates between two log lines, each a mean over them")
    save_every: int = Field(500, ge=1, description="updates between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of recent checkpoints to keep besides the best")
    sample_every: int | None = Field(
        None,
        ge=1,
        description="updates between two looks at outputs of base and policy, in samples.html and the trackers "
        "(docs/outputs.md); default: none",
    )
    samples: Annotated[int, Field(ge=1)] | str = Field(
        4,
        description="number of prompts of the validation pairs, or else of the training pairs; for images also a text "
        "file with one a line, or a table of prompt and source",
    )
    trackers: list[str] = Field(["tensorboard"], description="accelerate's trackers, by name")
