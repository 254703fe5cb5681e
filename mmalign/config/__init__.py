"""Sections of a recipe, with the types, limits and defaults of their YAML keys."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from mmalign.config.base import ImageSize, MethodConfig, Section
from mmalign.config.evaluation import (
    Coco,
    DecodingConfig,
    Evaluate,
    EvaluateImages,
    EvaluateJudge,
    EvaluateResponses,
    EvaluateSteps,
    Files,
    Gallery,
    RewardConfig,
    Rewards,
    SamplingConfig,
)
from mmalign.config.preparation import (
    BdhsConfig,
    CompletionConfig,
    Prepare,
    PrepareBdhs,
    PrepareImages,
    PrepareJudged,
    PreparePovid,
    PrepareRealign,
    PrepareResponses,
)
from mmalign.config.training import (
    Data,
    ImageData,
    ImageJudgeModel,
    ImageModel,
    JudgeModel,
    Limits,
    Lora,
    Model,
    ResponseData,
    ResponseModel,
    Train,
)

__all__ = [
    "SECTIONS",
    "BdhsConfig",
    "Coco",
    "CompletionConfig",
    "Data",
    "DecodingConfig",
    "Evaluate",
    "EvaluateImages",
    "EvaluateJudge",
    "EvaluateResponses",
    "EvaluateSteps",
    "Files",
    "ImageData",
    "ImageJudgeModel",
    "ImageModel",
    "ImageSize",
    "JudgeModel",
    "Lora",
    "MethodConfig",
    "Model",
    "PrepareBdhs",
    "PrepareImages",
    "PrepareJudged",
    "PreparePovid",
    "PrepareRealign",
    "PrepareResponses",
    "Recipe",
    "ResponseData",
    "ResponseModel",
    "RewardConfig",
    "Rewards",
    "SamplingConfig",
    "Section",
    "Train",
]


class Recipe(Section):
    """Complete recipe; the classes of its sections depend on `method.name`."""

    method: MethodConfig
    model: Model
    data: Data
    train: Train
    limits: Limits = Limits()
    evaluate: Evaluate | None = None
    gallery: Gallery = Gallery()
    prepare: Prepare | None = None
    allow_pickle: bool = Field(
        False,
        description="read weights from pickles too (.bin, .pt, .pth, .ckpt), of every model that the recipe names; "
        "docs/trust.md",
    )
    output: str = Field(description="folder for all outputs")


class Sections(NamedTuple):
    """Classes of the sections that depend on the method's modality."""

    model: type[Model]
    data: type[Data]
    evaluate: type[Evaluate]
    prepare: type[Prepare]


SECTIONS: dict[str, Sections] = {
    "text_to_image": Sections(ImageModel, ImageData, EvaluateImages, PrepareImages),
    "step_judge": Sections(JudgeModel, ImageData, EvaluateSteps, Prepare),
    "image_judge": Sections(ImageJudgeModel, ImageData, EvaluateJudge, Prepare),
    "vision_language": Sections(ResponseModel, ResponseData, EvaluateResponses, PrepareResponses),
}
