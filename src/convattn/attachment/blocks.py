"""The repeated blocks of a network, and the stages that they form."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import prod

from torch import nn

from convattn.attachment.maps import CONVOLUTION, Maps
from convattn.attachment.sums import WEIGHTED, Sum
from convattn.attachment.wrapper import layer_of
from convattn.networks.watching import Call, Value

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """A block: the map that it gives, and the values that it computes, from `first` up to, not including, `last`.

    `name` is that of the module; empty where the block is no module.
    """

    end: Value
    first: int
    last: int
    name: str = ""


@dataclass(frozen=True)
class _Candidate:
    """A call of a module that may be a block: class, parent, the map that it gives, and its layers of weights."""

    call: Call
    kind: type[nn.Module]
    parent: str
    contained: bool
    end: Value
    layers: int
    wide_layers: int

    @property
    def block(self) -> Block:
        return Block(self.end, self.call.first, self.call.last, self.call.name)


def find(maps: Maps, sums: list[Value]) -> list[Block]:
    """The repeated blocks of a network, in order; `sums` are its residual sums.

    A block is of a class with several calls, one after the other, in a container or beside each other, and has at least
    two layers of weights. Where the network has residual sums, they are in blocks. Of classes within one another the
    inner one counts. Where there is none, depthwise convolutions count as layers too, and at last each convolution with
    the norm and the activation behind it is a block; so it is in the part before the blocks where that goes deeper.
    """
    candidates = _candidates(maps)
    for layers in ("wide_layers", "layers"):
        deep = {one.kind for one in candidates if getattr(one, layers) > 1}
        repeated = _repeated([one for one in candidates if one.kind in deep])
        with_sums = {one.kind for one in repeated for each in sums if one.call.first <= each.index < one.call.last}
        tiers = (
            [one for one in repeated if one.kind in with_sums],
            [one for one in repeated if one.contained],
            repeated,
        )
        for tier in tiers:
            if tier:
                found = {one.end.index: one.block for one in _innermost(tier)}
                return _with_plain_part(maps, [found[index] for index in sorted(found)])
    return _units(maps)


def _with_plain_part(maps: Maps, blocks: list[Block]) -> list[Block]:
    """The blocks, and the convolutions before them where these make smaller maps than any block gives.

    So it is with an encoder of plain convolutions before a decoder of blocks.
    """
    before = [unit for unit in _units(maps) if unit.end.index < blocks[0].first]
    smallest = min((prod(maps.size(block.end)) for block in blocks), default=0)
    return [*before, *blocks] if any(prod(maps.size(unit.end)) < smallest for unit in before) else blocks


def stage_ends(maps: Maps, sums: list[Sum], blocks: list[Block]) -> list[Value]:
    """The maps with which the stages of a network end.

    A stage is a run of blocks, and of residual sums outside of them, whose maps have one size. It ends with the first
    map of a layer through which all goes that later depends on maps of this size; where there is none, as in networks
    whose cells take the outputs of two others, with that of the last block.
    """
    inside = {index for block in blocks for index in range(block.first, block.last)}
    beside = [one.value for one in sums if one.value.index not in inside]
    # blocks that come once, such as the first of many networks
    ends = {block.end.index for block in blocks} | {one.index for one in beside}
    for one in _candidates(maps):
        extent = set(range(one.call.first, one.call.last))
        if one.contained and one.layers > 1 and not extent & inside and not extent & ends:
            beside.append(one.end)
    values = {
        one.index: one for one in (*(block.end for block in blocks), *beside) if not _is_in_branch(one, sums, blocks)
    }
    # windows of a map are no maps of the network
    ordered = [values[index] for index in sorted(values) if values[index].shape[0] == maps.batch]
    runs = [list(run) for _, run in groupby(ordered, key=maps.size)]
    limits = [*(run[0].index for run in runs), len(maps.seen.values)][1:]
    last_use = {
        value.index: max(maps.seen.users.get(value.index, [-1])) for value in maps.seen.values if maps.is_map(value)
    }
    return [_end(maps, run[-1], limit, last_use) for run, limit in zip(runs, limits, strict=True)]


def _is_in_branch(value: Value, sums: list[Sum], blocks: list[Block]) -> bool:
    """Whether a map that no repeated block gives was computed for the branch of a later sum alone."""
    if any(block.end is value for block in blocks):
        return False
    return any(
        one.shortcut is not None
        and one.shortcut is not value
        and not one.shortcut.depends_on(value)
        and any(branch.depends_on(value) for branch in one.branches)
        for one in sums
    )


def _end(maps: Maps, last: Value, limit: int, last_use: dict[int, int]) -> Value:
    size = maps.size(last)
    alike = [maps.seen.values[index] for index in last_use if maps.size(maps.seen.values[index]) == size]
    for value in (one for one in alike if last.index <= one.index < limit and one.index in maps.by_output):
        passes = value is last or value.depends_on(last)
        if passes and all(last_use[one.index] <= value.index for one in alike if one.index < value.index):
            return value
    return last


def _candidates(maps: Maps) -> list[_Candidate]:
    values = maps.seen.values
    # how many of the values up to each one were given by weights, and are maps and not pooled
    layers = list(accumulate((_is_weighted_map(maps, value) for value in values), initial=0))
    wide = list(
        accumulate((_is_weighted_map(maps, value) and not _is_depthwise(maps, value) for value in values), initial=0)
    )
    called = {call.name: call.module for call in maps.seen.calls}
    found = []
    for call in maps.calls:
        layer = layer_of(call.module)
        count = layers[call.last] - layers[call.first]
        given = [values[index] for index in call.outputs if maps.is_map(values[index])]
        if given and count and type(layer) not in CONTAINERS and any(True for _ in layer.children()):
            end = max(given, key=lambda value: value.ancestors.bit_count())
            parent = call.name.rpartition(".")[0]
            # lists and dictionaries of modules are never called, and so are found by having been left out
            contained = parent != "" and (parent not in called or isinstance(layer_of(called[parent]), CONTAINERS))
            wide_count = wide[call.last] - wide[call.first]
            found.append(_Candidate(call, type(layer), parent, contained, end, count, wide_count))
    return found


def _repeated(candidates: list[_Candidate]) -> list[_Candidate]:
    """Those of a class that is called several times, one after the other."""
    kinds: dict[type[nn.Module], list[_Candidate]] = defaultdict(list)
    for one in candidates:
        kinds[one.kind].append(one)
    return [one for group in kinds.values() if _follow_each_other(group) for one in _in_company(group)]


def _in_company(group: list[_Candidate]) -> Iterator[_Candidate]:
    """Those in a container, or with another one of the class beside them."""
    parents = [one.parent for one in group]
    for one in group:
        if one.contained or parents.count(one.parent) > 1:
            yield one


def _follow_each_other(group: list[_Candidate]) -> bool:
    beside = [(a, b) for a, b in pairwise(group) if a.parent == b.parent] or list(pairwise(group))
    return sum(b.end.depends_on(a.end) for a, b in beside) * 2 > len(beside)


def _is_weighted_map(maps: Maps, value: Value) -> bool:
    if not _weighs(maps, value):
        return False
    if len(value.shape) in maps.ranks:
        return any(side > 1 for side in maps.size(value))
    # positions are rows of a matrix
    return len(value.shape) == 2 and value.shape[0] > maps.batch


def _weighs(maps: Maps, value: Value) -> bool:
    return value.operator.startswith(WEIGHTED) and maps.seen.is_data(value)


def _is_depthwise(maps: Maps, value: Value) -> bool:
    weight = maps.seen.values[value.inputs[1]] if value.operator == CONVOLUTION else None
    return weight is not None and weight.shape[1] == 1 and value.shape[1] > 1


def _innermost(candidates: list[_Candidate]) -> list[_Candidate]:
    outer = set()
    for name in {one.call.name for one in candidates}:
        while name:
            name = name.rpartition(".")[0]
            outer.add(name)
    around = {one.kind for one in candidates if one.call.name in outer}
    return [one for one in candidates if one.kind not in around]


def _units(maps: Maps) -> list[Block]:
    """Each convolution with the norm and the activation behind it, but that of the logits."""
    found = []
    last = max((value.index for value in maps.seen.values if _weighs(maps, value)), default=-1)
    for call in maps.calls:
        if call.y is None or not isinstance(layer_of(call.module), nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        start = end = maps.seen.values[call.y]
        while (following := _following(maps, end)) is not None:
            end = following
        if maps.is_map(end) and any(side > 1 for side in maps.size(end)) and (end is not start or start.index < last):
            found.append(Block(end, call.first, end.index + 1))
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
