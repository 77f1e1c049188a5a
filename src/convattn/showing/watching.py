"""One forward pass over the images, watched: the gates as applied, the pooled vectors, the maps of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from convattn.attachment import BlendedHead, attached, effects
from convattn.checks import suggestion
from convattn.data import Scale
from convattn.errors import AttachError, DataError, InvalidOption, UnknownName
from convattn.showing import images
from convattn.train import checkpoint as checkpoints

Array = NDArray[np.float32]
SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Seen:
    """What the forward pass showed; arrays have the images first.

    `sites` holds the arrays of each site by what they are: the gates as applied, each named by what it varies over, as
    `channel` (B, C, 1, 1), `spatial` (B, 1, H, W) or `channel and height` (B, C, H, 1); or `update`, what is added,
    in units of the root mean square of the image's map, with 1 for what it does not vary over; or `pooled` (B, C) and
    `head` (B, C) of a pooling head; and `strength` (1,) where the site has one.
    """

    checkpoint: Path
    about: dict[str, Any]
    paths: list[Path]
    names: list[str]
    images: NDArray[np.uint8]
    predictions: Array
    sites: dict[str, dict[str, Array]]
    layer: str | None
    maps: Array | None

    @property
    def blended(self) -> bool:
        """Whether the gates are blended with the identity, so that 1 stands for a network without them."""
        return any("strength" in arrays for arrays in self.sites.values())


def watch(checkpoint: Path, paths: Sequence[Path], layer: str | None, **own: Any) -> Seen:
    """Run the network of a checkpoint on images, and keep what its gates and the named layer computed.

    Raises:
        ConvattnError: see `show`.
    """
    if not paths:
        raise DataError("No images: give at least one.")
    network, about = checkpoints.load(checkpoint, **own)
    _check(network, checkpoint, layer)
    scale = about.get("scale")
    pixels = images.read(paths, about["image_size"], None if scale is None else Scale(**scale))
    x = images.normalised(pixels, about["mean"], about["std"])
    with torch.no_grad():
        logits, inputs, outputs = _run(network, x, layer)
        sites = {site: _arrays(one.attention, inputs[site]) for site, one in _sites(network) if site in inputs}
        maps = None if layer is None else _maps(layer, outputs)
    predictions = _numbers(logits.softmax(dim=1))
    return Seen(checkpoint, about, list(paths), images.distinct(paths), pixels, predictions, sites, layer, maps)


def _sites(network: nn.Module) -> list[tuple[str, Any]]:
    """The sites that have attention."""
    return [*attached(network)]


def _check(network: nn.Module, checkpoint: Path, layer: str | None) -> None:
    if layer is not None:
        known = [name for name, _ in network.named_modules() if name]
        if layer not in known:
            raise UnknownName(f"No layer is called {layer!r}. {suggestion(layer, known)}")
    elif not _sites(network):
        parts = ", ".join(name for name, _ in network.named_children())
        raise InvalidOption(
            f"The network of {checkpoint} has no gates to show: give the checkpoint of a variant with attention, or "
            f"name a layer whose feature maps to show: {parts}, or a layer inside one of them."
        )


def _run(
    network: nn.Module, x: torch.Tensor, layer: str | None
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, ...]], list[Any]]:
    """The logits, the inputs of each site's attention, and the outputs of each call of the layer."""
    inputs: dict[str, tuple[torch.Tensor, ...]] = {}
    outputs: list[Any] = []

    def keep_input(site: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[site] = args

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        # a copy: the activation behind may work in place
        outputs.append(output.clone() if isinstance(output, torch.Tensor) else output)

    handles = [one.attention.register_forward_pre_hook(partial(keep_input, site)) for site, one in _sites(network)]
    if layer is not None:
        handles.append(network.get_submodule(layer).register_forward_hook(keep_output))
    logits = network(x)
    # the gates are computed again from their inputs, which must not count as further calls of the layer
    for handle in handles:
        handle.remove()
    return logits, inputs, outputs


def _maps(layer: str, outputs: list[Any]) -> Array:
    if len(outputs) != 1:
        times = "is not called" if not outputs else f"is called {len(outputs)} times"
        raise AttachError(f"The layer {layer!r} {times} in a forward pass: name the layer around it or before it.")
    (output,) = outputs
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        came = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise AttachError(f"The layer {layer!r} gives no maps (B, C, H, W) but {came}: name a layer before it.")
    return _numbers(output)


def _arrays(attention: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, Array]:
    x, *pooled = inputs
    strength = getattr(attention, "strength", None)
    if pooled:
        blended = isinstance(attention, BlendedHead)
        head = attention.vector(x) if blended else attention(*inputs)
        tensors = {"pooled": pooled[0].flatten(1), "head": head.flatten(1)}
        # the vector of any other module is the one that it gives, blended or not
        strength = strength if blended else None
    elif effects.has_gates(attention):
        tensors = by_axes(effects.gates(attention, x), x)
    else:
        power = x.double().square().mean(dim=tuple(range(1, x.dim())), keepdim=True)
        update = effects.added(attention, x) / power.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        # an axis of size 1 of the update says that it does not vary there only where the map is larger
        tensors = {"update": update, "map": torch.tensor(x.shape[1:])}
    if isinstance(strength, torch.Tensor):
        tensors["strength"] = strength
    return {name: _numbers(tensor) for name, tensor in tensors.items()}


def by_axes(gates: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gates under names that say what they vary over; where two vary over the same, the second has a number."""
    found: dict[str, torch.Tensor] = {}
    for name, gate in gates.items():
        # of a map of a single position or channel, a gate is what it is called
        single = [axis for axis, count in (("channel", x.shape[1]), ("spatial", x[0, 0].numel())) if count == 1]
        axes = axes_of(tuple(gate.shape), tuple(x.shape)) or (name if name in single else "whole map")
        same = sum(other == axes or other.startswith(f"{axes} #") for other in found)
        found[f"{axes} #{same + 1}" if same else axes] = gate
    return found


def axes_of(shape: tuple[int, ...], of_map: tuple[int, ...]) -> str:
    """What a gate (B, C, *spatial) varies over, in words; empty where there is one number for each image.

    Args:
        shape: of the gate, with 1 for what it does not vary over.
        of_map: the shape of the map; a gate may have one number for each group of its channels.

    Example:
        >>> [axes_of(shape, (2, 8, 4, 4)) for shape in [(2, 8, 1, 1), (2, 4, 1, 1), (2, 1, 4, 4), (2, 8, 4, 1)]]
        ['channel', 'group', 'spatial', 'channel and height']
    """
    words = ["channel" if shape[1] == of_map[1] else "group"] if shape[1] > 1 else []
    names = SPATIAL.get(len(shape) - 2, ())
    varying = [name for name, size in zip(names, shape[2:], strict=False) if size > 1]
    # of a map that is a row or a column, one axis is all there is
    there = [name for name, size in zip(names, of_map[2:], strict=False) if size > 1]
    return " and ".join([*words, *(["spatial"] if varying and varying == there else varying)])


def _numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().to(torch.float32).numpy()
