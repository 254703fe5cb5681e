"""A judge that knows noisy images: a CLIP whose vision tower is told the timestep (arXiv:2406.04314).

SPO compares images that are predicted from x_t, blurred and wrong in ways that depend on t; a judge of clean images
sees in them what it never learned. Here every block of the vision tower is steered by the timestep, as a DiT's is
(arXiv:2212.09748):

    c = SiLU(MLP(sinusoid(t)))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(c)          one Linear a block
    h = h + gate_1 * attention(norm_1(h) * (1 + scale_1) + shift_1)
    h = h + gate_2 * mlp(norm_2(h) * (1 + scale_2) + shift_2)
    image = projection(norm_post(h[class token]) * (1 + scale) + shift)     shift, scale = Linear(c)

The Linears begin as zeros, but for a bias of 1 of the gates, so that the judge begins as the one that it was made from,
whatever t is. (The release's own constructor sets every bias to 1; its checkpoints override that.) The text tower is as
it was. A clean image has t = 0.

The folder of such a judge has open_clip's config and tokenizer, and all weights in `step_aware.safetensors`.

N is the number of images, L tokens, S the side of an image, E the width of the embedding, D of the vision tower.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.resources import resolve_model
from mmalign.rewards import transformers_clip
from mmalign.rewards.open_clip import TextFeatures, load_parts

CONFIG, WEIGHTS = "open_clip_config.json", "step_aware.safetensors"
FREQUENCIES = 256  # of the sinusoid
STD = 0.02  # of the time MLP's first weights, as released


class Config(BaseModel):
    """Options of the judge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt = 64
    """Images that go through the network at once."""


