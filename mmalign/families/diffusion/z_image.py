"""Z-Image: the states of a Qwen3, and a transformer of one stream; flow matching, with the time the other way round.

The network's time is 1 - t, and its answer is the velocity towards the image: the negative of everyone else's. Prompts
have as many states as tokens, and are padded with a mask as in Qwen-Image; the network takes them one by one, without.

The pipeline's guidance is what is added to a prediction with the prompt, 0 for none. Here it is the scale that all
families have, 1 for none: one more than the pipeline's (Z-Image-Turbo is drawn at 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading

RESOLUTION = 1024  # the pipeline has no other place for it
TOKENS = 512  # of the conversation with the prompt in it, as the pipeline has it


class ZImage(LatentModel):
    """Adapts a ZImagePipeline; the protocol TextToImage says what each call does."""

    @property
    def resolution(self) -> int:
        """Pixels."""
        return RESOLUTION

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` [N, L, D]: the penultimate states; `mask` [N, L]: 1 where there are some; float32."""
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return flow_matching.padded(rows, TOKENS)

    def unconditional(self) -> Conditioning:
        """The empty prompt, encoded."""
        return self.encode_prompts([""])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See TextToImage."""
        tokenizer = self.pipeline.tokenizer
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return latents.count_truncated(tokenizer, whole, TOKENS)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See TextToImage."""
        images = list(x_t.unsqueeze(2).unbind())  # each a video of one frame
        with self.loading.autocast():
            answers = net(images, 1 - t, flow_matching.texts(cond), return_dict=False)[0]
        return -torch.stack(answers).squeeze(2)

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """See LatentModel."""
        text: dict[str, object] = {"prompt_embeds": flow_matching.texts(self.encode_prompts(prompts))}
        text |= {"guidance_scale": sampling.guidance - 1}
        if sampling.guidance > 1:
            text |= {"negative_prompt_embeds": flow_matching.texts(self.unconditional()) * len(prompts)}
        return text


def load(path: str, loading: Loading) -> ZImage:
    """Load a folder or Hub id with a ZImagePipeline."""
    from diffusers import ZImagePipeline

    pipeline = latents.load_pipeline(ZImagePipeline, path, loading)
    return ZImage(path, pipeline, flow_matching.schedule(pipeline, path, RESOLUTION), loading)
