"""Training of the bundled models from scratch: `python models/build.py STAGE [STAGE ...]`.

Stages, in the order of their dependencies: `vae`, `sd` (denoiser and text encoder, on the VAE's latents), `clip` (the
reward model) and `clip_eval` (a second reward model, on other prompts with another seed, for evaluation alone).
`clip_steps` makes the reward model of SPO from `clip`. Run the same command again to resume a stopped stage; `--work`
holds the checkpoints. All images are rendered by `mmalign.toy.scenes`; nothing is downloaded. models/README.md lists
the costs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fit import fit, half
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmalign.toy import scenes

HERE = Path(__file__).parent
CONTEXT = 32  # tokens of the denoiser's text encoder; the longest caption of the world takes 12
JUDGE_CONTEXT = 16


# ------------------------------------------------------------------------------------------------------------- data


def drawings(number: int, seed: int) -> np.ndarray:
    """Render `number` small drawings of random shapes, uint8 [N, 64, 64, 3], so the VAE learns more than six shapes."""
    rng = np.random.default_rng(seed)
    out = np.empty((number, 64, 64, 3), dtype=np.uint8)
    for i in range(number):
        ground = (255, 255, 255) if rng.random() < 0.75 else tuple(int(v) for v in rng.integers(0, 256, 3))
        canvas = Image.new("RGB", (192, 192), ground)
        brush = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(2, 14)):
            _stroke(brush, rng)
        if rng.random() < 0.3:  # a soft shade over everything, as in illustrations
            shade = Image.linear_gradient("L").rotate(int(rng.integers(360))).resize((192, 192))
            canvas = Image.blend(canvas, Image.merge("RGB", (shade,) * 3), 0.25 * rng.random())
        out[i] = np.asarray(canvas.resize((64, 64), Image.Resampling.BOX))
    return out


def _stroke(brush: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    ink = tuple(int(v) for v in rng.integers(0, 256, 3))
    edge = tuple(int(v) for v in rng.integers(0, 256, 3)) if rng.random() < 0.3 else None
    centre, size = rng.uniform(20, 172, 2), rng.uniform(6, 80) * rng.uniform(0.3, 1)
    kind = rng.integers(4)
    if kind == 0:
        w, h = size * rng.uniform(0.3, 1, 2)
        brush.ellipse([centre[0] - w, centre[1] - h, centre[0] + w, centre[1] + h], fill=ink, outline=edge, width=4)
    elif kind == 1:
        angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
        radii = size * rng.uniform(0.4, 1, len(angles))
        brush.polygon(
            [(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)],
            fill=ink,
            outline=edge,
        )
    elif kind == 2:
        points = [tuple(centre + rng.uniform(-size, size, 2)) for _ in range(rng.integers(2, 6))]
        brush.line(points, fill=ink, width=int(rng.integers(2, 16)), joint="curve")
    else:
        w, h = size * rng.uniform(0.3, 1, 2)
        brush.rounded_rectangle(
            [centre[0] - w, centre[1] - h, centre[0] + w, centre[1] + h],
            radius=min(w, h) / 3,
            fill=ink,
            outline=edge,
            width=4,
        )


def captioned(number: int, seed: int, half: int | None = None) -> tuple[np.ndarray, list[scenes.ScenePrompt]]:
    """Render scenes of training prompts, uint8 [N, 64, 64, 3]; return them with the prompts.

    `half` (0 or 1) selects every other prompt.
    """
    rng = np.random.default_rng(seed)
    prompts = scenes.sample_prompts("train", number * (1 if half is None else 2), seed)
    if half is not None:
        order = {p: i for i, p in enumerate(scenes.all_prompts())}
        prompts = [p for p in prompts if order[p] % 2 == half][:number]
    images = np.stack([np.asarray(scenes.render(scenes.place_objects(p, rng))) for p in prompts])
    return images, prompts


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# -------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer whose merges cover the world's words; any other word splits into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=sorted(letters), show_progress=False
    )
    bpe.train_from_iterator((str(p) for p in scenes.all_prompts()), trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokens = sorted(letters) + [c + "</w>" for c in sorted(letters)]
    tokens += [t for t in sorted(trained["vocab"], key=trained["vocab"].get) if t not in set(tokens)]
    # The end token has the highest id: open_clip's text tower finds it by that.
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in trained["merges"]]
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)


def tokenizer_of(folder: Path) -> Any:
    """Load the tokenizer in a folder, or build it there."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer_config.json").exists():
        build_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- vae


