"""Cut a network to the part before a layer, by the layer's name and in the order of execution.

Wrapping `list(model.children())[:-2]` keeps layers in the order of definition and loses whatever happens between
them in `forward`. Here one forward pass is watched, and the cut is made only where it computes the same.
"""

import torch
from torch import nn

from convattn.checks import suggestion
from convattn.errors import AttachError, UnknownName
from convattn.networks.watching import INPUT, Call, Watched, watch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def features(model: nn.Module, layer: str, *, example: torch.Tensor | None = None) -> nn.Sequential:
    """The part of a network from its input to the output of a layer.

    The result shares the network's layers. Each of its steps is called after the layer that it is.

    Args:
        model: the network.
        layer: name of a layer as in `model.named_modules()`, for instance `"layer3"`.
        example: an input; by default a batch of 2 random images of the network's `input_size`, or 64 pixels.

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
    x = example_for(model) if example is None else example
    chain = _chain(watch(model, x), layer)
    cut = nn.Sequential()
    for position, call in enumerate(chain):
        name = call.name.replace(".", "_")
        # a layer without parameters may stand in the chain more than once
        cut.add_module(name if name not in cut._modules else f"{name}_{position}", call.module)
    return cut


def example_for(model: nn.Module, *, side: int | None = None) -> torch.Tensor:
    """A batch of 2 random images such as the network takes, on its device and in its dtype.

    Their side in pixels is the one given, or else the network's `input_size`, or 64.
    """
    first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
    channels, dimensions = (first.in_channels, first.weight.dim() - 2) if first is not None else (3, 2)
    side = side or getattr(model, "input_size", None) or 64
    images = torch.randn(2, channels, *[side] * dimensions, generator=torch.Generator().manual_seed(0))
    like = next((one for one in model.parameters() if one.is_floating_point()), images)
    return images.to(like.device, like.dtype)


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
