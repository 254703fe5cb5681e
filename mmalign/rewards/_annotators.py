"""Tastes of annotators as mixtures of a few prototypes that all of them share: PAL (arXiv:2406.08469).

Unit vectors u of an image and v of its prompt, of width E, and the score of annotator a, whose shares are
p_a = softmax(w_a), with the judge's learned scale c:

    angle       s_a = c cos(u, v + sum_k p_ak (A_k v + b_k))           model B: prototypes are maps of the prompt
    distance    s_a = -c |u - v - sum_k p_ak b_k|                      model A: prototypes are points

A and b are 0 at first, so that all annotators begin as one judge; w begins at random. Somebody unknown has the mean of
all annotators' shares. With one prototype all share one judge.

U annotators, K prototypes, N rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from typing_extensions import TypedDict

from mmalign.reading import parse_as
from mmalign.reading.weights import one_sentence

FILE = "annotators.safetensors"  # beside the weights of open_clip
UNKNOWN = -1  # place of somebody without shares of his own
# Factor of w: the release's learning rate of w is 50 times that of its maps; a power of two is exact
PACE = 64.0

Form = Literal["angle", "distance"]


class _About(TypedDict):
    """Metadata of a file."""

    names: list[str]
    form: Form


class AnnotatorMixture(nn.Module):
    """Shares of `names` in prototypes, and the prototypes.

    Args:
        names: the annotators.
        width: E.
        prototypes: K.
        form: the form of the score.
        seed: seed of the first shares.
    """

    maps: nn.Parameter | None

    def __init__(
        self, names: Sequence[str], width: int, *, prototypes: int, form: Form = "angle", seed: int = 0
    ) -> None:
        super().__init__()
        self.names, self.form = tuple(names), form
        self._places = {name: place for place, name in enumerate(self.names)}
        maps = nn.Parameter(torch.zeros(prototypes, width, width)) if form == "angle" else None
        self.register_parameter("maps", maps)
        self.points = nn.Parameter(torch.zeros(prototypes, width))
        start = torch.randn(len(names), prototypes, generator=Generator().manual_seed(seed))
        self.weights = nn.Parameter(start / PACE)

    def places(self, names: Sequence[str]) -> Tensor:
        """Return the places [N] of annotators; UNKNOWN for others."""
        places = [self._places.get(name, UNKNOWN) for name in names]
        return torch.tensor(places, dtype=torch.long, device=self.weights.device)

    def shares(self) -> Tensor:
        """Return the shares [U + 1, K] of the annotators; the last row is their mean, that of somebody unknown."""
        own = (PACE * self.weights).softmax(1)
        return torch.cat([own, own.mean(0, keepdim=True)])

    def forward(self, prompt: Tensor, places: Tensor) -> Tensor:
        """Return what annotators look for under a prompt [N, E], from unit vectors [N, E] and places [N]."""
        with torch.autocast(prompt.device.type, enabled=False):
            prototypes = self.points.to(prompt).expand(len(prompt), -1, -1)
            if self.maps is not None:
                prototypes = prototypes + torch.einsum("kfe,ne->nkf", self.maps.to(prompt), prompt)
            shares = self.shares()[places].to(prompt)
            return prompt + (shares[:, :, None] * prototypes).sum(1)

    def score(self, image: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
        """Return scores [N] of unit vectors of images [N, E], from the result of `forward` and the learned scale []."""
        if self.form == "angle":
            return scale * (image * F.normalize(wanted, dim=-1)).sum(-1)
        distances: Tensor = torch.linalg.vector_norm(image - wanted, dim=-1)
        return -scale * distances

    def save(self, folder: Path) -> None:
        """Write the mixture to a folder."""
        content = {name: weight.detach().cpu().contiguous() for name, weight in self.named_parameters()}
        about = _About(names=list(self.names), form=self.form)
        save_file(content, folder / FILE, metadata={"annotators": json.dumps(about)})


def load_mixture(folder: Path) -> AnnotatorMixture | None:
    """Load the mixture of a judge's folder; None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    with one_sentence(f"{folder / FILE}: cannot be read", folder / FILE, "train the judge again"):
        content = load_file(folder / FILE)
        with safe_open(folder / FILE, "pt") as file:
            settings = parse_as(_About, (file.metadata() or {}).get("annotators", "").encode())
        prototypes, width = content["points"].shape
        mixture = AnnotatorMixture(settings["names"], width, prototypes=prototypes, form=settings["form"])
        mixture.load_state_dict(content)
    return mixture
