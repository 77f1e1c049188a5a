"""Where a network pools its last map to a vector, in whatever form it does so."""

from dataclasses import dataclass
from math import prod
from typing import Any

from convattn.attachment.blocks import Block
from convattn.attachment.maps import LAYOUT, Maps
from convattn.attachment.sums import ACTIVATIONS, WEIGHTED
from convattn.attachment.wrapper import Functions
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
# operators that do more than pool: a head stands before them
WORKING = (*WEIGHTED, "native_batch_norm", "_native_batch_norm", "native_layer_norm", "native_group_norm", "batch_norm")


@dataclass(frozen=True)
class Pool:
    """A map that is pooled, and where a head can stand: see `Place`.

    `layers` are those that will do, the best first, and `sources` those that give the map, where that is another layer;
    where there is none, the reason says why.
    """

    map: Value
    layers: tuple[Call, ...] = ()
    side: str = "pool"
    width: int = 0
    pool: str = "mean"
    sources: tuple[Call, ...] = ()
    functions: Functions = ()
    reason: str = ""


def find(maps: Maps) -> list[Pool]:
    """The global poolings through which everything goes that the network's output depends on."""
    if not maps.output:
        return []
    values = maps.seen.values
    output = max((values[index] for index in maps.output), key=lambda value: value.ancestors.bit_count())
    found: dict[int, Pool] = {}
    # before the last map that has positions, a map of one position is small and not pooled
    spatial = [one.index for one in values if maps.is_map(one) and any(side > 1 for side in maps.size(one))]
    last = max((index for index in spatial if output.ancestors >> index & 1), default=-1)
    passages = _passages(maps, output)
    for vector in (one for one in passages if one.index > last and _is_vector(one)):
        layer = _as_layer(maps, vector)
        if layer is not None:
            # of layers within one another the outermost, which ends last
            found[layer.map.index] = layer
            continue
        given = [
            one for one in passages if one.index < vector.index and one.index in maps.by_output and maps.is_map(one)
        ]
        function = _as_function(maps, given[-1], vector) if given else None
        if function is not None and not (given[-1].index in found and found[given[-1].index].layers):
            found[given[-1].index] = function
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


def all_goes_through(maps: Maps, value: Value) -> bool:
    """Whether a map is given out, or everything that the outputs of the network are made of goes through it."""
    outputs = [maps.seen.values[index] for index in maps.output]
    return value in outputs or all(value in _passages(maps, output) for output in outputs)


def last_map(maps: Maps, pooled: Value) -> Value | None:
    """The last map before a pooling that a layer gives and through which everything goes."""
    value: Value | None = pooled
    while value is not None and (value.index not in maps.by_output or not maps.is_map(value)):
        value = _only_input(maps, value)
    return value


def _only_input(maps: Maps, value: Value) -> Value | None:
    data = [maps.seen.values[index] for index in value.inputs if maps.seen.is_data(maps.seen.values[index])]
    return data[0] if len(data) == 1 else None


def before_output(maps: Maps, blocks: list[Block]) -> Value | None:
    """The last map before a convolution that makes the output of a network and is in none of its blocks.

    So it is where the output is one map, as in segmentation.
    """
    if len(maps.output) != 1 or not maps.is_map(output := maps.seen.values[maps.output[0]]):
        return None
    needed = [value for value in maps.seen.values if output.ancestors >> value.index & 1 and maps.seen.is_data(value)]
    last = next((value for value in reversed(needed) if value.operator.startswith(WEIGHTED)), None)
    if last is None or last not in _passages(maps, output):
        return None
    source = None if any(block.first <= last.index < block.last for block in blocks) else _only_input(maps, last)
    return None if source is None else last_map(maps, source)


def _is_vector(value: Value) -> bool:
    return len(value.shape) > 1 and prod(value.shape[1:]) in value.shape[1:]


