"""One adapter for all vision-language models of transformers; quirks.py has the differences of their types.

B is the number of pairs, N of rows, L the longest row's tokens, R the longest response's, n an image's tokens, D the
decoder's width.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.attention import decoders
from mmalign.attention.choice import SelectedBackend, install_backend, select_backend
from mmalign.config import DecodingConfig
from mmalign.families import quantize, shapes
from mmalign.families.lora import (
    PEFT_CONFIG,
    absorb_adapters,
    adapter_layers,
    add_lora,
    in_float32,
    linear_names,
    make_trainable,
    set_up_adapters,
)
from mmalign.families.types import GeneratedText, ImageFeatures, ImageView, Loading, LoraSettings, Mixture
from mmalign.families.vlm.checks import check_one_image, check_processor, check_type, remove_dropout
from mmalign.families.vlm.decoder_inputs import decoder_inputs
from mmalign.families.vlm.export import adapter_names, export, read_adapter, save_adapters, save_model
from mmalign.families.vlm.generation import GenerationPrompt, generate, masking_unsupported_reason
from mmalign.families.vlm.image_features import frozen_parts, move_parameters, pack_features, unpack_features
from mmalign.families.vlm.packing import build_packed_mask, enable_packing, packed_inputs, unpacked_reason
from mmalign.families.vlm.parts import adapted_image_layers, names_images, split_targets
from mmalign.families.vlm.processor import HFProcessor
from mmalign.families.vlm.quirks import quirks_of
from mmalign.families.vlm.token_scorer import TokenScorer, unwrap
from mmalign.language.tokens import TokenizedResponse, Tokens
from mmalign.policy.sharding import ShardPlan
from mmalign.reading.weights import every_tensor, intact, tensors_only, use_safetensors
from mmalign.rng import KeyedRNG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class ImageTextToText:
    """Adapter of a model and its processor to the protocol VisionLanguage."""

    name: str
    network: TokenScorer
    processor: HFProcessor
    loading: Loading

    @property
    def _model(self) -> PreTrainedModel:
        return self.network.model

    @property
    def _decoder(self) -> str:
        """The name of the language model in the network."""
        decoder = self._model.get_decoder()
        return next(str(name) for name, module in self.network.named_modules() if module is decoder)

    @property
    def _decoder_in_model(self) -> str:
        return self._decoder.removeprefix("model.")

    def adapts_images(self, targets: Sequence[str], adapter: str | None) -> bool:
        if adapter is None:
            return names_images(targets)
        return any(f".{self._decoder_in_model}." not in name for name in adapter_names(adapter))

    @torch.no_grad()
    def encode_images(self, views: Mapping[str, ImageView]) -> ImageFeatures:
        """Encode images one at a time, since rounding depends on the batch.

        Raises:
            ValueError: the number of an image's features differs from the number of its tokens.
        """
        if adapted_image_layers(self._model, self._decoder_in_model):
            return ImageFeatures(views=dict(views))
        if any(view.features is None for view in views.values()):
            for _, part in self.encoders():
                move_parameters(part, self.device)  # they may have been moved to the CPU
        return ImageFeatures(
            {
                key: self._encode(view) if view.features is None else unpack_features(view.features, self.device)
                for key, view in views.items()
            }
        )

    @property
    def device(self) -> torch.device:
        return self.loading.device

    @property
    def half(self) -> torch.dtype | None:
        return self.loading.half

    def features_as_tensors(self, features: ImageFeatures) -> dict[str, dict[str, Tensor]]:
        return {key: pack_features(found) for key, found in features.images.items()}

    def encoders(self) -> Sequence[tuple[str, nn.Module]]:
        return self._encoders

    @cached_property
    def _encoders(self) -> Sequence[tuple[str, nn.Module]]:
        return tuple(frozen_parts(self.network, {id(p) for p in _learning(self._model)}))

    def _encode(self, view: ImageView) -> BaseModelOutputWithPooling:
        # The call takes what its signature names; processors return more
        model, known = self._model, inspect.signature(self._model.get_image_features).parameters
        given = {k: x.to(self.loading.device) for k, x in view.tensors.items() if k in known}
        with self.loading.autocast():
            output = model.get_image_features(**given, return_dict=True)
        # Every image token needs its feature
        pooled = output.pooler_output
        number = sum(x.shape[-2] for x in pooled)
        expected = view.ids.count(self.processor.image_token_id)
        if number != expected:
            raise ValueError(
                f"model.path: the processor of {self.name} gives an image {expected} tokens, and the model {number} "
                "features; it belongs to another model; copy the processor's files again"
            )
        output.grid = given.get("image_grid_thw")
        # Drop the tower's own states, which take more memory than the features that a decoder reads.
        return unpack_features(pack_features(output), self.loading.device)

    def token_logps(
        self, net: nn.Module, tokens: Tokens, features: ImageFeatures, targets: Tensor | None = None
    ) -> Tensor:
        """Apply the head only to the hidden states that predict response tokens."""
        mask, wanted = tokens.response_mask, tokens.responses if targets is None else targets
        positions, inputs = self._inputs(tokens, features)
        with self.loading.autocast():
            logps = net(positions, wanted[mask], **inputs)
        if features.views and logps.requires_grad:
            # Launched processes wait for a gradient of every adapter, also of a tower's last layers without effect
            layers = adapted_image_layers(self._model, self._decoder_in_model)
            logps = logps + sum(0.0 * p.sum() for layer in layers for p in layer.parameters() if p.requires_grad)
        filled = mask.view(*mask.shape, *[1] * (wanted.dim() - 2))
        return torch.zeros(wanted.shape, device=logps.device).masked_scatter(filled, logps)

    def _inputs(self, tokens: Tokens, features: ImageFeatures) -> tuple[Tensor, dict[str, object]]:
        """Return the indices that predict the responses' tokens, row by row, and the model's inputs."""
        model, quirks = self._model, self.processor.quirks
        features = self._encoded(features, {key for row in tokens.images for key in row})
        packed_mask = build_packed_mask(tokens, quirks)
        # Pack only if that saves tokens, by shared prompts or by dropped padding.
        if packed_mask.length < tokens.ids.numel() and not self._unpacked_reason(packed_mask.longest):
            return packed_inputs(model, quirks, tokens, packed_mask, features)
        images = [features.images[key] for row in tokens.images for key in row]
        positions = tokens.is_response.flatten().nonzero()[:, 0]
        return positions - 1, decoder_inputs(model, quirks, tokens.ids, tokens.mask, tokens.is_response, images)

    def _encoded(self, features: ImageFeatures, keys: Set[str]) -> ImageFeatures:
        """Encode the images of these keys that adapters change, with the adapters on or off as they are."""
        return features | ImageFeatures(
            {key: self._encode(features.views[key]) for key in keys & features.views.keys()}
        )

    def _unpacked_reason(self, longest: int) -> str | None:
        """Return the reason why rows of up to `longest` tokens are not packed; None if they are."""
        if not self.loading.pack_responses:
            return "train.pack_responses is off"
        return unpacked_reason(self._model.get_decoder(), longest)

    @property
    def packing(self) -> str:
        why = self._unpacked_reason(self.processor.max_length)
        if why and self._unpacked_reason(0):
            return f"packing: off; each response runs with its own prompt and images, since {why}"
        unless = f", unless rows are too long: {why}" if why else ""
        return f"packing: the responses to a prompt share one run of it and its images{unless}"

    def argmax(self, net: nn.Module, tokens: Tokens, features: ImageFeatures, avoided: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            positions, inputs = self._inputs(tokens, features)
        targets = None if avoided is None else avoided[tokens.response_mask]
        with self.loading.autocast():
            tokens_found = unwrap(net).argmax(positions, targets, **inputs)
        return tokens.responses.masked_scatter(tokens.response_mask, tokens_found)

    @property
    def image_masking_unsupported_reason(self) -> str | None:
        return masking_unsupported_reason(self._model)

    def generate(
        self,
        net: nn.Module,
        prompts: Sequence[TokenizedResponse],
        features: ImageFeatures,
        decoding: DecodingConfig,
        *,
        rows: Sequence[int],
        rng: KeyedRNG,
        hidden: Sequence[Tensor] | None = None,
        stop: Sequence[str] = (),
        mixture: Mixture | None = None,
    ) -> list[GeneratedText]:
        if hidden is not None and self.image_masking_unsupported_reason:
            raise ValueError(f"model.path: {self.name}: {self.image_masking_unsupported_reason}; use another model")
        masks = [None] * len(prompts) if hidden is None else hidden
        asked = [GenerationPrompt(*one) for one in zip(prompts, rows, masks, strict=True)]
        with torch.no_grad():
            features = self._encoded(features, {key for prompt in prompts for key in prompt.images})
        with self.loading.autocast():
            return unwrap(net).run(
                lambda model: generate(model, self.processor, asked, features, decoding, rng, stop, mixture)
            )

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """All linear layers of the decoder."""
        return linear_names(self._model, self._decoder_in_model)

    @property
    def linear_layers(self) -> Sequence[str]:
        return self.default_lora_targets

    def add_lora(self, settings: LoraSettings) -> None:
        """Adapt the decoder, and the vision tower or the projector if the targets name them (`parts.split_targets`)."""
        within = self._decoder_in_model
        targets, others = split_targets(self._model, within, settings.targets)
        add_lora(self._model, replace(settings, targets=targets), within=within, others=others)

    def continue_adapter(self, path: str) -> None:
        read_adapter(self._model, path)
        make_trainable(self._model)

    def unfreeze(self) -> None:
        """Unfreeze the decoder and its head; images are encoded once, since the parts that encode them stay frozen."""
        for parameter in _learning(self._model):
            parameter.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """Copy the decoder and its head; parameters that are never trained are shared with the original."""
        learning = _learning(self._model)
        shared = {id(p): p for p in self.network.parameters() if p not in learning}
        return copy.deepcopy(self.network, shared).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        self._model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """Return the decoder's layers."""
        return list(unwrap(net).model.get_decoder().layers)

    def shard_plan(self, net: nn.Module) -> ShardPlan:
        """Return the decoder's layers as shards; all that encodes images stays whole, since it runs by itself."""
        sharded = _learning(unwrap(net).model)
        whole = [p for p in net.parameters() if p not in sharded]
        if any(p.requires_grad for p in whole):
            raise ValueError(
                "model.lora.targets: adapters of the vision tower or the projector train in whole networks alone; set "
                "train.sharding: none, or leave them out"
            )
        return ShardPlan(self.blocks(net), whole, methods=("argmax", "run"))

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Set the decoder's attention; the vision tower stays unchanged, and with sdpa the decoder too."""
        decoder = self._model.get_decoder()
        dtype = self.loading.half or torch.float32
        against = decoders.xformers_unsupported_reason(decoder)
        choice = select_backend(wanted, self.loading.device, dtype, decoders.head_sizes(decoder), against)
        return install_backend(wanted, choice, partial(decoders.install, decoder))

    def save(self, folder: Path, net: nn.Module) -> None:
        """Write adapters for peft if the network has them, else the model for transformers; both with the processor."""
        model = unwrap(net).model
        if adapter_layers(model):
            save_adapters(self, model, folder)
        else:
            save_model(self, model, folder)

    def export(self, folder: Path, net: nn.Module, form: str, dtype: torch.dtype | None) -> None:
        export(self, unwrap(net).model, folder, form, dtype)

    def load_trained(self, folder: Path) -> nn.Module:
        mend = "`mmalign train` writes it again"
        with intact("output", folder, "a trained model", mend), tensors_only(), every_tensor():
            if (folder / PEFT_CONFIG).is_file():
                with in_float32():
                    self._model.load_adapter(str(folder))
                set_up_adapters(self._model)
                return self.network
            if not (folder / "config.json").is_file():  # transformers would take the defaults, of a model of any size
                raise FileNotFoundError("config.json is missing")
            model = type(self._model).from_pretrained(folder, dtype=self._model.dtype)
        # A new model has transformers' attention, and gets the backend of the base
        if (backend := decoders.installed(self._model.get_decoder())) is not None:
            decoders.install(model.get_decoder(), backend)
        return TokenScorer(model.to(self.loading.device).requires_grad_(False).eval())


