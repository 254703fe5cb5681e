"""Settings of the model, the data and the training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmalign.config.base import Section

# YAML reads a bare `off` as false.
_OFF = BeforeValidator(lambda value: "off" if value is False else value)


class Lora(Section):
    """Settings of low-rank adapters."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0, description="the adapter's scale is alpha / rank; the rank if not given")
    targets: list[str] | None = Field(
        None,
        description="the ends of the names of the layers to adapt; if not given, the attention's projections of a "
        "diffusion model, and all linear layers of a vision-language model's decoder",
    )


class Model(Section):
    """Settings of the model to align."""

    path: str = Field(description="a model of diffusers or transformers: a folder or a Hub id")
    revision: str | None = None
    tune: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()


class ImageModel(Model):
    """Settings of a text-to-image model."""

    path: str = Field(description="a diffusers pipeline: a folder or a Hub id")
    vae: str | None = Field(None, description="another autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class JudgeModel(Model):
    """Settings of a step judge, a reward model of noisy images, and of the frozen model that generates them."""

    path: str = Field(description="a CLIP, as which it begins, or a step-aware judge: a folder or a Hub id")
    denoiser: str = Field(description="a diffusers pipeline, which stays frozen: a folder or a Hub id")
    tune: Literal["full"] = "full"
    vae: str | None = Field(None, description="another autoencoder, such as madebyollin/sdxl-vae-fp16-fix")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _takes(self) -> JudgeModel:
        if self.lora != Lora():
            raise ValueError(
                "lora means nothing to a judge that learns to know noisy images, which is trained whole; leave it out"
            )
        if self.revision is not None:
            raise ValueError(
                f"revision: {self.revision!r} would be of either of two models, path and denoiser; leave it out, and "
                "name a folder where you mean another revision than a model's last"
            )
        return self


class Data(Section):
    """Settings of the preference pairs of any modality."""

    path: str = Field(description="a file, a folder, or a Hub id")
    split: str | None = None
    columns: dict[str, str] = Field({}, description="our column name: yours")
    group_by: str | None = Field(
        None,
        description="the column whose values a hold-out keeps together; if not given, the prompt of pairs of images, "
        "and the images of pairs of responses, where these are files",
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the groups kept from training, for evaluation"
    )
    limit: int | None = Field(None, ge=1)
    max_bad_images: int | None = Field(None, ge=0, description="stop if more images than this cannot be read")
    num_workers: int = Field(0, ge=0)
    cache: Annotated[str, _OFF] = Field(
        "auto",
        description="where latents and text, or images' features and what the reference scores of responses, are kept: "
        "auto (in the output), off, or a folder",
    )


class ImageData(Data):
    """Settings of image pairs, or of a text file with one prompt a line for methods that generate their images."""

    format: Literal["pick_a_pic", "folder", "rankings", "prompts"] = "pick_a_pic"
    resolution: int | None = Field(None, ge=8, description="pixels; the model's own if not given")
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(False, description="mirror half of the pairs, both images of a pair alike")


class ResponseData(Data):
    """Settings of pairs of a vision-language model's responses."""

    format: Literal["trl", "povid", "realign", "mdpo", "rlhfv", "swift"] = "trl"
    images: str | None = Field(None, description="the folder that images' paths begin in; beside the file if not given")
    max_length: int | None = Field(
        None, ge=2, description="tokens of prompt, images and response in all; as many as the model reads if not given"
    )


class Train(Section):
    """Settings of the optimization."""

    steps: int = Field(ge=1)
    batch_size: int = Field(1, ge=1, description="pairs at a time on each device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of an update")
    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="updates")
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="the largest norm of the gradient")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "xformers", "sdpa"] = Field(
        "auto", description="who computes attention; auto is xformers where it can serve, and else PyTorch (sdpa)"
    )
    pack_responses: Annotated[Literal["auto", "off"], _OFF] = Field(
        "auto", description="responses to one prompt and its images share one run of these, where the model can; or not"
    )
    gradient_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass, instead of kept"
    )
    compile: bool = Field(
        False,
        description="torch.compile of the blocks that the network is made of; the first updates take longer, and what "
        "it gains depends on the device (docs/performance.md: on a CPU nothing sure)",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which is then what is saved"
    )
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept besides the best")
    trackers: list[str] = Field(["tensorboard"], description="names of accelerate's trackers")
