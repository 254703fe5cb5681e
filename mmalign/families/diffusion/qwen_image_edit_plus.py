"""Qwen-Image-Edit-Plus (2509 and later): a Qwen-Image-Edit whose text encoder sees a smaller source.

The pipeline takes several sources; mmalign trains and samples with one.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion.qwen_image_edit import QwenImageEdit
from mmalign.families.types import Loading


class QwenImageEditPlus(QwenImageEdit):
    """Adapter of a QwenImageEditPlusPipeline, with one source image."""

    def _encode(self, prompt: str, image: Image.Image) -> tuple[Tensor, Tensor | None]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, image.width / image.height)
        return super()._encode(prompt, self.pipeline.image_processor.resize(image, height, width))

    def _templated(self, prompt: str) -> str:
        return super()._templated(f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{prompt}")


def load(path: str, loading: Loading) -> QwenImageEditPlus:
    """Load a folder or Hub id with a QwenImageEditPlusPipeline."""
    from diffusers import QwenImageEditPlusPipeline

    return flow_matching.load(QwenImageEditPlus, QwenImageEditPlusPipeline, path, loading)