def _learning(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the parameters that full fine-tuning trains: those of the decoder and its head."""
    return {p for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}


def load(path: str, model_type: str, loading: Loading) -> ImageTextToText:
    """Load a model that AutoModelForImageTextToText supports from a folder or the Hub, frozen, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, the processor is another model's, or the model cannot be trained here.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    # Model and processor, checked against each other
    dtype = loading.half if loading.half is not None and loading.network_half else torch.float32
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": dtype}
    kind = f"a vision-language model ({model_type})"
    with intact("model.path", path, kind), tensors_only(loading.allow_pickle), every_tensor():
        # Shapes alone for a plan, or weights
        if loading.shapes_only:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            with shapes.META:
                model = AutoModelForImageTextToText.from_config(config, **options)
            if loading.quantize is not None:
                quantize.quantize_shapes(model, loading.quantize, "transformers")
        else:
            if loading.quantize is not None:
                options["quantization_config"] = quantize.configuration(loading.quantize, "transformers", dtype)
            safe = use_safetensors(path, loading.allow_pickle)
            model = AutoModelForImageTextToText.from_pretrained(
                path, revision=loading.revision, variant=loading.variant, use_safetensors=safe, **options
            )
    # Quantized layers are fitted; an adapter that the run begins with becomes a part of the base
    if loading.quantize is not None:
        quantize.fit_for_training(model, dtype)
    if loading.adapter is not None and not loading.shapes_only:
        read_adapter(model, loading.adapter)
        absorb_adapters(model)
    prompt_processor = load_processor(path, model_type, loading.revision, loading.template_arguments, model.config)
    processor = prompt_processor.processor
    check_type(path, model_type, model, processor)
    check_processor(path, model, processor)
    # Network, frozen, and one image as a test
    remove_dropout(model)
    if loading.pack_responses:
        enable_packing(model.get_decoder())
    network = TokenScorer(model.to(loading.device).requires_grad_(False).eval())
    family = ImageTextToText(path, network, prompt_processor, loading)
    if not loading.shapes_only:
        check_one_image(family)
    return family


def load_processor(
    path: str,
    model_type: str,
    revision: str | None = None,
    template_arguments: Mapping[str, object] | None = None,
    config: PreTrainedConfig | None = None,
) -> HFProcessor:
    """Load the tokenizer and image preprocessor of a model, without its weights; `config` None loads that too.

    Raises:
        ValueError: a file is missing or damaged, or the chat template has no variable of that name.
    """
    from transformers import AutoConfig, AutoProcessor

    with intact("model.path", path, f"the processor of a {model_type}"), tensors_only():
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
        config = config or AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    longest = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)  # no limit without this entry
    # A model that is not supported may have no image token; loading its weights refuses it
    image_token_id = getattr(config, "image_token_id", -1)
    read = HFProcessor(processor, quirks_of(model_type), image_token_id, longest, template_arguments or {})
    if template_arguments:
        read.template.check_arguments()
    return read
