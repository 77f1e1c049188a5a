"""A name in, a network out."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from convattn import checks, own_code
from convattn.errors import InvalidOption, UnknownName, WeightsError
from convattn.networks import widths
from convattn.networks.cifar_resnet import (
    NETWORKS,
    BasicBlock,
    CifarResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from convattn.networks.weights import load

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "create",
    "given",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "wider",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def create(name: str, *, classes: int | None = None, weights: str | Path | None = None) -> nn.Module:
    """Create a network by name.

    The network has the attributes `input_mean` and `input_std` (one number for each channel of an image scaled to
    0..1) and `input_size` (the side in pixels that it was made for, or None).

    Args:
        name: one of ours (`"resnet20"`, 32, 44, 56, 110), `"timm:NAME"`, `"torchvision:NAME"`, or
            `"FILE.py:function"`, a function that returns a network and may take `classes` or `num_classes`;
            a bare name is ours first, then timm's.
        classes: width of the classifier; None leaves the network's own.
        weights: `"pretrained"`, `"none"` or None for random ones, or a file: safetensors, or a pickle of tensors.

    Raises:
        UnknownName: no such network; the message suggests the nearest.
        InvalidOption: `classes` below 1.
        WeightsError: weights that cannot be had or belong to another network.

    Example:
        >>> network = create("resnet20", classes=7)
        >>> network.input_size
        32
    """
    if classes is not None:
        checks.positive("create", "classes", classes)
    if not isinstance(name, str):
        raise UnknownName(f"A network is named by a text, got {name!r}.")
    pretrained = weights == "pretrained"
    network = _build(str(name), classes, pretrained)
    if weights is not None and weights not in ("none", "pretrained"):
        load(network, weights, name=str(name))
    return network


def wider(name: str, *, classes: int | None = None, parameters: int) -> nn.Module:
    """The network of that name with random weights, widened to about that number of parameters.

    The search for the width leaves PyTorch's random numbers as they are.

    Args:
        name: as in `create`; a function of a file takes `width`, a factor that is 1.0 by default.
        classes: width of the classifier; None leaves the network's own.
        parameters: more than the network has; the nearest number that its width allows is taken.

    Raises:
        UnknownName: no such network.
        InvalidOption: it has no option for its width, or that many parameters already.

    Example:
        >>> network = wider("resnet20", classes=10, parameters=280_000)
        >>> sum(parameter.numel() for parameter in network.parameters())
        279503
    """

    def build(options: Mapping[str, Any]) -> nn.Module:
        return _build(name, classes, False, options)

    ours = name.rpartition(":")[0] == "" and name in NETWORKS
    source = "own" if ours or own_code.is_named(name) else name.rpartition(":")[0] or "timm"
    return build(widths.options(name, source, build, parameters))


def given(network: nn.Module, *, like: object = None) -> nn.Module:
    """A network that a function of the user built, with the attributes that `create` gives a network.

    What it lacks of them it takes from `like`, else it is what networks for ImageNet have.
    """
    return _described(
        network,
        mean=getattr(network, "input_mean", getattr(like, "input_mean", IMAGENET_MEAN)),
        std=getattr(network, "input_std", getattr(like, "input_std", IMAGENET_STD)),
        size=getattr(network, "input_size", getattr(like, "input_size", None)),
    )


def _build(
    name: str, classes: int | None, pretrained: bool, more: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """Build a network, with `more` options of its own."""
    if own_code.is_named(name):
        return _own(name, classes, pretrained, more)
    if name.endswith(".py"):
        raise UnknownName(f"{name} is a file: name the function in it that returns the network, {name}:FUNCTION.")
    source, _, bare = name.rpartition(":")
    if source == "timm" or (source == "" and bare not in NETWORKS):
        return _timm(bare, classes, pretrained, more, bare_name=source == "")
    if source == "torchvision":
        return _torchvision(bare, classes, pretrained, more)
    if source:
        raise UnknownName(
            f"No source of networks is called {source!r}: use timm:NAME, torchvision:NAME or FILE.py:NAME."
        )
    if pretrained:
        raise WeightsError(f"{bare} brings no pretrained weights: give a file of weights instead.")
    given = {} if classes is None else {"classes": classes}
    return _described(NETWORKS[bare](**given, **more), size=32)


def _timm(name: str, classes: int | None, pretrained: bool, more: Mapping[str, Any], *, bare_name: bool) -> nn.Module:
    try:
        timm = checks.extra("timm", f"The network {name!r}")
    except ImportError as error:
        if bare_name:
            raise UnknownName(
                f"No network of ours is called {name!r}, and timm is not installed. {checks.suggestion(name, NETWORKS)}"
            ) from error
        raise
    if not timm.is_model(name):
        known = [*NETWORKS, *timm.list_models()] if bare_name else timm.list_models()
        raise UnknownName(f"No network is called {name!r}. {checks.suggestion(name, known)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownName(
            f"No weights of timm are called {name!r}. {checks.suggestion(name, timm.list_pretrained())}"
        ) from error
    options = dict(more) if classes is None else {"num_classes": classes, **more}
    network = _fetched(name, pretrained, lambda: timm.create_model(name, pretrained=pretrained, **options))
    config: Any = network.pretrained_cfg
    return _described(network, mean=config["mean"], std=config["std"], size=config["input_size"][-1])


def _torchvision(name: str, classes: int | None, pretrained: bool, more: Mapping[str, Any]) -> nn.Module:
    models = checks.extra("torchvision.models", f"The network 'torchvision:{name}'")
    if name not in models.list_models():
        raise UnknownName(f"torchvision has no network {name!r}. {checks.suggestion(name, models.list_models())}")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    chosen = "DEFAULT" if pretrained else None
    # a network around a backbone would fetch the backbone's weights
    takes = inspect.signature(models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
    network = _fetched(name, pretrained, lambda: models.get_model(name, weights=chosen, **backbone, **more))
    if classes is not None:
        _reset_classifier(network, name, classes)
    size = getattr(preset, "crop_size", [None])[0]
    return _described(
        network, mean=getattr(preset, "mean", IMAGENET_MEAN), std=getattr(preset, "std", IMAGENET_STD), size=size
    )


def _reset_classifier(network: nn.Module, name: str, classes: int) -> None:
    # torchvision takes num_classes only without pretrained weights, so the last linear layer is replaced for both
    linear = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InvalidOption(f"torchvision:{name} has no linear classifier whose number of classes could be set.")
    path, old = linear[-1]
    if old.out_features != classes:
        fresh = nn.Linear(old.in_features, classes, bias=old.bias is not None)
        parent, _, key = path.rpartition(".")
        setattr(network.get_submodule(parent), key, fresh)


def _own(name: str, classes: int | None, pretrained: bool, more: Mapping[str, Any]) -> nn.Module:
    build = own_code.load(name)
    accepted = inspect.signature(build).parameters
    options: dict[str, Any] = {}
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
    for key in ("classes", "num_classes"):
        if classes is not None and (key in accepted or (anything and key == "classes")):
            options[key] = classes
    classes_taken = bool(options)
    options |= {key: value for key, value in more.items() if key in accepted or anything}
    if pretrained:
        if "pretrained" not in accepted:
            raise WeightsError(f"{name} takes no argument `pretrained`: give a file of weights instead.")
        options["pretrained"] = True
    try:
        network = build(**options)
    except Exception as error:
        raise InvalidOption(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UnknownName(f"{name} returned {type(network).__name__}, expected a torch.nn.Module.")
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if classes is not None and not classes_taken and linear and linear[-1].out_features != classes:
        raise InvalidOption(
            f"{name} takes no argument `classes` and returned a network of {linear[-1].out_features} classes, "
            f"not {classes}."
        )
    return given(network)


def _fetched(name: str, pretrained: bool, build: Callable[[], nn.Module]) -> nn.Module:
    if not pretrained:
        return build()
    try:
        return build()
    except Exception as error:
        raise WeightsError(
            f"The pretrained weights of {name} could not be fetched ({checks.reason(error)}): give a file."
        ) from error


def _described(
    network: nn.Module, *, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD, size: int | None = None
) -> nn.Module:
    for key, value in (("input_mean", tuple(mean)), ("input_std", tuple(std)), ("input_size", size)):
        # not through Module.__setattr__, whose type would be a tensor or a module
        object.__setattr__(network, key, value)
    return network
