"""Hyper-parameters of all methods, by name; reading them imports no torch."""

from __future__ import annotations

from types import ModuleType

from mmalign.config.base import MethodConfig
from mmalign.config.methods import judges, online_images, online_responses, text_to_image, vision_language
from mmalign.config.methods.kinds import ThumbsMethodConfig
from mmalign.registry import check_known, import_class, is_outside


def _methods_in(*modules: ModuleType) -> tuple[type[MethodConfig], ...]:
    """Return the configurations with a name that modules define, sorted."""
    classes = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    configs = [kind for kind in classes if issubclass(kind, MethodConfig) and _name(kind)]
    return tuple(sorted(configs, key=lambda config: config.__name__.lower()))


def _name(config: type[MethodConfig]) -> str:
    """Return the name of a configuration's method; empty for a base class."""
    name = config.model_fields["name"].default
    return name if isinstance(name, str) else ""


# The methods of each modality
METHODS: dict[str, tuple[type[MethodConfig], ...]] = {
    "text_to_image": _methods_in(text_to_image, online_images),
    "step_judge": (judges.StepPreferenceConfig,),
    "image_judge": (judges.BradleyTerryConfig,),
    "vision_language": _methods_in(vision_language, online_responses),
}
_BY_NAME = {_name(config): (modality, config) for modality, configs in METHODS.items() for config in configs}


def find_method(name: str) -> tuple[str, type[MethodConfig]]:
    """Return the modality and the configuration class of the method called `name`, or "module:Class" from outside.

    Raises:
        ValueError: no method has that name, or the class from outside is no configuration of a method.
    """
    if is_outside(name):
        config = import_class("method.name", name, MethodConfig)
        check_known(f"method.name: {name} has the modality", config.modality, METHODS)
        return config.modality, config
    check_known("method.name: there is no method", name, _BY_NAME)
    return _BY_NAME[name]


def learns_from_thumbs(name: str) -> bool:
    """Return whether the method called `name` learns from single outputs with labels.

    Raises:
        ValueError: no method has that name.
    """
    return issubclass(find_method(name)[1], ThumbsMethodConfig)
