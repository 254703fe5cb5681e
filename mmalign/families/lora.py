"""Low-rank adapters for networks of diffusers and transformers (arXiv:2106.09685)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign.families.types import LoraSettings
from mmalign.reading.weights import one_sentence, sort_metadata

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

ADAPTERS = "pytorch_lora_weights.safetensors"  # diffusers' file name
PEFT_CONFIG, PEFT_ADAPTERS = "adapter_config.json", "adapter_model.safetensors"  # peft's file names
TRAINED, LOADED = "default", "loaded"  # names of the adapter in training, and of one read back from a file
_HALVES = ((".lora_A.", ".lora_B."), (".lora_down.", ".lora_up."), (".lora.down.", ".lora.up."))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that diffusers' own preference scripts adapt


def add_lora(
    net: ModelMixin | PreTrainedModel, settings: LoraSettings, *, within: str = "", others: Sequence[str] = ()
) -> None:
    """Add adapters to the linear layers whose names end in the targets; adapter weights are float32 masters.

    `within` names the part of the network to adapt; empty means all of it. `others` are the whole names of more layers.

    The first matrix is Gaussian and the second one zero, so the network's initial outputs are unchanged. The inputs of
    adapters have dropout in train mode alone; the loop keys its draws.

    Raises:
        ValueError: no layer of the network has one of these names, or one with magnitudes is not linear.
    """
    from peft import LoraConfig

    targets = settings.targets
    # peft accepts several names if it finds one of them; the other names' layers would silently not be trained.
    known = [name for name, _ in net.named_modules() if f"{name}.".startswith(f"{within}.") or not within]
    lost = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in known)]
    if lost or not (targets or others):
        usual = linear_names(net, within) if within else ATTENTION
        raise ValueError(
            f"model.lora.targets: no layer of {within or type(net).__name__} ends in {', '.join(lost) or 'nothing'}; "
            f"expected suffixes of its layers' names, such as {', '.join(usual)}"
        )
    # Adapters, from their own seed
    ends = "|".join(map(re.escape, sorted(targets)))
    patterns = [rf"{re.escape(within)}\.(.*\.)?({ends})"] if targets else []
    # peft reads a pattern as whole names, and a list as ends of names
    modules = "|".join([*patterns, *map(re.escape, others)]) if within else list(targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=modules,
        init_lora_weights="gaussian",
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
    )
    # They are drawn on the CPU and moved, so no process touches the generators of all GPUs
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        try:
            net.add_adapter(config)
        except ValueError as error:
            raise ValueError(
                f"model.lora.targets: {', '.join([*targets, *others])} cannot be adapted: {error}"
            ) from error
    make_trainable(net, fresh=True)


def make_trainable(net: nn.Module, *, fresh: bool = False) -> None:
    """Make the adapters of a network, and nothing else, trainable float32 masters; `fresh` ones change nothing yet."""
    set_up_adapters(net, fresh=fresh)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def set_up_adapters(net: nn.Module, *, fresh: bool = False) -> None:
    """Set up the adapters of a network in float32, with magnitudes of DoRA that begin as the norms if `fresh`.

    Raises:
        ValueError: an adapted layer with magnitudes is not linear.
    """
    from mmalign.families import dora  # it imports peft

    dora.install(net, fresh=fresh)
    for layer in adapter_layers(net).values():
        # Autocast matches the dtypes of inputs and adapters; peft would first copy every input to float32.
        layer.cast_input_dtype_enabled = False
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            # Half-precision weights would lose updates of 1e-5.
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Have libraries load adapters in float32; peft rounds them to the dtype of the layers that they adapt."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = BaseTunerLayer._get_base_layer_device_and_dtype

    def device_and_float32(self: BaseTunerLayer, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype]:
        return own(self, base_layer)[0], torch.float32

    BaseTunerLayer._get_base_layer_device_and_dtype = device_and_float32
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = own


def check_adapter_path(path: str) -> None:
    """Refuse a checkpoint of a run as an adapter, since other programs cannot read it.

    Raises:
        ValueError: the path is such a checkpoint.
    """
    if (Path(path) / "checkpoint.json").is_file():
        folder = Path(path).absolute()
        step = folder.name.removeprefix("checkpoint-").lstrip("0") or "0"
        raise ValueError(
            f"model.adapter: {path} is a checkpoint; write its adapter with `mmalign export {folder.parent} "
            f"--checkpoint {step} --to peft`, and name that folder"
        )


def check_halves(file: Path) -> None:
    """Check that a file has both matrices of every adapter; the libraries would initialize the second one.

    Raises:
        ValueError: a matrix is missing.
    """
    if not file.is_file():  # on the Hub, or a pickle
        return
    with safe_open(file, "pt") as weights:
        names = {str(name) for name in weights.keys()}  # noqa: SIM118
    for name in sorted(names):
        for parameter, other in (*_HALVES, *((b, a) for a, b in _HALVES)):
            if parameter in name and (partner := name.replace(parameter, other)) not in names:
                raise ValueError(f"{file.name} lacks {partner}, the other matrix of an adapter")


def adapter_layers(net: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers of a network by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in net.named_modules() if isinstance(layer, LoraLayer)}


def folded(net: nn.Module, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the adapters' weights by peft's names, and their config, with the scale folded into the second matrices.

    A program that reads the weights alone takes alpha for the rank. After folding it is.

    Args:
        net: the network with its adapters.
        dtype: the dtype of the weights; None keeps float32.
    """
    from peft.utils import get_peft_model_state_dict

    weights: dict[str, Tensor] = get_peft_model_state_dict(net)
    for name, layer in adapter_layers(net).items():
        key = f"{name}.lora_B.weight"
        weights[key] = weights[key] * layer.scaling[TRAINED]
    configs: Any = net.peft_config
    # A set has another order in every process
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in configs[TRAINED].to_dict().items()}
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    return {name: x.detach().to(dtype or x.dtype).cpu().contiguous() for name, x in weights.items()}, config


