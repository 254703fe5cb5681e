"""Step-aware reward model for noisy images: a CLIP with a vision tower conditioned on the timestep (arXiv:2406.04314).

SPO compares images that are predicted from x_t. Their blur and errors depend on t, and a reward model of clean images
has never seen them. Here the timestep modulates every block of the vision tower, as in a DiT (arXiv:2212.09748):

    c = SiLU(MLP(sinusoid(t)))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(c)          one Linear per block
    h = h + gate_1 * attention(norm_1(h) * (1 + scale_1) + shift_1)
    h = h + gate_2 * mlp(norm_2(h) * (1 + scale_2) + shift_2)
    image = projection(norm_post(h[class token]) * (1 + scale) + shift)     shift, scale = Linear(c)

The Linears are initialized to 0, except the gates' biases, which are 1. The initial scores are therefore those of the
original CLIP at every t. (The release's constructor sets every bias to 1; its checkpoints override that.) The text
tower is unchanged. A clean image has t = 0.

The folder of a step-aware reward model has open_clip's config and tokenizer, and all weights in
`step_aware.safetensors`. The files that SPO's authors published are loaded with the option `weights`.

Shapes: N images, L tokens of a prompt, side S of an image, width E of the embedding and D of the vision tower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mmalign.rewards import BatchConfig, _clip_files, _spo_release, check_files, in_batches, readable, transformers_clip
from mmalign.rewards._clip_files import CONFIG
from mmalign.rewards._weights import find_optional
from mmalign.rewards.open_clip import ClipParts, TextFeatures, unit_vectors

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock

check = check_files
WEIGHTS = "step_aware.safetensors"
FREQUENCIES = 256  # width of the sinusoid
STD = 0.02  # of the time MLP's initial weights, as in the release


class Config(BatchConfig):
    """Options of the reward model."""

    weights: str | None = None
    """File of a judge as SPO's authors published them, in the folder or Hub repository `path`; default: a folder as
    mmalign writes it."""
    clip: str = "yuvalkirstain/PickScore_v1"
    """With `weights`: the CLIPModel that the published judge was trained from. Its own weights are not read."""
    preprocessing: Literal["folder", "release"] | None = None
    """Resizing of images: as the folder's or CLIP's config says, or without antialiasing as in the release; default:
    release with `weights`, else folder."""


class TimeConditioned(nn.Module):
    """open_clip model with a vision tower conditioned on the timestep; its initial scores are the original model's.

    Attributes:
        clip: the original model; its weights are trained with the rest.
        checkpointing: True to recompute the blocks' activations in the backward pass (gradient checkpointing).

    Raises:
        ValueError: the vision tower is not a plain vision transformer with a class token.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        tower = clip.visual
        # Only plain blocks with a class token have a place for shifts, scales and gates
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
        plain = blocks and all(type(block).__name__ == "ResidualAttentionBlock" for block in blocks)
        if not plain or tower.attn_pool is not None or tower.pool_type != "tok" or not hasattr(clip, "encode_text"):
            raise ValueError(
                f"a {type(tower).__name__} has no input for the timestep; expected open_clip's plain vision "
                "transformer with a class token, such as ViT-H-14's"
            )
        width = tower.transformer.width
        self.clip = clip
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(nn.Linear(width, 6 * width) for _ in blocks)
        self.final = nn.Linear(width, 2 * width)
        self.checkpointing = False
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        generator = torch.Generator().manual_seed(0)  # the same initial weights every time
        for linear in (self.time[0], self.time[2]):
            assert isinstance(linear, nn.Linear)
            linear.weight.normal_(std=STD, generator=generator)
            linear.bias.zero_()
        # Shifts and scales of 0 and gates of 1 leave the CLIP's scores as they are
        for linear in (*self.blocks, self.final):
            assert isinstance(linear, nn.Linear)
            linear.weight.zero_()
            linear.bias.zero_()
        for block in self.blocks:
            _, _, gate_1, _, _, gate_2 = block.bias.chunk(6)  # type: ignore[operator]
            gate_1.fill_(1)
            gate_2.fill_(1)

    def forward(self, pixels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        """Return scores [N], float32, of images [N, 3, S, S] at timesteps [N].

        There are M prompts, of tokens [M, L], and N is a multiple of M. Image i belongs to prompt i mod M, as in
        batches of pairs, which have all chosen images before all rejected ones.
        """
        text = self.clip.encode_text(ids, normalize=True).repeat(len(pixels) // len(ids), 1)
        cosine: Tensor = (self.encode_image(pixels, t).float() * text.float()).sum(-1)
        scale: Tensor = self.clip.logit_scale.float().exp()
        return scale * cosine

    def encode_image(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Return unit vectors [N, E] of images [N, 3, S, S] at timesteps [N]."""
        tower = self.clip.visual
        steering = F.silu(self.time(sinusoid(t, FREQUENCIES)))  # [N, D]
        # Blocks on the tokens [N, tokens, D], modulated by the timestep
        h = tower._embeds(pixels)
        for block, steer in zip(tower.transformer.resblocks, self.blocks, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                h = torch.utils.checkpoint.checkpoint(_steered, block, h, steer(steering), use_reentrant=False)
            else:
                h = _steered(block, h, steer(steering))
        # Projection of the class token, modulated too
        pooled, _ = tower._pool(h)
        shift, scale = self.final(steering).chunk(2, -1)
        pooled = pooled * (1 + scale) + shift
        features: Tensor = F.normalize(pooled if tower.proj is None else pooled @ tower.proj, dim=-1)
        return features


def _steered(block: ResidualAttentionBlock, h: Tensor, steering: Tensor) -> Tensor:
    """Return a block's output [N, tokens, D] with shifts, scales and gates from `steering` [N, 6 D]."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = steering[:, None].chunk(6, -1)
    h = h + gate_1 * block.ls_1(block.attention(block.ln_1(h) * (1 + scale_1) + shift_1))
    h = h + gate_2 * block.ls_2(block.mlp(block.ln_2(h) * (1 + scale_2) + shift_2))
    return h


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of timesteps [N] at `width / 2` frequencies, 1 to 1/10000 (exclusive): [N, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


@dataclass(frozen=True)
class Parts:
    """Step-aware network, on the CPU after loading, with its preprocessing, tokenizer and config as in `ClipParts`."""

    net: TimeConditioned
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class StepAware:
    """Loaded reward model, in float32 and eval mode."""

    net: TimeConditioned
    preprocess: Callable[[Image.Image], Tensor]
    text: TextFeatures
    device: torch.device
    batch_size: int

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the model's device; without timesteps [N] images are taken as clean."""
        times = torch.zeros(len(images)) if t is None else t
        scale = self.net.clip.logit_scale.exp()

        def score(rows: slice) -> Tensor:
            pixels = torch.stack([self.preprocess(image) for image in images[rows]]).to(self.device)
            features = self.net.encode_image(pixels, times[rows].to(self.device))
            scores: Tensor = (scale * (features * self.text(prompts[rows])).sum(-1)).float()
            return scores

        return in_batches(score, len(images), self.batch_size, self.device)


def load(path: str, device: torch.device, cfg: Config) -> StepAware:
    """Load the reward model from a folder that `save` wrote, or from a file that SPO's authors published.

    Raises:
        ValueError: there is no such model, or its weights are incomplete or do not fit its config.
    """
    from open_clip.transform import PreprocessCfg

    parts = read(path) if cfg.weights is None else read_release(path, cfg.weights, cfg.clip)
    net, preprocess = parts.net.eval().requires_grad_(False).to(device), parts.preprocess
    # By default each network gets the preprocessing that it was trained on
    if (cfg.preprocessing or ("folder" if cfg.weights is None else "release")) == "release":
        about = PreprocessCfg(**parts.config["preprocess_cfg"])
        preprocess = _spo_release.preprocessing(net.clip.visual.image_size[0], about.mean, about.std)
    return StepAware(
        net, preprocess, TextFeatures(unit_vectors(net.clip), parts.tokenize, device), device, cfg.batch_size
    )


def begin(path: str) -> Parts:
    """Load the initial network of a training: a step-aware reward model, or a CLIP with added timestep conditioning.

    The CLIP is an open_clip model, or one of transformers if the folder or Hub id has no open_clip config.

    Raises:
        ValueError: `path` is none of these, or the CLIP's vision tower cannot be conditioned on the timestep.
    """
    if find_optional(path, WEIGHTS) is not None:
        return read(path)
    try:
        parts = _clip_files.load_start(path)
    except ValueError as error:
        raise ValueError(f"{error}; a step judge would have {WEIGHTS}") from error
    return Parts(_conditioned(path, parts.model), parts.preprocess, parts.tokenize, parts.config)


def read(path: str) -> Parts:
    """Load a step-aware network and its parts from a folder that `save` wrote, or from the Hub.

    Raises:
        ValueError: the folder has no such network, or its weights are incomplete or do not fit its config.
    """
    weights, about = find_optional(path, WEIGHTS), find_optional(path, CONFIG)
    if weights is None or about is None:
        raise ValueError(
            f"reward step_aware: {path} has no {WEIGHTS}; expected the folder of a step judge, as the method "
            "step_preference trains it"
        )
    with readable("step_aware", path, "it may be incomplete: copy it again"):
        clip = _clip_files.random_parts(path)
        net = _conditioned(path, clip.model)
        net.load_state_dict(load_file(weights))
        config = json.loads(about.read_text(encoding="utf-8"))
    return Parts(net, clip.preprocess, clip.tokenize, config)


def read_release(path: str, weights: str, clip: str) -> Parts:
    """Load a network that SPO's authors published; `save` then writes it as a folder of mmalign.

    `weights` is the file's name in a folder or Hub repository, `clip` the CLIPModel that it was trained from.

    Raises:
        ValueError: there is no such file or CLIP, or the names or shapes of the weights do not fit the CLIP.
    """
    try:
        config, parts = transformers_clip.random_parts(clip)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"reward step_aware: clip: cannot read the config of {clip!r} ({' '.join(str(error).split())[:300]}); "
            "expected the CLIPModel that the judge was trained from, such as yuvalkirstain/PickScore_v1"
        ) from error
    net = _conditioned(clip, parts.model)
    net.load_state_dict(_spo_release.read_weights(path, weights, config, FREQUENCIES))
    return Parts(net, parts.preprocess, parts.tokenize, parts.config)


def _conditioned(path: str, clip: CLIP) -> TimeConditioned:
    try:
        return TimeConditioned(clip.float())
    except ValueError as error:
        raise ValueError(f"reward step_aware: {path}: {error}") from None


def save(parts: Parts, folder: Path) -> None:
    """Write config, tokenizer and weights to a folder."""
    clip = ClipParts(parts.net.clip, parts.preprocess, parts.tokenize, parts.config)
    _clip_files.write(clip, folder, parts.net.state_dict(), WEIGHTS)
