"""The feature maps of one forward pass: which values are maps, where their channels are, which layers gave them."""

from collections import defaultdict
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from convattn.attachment.tensors import INNER
from convattn.attachment.wrapper import ATTENTION, Attached, layer_of
from convattn.networks.cut import watch_example
from convattn.networks.watching import INPUT, Call, Value, Watched, watch

CONVOLUTION = "convolution"
# operators whose result has its channels in the second dimension
CHANNELS_FIRST = (CONVOLUTION, "batch_norm", "native_batch_norm", "_native_batch_norm", "native_group_norm", "upsample")
# operators that multiply by what may be constant, and those that keep every number
SCALING = ("mul", "div")
LAYOUT = (
    *("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "alias"),
)


class Maps:
    """A watched forward pass of a network without attention, seen as feature maps.

    Raises:
        AttachError: the network does not run on the example.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.seen = _without_attention(watch_example(model) if example is None else watch(model, example))
        self.output = self.seen.calls[-1].outputs
        self.calls = [call for call in self.seen.calls if call.name]
        self.by_output: dict[int, list[Call]] = defaultdict(list)
        self._by_module: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            self._by_module[id(call.module)].append(call)
            if call.y is not None:
                self.by_output[call.y].append(call)
        # a convolution over one channel, as of a pooled vector, makes no maps
        convolved = [
            value for value in self.seen.values if value.operator == CONVOLUTION and self._takes_channels(value)
        ]
        given = [value for value in self.seen.values if value.operator == INPUT and value.shape]
        self.ranks = {len(value.shape) for value in convolved or given} or {4}
        # the images of a batch may be given one by one
        self.batch = next((value.shape[0] for value in convolved or given), 1)
        self._axes: dict[int, int | None] = {}

    def _takes_channels(self, value: Value) -> bool:
        x = self.seen.values[value.inputs[0]]
        return x.shape[1] > 1 or x.operator == INPUT

    def calls_of(self, module: nn.Module) -> list[Call]:
        """All calls of a module."""
        return self._by_module[id(module)]

    def is_container(self, call: Call) -> bool:
        """Whether what was called only calls others, one after the other."""
        return isinstance(layer_of(call.module), nn.Sequential)

    def users(self, value: Value) -> list[Value]:
        """What was computed from a value directly, in order."""
        return [self.seen.values[index] for index in self.seen.users.get(value.index, [])]

    def is_map(self, value: Value) -> bool:
        """Whether a value is a feature map that depends on the input."""
        return len(value.shape) in self.ranks and 0 not in value.shape and self.seen.is_data(value)

    def kind(self, value: Value) -> tuple[int, int]:
        """Where a map's channels are and how many: what two maps must share for one gate to stand on both."""
        axis = self.axis(value)
        return axis, value.shape[axis]

    def size(self, value: Value) -> tuple[int, ...]:
        """The spatial dimensions of a map."""
        axis = self.axis(value)
        return tuple(length for dimension, length in enumerate(value.shape) if dimension not in (0, axis))

    def axis(self, value: Value) -> int:
        """The dimension of a value that counts its channels; the second one where its operators do not tell."""
        known = self._known_axis(value)
        return 1 if known is None else known

    def _known_axis(self, value: Value) -> int | None:
        if value.index not in self._axes:
            self._axes[value.index] = self._channel_axis(value)
        return self._axes[value.index]

    def _channel_axis(self, value: Value) -> int | None:
        last = len(value.shape) - 1
        if value.operator.startswith(CHANNELS_FIRST):
            return 1
        data = [self.seen.values[one] for one in value.inputs if self.seen.is_data(self.seen.values[one])]
        if not data:
            return None
        if value.operator.startswith("native_layer_norm"):
            # over several dimensions, as over a whole map, it says nothing of the channels
            return self._known_axis(data[0]) if self._normalised(value) > 1 else last
        if value.operator in ("bmm", "baddbmm"):
            return self._product_axis(value, last)
        before = self._known_axis(data[0])
        if value.operator in ("addmm", "mm", "linear"):
            # over another dimension than the channels, such as the width, it leaves them where they are
            return last if before in (None, len(data[0].shape) - 1) else before
        if value.operator in ("permute", "transpose"):
            return None if before is None else _moved(before, value, last)
        alike = [one for one in data if len(one.shape) == len(value.shape)]
        if alike:
            return self._known_axis(alike[0])
        return None if before is None else _reshaped(before, data[0].shape, value.shape)

    def _normalised(self, value: Value) -> int:
        """Over how many dimensions a layer norm goes."""
        if value.arguments:
            return len(value.arguments[0])
        return len(self.seen.values[value.inputs[1]].shape)

    def _product_axis(self, value: Value, last: int) -> int | None:
        """Where the channels of a product of matrices are: its rows are those of the left, its columns of the right."""
        left, right = (self.seen.values[one] for one in value.inputs[-2:])
        rows, columns = self._known_axis(left), self._known_axis(right)
        if self.seen.is_data(left) and rows == last - 1:
            return last - 1
        if self.seen.is_data(right):
            weighted = not self.seen.is_data(left) and columns == last - 1
            return last - 1 if weighted else last if columns == last else None
        return last


def before_functions(maps: Maps, value: Value) -> list[Value]:
    """The maps of which functions alone made a map, the last first: the same but for constant factors and the layout.

    A factor is a number, or one for each channel; of the layout the order of dimensions may differ. Nothing else uses
    these maps nor the one that was made, and no function gives more dimensions than that has, unlike those that cut a
    map into windows.
    """
    found: list[Value] = []
    before = value
    while _has_one_use(maps, before):
        source = _source_of_function(maps, before)
        if source is None or len(source.shape) > len(value.shape):
            break
        before = source
        same = maps.is_map(source) and source.shape[0] == value.shape[0] and maps.size(source) == maps.size(value)
        if same and maps.kind(source)[1] == maps.kind(value)[1] and _has_one_use(maps, source):
            found.append(source)
    return found


def _has_one_use(maps: Maps, value: Value) -> bool:
    return value.index not in maps.output and len(maps.users(value)) == 1


def _source_of_function(maps: Maps, value: Value) -> Value | None:
    """What a function that multiplies by constants or changes the layout was given."""
    values = maps.seen.values
    data = [index for index in value.inputs if maps.seen.is_data(values[index])]
    if len(data) != 1:
        return None
    source, name = values[data[0]], value.operator.rstrip("_")
    return source if name in LAYOUT or (name in SCALING and _scales(maps, source, value)) else None


def _scales(maps: Maps, source: Value, value: Value) -> bool:
    """Whether a product, or a quotient, is that of a map with a number or with one number for each channel."""
    if value.shape != source.shape or value.dtype != source.dtype:
        return False
    # neither what is divided by the map, nor a quotient that is rounded
    if value.operator.startswith("div") and (value.inputs[0] != source.index or value.options):
        return False
    axis, rank = maps.axis(source), len(source.shape)
    factors = [maps.seen.values[index].shape for index in value.inputs if index != source.index]
    return all(n == 1 or rank - len(shape) + k == axis for shape in factors for k, n in enumerate(shape))


def _without_attention(seen: Watched) -> Watched:
    """The pass as the plain network would have made it: layers take and give what they do without attention."""
    wrappers = [call for call in seen.calls if isinstance(call.module, Attached)]
    if not wrappers:
        return seen
    same: dict[int, int] = {}
    hidden: set[int] = set()
    for call in wrappers:
        inner = next(
            one for one in seen.calls if one.module is layer_of(call.module) and call.first <= one.first <= call.last
        )
        hidden |= {*range(call.first, inner.first), *range(inner.last, call.last)}
        pairs = ((inner.x, call.x), (call.y, inner.y))
        same |= {one: other for one, other in pairs if one is not None and other is not None and one != other}

    def plain(index: int) -> int:
        while index in same:
            index = same[index]
        return index

    found = Watched(inputs=seen.inputs)
    for value in seen.values:
        inputs = () if value.index in hidden else tuple(plain(index) for index in value.inputs)
        ancestors = 1 << value.index
        for index in inputs:
            ancestors |= found.values[index].ancestors
            found.users.setdefault(index, []).append(value.index)
        operator = ATTENTION if value.index in hidden else value.operator
        within = value.within.replace(f".{INNER}", "")
        found.values.append(replace(value, operator=operator, inputs=inputs, ancestors=ancestors, within=within))
    roots = {f"{call.name}.{part}" for call in wrappers for part in (ATTENTION, INNER)}
    for call in (one for one in seen.calls if not _is_within(one.name, roots)):
        x, y = (None if one is None else plain(one) for one in (call.x, call.y))
        found.calls.append(replace(call, x=x, y=y, outputs=tuple(plain(index) for index in call.outputs)))
    return found


def _is_within(name: str, roots: set[str]) -> bool:
    while name:
        # a layer keeps the names of its parts: only what is the wrapper's own stands below a root
        if name in roots:
            return True
        name = name.rpartition(".")[0]
    return False


def _reshaped(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Where a change of shape takes an axis: the last stays the last, and the rows of a matrix hold all others."""
    if axis == len(before) - 1 or prod(after[:-1]) <= prod(before[:axis]):
        return len(after) - 1
    return 0 if len(after) == 2 else 1


def _moved(axis: int, value: Value, last: int) -> int:
    """Where a permutation or transposition takes an axis."""
    if value.operator == "permute":
        order: list[int] = [dimension % (last + 1) for dimension in value.arguments[0]]
        return order.index(axis)
    one, other = (int(dimension) % (last + 1) for dimension in value.arguments[:2])
    return other if axis == one else one if axis == other else axis