def save_lora(
    pipeline: type[DiffusionPipeline], part: str, net: ModelMixin, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters of a pipeline's `part` in diffusers' layout, with the same bytes every time."""
    weights, config = folded(net, dtype)
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config})
    sort_metadata(folder / ADAPTERS)


def save_peft(net: nn.Module, folder: Path, name: str, revision: str | None, dtype: torch.dtype | None = None) -> None:
    """Write the adapters of a network for peft, with all that `AutoPeftModel` needs to load the base model.

    Args:
        net: the network with its adapters.
        folder: an existing folder.
        name: the path or Hub id of the base model.
        revision: its revision on the Hub.
        dtype: the dtype of the weights; None keeps float32.
    """
    weights, config = folded(net, dtype)
    # Entries that peft's `AutoPeftModel` reads to find and build the base model
    described = {
        **config,
        "base_model_name_or_path": str(Path(name).resolve()) if Path(name).exists() else name,
        "revision": revision,
        "inference_mode": True,
        "auto_mapping": {"base_model_class": type(net).__name__, "parent_library": type(net).__module__},
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True), encoding="utf-8")
    save_file({f"base_model.model.{key}": x for key, x in weights.items()}, folder / PEFT_ADAPTERS, {"format": "pt"})


def check_exportable(net: nn.Module, merged: str | None, whole: str) -> None:
    """Check that the adapters of a network are all that its run changed in the published base model.

    Args:
        net: the network.
        merged: existing adapters that the run began with.
        whole: the forms of a whole model, for the message.

    Raises:
        ValueError: the run changed other weights too.
    """
    if merged is not None:
        raise ValueError(f"this run began with {merged} merged, without which its adapter is wrong; use merged")
    if not adapter_layers(net):
        raise ValueError(f"this run trained all weights, so there is no adapter; use {whole}")


def check_peft(net: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Load a folder by peft, beside the trained adapters, and compare them.

    Raises:
        ValueError: peft cannot read the folder, or reads other weights.
    """
    from peft import PeftModel

    with one_sentence("peft cannot read back what was written", folder, "use merged"), in_float32():
        PeftModel.from_pretrained(net, folder, adapter_name=LOADED)
    compare_adapters(net, dtype)


@torch.no_grad()
def merged_weights(net: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """Return the weights of `plain`, the network without adapters, with those of `net` added in float32.

    Raises:
        ValueError: an adapted layer is missing, or is a convolution with DoRA.
    """
    weights = dict(plain.state_dict())
    for name, layer in adapter_layers(net).items():
        weights[f"{name}.weight"] = _merged(name, layer, weights[f"{name}.weight"])
    return weights


@torch.no_grad()
def absorb_adapters(net: nn.Module) -> None:
    """Add the adapters of a network to its weights, rounded once, and remove them.

    Raises:
        ValueError: an adapted layer is a convolution with DoRA.
    """
    for name, layer in adapter_layers(net).items():
        base = layer.get_base_layer()
        base.weight.data = _merged(name, layer, base.weight).to(base.weight)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, base)
    model: Any = net  # of diffusers or transformers
    model.peft_config, model._hf_peft_config_loaded = {}, False
    net.requires_grad_(False)


def _merged(name: str, layer: LoraLayer, weight: Tensor) -> Tensor:
    """Return a layer's weight with its adapter added, in float32."""
    total: Tensor = weight.float() + layer.get_delta_weight(TRAINED).float().to(weight.device)
    if TRAINED in layer.lora_magnitude_vector:  # DoRA (arXiv:2402.09353, equation 5)
        if total.dim() != 2:
            raise ValueError(f"{name}: a convolution with DoRA cannot be merged; export to peft")
        magnitudes = layer.lora_magnitude_vector[TRAINED].weight.to(total)
        total = total * (magnitudes / total.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
    return total


def compare_adapters(net: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Compare the adapter that was read back with the trained one, layer by layer, and remove it.

    Layers that only the one read back has must change nothing. The bound is the rounding of two matrices in `dtype`.

    Raises:
        ValueError: a layer's weights are lost or differ.
    """
    layers = adapter_layers(net)
    try:
        for name, layer in layers.items():
            _compare_layer(name, layer, torch.finfo(dtype or torch.float32).eps)
    finally:
        for layer in layers.values():
            layer.set_adapter([TRAINED])
            layer.delete_adapter(LOADED)
        configs: Any = net.peft_config
        del configs[LOADED]


@torch.no_grad()
def _compare_layer(name: str, layer: LoraLayer, eps: float) -> None:
    """Compare a layer's changes by both adapters, and the magnitudes of DoRA."""
    trained, loaded = (
        layer.get_delta_weight(adapter).float() if adapter in layer.lora_A else torch.zeros(())
        for adapter in (TRAINED, LOADED)
    )
    # The product of the norms of both matrices bounds the norm of their product
    norms = [
        float(matrices[TRAINED].weight.float().norm())
        for matrices in (layer.lora_A, layer.lora_B)
        if TRAINED in matrices
    ]
    bound = 4 * eps * norms[0] * norms[1] * float(layer.scaling[TRAINED]) if norms else 0.0
    if (error := float((trained - loaded).norm())) > bound:
        raise ValueError(f"{name} was read back with other numbers (by {error:.3g}; rounding explains {bound:.3g})")
    vectors = layer.lora_magnitude_vector
    if TRAINED in vectors:
        a, b = (
            vectors[adapter].weight.float() if adapter in vectors else torch.zeros(()) for adapter in (TRAINED, LOADED)
        )
        if not torch.allclose(a, b, rtol=4 * eps, atol=0):
            raise ValueError(f"{name} was read back without its magnitudes of DoRA")


def all_linear(net: nn.Module) -> list[str]:
    """Return the whole names of all linear layers of a network."""
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]


def linear_names(net: nn.Module, within: str) -> list[str]:
    """Return the last components of the names of all linear layers in a part of a network, each once."""
    prefix = f"{within}."
    names = (name for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and name.startswith(prefix))
    return sorted({name.rpartition(".")[2] for name in names})
