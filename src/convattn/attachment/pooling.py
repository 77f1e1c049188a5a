"""Where a network pools its last map to a vector, in whatever form it does so."""

from dataclasses import dataclass
from math import prod
from typing import Any

from convattn.attachment.maps import Maps
from convattn.attachment.sums import ACTIVATIONS, WEIGHTED
from convattn.attachment.wrapper import AttachedHead
from convattn.networks.watching import Call, Value

MEANS = ("mean", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d", "avg_pool1d")
MAXIMA = (
    "amax",
    "max",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
)
REDUCING = (*MEANS, *MAXIMA, "sum", "logsumexp", "linalg_vector_norm", "median")
# operators that keep every number
RESHAPING = (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "clone",
    "alias",
)


@dataclass(frozen=True)
class Pool:
    """The map that is pooled, and where a head can stand: see `Place`; without a layer, the reason."""

    map: Value
    layer: Call | None = None
    side: str = "pool"
    width: int = 0
    pool: str = "mean"
    source: str = ""
    functions: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    reason: str = ""


def find(maps: Maps) -> list[Pool]:
    """The global poolings through which everything goes that the network's output depends on."""
    if not maps.output:
        return []
    values = maps.seen.values
    output = max((values[index] for index in maps.output), key=lambda value: value.ancestors.bit_count())
    found: dict[int, Pool] = {}
    for value in _passages(maps, output):
        layer, function = _as_layer(maps, value), _as_function(maps, value)
        if layer is not None:
            # of layers within one another the outermost, which ends last
            found[layer.map.index] = layer
        elif function is not None:
            found.setdefault(function.map.index, function)
    return list(found.values())


def _passages(maps: Maps, output: Value) -> list[Value]:
    """The values through which everything goes that an output depends on, in order."""
    needed = [one for one in maps.seen.values if output.ancestors >> one.index & 1 and maps.seen.is_data(one)]
    latest, passages = -1, []
    for value in needed:
        if latest <= value.index:
            passages.append(value)
        users = [one.index for one in maps.users(value) if output.ancestors >> one.index & 1]
        latest = max(latest, *users) if users else latest
    return passages


def last_map(maps: Maps, pooled: Value) -> Value | None:
    """The last map before a pooling that a layer gives and through which everything goes."""
    value = pooled
    while value.index not in maps.by_output or not maps.is_map(value):
        data = [maps.seen.values[index] for index in value.inputs if maps.seen.is_data(maps.seen.values[index])]
        if len(data) != 1:
            return None
        value = data[0]
    return value


def _as_layer(maps: Maps, vector: Value) -> Pool | None:
    """The outermost layer that gives a vector and does nothing but pool a map to it."""
    values = maps.seen.values
    for call in reversed(maps.by_output.get(vector.index, [])):
        source = None if call.x is None or not call.alone else values[call.x]
        if source is None or not maps.is_map(source) or len(maps.calls_of(call.module)) > 1:
            continue
        inside = [one.operator for one in values[call.first : call.last]]
        pools = any(operator in REDUCING for operator in inside)
        weighs = any(operator.startswith(WEIGHTED) or "norm" in operator for operator in inside)
        width = prod(vector.shape[1:])
        fits = vector.shape[:1] == source.shape[:1] and width in vector.shape[1:]
        only = all(call.first <= user.index < call.last for user in maps.users(source))
        # a head that is attached there already has weights of its own
        if pools and fits and only and (not weighs or isinstance(call.module, AttachedHead)):
            return Pool(source, call, width=width)
    return None


def _as_function(maps: Maps, vector: Value) -> Pool | None:
    """The pooling of a map by a function, and the layer before or behind it at which a head can stand."""
    source = _pooled_map(maps, vector)
    if source is None:
        return None
    width, kind = prod(vector.shape[1:]), "mean" if vector.operator in MEANS else "max"
    for call in maps.by_output.get(source.index, []):
        if call.alone and len(maps.calls_of(call.module)) == 1:
            return Pool(source, call, "map", width, kind)
    given, functions = _functions(maps, source)
    giving = [
        call for call in maps.by_output.get(given.index, []) if call.alone and len(maps.calls_of(call.module)) == 1
    ]
    taking = _taking(maps, vector)
    if not giving:
        return Pool(source, reason=f"the map is computed by a function ({given.operator}) and pooled by another")
    if taking is None:
        return Pool(source, reason="the map is computed by a function, and no layer takes the pooled vector")
    return Pool(source, taking, "vector", width, source=giving[-1].name, functions=functions)


def _pooled_map(maps: Maps, vector: Value) -> Value | None:
    """The map of which a value is the global mean or maximum, one number for each channel of an image."""
    data = [maps.seen.values[index] for index in vector.inputs if maps.seen.is_data(maps.seen.values[index])]
    if vector.operator not in (*MEANS, *MAXIMA) or len(data) != 1:
        return None
    source = data[0]
    while not maps.is_map(source) and source.operator in RESHAPING:
        source = maps.seen.values[source.inputs[0]]
    if not maps.is_map(source):
        return None
    channels = source.shape[maps.axis(source)]
    pools = vector.shape[:1] == source.shape[:1] and prod(vector.shape[1:]) == channels and channels in vector.shape[1:]
    return source if pools else None


def _functions(maps: Maps, source: Value) -> tuple[Value, tuple[tuple[str, tuple[Any, ...]], ...]]:
    """The value that a layer gave, and the activations that the network applies to it to get the map."""
    functions: list[tuple[str, tuple[Any, ...]]] = []
    while source.index not in maps.by_output and source.operator.rstrip("_") in ACTIVATIONS:
        if not source.operator.endswith("_"):
            functions.insert(0, (source.operator, source.arguments))
        source = maps.seen.values[source.inputs[0]]
    return source, tuple(functions)


def _taking(maps: Maps, vector: Value) -> Call | None:
    """The layer that takes a pooled vector and nothing else."""
    while True:
        for call in maps.calls:
            if call.x == vector.index and call.alone and len(maps.calls_of(call.module)) == 1:
                return call
        users = maps.users(vector)
        if len(users) != 1 or users[0].operator not in RESHAPING:
            return None
        vector = users[0]
