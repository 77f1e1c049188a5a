"""The repeated blocks of a network, and the stages that they form."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, groupby

from torch import nn

from convattn.attachment.maps import Maps
from convattn.attachment.sums import WEIGHTED
from convattn.attachment.wrapper import Attached
from convattn.networks.watching import Call, Value

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Stage:
    """A run of blocks whose maps have one size: the output of the last one, and the map with which the stage ends.

    The end is given by a layer, and all that comes later depends on maps of this size through it alone; None where
    there is no such map.
    """

    last: Value
    end: Value | None


@dataclass(frozen=True)
class _Candidate:
    """A call of a module of a repeated class: its class, its parent, and the map that it gives."""

    call: Call
    kind: type[nn.Module]
    parent: str
    contained: bool
    end: Value


def ends(maps: Maps, sums: list[Value]) -> list[Value]:
    """The maps that the repeated blocks of a network give, in order; `sums` are its residual sums.

    A block is of a class that is called more than once, in a container or beside others of the class, and has at least
    two layers of weights. Where the network has residual sums, they are in blocks. Of classes within one another the
    inner one counts; where there is none, each convolution with the norm and the activation behind it is a block.
    """
    candidates = _candidates(maps)
    with_sums = {one.kind for one in candidates for total in sums if one.call.first <= total.index < one.call.last}
    tiers = (
        [one for one in candidates if one.kind in with_sums],
        [one for one in candidates if one.contained],
        candidates,
    )
    for tier in tiers:
        innermost = _innermost(tier)
        if innermost:
            return sorted({one.end.index: one.end for one in innermost}.values(), key=lambda value: value.index)
    return _units(maps)


def stages(maps: Maps, sums: list[Value], blocks: list[Value]) -> list[Stage]:
    """The stages of a network: runs of blocks and residual sums, one after the other, whose maps have one size."""
    values = {value.index: value for value in (*sums, *blocks)}
    runs = [list(run) for _, run in groupby((values[index] for index in sorted(values)), key=maps.size)]
    limits = [run[0].index for run in runs[1:]] + [len(maps.seen.values)]
    last_use = {
        value.index: max(maps.seen.users.get(value.index, [-1])) for value in maps.seen.values if maps.is_map(value)
    }
    return [Stage(run[-1], _end(maps, run[-1], limit, last_use)) for run, limit in zip(runs, limits, strict=True)]


def _end(maps: Maps, last: Value, limit: int, last_use: dict[int, int]) -> Value | None:
    size = maps.size(last)
    alike = [maps.seen.values[index] for index in last_use if maps.size(maps.seen.values[index]) == size]
    for value in (one for one in alike if last.index <= one.index < limit and one.index in maps.by_output):
        passes = value is last or value.depends_on(last)
        if passes and all(last_use[one.index] <= value.index for one in alike if one.index < value.index):
            return value
    return None


def _candidates(maps: Maps) -> list[_Candidate]:
    values = maps.seen.values
    batch = max((value.shape[0] for value in values if value.operator == "input" and value.shape), default=1)
    # how many of the values up to each one were given by weights, and are maps and not pooled
    weighted = list(accumulate((_is_weighted_map(maps, value, batch) for value in values), initial=0))
    parents = {call.name: call.module for call in maps.seen.calls}
    found = []
    for call in maps.calls:
        layer = _layer(call.module)
        if type(layer) in CONTAINERS or weighted[call.last] - weighted[call.first] < 2:
            continue
        given = [values[index] for index in call.outputs if maps.is_map(values[index])]
        if given:
            end = max(given, key=lambda value: value.ancestors.bit_count())
            parent = call.name.rpartition(".")[0]
            found.append(_Candidate(call, type(layer), parent, _is_contained(maps, parent, parents), end))
    times: dict[type[nn.Module], int] = defaultdict(int)
    beside: dict[tuple[str, type[nn.Module]], int] = defaultdict(int)
    for one in found:
        times[one.kind] += 1
        beside[one.parent, one.kind] += 1
    return [one for one in found if (times[one.kind] if one.contained else beside[one.parent, one.kind]) > 1]


def _is_contained(maps: Maps, parent: str, parents: dict[str, nn.Module]) -> bool:
    # lists and dictionaries of modules are never called, and so are found by having been left out
    return parent != "" and (parent not in parents or isinstance(_layer(parents[parent]), CONTAINERS))


def _layer(module: nn.Module) -> nn.Module:
    return module.inner if isinstance(module, Attached) else module


def _is_weighted_map(maps: Maps, value: Value, batch: int) -> bool:
    if not value.operator.startswith(WEIGHTED) or not maps.seen.is_data(value):
        return False
    if len(value.shape) == maps.rank:
        return any(side > 1 for side in maps.size(value))
    # positions are rows of a matrix
    return len(value.shape) == 2 and value.shape[0] > batch


def _innermost(candidates: list[_Candidate]) -> list[_Candidate]:
    names = {one.call.name for one in candidates}
    outer = set()
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            outer.add(name)
    around = {one.kind for one in candidates if one.call.name in outer}
    return [one for one in candidates if one.kind not in around]


def _units(maps: Maps) -> list[Value]:
    """The end of each convolution with the norm and the activation behind it, but that of the logits."""
    found = []
    last = max((value.index for value in maps.seen.values if _weighs(maps, value)), default=-1)
    for call in maps.calls:
        if call.y is None or not isinstance(_layer(call.module), nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        start = end = maps.seen.values[call.y]
        while (following := _following(maps, end)) is not None:
            end = following
        if maps.is_map(end) and any(side > 1 for side in maps.size(end)) and (end is not start or start.index < last):
            found.append(end)
    return found


def _following(maps: Maps, value: Value) -> Value | None:
    """What a layer without convolution makes of a map, at the same size and as its only user."""
    users = maps.users(value)
    if len(users) != 1 or users[0].shape != value.shape or users[0].operator.startswith(WEIGHTED):
        return None
    calls = maps.by_output.get(users[0].index, [])
    # pooling at stride 1 keeps the size as well
    passes = "pool" not in users[0].operator and any(call.x == value.index and call.alone for call in calls)
    return users[0] if passes else None


def _weighs(maps: Maps, value: Value) -> bool:
    return value.operator.startswith(WEIGHTED) and maps.seen.is_data(value)
