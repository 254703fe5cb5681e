"""What it buys to run a prompt and its image once for both responses. Not a test, but run by hand, on one thread:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.packing --json packing.json

The model is LLaVA's class with random weights and a decoder of 4.8 million: 576 tokens an image, and 50 of a prompt, as
LLaVA-1.5 has them. A step is what `dpo` makes of a batch: the reference's scores by a frozen copy, the policy's, and
its gradients for all weights of the decoder. Images are encoded before it, and the optimizer is left out, which are the
same for both. Seconds are those of the processor, which a busy machine changes little; packed and apart take turns, and
ratios are taken within a turn. Operations are counted, and their ratio is what is expected; rows of unequal length gain
more, since padding makes attention read a mask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import LlavaProcessor as Processor

from mmalign.benchmark.meters import Operations
from mmalign.draws import Draws
from mmalign.encode_responses import EncodedResponses
from mmalign.families import Loading, VisionLanguage, load_vision_language
from mmalign.families.packed import forest_of
from mmalign.language.tokens import TokenRow
from mmalign.methods import dpo
from mmalign.policy import FrozenCopy, Policy
from tests import tiny_vlm_models

PROMPT = 50  # tokens beside the image's


@dataclass(frozen=True)
class Case:
    """The tokens of a pair's responses, and the pairs of a batch."""

    responses: tuple[int, int] = (100, 100)
    pairs: int = 1


CASES = (Case(), Case((200, 60)), Case(pairs=2))


@dataclass
class Measured:
    """A case: [packed, apart] of everything.

    Attributes:
        case: which.
        operations: of a step.
        tokens: that the decoder runs.
        gradient_error: the greatest difference between their gradients, over the greatest gradient.
        seconds: of the processor, of each turn.
    """

    case: Case
    operations: tuple[int, int]
    tokens: tuple[int, int]
    gradient_error: float
    seconds: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times faster packed is: the median of the turns."""
        return statistics.median(apart / packed for packed, apart in self.seconds)

    @property
    def expected(self) -> float:
        """What it is in operations."""
        return self.operations[1] / self.operations[0]


def model(folder: Path) -> VisionLanguage:
    """A LLaVA with random weights and its processor: 24 x 24 patches of 14 pixels, a small tower, six layers."""
    torch.manual_seed(0)
    tokens = tiny_vlm_models.tokenizer(["<image>"], begin=True)
    square = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    Processor(
        square,
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_vlm_models.LLAVA_CHAT,
    ).save_pretrained(folder)
    decoder = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=4096,
    )
    tower = {**tiny_vlm_models.VISION, "image_size": 336, "patch_size": 14, "projection_dim": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=decoder,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return load_vision_language(str(folder), Loading(torch.device("cpu")))


def batch(family: Any, case: Case) -> EncodedResponses:
    """Pairs of random tokens: an image of its own, and a prompt, before two responses."""
    draw = torch.Generator().manual_seed(0)

    def words(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 300, (number,), generator=draw).tolist())

    view, sides = family.reader.view(Image.new("RGB", (336, 336), "gray")), list[list[TokenRow]]()
    for pair in range(case.pairs):
        prompt = (*view.ids, *words(PROMPT))
        sides.append([TokenRow((*prompt, *words(n)), len(prompt), (f"image {pair}",)) for n in case.responses])
    rows = [row for view_rows in zip(*sides, strict=True) for row in view_rows]
    features = family.encode_images({row.images[0]: view for row in rows})
    return EncodedResponses(list(range(case.pairs)), family.reader.batch(rows), features, torch.ones(case.pairs))


def step(policy: Policy[Any], given: EncodedResponses) -> list[Tensor]:
    """One of `dpo`, up to the gradients."""
    policy.model.zero_grad()
    config = dpo.Config()
    (contrast,) = dpo.contrasts(policy, given, config, Draws(0, 0))
    dpo.loss(policy, contrast, config).losses.mean().backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in policy.trainable() if p.grad is not None]


def measure(
    cases: Sequence[Case] = CASES, repeats: int = 5, say: Callable[[str], None] = lambda _: None
) -> list[Measured]:
    """Every case, packed and apart: counted and compared first, which warms up, then timed in turns."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        packed: Any = model(Path(folder))
        apart = replace(packed, loading=replace(packed.loading, pack=False))
        reference = FrozenCopy(packed.frozen_copy())
        packed.unfreeze()
        policies = [Policy(family, family.network, family.network, reference) for family in (packed, apart)]
        for case in cases:
            given, counted, gradients = batch(packed, case), list[int](), list[list[Tensor]]()
            for policy in policies:
                with Operations() as counter:
                    gradients.append([grad.clone() for grad in step(policy, given)])
                counted.append(counter.get_total_flops())
            tokens = forest_of(given.tokens, packed.reader.facts).length, given.tokens.ids.numel()
            error = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
            largest = max(float(grad.abs().max()) for grad in gradients[1])
            row = Measured(case, (counted[0], counted[1]), tokens, error / largest)
            found.append(row)
            for turn in range(repeats):
                say(f"{case}: turn {turn + 1} of {repeats}")
                spent = [0.0, 0.0]
                for which in (0, 1) if turn % 2 == 0 else (1, 0):
                    started = time.process_time()
                    step(policies[which], given)
                    spent[which] = time.process_time() - started
                row.seconds.append((spent[0], spent[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show, and write where one asks."""
    parser = argparse.ArgumentParser(description="What it buys to run a prompt once for both responses.")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    rows = measure(repeats=options.repeats, say=Console(stderr=True, highlight=False).print)
    table = Table(
        "responses", "pairs", "tokens apart", "packed", "s apart", "s packed", "faster", "expected", "gradients"
    )
    for row in rows:
        seconds = [f"{statistics.median(one):.2f}" for one in zip(*row.seconds, strict=True)]
        of, numbers = row.case, (str(row.tokens[1]), str(row.tokens[0]), seconds[1], seconds[0])
        ratios = (f"{row.ratio:.2f}", f"{row.expected:.2f}", f"{row.gradient_error:.0e}")
        table.add_row("/".join(map(str, of.responses)), str(of.pairs), *numbers, *ratios)
    Console().print(table)
    if options.json:
        told = [{**asdict(row), "ratio": row.ratio, "expected": row.expected} for row in rows]
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
