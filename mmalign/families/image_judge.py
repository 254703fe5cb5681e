"""Judge of images in training: a CLIP whose scores of an image and its prompt are logits of preferences.

The score is the cosine of both vectors times the learned scale, as the reward model `open_clip` computes it. What is
trained are both towers, adapters in them, or the last linear layer of each on features that do not change.

N images of M prompts, N a multiple of M; S is the side of the judge's input image, L the number of tokens, D and E are
the widths of features and vectors. A is the number of attributes, which heads predict beside the score. With a mixture
the score is that of the annotator of a prompt's images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmalign.attention.choice import SelectedBackend
from mmalign.families import lora
from mmalign.families.types import Loading, LoraSettings
from mmalign.policy.sharding import ShardPlan
from mmalign.reading.weights import tensors_only
from mmalign.rewards import _clip_files, open_clip
from mmalign.rewards._annotators import UNKNOWN, AnnotatorMixture, Form, load_mixture
from mmalign.rewards._attributes import AttributeHeads, Scales, load_heads
from mmalign.rewards.open_clip import ClipParts, TextFeatures

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer, VisionTransformer
    from peft import LoraConfig

NOT_COMPILED = "train.compile: not supported for judges of images; leave it out"
NOT_SHARDED = "train.sharding: not supported for judges, which fit on one device; leave it out"


class ClipScorer(nn.Module):
    """CLIP of open_clip as one network from images and prompts to scores.

    Attributes:
        clip: the CLIP.
        attributes: the heads of attributes; None without any.
        annotators: the mixture of annotators' tastes; None without one.
    """

    def __init__(
        self, clip: CLIP, attributes: AttributeHeads | None = None, annotators: AnnotatorMixture | None = None
    ) -> None:
        super().__init__()
        self.clip, self.attributes, self.annotators = clip, attributes, annotators

    def forward(self, images: Tensor, text: Tensor, places: Tensor | None = None) -> Tensor:
        """Return scores and predictions of the attributes [N, 1 + A], float32; image i belongs to prompt i mod M.

        Args:
            images: preprocessed images [N, 3, S, S], or features of them [N, D].
            text: tokens of the prompts [M, L], or features of them [M, D].
            places: the places of the prompts' annotators in the mixture [M]; None for unknown ones.
        """
        # Unit vectors of images [N, E] and prompts [M, E]
        if images.dim() == 2:  # features
            vision, words = self._towers
            last = words.text_projection
            image = F.normalize(images @ vision.proj, dim=-1)
            prompt = F.normalize(last(text) if isinstance(last, nn.Linear) else text @ last, dim=-1)
        else:
            image = self.clip.encode_image(images, normalize=True)
            prompt = self.clip.encode_text(text, normalize=True)
        image, prompt, scale = image.float(), prompt.float(), self.clip.logit_scale.float().exp()
        # Scores [N], of one scale for all or by the annotator of each prompt
        number = len(image) // len(prompt)
        if self.annotators is None:
            scores: Tensor = scale * (image * prompt.repeat(number, 1)).sum(-1)
        else:
            places = torch.full((len(prompt),), UNKNOWN, device=prompt.device) if places is None else places
            scores = self.annotators.score(image, self.annotators(prompt, places).repeat(number, 1), scale)
        # Heads read the same vectors
        if self.attributes is None:
            return scores[:, None]
        return torch.cat([scores[:, None], self.attributes(image, prompt.repeat(number, 1))], 1)

    def image_features(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of images [N, 3, S, S], before the last linear layer."""
        vision, _ = self._towers
        layer, vision.proj = vision.proj, None  # open_clip applies no layer where it is None
        try:
            features: Tensor = self.clip.encode_image(images)
        finally:
            vision.proj = layer
        return features

    def text_features(self, tokens: Tensor) -> Tensor:
        """Return the features [M, D] of tokens [M, L], before the last linear layer."""
        _, text = self._towers
        layer, text.text_projection = text.text_projection, None
        try:
            features: Tensor = self.clip.encode_text(tokens)
        finally:
            text.text_projection = layer
        return features

    def head(self) -> list[nn.Parameter]:
        """Return the weights of the last linear layers, of the scale, and beside the CLIP.

        Raises:
            ValueError: a tower has no such layer.
        """
        vision, text = self._towers
        last = text.text_projection
        layers = [vision.proj, *(last.parameters() if isinstance(last, nn.Linear) else [last]), self.clip.logit_scale]
        return [*layers, *self.beside()]

    def beside(self) -> list[nn.Parameter]:
        """Return the weights beside the CLIP: those of the attributes' heads and of the annotators' mixture."""
        return [p for part in (self.attributes, self.annotators) if part is not None for p in part.parameters()]

    def add_adapter(self, config: LoraConfig) -> None:
        """Add adapters, as networks of diffusers and transformers do."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name=lora.TRAINED)

    @property
    def known_towers(self) -> tuple[VisionTransformer, CLIP | TextTransformer] | None:
        """The towers for images and for text, if each ends in a linear layer that is known."""
        from open_clip import CLIP, CustomTextCLIP
        from open_clip.transformer import TextTransformer, VisionTransformer

        vision, text = self.clip.visual, self.clip.text if isinstance(self.clip, CustomTextCLIP) else self.clip
        known = isinstance(vision, VisionTransformer) and isinstance(text, CLIP | TextTransformer)
        return (vision, text) if known and vision.proj is not None and text.text_projection is not None else None

    @property
    def _towers(self) -> tuple[VisionTransformer, CLIP | TextTransformer]:
        """The towers for images and for text, each of which ends in a linear layer.

        Raises:
            ValueError: they do not.
        """
        towers = self.known_towers
        if towers is None:
            image, text = (type(part).__name__ for part in (self.clip.visual, self.clip))
            raise ValueError(
                f"model.head: the towers {image} and {text} end in no linear layer that is known; leave head out, or "
                "use tune: lora"
            )
        return towers


@dataclass(frozen=True)
class ImageJudge:
    """Adapter of a CLIP as a judge to the protocol Family.

    Attributes:
        name: the path or Hub id that the CLIP was loaded from.
        parts: the CLIP with its preprocessing, tokenizer and config.
        network: the CLIP as a network that scores.
        loading: the network's device, and the dtype of its autocast.
        head_only: nothing before the last linear layers is trained.
        shares_only: only the shares of added annotators are trained.
    """

    packing: ClassVar[None] = None

    name: str
    parts: ClipParts
    network: ClipScorer
    loading: Loading
    head_only: bool = False
    shares_only: bool = False

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """All linear layers that can be adapted, those of the multilayer perceptrons in both towers."""
        return self.linear_layers

    @cached_property
    def linear_layers(self) -> Sequence[str]:
        """The ends of the names of the linear layers that are called; attention reads the weights of its own."""
        parents = dict(self.network.named_modules())
        called = [
            name.rpartition(".")
            for name, layer in parents.items()
            if isinstance(layer, nn.Linear) and not isinstance(parents[name.rpartition(".")[0]], nn.MultiheadAttention)
        ]
        return sorted({end for _, _, end in called})

    def add_lora(self, settings: LoraSettings) -> None:
        """Add adapters to both towers; heads and a mixture are trained beside them."""
        unknown = [name for name in settings.targets if name.rpartition(".")[2] not in self.linear_layers]
        if unknown:
            raise ValueError(
                f"model.lora.targets: {', '.join(unknown)} cannot be adapted; expected suffixes of linear layers, such "
                f"as {', '.join(self.linear_layers)}"
            )
        lora.add_lora(self.network, settings)
        for parameter in self.network.beside():
            parameter.requires_grad_(True)

    def add_annotators(self, names: Sequence[str], *, prototypes: int, form: Form, seed: int) -> None:
        """Add a mixture of annotators' tastes to the network, in which all are one judge at first."""
        mixture = AnnotatorMixture(names, _width(self.network.clip), prototypes=prototypes, form=form, seed=seed)
        self.network.annotators = mixture.to(self.loading.device)

    def extend_annotators(self, names: Sequence[str]) -> None:
        """Add annotators to the judge's mixture, who begin with the mean taste."""
        assert self.network.annotators is not None
        self.network.annotators = self.network.annotators.extended(names)

    def continue_adapter(self, path: str) -> None:
        """Refuse adapters: a judge's are added to its weights when it is saved."""
        raise ValueError("model.adapter: a trained judge is a whole CLIP; name its folder as model.path")

    def unfreeze(self) -> None:
        """Unfreeze both towers and the scale, the last linear layers and the scale, or the added annotators' shares."""
        if self.shares_only:
            mixture = self.network.annotators
            assert mixture is not None and mixture.added is not None
            mixture.added.requires_grad_(True)
            return
        if self.head_only:
            for parameter in self.network.head():
                parameter.requires_grad_(True)
            return
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not name.endswith("logit_bias"))  # cancels in differences

    def frozen_copy(self) -> nn.Module:
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of both towers."""
        self.network.clip.set_grad_checkpointing(True)

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        raise ValueError(NOT_COMPILED)

    def shard_plan(self, net: nn.Module) -> ShardPlan:
        """Refuse sharding: the network is small, and its scale is a scalar."""
        raise ValueError(NOT_SHARDED)

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Return PyTorch's attention, open_clip's own."""
        if wanted == "xformers":
            raise ValueError("train.attention: xformers is not supported for judges of images; use auto or sdpa")
        return SelectedBackend("sdpa")

    def encoders(self) -> Iterable[tuple[str, nn.Module]]:
        """Return nothing: the towers belong to the trained network."""
        return ()

    def save(self, folder: Path, net: nn.Module) -> None:
        """Write a folder that open_clip and the reward model `open_clip` load, with adapters added to the weights."""
        self._write(folder, net, torch.float32)

    def export(self, folder: Path, net: nn.Module, form: str, dtype: torch.dtype | None) -> None:
        """Write the form merged, which is that of a run's model in another dtype; the arguments are Family's.

        Raises:
            ValueError: the form is another one, or other weights were read back.
        """
        if form != "merged":
            raise ValueError("a judge of images has one form, a folder of open_clip; use merged")
        written = self._write(folder, net, dtype or torch.float32)
        read = open_clip.load_parts(str(folder)).model.state_dict()
        changed = [name for name, weight in written.items() if not torch.equal(read[name], weight.float())]
        if changed:
            raise ValueError(f"{changed[0]} was read back with other numbers; use dtype float32")

    def _write(self, folder: Path, net: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Write a folder in open_clip's format, and return its weights."""
        assert isinstance(net, ClipScorer)
        # The run goes on with its adapters, so a copy absorbs them
        if lora.adapter_layers(net):
            net = copy.deepcopy(net)
            lora.absorb_adapters(net)
        weights = {name: x.detach().cpu().to(dtype) for name, x in net.clip.state_dict().items()}
        _clip_files.write(self.parts, folder, weights)
        for part in (net.attributes, net.annotators):
            if part is not None:
                part.save(folder)
        return weights

    def load_trained(self, folder: Path) -> nn.Module:
        with tensors_only():
            path = str(folder)
            net = ClipScorer(open_clip.load_parts(path).model, load_heads(path), load_mixture(path))
        return net.requires_grad_(False).eval().to(self.loading.device)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the judge's input [3, S, S], on the CPU."""
        return self.parts.preprocess(image)

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """Return the network's inputs for images [N, 3, S, S]: the images, or features [N, D] for the last layer.

        Features pass through. Each image is encoded by a call of its own, so that its features are always the same.
        """
        if not self.head_only or images.dim() == 2:
            return images.to(self.loading.device)
        with self.loading.autocast():
            return torch.cat([self.network.image_features(x[None].to(self.loading.device)).float() for x in images])

    def text_inputs(self, prompts: Sequence[str]) -> Tensor:
        """Return the network's inputs for prompts [M]: tokens [M, L], or features [M, D] for the last layer."""
        if self.head_only:
            return self._features(prompts)
        return self.tokens(prompts)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize prompts [M]: [M, L]."""
        return self.parts.tokenize(list(prompts)).to(self.loading.device)

    @cached_property
    def _features(self) -> Callable[[Sequence[str]], Tensor]:
        """A function that encodes each prompt once."""
        return TextFeatures(self.network.text_features, self.parts.tokenize, self.loading.device)

    def score(self, net: nn.Module, images: Tensor, text: Tensor) -> Tensor:
        """Return the scores [N], float32, of the inputs of N images and of M prompts (see ClipScorer)."""
        return self.judge(net, images, text)[:, 0]

    def judge(self, net: nn.Module, images: Tensor, text: Tensor, places: Tensor | None = None) -> Tensor:
        """Return the scores and the predictions of the attributes [N, 1 + A], float32 (see ClipScorer)."""
        with self.loading.autocast():
            values: Tensor = net(images, text, places)
        return values.float()


def load(
    path: str,
    loading: Loading,
    *,
    head_only: bool = False,
    random: bool = False,
    shares_only: bool = False,
    attributes: Scales = MappingProxyType({}),
) -> ImageJudge:
    """Load a CLIP to train: of open_clip or transformers, with its weights or with random ones, and new heads.

    With `shares_only` it is a trained judge, which keeps its attributes and its mixture.

    Raises:
        ValueError: the path has neither, a tower has batch normalization, or `head_only` and no known last layer.
    """
    with tensors_only(loading.allow_pickle):
        parts = _clip_files.load_start(path, random=random)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts.model.modules()):
        raise ValueError(
            f"model.path: the vision tower of {path} has batch normalization, whose running statistics are no weights; "
            "expected a vision transformer, such as ViT-B-32's"
        )
    heads, mixture = AttributeHeads(attributes, _width(parts.model)) if attributes else None, None
    if shares_only:
        heads, mixture = load_heads(path), load_mixture(path)
    network = ClipScorer(parts.model.float(), heads, mixture).requires_grad_(False).eval().to(loading.device)
    # Raises now for a tower without a known last layer, not when training begins
    if head_only:
        network.head()
    on_features = head_only or (shares_only and network.known_towers is not None)
    return ImageJudge(path, parts, network, loading, on_features, shares_only)


@torch.no_grad()
def _width(clip: CLIP) -> int:
    """Return the width of a CLIP's vectors."""
    tokens = torch.zeros(1, clip.context_length, dtype=torch.long, device=clip.logit_scale.device)
    vectors: Tensor = clip.encode_text(tokens)
    return vectors.shape[1]
