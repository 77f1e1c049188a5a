"""Where attention can stand in a network. Pure: a model in, places out."""

from dataclasses import dataclass

from torch import nn

from convattn.attachment.wrapper import ATTENTION, Attached
from convattn.errors import AttachError
from convattn.nn import Head

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# the residual blocks of torchvision, timm and convattn share these names and the names of their layers
BLOCKS = ("BasicBlock", "Bottleneck")


@dataclass(frozen=True)
class Place:
    """A layer on whose output attention can stand: its name, what it is, the channels and dimensions of its map."""

    name: str
    place: str
    channels: int
    dimensions: int


def residual(model: nn.Module) -> list[Place]:
    """The last layer of the residual branch of every block, just before the sum.

    Raises:
        AttachError: the network has no residual block that is known.
    """
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ in BLOCKS and hasattr(module, "conv2"):
            found.append(_end_of_branch(f"{name}." if name else "", module))
    # a layer that ends several blocks is one site
    layers = [model.get_submodule(place.name) for place in found]
    found = [place for i, place in enumerate(found) if layers[i] not in layers[:i]]
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no residual block (BasicBlock or Bottleneck with conv1, bn1, conv2, bn2), "
            f"before whose sum a gate could stand. The model was not changed."
        )
    return found


def pool(model: nn.Module) -> list[Place]:
    """The global pooling layer before the classifier.

    Raises:
        AttachError: the network has no such layer of its own, or several.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    found = [(name, module) for name, module in model.named_children() if _pools_globally(module)]
    if len(found) != 1 or not linear:
        listed = ", ".join(name for name, _ in found) or "none"
        raise AttachError(
            f"{type(model).__name__} needs exactly one global pooling layer, as a layer of its own, and a linear "
            f"classifier behind it for a pooling head; found: {listed}. The model was not changed."
        )
    name, _ = found[0]
    convolution = next((module for module in model.modules() if type(module) in CONVOLUTIONS), None)
    dimensions = CONVOLUTIONS[type(convolution)] if convolution is not None else 2
    return [Place(name, "pool", linear[-1].in_features, dimensions)]


def _end_of_branch(prefix: str, block: nn.Module) -> Place:
    last = "3" if hasattr(block, "conv3") else "2"
    convolution, norm = getattr(block, f"conv{last}"), f"bn{last}"
    # networks that come with attention have it as the last layer of the branch
    end = "se" if isinstance(getattr(block, "se", None), nn.Module) else norm
    if type(convolution) not in CONVOLUTIONS or not hasattr(block, norm):
        raise AttachError(
            f"The block {prefix.rstrip('.') or 'itself'} does not end in conv{last} and {norm}. "
            f"The model was not changed."
        )
    if hasattr(getattr(block, end), ATTENTION) and not isinstance(getattr(block, end), Attached):
        raise AttachError(f"{prefix}{end} has a part called {ATTENTION!r} already. The model was not changed.")
    return Place(prefix + end, "residual", convolution.out_channels, CONVOLUTIONS[type(convolution)])


def _pools_globally(module: nn.Module) -> bool:
    layer = module.inner if isinstance(module, Attached) else module
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        sizes = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,)
        return all(size == 1 for size in sizes)
    # timm's global pooling layer, unless it has been switched off
    if type(layer).__name__ == "SelectAdaptivePool2d":
        return getattr(layer, "pool_type", "") not in ("", None) and layer.feat_mult() == 1  # type: ignore[operator]
    return isinstance(layer, Head)
