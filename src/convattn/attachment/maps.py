"""The feature maps of one forward pass: which values are maps, where their channels are, which layers gave them."""

from collections import defaultdict
from contextlib import suppress
from typing import Any

from torch import nn

from convattn.attachment.wrapper import ATTENTION, INNER, Attached
from convattn.errors import AttachError
from convattn.networks.cut import example_for
from convattn.networks.watching import INPUT, Call, Value, Watched, watch

# images of networks that do not say what they take, the cheapest first
SIDES = (64, 224, 299)
CONVOLUTION = "convolution"
# operators whose result has its channels in the second dimension, and those that have them in the last
CHANNELS_FIRST = (CONVOLUTION, "batch_norm", "native_batch_norm", "_native_batch_norm", "native_group_norm", "upsample")
CHANNELS_LAST = ("native_layer_norm", "addmm", "mm", "linear", "bmm", "_unsafe_view")


class Maps:
    """A watched forward pass, seen as feature maps; what attached attention computes is left out.

    Raises:
        AttachError: the network does not run on the example.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.seen = _watched(model) if example is None else watch(model, example)
        wrapped = {call.name for call in self.seen.calls if isinstance(call.module, Attached)}
        self._hidden = {f"{name}.{part}" for name in wrapped for part in (ATTENTION, INNER)}
        self._attention = {f"{name}.{ATTENTION}" for name in wrapped}
        self.output = self.seen.calls[-1].outputs
        self.calls = [call for call in self.seen.calls if call.name and not _is_within(call.name, self._hidden)]
        self.by_output: dict[int, list[Call]] = defaultdict(list)
        self._by_module: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            self._by_module[id(call.module)].append(call)
            if call.y is not None:
                self.by_output[call.y].append(call)
        shapes = [value.shape for value in self.seen.values if value.operator == CONVOLUTION]
        shapes = shapes or [value.shape for value in self.seen.values if value.operator == INPUT and value.shape]
        # of several kinds of convolution the one over most dimensions: others are of vectors and sequences
        self.rank = max(map(len, shapes), default=4)
        # the images of a batch may be given one by one
        self.batch = shapes[0][0] if shapes else 1
        self._axes: dict[int, int] = {}

    def calls_of(self, module: nn.Module) -> list[Call]:
        """All calls of a module."""
        return self._by_module[id(module)]

    def users(self, value: Value) -> list[Value]:
        """What was computed from a value directly, in order."""
        return [self.seen.values[index] for index in self.seen.users.get(value.index, [])]

    def is_attention(self, name: str) -> bool:
        """Whether a module is a part of attention that is attached already."""
        return _is_within(name, self._attention)

    def is_map(self, value: Value) -> bool:
        """Whether a value is a feature map that depends on the input."""
        return len(value.shape) == self.rank and 0 not in value.shape and self.seen.is_data(value)

    def kind(self, value: Value) -> tuple[int, int]:
        """Where a map's channels are and how many: what two maps must share for one gate to stand on both."""
        axis = self.axis(value)
        return axis, value.shape[axis]

    def size(self, value: Value) -> tuple[int, ...]:
        """The spatial dimensions of a map."""
        axis = self.axis(value)
        return tuple(length for dimension, length in enumerate(value.shape) if dimension not in (0, axis))

    def axis(self, value: Value) -> int:
        """The dimension of a value that counts its channels, from the operators that it was computed by."""
        if value.index not in self._axes:
            self._axes[value.index] = self._channel_axis(value)
        return self._axes[value.index]

    def _channel_axis(self, value: Value) -> int:
        last = len(value.shape) - 1
        if value.operator.startswith(CHANNELS_FIRST):
            return 1
        if value.operator.startswith(CHANNELS_LAST):
            return last
        data = [self.seen.values[one] for one in value.inputs if self.seen.is_data(self.seen.values[one])]
        if value.operator in ("permute", "transpose") and data:
            return _moved(self.axis(data[0]), value, last)
        alike = [one for one in data if len(one.shape) == len(value.shape)]
        if alike:
            return self.axis(alike[0])
        # reshaped: the last dimension stays the last
        if data and data[0].shape and self.axis(data[0]) == len(data[0].shape) - 1:
            return last
        return 1


def _watched(model: nn.Module) -> Watched:
    """A forward pass on random images of a size that the network takes."""
    first, *others = [None] if getattr(model, "input_size", None) else SIDES
    try:
        return watch(model, example_for(model, side=first))
    except AttachError:
        for side in others:
            with suppress(AttachError):
                return watch(model, example_for(model, side=side))
        raise


def _moved(axis: int, value: Value, last: int) -> int:
    """Where a permutation or transposition takes an axis."""
    if value.operator == "permute":
        order: list[int] = [dimension % (last + 1) for dimension in value.arguments[0]]
        return order.index(axis)
    one, other = (int(dimension) % (last + 1) for dimension in value.arguments[:2])
    return other if axis == one else one if axis == other else axis


def _is_within(name: str, roots: set[str]) -> bool:
    while name:
        if name in roots:
            return True
        name = name.rpartition(".")[0]
    return False
