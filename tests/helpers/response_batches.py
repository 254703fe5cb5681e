"""Batches of responses for tests of methods, on tiny models of the real classes and with published logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.types import ImageFeatures, ImageView
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.policy import FrozenCopy, Policy

PAIRS = [
    ("What is it?", "A red cube.", "A red cube and a dog."),
    ("Is there a dog in the image?", "No, there is no dog.", "Yes."),
    ("Describe it.", "Two cats on a mat near a car.", "Two cats on a blue mat near a car."),
]


def picture(number: int, side: int = 20) -> Image.Image:
    """Return an image of noise, seeded by the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side + 8 * (number % 2), 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(family: Any, pairs: Sequence[tuple[str, str, str]] = PAIRS) -> EncodedResponses:
    """Return a batch with one image for every two pairs, and one other image for all; rows are the pairs' numbers."""
    reader, views, pictures = family.processor, {}, {}
    sides, others, rows = [], [], []
    for question, *answers in pairs:
        number = [pair[0] for pair in PAIRS].index(question)
        key, turns = f"image {number // 2}", [Turn("user", f"<image>{question}")]
        pictures |= {key: picture(number // 2), "another": picture(7)}
        views |= {key: reader.preprocess_image(pictures[key]), "another": reader.preprocess_image(pictures["another"])}
        sides.append(reader.tokenize_responses(turns, answers, [(key, views[key])]))
        others.append(reader.tokenize_responses(turns, answers, [("another", views["another"])])[0])
        rows.append(number)
    return EncodedResponses(
        rows,
        reader.collate([*(s[0] for s in sides), *(s[1] for s in sides)]),
        family.encode_images(views),
        torch.ones(len(sides)),
        decoded_images=pictures,
        other_images=reader.collate(others),
    )


def swapped(given: EncodedResponses) -> EncodedResponses:
    """Exchange the chosen and the rejected sides."""
    half = len(given.rows)
    return replace(given, tokens=Tokens.cat([given.tokens[half:], given.tokens[:half]]))


class Logits(nn.Module):
    """A network whose parameters are the logits [2, 8, V] of each published block of rows, by the block's name."""

    def __init__(self, of: dict[str, Any], who: str) -> None:
        super().__init__()
        given = {k.removesuffix("_logits"): torch.tensor(v) for k, v in of["inputs"].items() if k.endswith("logits")}
        self.blocks = nn.ParameterDict({k.removeprefix(f"{who}_"): v for k, v in given.items() if k.startswith(who)})


@dataclass
class Table:
    """A family with given logits: the key of a row's image names the block with the row's logits."""

    seen: list[int] = field(default_factory=list)

    @property
    def processor(self) -> Any:
        return self

    def preprocess_image(self, image: Image.Image) -> ImageView:
        return ImageView((), {})

    def encode_images(self, views: Any) -> ImageFeatures:
        return ImageFeatures(dict.fromkeys(views))

    def token_logps(self, net: Any, tokens: Tokens, features: Any, targets: Tensor | None = None) -> Tensor:
        self.seen.append(len(tokens))
        wanted = tokens.responses[..., None] if targets is None else targets
        result = self._logits(net, tokens).log_softmax(-1).gather(2, wanted) * tokens.response_mask[..., None]
        return result[..., 0] if targets is None else result

    def argmax(self, net: Any, tokens: Tokens, features: Any, avoided: Tensor | None = None) -> Tensor:
        logits = self._logits(net, tokens)
        if avoided is not None:
            logits = logits.scatter(2, avoided[..., None], -torch.inf)
        return logits.argmax(-1).where(tokens.response_mask, tokens.ids[:, :1])

    def _logits(self, net: Any, tokens: Tokens) -> Tensor:
        """Return the logits [N, R, V] before the tokens of the responses."""
        blocks = ["chosen_noisy" if "disturbed" in key else key for (key,) in tokens.images]
        whole = torch.stack([net.blocks[name][row % 2] for row, name in enumerate(blocks)])
        at = tokens.starts[:, None] - 1 + torch.arange(tokens.response_mask.shape[1])
        return whole.gather(1, at.clamp(max=7)[..., None].expand(-1, -1, whole.shape[2]))


def published(of: dict[str, Any]) -> tuple[Policy[Any], EncodedResponses]:
    """Return policy and batch of the published rows; labels are -100 in the prompt and in the padding."""

    def rows(side: str, block: str) -> list[TokenizedResponse]:
        result = []
        for labels in of["inputs"][f"labels_{side}"]:
            start = next(i for i, label in enumerate(labels) if label != -100)
            response = [label for label in labels if label != -100]
            result.append(TokenizedResponse((*[0] * start, *response), start, (block,)))
        return result

    given = EncodedResponses(
        [0, 1],
        Tokens.from_rows([*rows("chosen", "chosen"), *rows("rejected", "rejected")], 0),
        ImageFeatures({}),
        torch.ones(2),
        decoded_images={"chosen": picture(0)},
        other_images=Tokens.from_rows(rows("chosen", "chosen_retrieved"), 0),
    )
    net = Logits(of, "policy")
    return Policy(Table(), net, net, FrozenCopy(Logits(of, "ref"))), given  # type: ignore[arg-type]
