"""Heads of a judge that predict named attributes, as HelpSteer2's regression does (arXiv:2406.08673).

Unit vectors u of an image and v of its prompt, of width E, give the prediction of an attribute on a scale from l to h:

    r = (l + h) / 2 + (h - l) / 2 (w . [sqrt(E) u, E u v] + b)

w and b are 0 at first, so that the prediction begins in the middle. A judge's cosine has the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign.reading import parse_as
from mmalign.reading.weights import one_sentence
from mmalign.rewards._weights import find_optional

FILE = "attributes.safetensors"  # beside the weights of open_clip

Scales = Mapping[str, Sequence[float]]  # the lowest and the highest value of each attribute


class AttributeHeads(nn.Module):
    """Linear heads, one for each of A attributes, whose `scales` are in order."""

    low: Tensor
    high: Tensor

    def __init__(self, scales: Scales, width: int) -> None:
        super().__init__()
        self.scales = dict(scales)
        self.weight = nn.Parameter(torch.zeros(len(scales), 2 * width))
        self.bias = nn.Parameter(torch.zeros(len(scales)))
        # Scales move with the heads, and are saved beside the weights, not among them
        low, high = torch.tensor(list(scales.values())).view(-1, 2).unbind(1)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        """Return predictions [N, A] in the attributes' units, from unit vectors [N, E]."""
        image, prompt, width = image.float(), prompt.float(), image.shape[1]
        features = torch.cat([width**0.5 * image, width * image * prompt], dim=1)
        heads = features @ self.weight.float().T + self.bias.float()
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * heads

    def losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return squared errors [..., A] of predictions in units of half a scale, 0 where a label [..., A] is NaN."""
        errors = 2 * (predictions - labels.nan_to_num()) / (self.high - self.low)
        return errors.square() * ~labels.isnan()

    def save(self, folder: Path) -> None:
        """Write the heads to a folder."""
        weights = {"weight": self.weight, "bias": self.bias}
        content = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        rows = [(name, *scale) for name, scale in self.scales.items()]
        save_file(content, folder / FILE, metadata={"attributes": json.dumps(rows)})


def load_heads(path: str) -> AttributeHeads | None:
    """Load the heads of a judge, a folder or a Hub id; None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    file = find_optional(path, FILE)
    if file is None:
        return None
    with one_sentence(f"{file}: cannot be read", file, "train the judge again"):
        with safe_open(file, "pt") as opened:
            weight, bias, about = opened.get_tensor("weight"), opened.get_tensor("bias"), opened.metadata() or {}
        rows = parse_as(list[tuple[str, float, float]], about.get("attributes", "").encode())
        heads = AttributeHeads({name: (low, high) for name, low, high in rows}, weight.shape[1] // 2)
        heads.load_state_dict({"weight": weight, "bias": bias})
    return heads
