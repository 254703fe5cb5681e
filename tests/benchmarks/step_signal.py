"""Measure what SPO's preferred steps tell of the finished images, on the bundled models.

    python -m tests.benchmarks.step_signal                                        # the shipped recipe
    python -m tests.benchmarks.step_signal method.reward='{path: models/tiny_clip}'   # or with other settings

Along one trajectory for each of 256 prompts, the K candidates of every step are judged as in training. Then each
candidate is finished without further noise, and the bundled world's exact reader decides whether its image fulfils the
prompt. A step can teach something if its candidates differ in that, and the judge prefers those that do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mmalign.commands import _bench_run
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.config.methods.text_to_image import SPOConfig
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.walk import Walk
from mmalign.evaluation.benchmarks.scenes import check_scenes
from mmalign.evaluation.statistics import paired_difference
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.methods.text_to_image import spo
from mmalign.methods.text_to_image._images import decode_images, policy_walk
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

RECIPE = "configs/text_to_image/spo_tiny_sd.yaml"
PAIRS = Path("assets/quickstart-pairs.parquet")
PROMPTS, BATCH = 256, 64


class Judged(NamedTuple):
    """Candidates of one step for B prompts: their scores [K, B], and whether their finished images are right [K, B]."""

    step: int
    scores: Tensor
    right: Tensor


def judged_steps(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: SPOConfig, rng: KeyedRNG) -> Iterator[Judged]:
    """Yield the candidates of every step along the trajectories of a batch, as in SPO without inner steps."""
    options: dict[str, Any] = {"steps": cfg.steps, "guidance": cfg.guidance}
    walk = policy_walk(policy, batch, rng, eta=cfg.eta, **options)
    finish = policy_walk(policy, batch, rng, eta=0.0, **options)
    x, everyone = rng.normal(batch.rows, batch.shape, "start")[None], torch.arange(len(batch.rows))
    for index in range(cfg.steps):
        if index < cfg.start:
            x = walk.step(x, index, walk.prediction(x, index))
            continue
        candidates = walk.step(x, index, walk.prediction(x, index), cfg.candidates)
        answer = walk.prediction(candidates, index + 1) if index + 1 < cfg.steps else None
        scores = spo._judge(policy.family, batch, candidates, walk.times[index + 1], answer)
        yield Judged(index, scores, _are_right(policy.family, batch, _finished(finish, candidates, index + 1)))
        survivor = rng.integers(batch.rows, 0, cfg.candidates, "survivor", index)
        x = candidates[survivor, everyone][None]


def _finished(walk: Walk, x: Tensor, index: int) -> Tensor:
    """Return the clean latents [K, B, C, H, W] that latents before step `index` lead to."""
    for number in range(index, len(walk.times) - 1):
        x = walk.step(x, number, walk.prediction(x, number))
    return x


def _are_right(family: TextToImage, batch: EncodedPrompts, latents: Tensor) -> Tensor:
    """Return 1 for each latent [K, B, C, H, W] whose image fulfils its prompt, and 0 for the others [K, B]."""
    images = to_pil(decode_images(family, latents.flatten(0, 1)))
    truths = check_scenes(images, list(batch.prompts) * len(latents))
    return torch.tensor([float(truth["correct"]) for truth in truths]).view(latents.shape[:2])


def row(step: int, scores: Tensor, right: Tensor, prompts: Sequence[str], threshold: float) -> str:
    """Return the table's row of a step, from scores [K, N] and finished images [K, N]."""
    best, worst, sure = spo.best_and_worst(scores, threshold)
    of_best, of_worst = (right.gather(0, side[None])[0][sure] for side in (best, worst))
    groups = [prompt for prompt, is_sure in zip(prompts, sure.tolist(), strict=True) if is_sure]
    differ = (right.max(0).values - right.min(0).values).mean()
    return f"| {step + 1} | {differ:.1%} | {sure.float().mean():.1%} | {_sides(of_worst, of_best, groups)} |"


def _sides(rejected: Tensor, chosen: Tensor, groups: Sequence[str]) -> str:
    if len(set(groups)) < 2:
        return "- | - | -"
    gain = paired_difference(rejected.numpy(), chosen.numpy(), groups)
    change = f"{100 * gain.estimate:+.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
    return f"{chosen.mean():.1%} | {rejected.mean():.1%} | {change}"


def image_pairs(path: Path) -> str:
    """Return the same cells for the pairs of whole images of a Pick-a-Pic file."""
    table = pq.read_table(path).to_pylist()
    sides = {1.0: list[Image.Image](), 0.0: list[Image.Image]()}
    pairs = [pair for pair in table if pair["label_0"] != pair["label_1"]]
    for pair in pairs:
        for side in (0, 1):
            sides[pair[f"label_{side}"]].append(Image.open(BytesIO(pair[f"jpg_{side}"])).convert("RGB"))
    prompts = [pair["caption"] for pair in pairs]
    chosen, rejected = (
        torch.tensor([float(truth["correct"]) for truth in check_scenes(sides[label], prompts)]) for label in (1.0, 0.0)
    )
    return f"| pairs of images | {(chosen != rejected).float().mean():.1%} | | {_sides(rejected, chosen, prompts)} |"


def parse(arguments: Sequence[str]) -> Recipe:
    """Return the recipe with the settings of a command line."""
    return load_recipe(RECIPE, [f"train.batch_size={BATCH}", f"data.limit={PROMPTS}", *arguments])


def main() -> None:
    """Print the table."""
    from accelerate import Accelerator

    recipe = parse(sys.argv[1:])
    cfg = recipe.method
    assert isinstance(cfg, SPOConfig) and cfg.inner_steps == 0
    print("| step | candidates differ | judge is sure | best right | worst right | difference, points |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = _bench_run.build(recipe, Accelerator(), Path(folder), updates=1)
        batches = list(run.data_module.batches(0, 0))
        steps = [list(judged_steps(run.policy, batch, cfg, KeyedRNG(0))) for batch in batches]
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    for parts in zip(*steps, strict=True):
        scores, right = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("scores", "right"))
        print(row(parts[0].step, scores, right, prompts, cfg.threshold), flush=True)
    print(image_pairs(PAIRS))


if __name__ == "__main__":
    main()