def build_vae(work: Path, compiled: bool) -> None:
    """Train an AutoencoderKL, 64 x 64 pixels to 16 x 16 x 4.

    The loss is the absolute and squared error, the absolute error of the gradients, and a small KL term.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
    )
    print(f"vae {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    images = np.concatenate([captioned(6000, seed=10)[0], drawings(14000, seed=11)])
    net = torch.compile(_autoencode(model)) if compiled else _autoencode(model)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((1, step))
        torch.manual_seed(step)
        x = to_tensor(images[rng.integers(len(images), size=32)])
        with torch.autocast("cpu", torch.bfloat16):
            y, mean, logvar = net(x)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges + 2e-4 * kl

    def save(average: nn.Module) -> None:
        with torch.no_grad():
            latents = average.encode(to_tensor(images[:512])).latent_dist.mean
        average.register_to_config(scaling_factor=round(1 / float(latents.std()), 4), _name_or_path="")
        half(average).save_pretrained(HERE / "tiny_sd" / "vae")

    fit("vae", work, model, loss, steps=1200, lr=1.5e-3, save=save)


def _autoencode(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = model.quant_conv(model.encoder(x)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        return model.decoder(model.post_quant_conv(z)), mean, logvar

    return run


# --------------------------------------------------------------------------------------------------------------- sd


def build_sd(work: Path, compiled: bool, steps: int) -> None:
    """Train UNet and text encoder together, on scenes with one error in 15 % of the captions."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = HERE / "tiny_sd"
    tokenizer = tokenizer_of(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="")  # keep local paths out of the shipped configuration
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    print(f"unet {unet.num_parameters() / 1e6:.2f}M, text {text.num_parameters() / 1e6:.2f}M parameters", flush=True)
    model = nn.ModuleDict({"unet": unet, "text": text})
    mean, std, ids = _latents(work, vae, tokenizer)
    empty = tokenizer([""], padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids[0]
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    # Min-SNR, with more weight on the times that decide layout and colour: the plain epsilon loss learns these last.
    weight = snr.clamp(max=5) / snr * (1 / alphas).clamp(max=4)
    run = torch.compile(unet) if compiled else unet

    def loss(step: int) -> Tensor:
        torch.manual_seed(step)
        rows = torch.randint(len(mean), (64,))
        x_0 = mean[rows].float() + std[rows].float() * torch.randn(64, 4, 16, 16)
        eps, t = torch.randn_like(x_0), torch.randint(1000, (64,))
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[rows])
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            error = run(x_t, t, text(tokens).last_hidden_state, return_dict=False)[0].float() - eps
        return (weight[t] * error.pow(2).mean(dim=(1, 2, 3))).mean()

    def save(average: nn.Module) -> None:
        average = half(average)
        StableDiffusionPipeline(
            vae=half(vae),
            text_encoder=average["text"],
            tokenizer=tokenizer,
            unet=average["unet"],
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    fit("sd", work, model, loss, steps=steps, lr=7e-4, save=save, ema_decay=0.9993)


@torch.no_grad()
def _latents(work: Path, vae: nn.Module, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled posterior means and standard deviations [N, 4, 16, 16] and caption tokens [N, CONTEXT], cached."""
    path = work / "latents.pt"
    if not path.exists():
        images, prompts = captioned(40000, seed=20)
        rng = np.random.default_rng(21)
        captions = [str(scenes.corrupt(p, rng) if rng.random() < 0.15 else p) for p in prompts]
        means, stds = [], []
        for i in range(0, len(images), 64):
            posterior = vae.encode(to_tensor(images[i : i + 64])).latent_dist
            means.append((posterior.mean * vae.config.scaling_factor).half())
            stds.append((posterior.std * vae.config.scaling_factor).half())
        ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        torch.save((torch.cat(means), torch.cat(stds), ids), path)
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- clip


def build_clip(work: Path, name: str, prompts_half: int, seed: int, steps: int) -> None:
    """Train an open_clip model that also distinguishes every image from a caption with one error."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = HERE / name
    tokenizer = tokenizer_of(folder)
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
        "text_cfg": {
            "context_length": JUDGE_CONTEXT,
            "vocab_size": len(tokenizer),
            "width": 128,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": name,
        },
    }
    torch.manual_seed(seed)
    model = CLIP(**deepcopy(config))
    print(f"{name} {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    images, prompts = captioned(24000, seed=seed, half=prompts_half)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        torch.manual_seed(step)
        rows = rng.choice(len(images), size=128, replace=False)
        captions = [str(prompts[i]) for i in rows] + [str(scenes.corrupt(prompts[i], rng)) for i in rows]
        ids = tokenizer(captions, padding="max_length", max_length=JUDGE_CONTEXT, return_tensors="pt").input_ids
        x = _weathered(to_tensor(images[rows]))
        with torch.autocast("cpu", torch.bfloat16):
            image, text = model.encode_image(x, normalize=True), model.encode_text(ids, normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
        same = torch.tensor([[a == b for b in captions] for a in captions[:128]])
        log_p, log_q = logits.log_softmax(1), logits[:, :128].log_softmax(0)  # all equal captions are correct
        forward = -(log_p.masked_fill(~same, -torch.inf)).logsumexp(1).mean()
        return 0.5 * (forward - (log_q.masked_fill(~same[:, :128], -torch.inf)).logsumexp(0).mean())

    def save(average: nn.Module) -> None:
        folder.mkdir(exist_ok=True)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
        )
        weights = {k: v.contiguous() for k, v in half(average).state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")

    fit(name, work, model, loss, steps=steps, lr=1e-3, save=save)


def _weathered(x: Tensor) -> Tensor:
    """Add blur, noise and brightness changes, since generated images are less clean than rendered ones."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1))
    x = x + 0.15 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    return (x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1)) + 0.05 * torch.randn(len(x), 3, 1, 1)).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------- clip_steps


def build_clip_steps(work: Path) -> None:
    """Train SPO's reward model, tiny_clip conditioned on time, by its shipped recipe; store float16 weights."""
    from mmalign.commands.load_recipe import load_recipe
    from mmalign.commands.train import train
    from mmalign.rewards import step_aware

    recipe = load_recipe("configs/text_to_image/step_preference_tiny_sd.yaml", [f"output={work / 'clip_steps'}"])
    parts = step_aware.read(str(train(recipe).folder))
    parts.net.half()
    step_aware.save(parts, HERE / "tiny_clip_steps")


def stages(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the stages by name."""
    yield "vae", lambda: build_vae(args.work, args.compile)
    yield "sd", lambda: build_sd(args.work, args.compile, args.sd_steps)
    yield "clip", lambda: build_clip(args.work, "tiny_clip", 0, seed=30, steps=1500)
    yield "clip_eval", lambda: build_clip(args.work, "tiny_clip_eval", 1, seed=40, steps=600)
    yield "clip_steps", lambda: build_clip_steps(args.work)


def main() -> None:
    """Run the named stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="+", choices=["vae", "sd", "clip", "clip_eval", "clip_steps"])
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="where checkpoints are kept")
    parser.add_argument("--threads", type=int, default=0, help="processor threads (0: all)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the networks: a third faster, needs a C++ compiler"
    )
    parser.add_argument("--sd-steps", type=int, default=3600, help="training steps of the denoiser")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = dict(stages(args))
    for name in args.stage:
        started = time.time()
        known[name]()
        print(f"{name} done in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
