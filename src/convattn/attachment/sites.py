"""Where attention can stand in a network. Pure: a model in, places out."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from convattn.attachment.sums import Sum, sums
from convattn.attachment.wrapper import ATTENTION, Attached
from convattn.errors import AttachError
from convattn.networks.cut import example_for
from convattn.networks.watching import Call, Value, Watched, watch
from convattn.nn import Head

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# operators whose result has its channels in the second dimension, and those that have them in the last
CHANNELS_FIRST = (
    "convolution",
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm",
    "native_group_norm",
    "upsample",
)
CHANNELS_LAST = ("native_layer_norm", "addmm", "mm", "linear", "bmm", "_unsafe_view")


@dataclass(frozen=True)
class Place:
    """A layer on whose output attention can stand: its name, what it is, and the map that it gives.

    `size` are the map's spatial dimensions on the example; the channels are its second dimension or its last.
    """

    name: str
    place: str
    channels: int
    size: tuple[int, ...]
    channels_last: bool = False


@dataclass(frozen=True)
class Skipped:
    """A sum at which nothing can stand: a layer near it, and the reason."""

    name: str
    reason: str


def residual(model: nn.Module, example: Any = None) -> tuple[list[Place], list[Skipped]]:
    """The last layer of every residual branch, just before the sum; and the sums without such a place.

    Raises:
        AttachError: the network has no residual sum, or does not run on the example.
    """
    seen = watch(model, example_for(model) if example is None else example)
    wrapped = {call.name for call in seen.calls if isinstance(call.module, Attached)}
    found = [one for one in sums(seen) if not _is_within(one.value.within, wrapped)]
    calls = [call for call in seen.calls if call.name in wrapped or not _is_within(call.name, wrapped)]
    rank = max((len(value.shape) for value in seen.values if value.operator == "input"), default=4)
    places: dict[int, Place] = {}
    skipped = [Skipped(one.value.within, one.reason) for one in found if one.shortcut is None]
    for one in (one for one in found if one.shortcut is not None):
        for branch in one.branches:
            place = _place(seen, calls, one, branch, rank, found)
            if isinstance(place, Skipped):
                skipped.append(place)
            else:
                # a layer that ends several branches is one place
                places.setdefault(id(model.get_submodule(place.name)), place)
    if not places:
        reasons = "; ".join(dict.fromkeys(one.reason for one in skipped))
        raise AttachError(
            f"{type(model).__name__} has no residual block before whose sum a gate could stand"
            f"{f' ({reasons})' if reasons else ''}. The model was not changed."
        )
    return list(places.values()), skipped


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
    # of no particular size
    return [Place(name, "pool", linear[-1].in_features, (1,) * dimensions)]


def _place(seen: Watched, calls: list[Call], one: Sum, branch: Value, rank: int, every: list[Sum]) -> Place | Skipped:
    near = one.value.within
    if len(branch.shape) != rank:
        return Skipped(near, "a sum of tokens, not of maps")
    ends = [call for call in calls if call.y == branch.index and call.name]
    # the layer that computed the value, before those that only pass it on
    ends = [call for call in ends if call.x != call.y] + [call for call in ends if call.x == call.y]
    axis = _channel_axis(seen, branch)
    # a layer may end several branches, if their maps have as many dimensions and channels
    alike = {
        value.index
        for each in every
        if each.shortcut is not None
        for value in each.branches
        if len(value.shape) == rank and value.shape[axis] == branch.shape[axis]
    }
    for end in ends:
        if all(call.y in alike for call in calls if call.module is end.module):
            if hasattr(end.module, ATTENTION) and not isinstance(end.module, Attached):
                return Skipped(end.name, f"it has a part called {ATTENTION!r} already")
            size = tuple(side for place, side in enumerate(branch.shape) if place not in (0, axis))
            return Place(end.name, "residual", branch.shape[axis], size, axis == rank - 1)
    if ends:
        return Skipped(ends[0].name, "its output is used elsewhere as well")
    return Skipped(near, f"the branch ends in a function ({branch.operator}), not in a layer")


def _channel_axis(seen: Watched, value: Value) -> int:
    """The dimension of a value that counts its channels, from the operators that it was computed by."""
    last = len(value.shape) - 1
    if value.operator.startswith(CHANNELS_FIRST):
        return 1
    if value.operator.startswith(CHANNELS_LAST):
        return last
    data = [seen.values[one] for one in value.inputs if seen.is_data(seen.values[one])]
    if value.operator in ("permute", "transpose") and data:
        before = _channel_axis(seen, data[0])
        if value.operator == "permute":
            return [dimension % (last + 1) for dimension in value.order].index(before)
        swapped = [dimension % (last + 1) for dimension in value.order]
        return swapped[1 - swapped.index(before)] if before in swapped else before
    alike = [one for one in data if len(one.shape) == len(value.shape)]
    if alike:
        return _channel_axis(seen, alike[0])
    # reshaped: the last dimension stays the last
    if data and data[0].shape and _channel_axis(seen, data[0]) == len(data[0].shape) - 1:
        return last
    return 1


def _is_within(name: str, wrapped: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in wrapped)


def _pools_globally(module: nn.Module) -> bool:
    layer = module.inner if isinstance(module, Attached) else module
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        sizes = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,)
        return all(size == 1 for size in sizes)
    # timm's global pooling layer, unless it has been switched off
    if type(layer).__name__ == "SelectAdaptivePool2d":
        return getattr(layer, "pool_type", "") not in ("", None) and layer.feat_mult() == 1  # type: ignore[operator]
    return isinstance(layer, Head)
