"""Which layers of a network are its classifier: those that have to learn the classes of new images."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from convattn.attachment.freezing import base_layers, unwrapped
from convattn.attachment.maps import Maps
from convattn.attachment.sums import WEIGHTED
from convattn.attachment.wrapper import layer_of

# of torchvision, CIFAR and Cadene's networks; then of torchvision's auxiliary outputs and detected regions
NAMES = ("fc", "classifier", "head", "heads", "linear", "last_linear")
FURTHER = ("aux_classifier", "AuxLogits", "aux1", "aux2", "roi_heads")
NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")


def find(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a network that are its classifier; None where that cannot be told.

    The network's own word comes first (`get_classifier()` or the configuration that timm gives it), then the usual
    names, both also in a network that is all that another module holds. Else it is the layer of weights that gives the
    output of a forward pass on random images, without a norm behind it, such as the last convolution of a U-Net; where
    the network does not run on these, it is the last layer in `model.modules()` if that is linear. An encoder has none.
    """
    model = unwrapped(model)
    inside: nn.Module | None = model
    while inside is not None:
        named = _by_its_word(inside)
        if named is None:
            usual = [child for name, child in inside.named_children() if name in (*NAMES, *FURTHER)]
            named = [child for child in usual if _has_weights(child)] or None
        if named is not None:
            return [one for one in named if _has_weights(one)]
        inside = _only_part(inside)
    with suppress(Exception):
        return _giving_the_output(model)
    leaves = [layer for layer in base_layers(model) if next(layer.children(), None) is None]
    last = [layer for layer in leaves if _has_weights(layer)][-1:]
    return last if all(isinstance(layer, nn.Linear) for layer in last) else None


def _by_its_word(model: nn.Module) -> list[nn.Module] | None:
    """What a network calls its classifier; None where it says nothing."""
    with suppress(Exception):
        answer: Any = model.get_classifier()  # type: ignore[operator]
        layers = [one for one in _listed(answer) if isinstance(one, nn.Module)]
        if layers:
            return layers
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        names = config.get("classifier") if isinstance(config, Mapping) else getattr(config, "classifier", None)
        with suppress(AttributeError):
            layers = [model.get_submodule(name) for name in _listed(names) if isinstance(name, str) and name]
            if layers:
                return layers
    return None


def _listed(thing: Any) -> list[Any]:
    return list(thing) if isinstance(thing, tuple | list) else [thing]


def _only_part(model: nn.Module) -> nn.Module | None:
    """The one part of a module that has all of its parameters."""
    parts = [layer_of(child) for child in model.children() if _has_weights(child)]
    return parts[0] if len(parts) == 1 and next(model.parameters(recurse=False), None) is None else None


def _giving_the_output(model: nn.Module) -> list[nn.Module]:
    maps = Maps(model, None)
    values = maps.seen.values
    needed = [one for one in values if any(values[index].ancestors >> one.index & 1 for index in maps.output)]
    data = [one for one in needed if maps.seen.is_data(one)]
    last = [
        one
        for one in data
        if one.operator.startswith(WEIGHTED)
        and not any(other.depends_on(one) and _works(other.operator) for other in data)
    ]
    layers = {name: model.get_submodule(name) for name in dict.fromkeys(one.within for one in last) if name}
    return [layer for layer in layers.values() if _has_weights(layer)]


def _works(operator: str) -> bool:
    return operator.startswith(WEIGHTED) or any(norm in operator for norm in NORMS)


def _has_weights(module: nn.Module) -> bool:
    return any(one.dim() > 1 for layer in base_layers(module) for one in layer.parameters(recurse=False))
