"""Tastes of annotators as mixtures of a few prototypes that all of them share: PAL (arXiv:2406.08469).

Unit vectors u of an image and v of its prompt, of width E, and the score of annotator a, whose shares are
p_a = softmax(w_a), with the judge's learned scale c:

    angle       s_a = c cos(u, v + sum_k p_ak (A_k v + b_k))           model B: prototypes are maps of the prompt
    distance    s_a = -c |u - v - sum_k p_ak b_k|                      model A: prototypes are points

A and b are 0 at first, so that all annotators begin as one judge; w begins at random. Somebody unknown has the mean of
the shares of all annotators that the prototypes were trained with. With one prototype all share one judge.

Annotators can be added to a trained judge. They begin with that mean, and their w alone is trained.

U annotators, K prototypes, N rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from typing_extensions import TypedDict

from mmalign.reading import parse_as
from mmalign.reading.weights import one_sentence
from mmalign.rewards._weights import find_optional

FILE = "annotators.safetensors"  # beside the weights of open_clip
UNKNOWN = -1  # place of somebody without shares of his own
# Factor of w: the release's learning rate of w is 50 times that of its maps; a power of two is exact
PACE = 64.0

Form = Literal["angle", "distance"]


class _About(TypedDict):
    """Metadata of a file."""

    names: list[str]
    form: Form
    num_original: NotRequired[Annotated[int, Field(ge=1)]]  # absent if all are


class AnnotatorMixture(nn.Module):
    """Shares of `names` in prototypes, and the prototypes, which the first `num_original` names were trained with."""

    maps: nn.Parameter | None
    added: nn.Parameter | None  # w of the annotators whose shares alone are trained, the last ones of `names`

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        *,
        prototypes: int,
        form: Form = "angle",
        seed: int = 0,
        num_original: int | None = None,
    ) -> None:
        super().__init__()
        self.names, self.form = tuple(names), form
        self.num_original = len(self.names) if num_original is None else num_original
        self._places = {name: place for place, name in enumerate(self.names)}
        maps = nn.Parameter(torch.zeros(prototypes, width, width)) if form == "angle" else None
        self.register_parameter("maps", maps)
        self.points = nn.Parameter(torch.zeros(prototypes, width))
        start = torch.randn(len(names), prototypes, generator=Generator().manual_seed(seed))
        self.weights = nn.Parameter(start / PACE)
        self.register_parameter("added", None)

    def extended(self, names: Sequence[str]) -> AnnotatorMixture:
        """Return a copy with new annotators, who begin with the mean taste; their shares alone can be trained."""
        assert self.added is None and not set(names) & set(self.names)
        result = copy.deepcopy(self).requires_grad_(False)
        mean = self.shares()[-1].detach()
        start = mean.clamp(min=torch.finfo(mean.dtype).tiny).log() / PACE
        result.added = nn.Parameter(start.repeat(len(names), 1))
        result.names = (*self.names, *names)
        result._places = {name: place for place, name in enumerate(result.names)}
        return result

    @property
    def prototypes(self) -> int:
        """K."""
        return self.weights.shape[1]

    def places(self, names: Sequence[str]) -> Tensor:
        """Return the places [N] of annotators; UNKNOWN for others."""
        places = [self._places.get(name, UNKNOWN) for name in names]
        return torch.tensor(places, dtype=torch.long, device=self.weights.device)

    def shares(self) -> Tensor:
        """Return the shares [U + 1, K] of the annotators; the last row is that of somebody unknown."""
        own = (PACE * self._all_weights()).softmax(1)
        return torch.cat([own, own[: self.num_original].mean(0, keepdim=True)])

    def _all_weights(self) -> Tensor:
        return self.weights if self.added is None else torch.cat([self.weights, self.added])

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
        weights = {"maps": self.maps, "points": self.points, "weights": self._all_weights()}
        content = {name: weight.detach().cpu().contiguous() for name, weight in weights.items() if weight is not None}
        about = _About(names=list(self.names), form=self.form, num_original=self.num_original)
        save_file(content, folder / FILE, metadata={"annotators": json.dumps(about)})


def load_mixture(path: str) -> AnnotatorMixture | None:
    """Load the mixture of a judge, a folder or a Hub id; None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    file = find_optional(path, FILE)
    if file is None:
        return None
    with one_sentence(f"{file}: cannot be read", file, "train the judge again"):
        content = load_file(file)
        with safe_open(file, "pt") as opened:
            settings = parse_as(_About, (opened.metadata() or {}).get("annotators", "").encode())
        prototypes, width = content["points"].shape
        number = settings.get("num_original")
        mixture = AnnotatorMixture(
            settings["names"], width, prototypes=prototypes, form=settings["form"], num_original=number
        )
        mixture.load_state_dict(content)
    return mixture