def _as_layer(maps: Maps, vector: Value) -> Pool | None:
    """The outermost layer that gives a vector and does nothing but pool a map to it."""
    values = maps.seen.values
    for call in reversed(maps.by_output.get(vector.index, [])):
        source = None if call.x is None or not call.alone else values[call.x]
        if source is None or not maps.is_map(source) or len(maps.calls_of(call.module)) > 1:
            continue
        only = all(call.first <= user.index < call.last for user in maps.users(source))
        if only and vector.shape[0] == source.shape[0] and _pools(values[call.first : call.last]):
            return Pool(source, (call,), width=prod(vector.shape[1:]))
    return None


def _pools(values: list[Value]) -> bool:
    """Whether operators pool and do nothing more."""
    names = [value.operator for value in values]
    return any(name in REDUCING for name in names) and not any(name.startswith(WORKING) for name in names)


def _as_function(maps: Maps, given: Value, vector: Value) -> Pool | None:
    """The pooling by functions of a map that a layer gives, and the layers at which a head can stand."""
    if given.shape[0] != vector.shape[0]:
        return None
    between = [one for one in maps.seen.values[given.index + 1 : vector.index + 1] if _lies_between(one, given, vector)]
    if not _pools(between):
        return None
    source, functions = _activated(maps, given)
    width = prod(vector.shape[1:])
    giving = _giving(maps, given)
    # the outermost: what is a leaf to a symbolic trace then holds the layer that takes the vector too, or neither
    sources = _giving(maps, given, containers_last=False)
    if not functions and source is given and _is_mean_or_max(maps, given, vector) and giving:
        return Pool(given, giving, "map", width, "mean" if vector.operator in MEANS else "max")
    taking = _taking(maps, vector)
    if not giving or taking is None:
        return Pool(given, reason="it is pooled by a function, between layers that are called more than once")
    return Pool(source, (taking,), "vector", width, sources=sources, functions=functions)


def _lies_between(value: Value, given: Value, vector: Value) -> bool:
    return value.depends_on(given) and (value is vector or vector.depends_on(value))


def _giving(maps: Maps, value: Value, *, containers_last: bool = True) -> tuple[Call, ...]:
    """The layers that give a value, the outermost first, but containers last where a head is to stand on one."""
    calls = [one for one in maps.by_output[value.index] if one.alone and len(maps.calls_of(one.module)) == 1][::-1]
    if containers_last:
        calls.sort(key=maps.is_container)
    return tuple(calls)


def _activated(maps: Maps, given: Value) -> tuple[Value, Functions]:
    """A map after the activations that are applied to all of it, and those that give a new map."""
    source = given
    functions: list[Any] = []
    while len(users := maps.users(source)) == 1 and users[0].operator.rstrip("_") in ACTIVATIONS:
        # one that changes the layer's own map has been applied to what the layer leaves
        if functions or not users[0].operator.endswith("_"):
            functions.append((users[0].operator.rstrip("_"), users[0].arguments, users[0].options))
        source = users[0]
    return source, tuple(functions)


def _is_mean_or_max(maps: Maps, given: Value, vector: Value) -> bool:
    """Whether a vector is the mean or the maximum of a map for each channel, and the map has no other use."""
    if given.index in maps.output or prod(vector.shape[1:]) != given.shape[maps.axis(given)]:
        return False
    value = given
    while len(users := maps.users(value)) == 1 and users[0].operator in LAYOUT and users[0] is not vector:
        value = users[0]
    # the positions of maxima come with them
    alone = all(user.operator == vector.operator for user in users) and vector in users
    return alone and vector.operator in (*MEANS, *MAXIMA)


def _taking(maps: Maps, vector: Value) -> Call | None:
    """The layer that takes a pooled vector and nothing else."""
    while True:
        for call in maps.calls:
            if call.x == vector.index and call.alone and len(maps.calls_of(call.module)) == 1:
                return call
        users = maps.users(vector)
        if len(users) != 1 or users[0].operator not in LAYOUT:
            return None
        vector = users[0]
