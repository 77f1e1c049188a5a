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
        classes: width of the classifier; None leaves the network's own. Another number than its own gives a new
            classifier with random weights, as timm's `reset_classifier` and torchvision's guide to fine-tuning do.
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
    network = _fetched(name, pretrained, lambda: timm.create_model(name, pretrained=pretrained, **more))
    if classes not in (None, getattr(network, "num_classes", None)):
        _reset_classifier(network, name, classes)
    config: Any = network.pretrained_cfg
    return _described(network, mean=config["mean"], std=config["std"], size=config["input_size"][-1])


def _torchvision(name: str, classes: int | None, pretrained: bool, more: Mapping[str, Any]) -> nn.Module:
    models = checks.extra("torchvision.models", f"The network 'torchvision:{name}'")
    if name not in models.list_models():
        raise UnknownName(f"torchvision has no network {name!r}. {checks.suggestion(name, models.list_models())}")
    brings = models.get_model_weights(name).DEFAULT
    preset = brings.transforms()
    chosen = "DEFAULT" if pretrained else None
    builder = models.get_model_builder(name)
    if classes is not None and builder.__module__.startswith("torchvision.models.detection"):
        raise InvalidOption(f"torchvision:{name} is a detector: build it with its own num_classes and attach to it.")
    # a network around a backbone would fetch the backbone's weights
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    network = _fetched(name, pretrained, lambda: models.get_model(name, weights=chosen, **backbone, **more))
    if classes is not None:
        _renew_classifier(network, name, len(brings.meta.get("categories", ())), classes)
    size = getattr(preset, "crop_size", [None])[0]
    return _described(
        network, mean=getattr(preset, "mean", IMAGENET_MEAN), std=getattr(preset, "std", IMAGENET_STD), size=size
    )


def _reset_classifier(network: Any, name: str, classes: int | None) -> None:
    """Give a network of timm a new classifier of another width, and leave its pooling and its kind of head.

    By the call that timm has for it: its constructor of EfficientNet draws a classifier from a range that grows as
    classes become fewer, and training starts at ten times the loss of a guess.
    """
    reset = getattr(network, "reset_classifier", None)
    if reset is None:
        raise InvalidOption(f"timm:{name} has no classifier whose number of classes could be set.")
    takes, options = inspect.signature(reset).parameters, {}
    if "global_pool" in takes and takes["global_pool"].default is not None:
        # in older versions of timm what is left out means average pooling
        pool = getattr(network, "global_pool", takes["global_pool"].default)
        options["global_pool"] = getattr(pool, "pool_type", pool)
    if "distillation" in takes:
        options["distillation"] = getattr(network.get_classifier(), "distillation", False)
    reset(classes, **options)


def _renew_classifier(network: nn.Module, name: str, own: int, classes: int) -> None:
    """Give the layers of a network of torchvision that have an output for each of its `own` classes as many as asked.

    They start as PyTorch's layers do, as in torchvision's guide to fine-tuning: its constructors take no number of
    classes beside pretrained weights, and those of EfficientNet and MNASNet have the fault of timm's EfficientNet.
    """
    widths_of = {nn.Linear: "out_features", nn.Conv2d: "out_channels", nn.Conv3d: "out_channels"}
    layers: list[Any] = [one for one in network.modules() if getattr(one, widths_of.get(type(one), ""), None) == own]
    if not layers:
        raise InvalidOption(f"torchvision:{name} has no classifier whose number of classes could be set.")
    for layer in layers if own != classes else []:
        for key, value in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(value.new_empty(classes, *value.shape[1:])))
        setattr(layer, widths_of[type(layer)], classes)
        layer.reset_parameters()


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
        with own_code.running(name):
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
