"""Cut a network to the part before a layer, by the layer's name and in the order of execution.

Wrapping `list(model.children())[:-2]` keeps layers in the order of definition and loses whatever happens between
them in `forward`. Here one forward pass is watched, and the cut is made only where it computes the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from convattn.checks import suggestion
from convattn.errors import AttachError, UnknownName
from convattn.networks.watching import INPUT, Call, Watched, watch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# sides of images for networks that do not say what they take, by the number of dimensions, the cheapest first: those of
# ImageNet, Inception, CIFAR and MNIST, a second of sound at 16 kHz, clips of 16 frames
SIDES: dict[int, tuple[int | tuple[int, ...], ...]] = {
    1: (64, 224, 1024, 16000),
    2: (64, 224, 256, 299, 32, 28, 384),
    3: (64, 32, (16, 112, 112)),
}
LIKELIEST = 224


def features(model: nn.Module, layer: str, *, example: torch.Tensor | None = None) -> nn.Sequential:
    """The part of a network from its input to the output of a layer.

    The result shares the network's layers. Each of its steps is called after the layer that it is.

    Args:
        model: the network.
        layer: name of a layer as in `model.named_modules()`, for instance `"layer3"`.
        example: an input; by default a batch of 2 random images of the size that the network names, or of one that it
            takes, from 64 pixels.

    Raises:
        UnknownName: no layer of that name; the message suggests the nearest.
        AttachError: the layer is not called, is called several times, or is fed by something computed outside any layer
            (a sum, a concatenation, a function), which a chain of layers would silently leave out.

    Example:
        >>> from convattn import networks
        >>> body = features(networks.create("timm:resnet18"), "layer3")
        >>> body(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 256, 4, 4])
    """
    names = dict(model.named_modules())
    if not layer or layer not in names:
        raise UnknownName(f"No layer is called {layer!r}. {suggestion(layer, [name for name in names if name])}")
    chain = _chain(watch_example(model) if example is None else watch(model, example), layer)
    cut = nn.Sequential()
    for position, call in enumerate(chain):
        name = call.name.replace(".", "_")
        # a layer without parameters may stand in the chain more than once
        cut.add_module(name if name not in cut._modules else f"{name}_{position}", call.module)
    return cut


def example_for(model: nn.Module, *, side: int | None = None) -> torch.Tensor:
    """A batch of 2 random images such as the network takes, on its device and in its dtype.

    Their side in pixels is the one given, or else they have the size that the network itself names: its `input_size`,
    `img_size` or `image_size`, or that of its `pretrained_cfg` or `default_cfg`; where it names none, 64 pixels.
    """
    return _images(model, _shapes(model, side)[0])


def watch_example(model: nn.Module) -> Watched:
    """A forward pass on random images of the size that the network names, or else of the first one that it takes.

    Raises:
        AttachError: the network runs on none; the message is that for the likeliest size. The model was not changed.
    """
    shapes = _shapes(model)
    dimensions = len(shapes[0]) - 1
    own = _named_size(model, dimensions)
    likeliest = shapes[0] if own else next((one for one in shapes if one[-1] == LIKELIEST), shapes[0])
    errors = {}
    for shape in shapes:
        try:
            return watch(model, _images(model, shape))
        except AttachError as error:
            errors[shape] = error
    raise errors[likeliest]


def _images(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    like = next((one for one in model.parameters() if one.is_floating_point()), images)
    return images.to(like.device, like.dtype)


def _shapes(model: nn.Module, side: int | None = None) -> list[tuple[int, ...]]:
    """The shapes of images that a network may take, the likeliest of its own first."""
    first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
    convolved, dimensions = (first.in_channels, first.weight.dim() - 2) if first is not None else (3, 2)
    own = _named_size(model, dimensions)
    if side:
        sizes = [(side,) * dimensions]
    else:
        sizes = [own] if own else []
        sizes += [one if isinstance(one, tuple) else (one,) * dimensions for one in SIDES[dimensions]]
        # what a part says holds for the whole where that only prepares its input
        sizes += [size for part in model.modules() if (size := _named_size(part, dimensions))]
    named = _named_channels(model, dimensions)
    # the first convolution that a network lists need not be the first that it calls
    channels = [convolved] if named in (None, convolved) else [named, convolved]
    return list(dict.fromkeys((count, *size) for size in sizes for count in channels if count))


def _named_size(model: nn.Module, dimensions: int) -> tuple[int, ...] | None:
    """The size that a network names itself; what it was built for comes before what its weights were trained on."""
    patches = getattr(model, "patch_embed", None)
    names = ((model, "input_size"), (model, "img_size"), (model, "image_size"), (patches, "img_size"))
    for value in (*(getattr(owner, name, None) for owner, name in names), _config(model).get("input_size")):
        if type(value) is int and value > 0:
            return (value,) * dimensions
        if _are_lengths(value) and len(value) in (dimensions, dimensions + 1):
            return tuple(value[-dimensions:])
    return None


def _named_channels(model: nn.Module, dimensions: int) -> int | None:
    """The channels that a network says it takes."""
    config = _config(model)
    # a network of timm may have been built for others than its weights, and then its first layer tells
    path = config.get("first_conv")
    if isinstance(path, str):
        layer = dict(model.named_modules()).get(path)
        if isinstance(layer, CONVOLUTIONS):
            return layer.in_channels
    for value in (getattr(model, "input_size", None), config.get("input_size")):
        if _are_lengths(value) and len(value) == dimensions + 1:
            return int(value[0])
    return None


def _config(model: nn.Module) -> dict[str, Any]:
    """What timm tells of a network: a dictionary, or an object with the same names."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, Mapping):
            return dict(config)
        if is_dataclass(config) and not isinstance(config, type):
            return dict(vars(config))
    return {}


def _are_lengths(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, tuple | list) and all(type(one) is int and one > 0 for one in value)


def _chain(seen: Watched, layer: str) -> list[Call]:
    calls = [call for call in seen.calls if call.name and call.alone and call.x is not None and call.y is not None]
    found = [i for i, call in enumerate(calls) if call.name == layer]
    if len(found) != 1:
        times = "is not called with one tensor" if not found else f"is called {len(found)} times"
        raise AttachError(f"The layer {layer!r} {times} in a forward pass, so that the network cannot be cut there.")
    start, end = found[0], calls[found[0]]
    chain = [end]
    while seen.values[end.x or 0].operator != INPUT:
        # the layers inside a call are completed before it, and none of them can feed it
        feeding = [i for i in range(start) if calls[i].y == end.x and not _within(calls[i], end)]
        if not feeding:
            raise AttachError(
                f"The input of {end.name!r} is computed outside any layer (a sum, a concatenation or a function in "
                f"forward), which a chain of layers up to {layer!r} would leave out. Cut at a layer before, or read "
                f"the map with a forward hook."
            )
        # of several layers that end in the same tensor, the outermost: the one completed last
        start = feeding[-1]
        end = calls[start]
        chain.append(end)
    return chain[::-1]


def _within(call: Call, outer: Call) -> bool:
    return call.name.startswith(outer.name + ".")
