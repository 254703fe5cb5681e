"""Hyper-parameters of all methods, by name; reading them imports no torch."""

from __future__ import annotations

from mmalign.config.base import MethodConfig
from mmalign.config.methods.kinds import ThumbsMethodConfig
from mmalign.config.methods.online_images import (
    AWMConfig,
    CRDConfig,
    DGPOConfig,
    DiffusionOnlineDPOConfig,
    FlowGRPOConfig,
    NFTConfig,
)
from mmalign.config.methods.online_responses import GRPOConfig, OnlineDPOConfig, RAFTConfig
from mmalign.config.methods.text_to_image import (
    BradleyTerryConfig,
    CCAConfig,
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    ImageListConfig,
    InPOConfig,
    InstructEngineConfig,
    MaPOConfig,
    SFTConfig,
    SPOConfig,
    StepPreferenceConfig,
)
from mmalign.config.methods.vision_language import (
    BDHSMethodConfig,
    DPOConfig,
    KTOConfig,
    LiPOConfig,
    MDPOConfig,
    POVIDConfig,
    ReAlignConfig,
    ResponseSFTConfig,
    RLHFVConfig,
)
from mmalign.registry import check_known, import_class, is_outside

# The methods of each modality.
METHODS: dict[str, tuple[type[MethodConfig], ...]] = {
    "text_to_image": (
        AWMConfig,
        CCAConfig,
        CRDConfig,
        DGPOConfig,
        DiffusionDPOConfig,
        DiffusionKTOConfig,
        DiffusionOnlineDPOConfig,
        FlowGRPOConfig,
        ImageListConfig,
        InPOConfig,
        InstructEngineConfig,
        MaPOConfig,
        NFTConfig,
        SFTConfig,
        SPOConfig,
    ),
    "step_judge": (StepPreferenceConfig,),
    "image_judge": (BradleyTerryConfig,),
    "vision_language": (
        BDHSMethodConfig,
        DPOConfig,
        GRPOConfig,
        KTOConfig,
        LiPOConfig,
        MDPOConfig,
        OnlineDPOConfig,
        POVIDConfig,
        RAFTConfig,
        ReAlignConfig,
        ResponseSFTConfig,
        RLHFVConfig,
    ),
}
_BY_NAME = {
    config.model_fields["name"].default: (modality, config)
    for modality, configs in METHODS.items()
    for config in configs
}


def find_method(name: str) -> tuple[str, type[MethodConfig]]:
    """Return the modality and the configuration class of the method called `name`, or "module:Class" from outside.

    Raises:
        ValueError: no method has that name, or the class from outside is no configuration of a method.
    """
    if is_outside(name):
        config = import_class("method.name", name, MethodConfig)
        check_known(f"method.name: {name} has the modality", config.modality, METHODS)
        return config.modality, config
    check_known("method.name: there is no method", name, _BY_NAME)
    return _BY_NAME[name]


def learns_from_thumbs(name: str) -> bool:
    """Return whether the method called `name` learns from single outputs with labels.

    Raises:
        ValueError: no method has that name.
    """
    return issubclass(find_method(name)[1], ThumbsMethodConfig)