class TimeConditioned(nn.Module):
    """An open_clip model whose vision tower is told the timestep, and is at first as it was.

    Attributes:
        clip: the model, whose weights learn with the rest.
        checkpointing: compute a block's activations again in the backward pass, instead of keeping them.

    Raises:
        ValueError: the vision tower is not a plain vision transformer with a class token.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        tower = clip.visual
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
        plain = blocks and all(type(block).__name__ == "ResidualAttentionBlock" for block in blocks)
        if not plain or tower.attn_pool is not None or tower.pool_type != "tok" or not hasattr(clip, "encode_text"):
            raise ValueError(
                f"a {type(tower).__name__} cannot be told the timestep; expected open_clip's plain vision transformer "
                "with a class token, as ViT-H-14 and its kin have it"
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
        generator = torch.Generator().manual_seed(0)  # two beginnings from one model are the same judge
        for linear in (self.time[0], self.time[2]):
            assert isinstance(linear, nn.Linear)
            linear.weight.normal_(std=STD, generator=generator)
            linear.bias.zero_()
        for linear in (*self.blocks, self.final):
            assert isinstance(linear, nn.Linear)
            linear.weight.zero_()
            linear.bias.zero_()
        for block in self.blocks:
            _, _, gate_1, _, _, gate_2 = block.bias.chunk(6)  # type: ignore[operator]
            gate_1.fill_(1)
            gate_2.fill_(1)

    def forward(self, pixels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        """Scores [N], float32, of images [N, 3, S, S] at timesteps [N].

        There are as many rows of tokens [M, L] as images, or a part as many: then the images are M for each in turn,
        as those of pairs are.
        """
        text = self.clip.encode_text(ids, normalize=True).repeat(len(pixels) // len(ids), 1)
        cosine: Tensor = (self.encode_image(pixels, t).float() * text.float()).sum(-1)
        scale: Tensor = self.clip.logit_scale.float().exp()
        return scale * cosine

    def encode_image(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Unit vectors [N, E]."""
        tower = self.clip.visual
        steering = F.silu(self.time(sinusoid(t, FREQUENCIES)))  # [N, D]
        h = tower._embeds(pixels)
        for block, steer in zip(tower.transformer.resblocks, self.blocks, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                h = torch.utils.checkpoint.checkpoint(_steered, block, h, steer(steering), use_reentrant=False)
            else:
                h = _steered(block, h, steer(steering))
        pooled, _ = tower._pool(h)
        shift, scale = self.final(steering).chunk(2, -1)
        pooled = pooled * (1 + scale) + shift
        features: Tensor = F.normalize(pooled if tower.proj is None else pooled @ tower.proj, dim=-1)
        return features


def _steered(block: Any, h: Tensor, steering: Tensor) -> Tensor:
    """A block of the tower on tokens [N, tokens, D], steered by [N, 6 D]."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = steering[:, None].chunk(6, -1)
    h = h + gate_1 * block.ls_1(block.attention(block.ln_1(h) * (1 + scale_1) + shift_1))
    h = h + gate_2 * block.ls_2(block.mlp(block.ln_2(h) * (1 + scale_2) + shift_2))
    return h


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timesteps [N] at `width / 2` frequencies from 1 to 1/10000 (exclusive): [N, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


@dataclass(frozen=True)
class Parts:
    """A step-aware judge with what stands before it.

    Attributes:
        net: the network, on the CPU when it comes.
        preprocess: an image to [3, S, S].
        tokenize: prompts to [N, L]; longer ones are cut.
        config: the content of open_clip's config file.
    """

    net: TimeConditioned
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Any
    config: dict[str, Any]


@dataclass(frozen=True)
class StepAware:
    """A loaded judge, in float32 and eval mode."""

    net: TimeConditioned
    preprocess: Callable[[Image.Image], Tensor]
    text: TextFeatures
    device: torch.device
    batch_size: int

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores [N], float32, on the device of the model; without timesteps [N] the images are taken for clean."""
        times = torch.zeros(len(images)) if t is None else t
        scale, parts = self.net.clip.logit_scale.exp(), [torch.empty(0, device=self.device)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = torch.stack([self.preprocess(image) for image in images[rows]]).to(self.device)
            features = self.net.encode_image(pixels, times[rows].to(self.device))
            parts.append((scale * (features * self.text(prompts[rows])).sum(-1)).float())
        return torch.cat(parts)


def load(path: str, device: torch.device, cfg: Config) -> StepAware:
    """The judge in a folder that `save` wrote.

    Raises:
        ValueError: there is none, or its weights are missing or do not fit its config.
    """
    parts = read(path)
    net = parts.net.eval().requires_grad_(False).to(device)
    return StepAware(net, parts.preprocess, TextFeatures(net.clip, parts.tokenize, device), device, cfg.batch_size)


def begin(path: str) -> Parts:
    """What a judge is trained from: a step-aware judge's folder, or a CLIP, whose scores it then has.

    That is a model of open_clip, or of transformers where the folder or Hub id has no configuration of open_clip's.

    Raises:
        ValueError: it is none of these, or the model's vision tower cannot be told the timestep.
    """
    resolved = resolve_model(path)
    if (Path(resolved) / WEIGHTS).is_file():
        return read(path)
    about = _config_file(resolved)
    if about is None:
        clip, preprocess, tokenize, config = _of_transformers(path)
    else:
        clip, preprocess, tokenize = load_parts(path)
        config = json.loads(about.read_text(encoding="utf-8"))
    return Parts(_conditioned(path, clip), preprocess, tokenize, config)


def read(path: str) -> Parts:
    """The judge in a folder.

    Raises:
        ValueError: there is none, or its weights are missing or do not fit its config.
    """
    import open_clip

    folder = Path(resolve_model(path))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"judge step_aware: {path} has no {WEIGHTS}; expected the folder of a step-aware judge, which the method "
            "step_preference makes of an open_clip model"
        )
    try:
        name = f"local-dir:{folder}"
        with _quiet():  # it would warn that the model is random, which it is for a moment
            clip, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
        tokenize = open_clip.get_tokenizer(name)
        net = _conditioned(path, clip)
        net.load_state_dict(load_file(folder / WEIGHTS))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"judge step_aware: cannot load {path!r} ({' '.join(str(error).split())[:300]}); it may be incomplete: "
            "copy it anew"
        ) from error
    return Parts(net, preprocess, tokenize, config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _conditioned(path: str, clip: Any) -> TimeConditioned:
    try:
        return TimeConditioned(clip.float())
    except ValueError as error:
        raise ValueError(f"judge step_aware: {path}: {error}") from None


def _of_transformers(path: str) -> tuple[Any, Callable[[Image.Image], Tensor], Any, dict[str, Any]]:
    try:
        return transformers_clip.load_parts(path)
    except ValueError as error:
        raise ValueError(f"{error}; a model of open_clip would have {CONFIG}, a step-aware judge {WEIGHTS}") from error


def _config_file(resolved: str) -> Path | None:
    """open_clip's configuration of a model, in a folder or from the Hub; None if there is none."""
    if Path(resolved).is_dir():
        return Path(resolved) / CONFIG if (Path(resolved) / CONFIG).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(resolved, CONFIG))
    except EntryNotFoundError:
        return None


def save(parts: Parts, folder: Path) -> None:
    """Write a judge's folder: config, tokenizer and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(parts.config, indent=2), encoding="utf-8")
    if hasattr(parts.tokenize, "save_pretrained"):  # open_clip brings its own tokenizer itself
        parts.tokenize.save_pretrained(folder)
    save_file({name: x.detach().contiguous().cpu() for name, x in parts.net.state_dict().items()}, folder / WEIGHTS)
