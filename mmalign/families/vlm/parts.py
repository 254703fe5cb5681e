"""Parts of a vision-language model that adapters may change beside its decoder: the vision tower and the projector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from mmalign.families.lora import adapter_layers, linear_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODER, TOWER, PROJECTOR = "decoder", "vision_tower", "projector"
# Names that architectures give to what comes between tower and decoder.
_BETWEEN = re.compile(r"projector|connector|merger")


def names_images(targets: Sequence[str]) -> bool:
    """Return whether `model.lora.targets` names layers that compute image features."""
    return any(target.partition(".")[0] in (TOWER, PROJECTOR) for target in targets)


def split_targets(model: PreTrainedModel, decoder: str, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the ends of layers' names in the decoder, and the whole names of layers in the other parts.

    Args:
        model: the model.
        decoder: the decoder's name in it.
        targets: ends of the decoder's layers; `decoder`, `vision_tower` or `projector` for all linear layers of a part;
            or a part, a point and an end, such as `vision_tower.q_proj`.

    Raises:
        ValueError: a part has no linear layer, or none with this end.
    """
    layers, ends, others = _image_layers(model, decoder), list[str](), list[str]()
    for target in targets:
        # The name of a part, with or without an end of its layers' names
        part, _, end = target.partition(".")
        if part == DECODER:
            ends += [end] if end else linear_names(model, decoder)
        elif part in (TOWER, PROJECTOR):
            of_part = [name for name, other in layers.items() if other == part]
            chosen = [name for name in of_part if not end or f".{name}".endswith(f".{end}")]
            if not chosen:
                known = sorted({name.rpartition(".")[2] for name in of_part})
                expected = f"expected one of {', '.join(known)}" if known else f"leave out {part}"
                raise ValueError(
                    f"model.lora.targets: no linear layer of the {part} of a {type(model).__name__} ends in "
                    f"{end or 'anything'}; {expected}"
                )
            others += chosen
        else:
            ends.append(target)
    return list(dict.fromkeys(ends)), list(dict.fromkeys(others))


def adapted_image_layers(model: PreTrainedModel, decoder: str) -> list[nn.Module]:
    """Return the adapted layers outside the decoder, which change image features."""
    return [layer for name, layer in adapter_layers(model).items() if not name.startswith(f"{decoder}.")]


def _image_layers(model: PreTrainedModel, decoder: str) -> dict[str, str]:
    """Return the part of every linear layer that is neither the decoder's nor the head, by the layer's name."""
    head = model.get_output_embeddings()
    return {
        name: PROJECTOR if _BETWEEN.search(name) else TOWER
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not name.startswith(f"{decoder}.")
    }
