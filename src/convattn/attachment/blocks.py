"""The repeated blocks of a network, and the stages that they form."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, groupby, pairwise
from math import prod
from operator import and_, or_

from torch import nn

from convattn.attachment.maps import CONVOLUTION, Maps
from convattn.attachment.sums import WEIGHTED, Sum
from convattn.attachment.wrapper import layer_of
from convattn.networks.watching import Call, Value

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
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
    """A call of a module that may be a block: kind, parent, the map that it gives, and its layers of weights.

    The kind is the class, and of a plain `Sequential` the classes of the layers in it that have parameters. `at_top`
    says that it is in the network itself, or in a part with most of its layers. `layers` and `wide_layers`, those that
    are not depthwise, are not counted on maps of one position.
    """

    call: Call
    kind: object
    parent: str
    contained: bool
    at_top: bool
    end: Value
    layers: int
    wide_layers: int

    @property
    def plain(self) -> bool:
        """Whether it is a `Sequential` and of no class of its own."""
        return isinstance(self.kind, tuple)

    @property
    def block(self) -> Block:
        return Block(self.end, self.call.first, self.call.last, self.call.name)


def find(maps: Maps, sums: list[Sum]) -> list[Block]:
    """The repeated blocks of a network, in order; `sums` are its residual sums.

    A block is of a class with several calls, one after the other, in a container, beside each other or at the top of
    the network, and has at least two layers of weights. Where there are residual sums that begin and end in one class,
    as they do in most networks, such classes are blocks, and with them those outside of them, as in a decoder. Of
    classes within one another the inner one counts. Where there is none, depthwise convolutions count as layers too;
    then each `Sequential` of the same layers is a block; and at last each convolution with the norm and the activation
    behind it; so it is in the part before the blocks where that goes deeper, or where they are of no class.
    """
    all_calls = _candidates(maps)
    # maps of one position may be pooled ones, but not in blocks of the kinds of others
    candidates = [one for one in all_calls if one.layers]
    for plain in (False, True):
        for layers in ("wide_layers", "layers"):
            repeated = _repeated([one for one in candidates if one.plain is plain], layers)
            chosen = _innermost(_preferred(maps, repeated, sums))
            if not chosen or (plain and not _are_most(maps, chosen)):
                continue
            chosen += _beside(_repeated(candidates, "wide_layers"), chosen, sums)
            kinds = {one.kind for one in chosen}
            chosen += _outside([one for one in all_calls if not one.layers and one.kind in kinds], chosen)
            found = {one.end.index: one.block for one in chosen}
            return _with_plain_part(maps, [found[index] for index in sorted(found)], plain)
    return _units(maps)


def _are_most(maps: Maps, chosen: list[_Candidate]) -> bool:
    """Whether most layers of weights are in some blocks."""
    return 2 * sum(one.layers for one in chosen) > sum(_is_weighted_map(maps, value) for value in maps.seen.values)


def _beside(repeated: list[_Candidate], chosen: list[_Candidate], sums: list[Sum]) -> list[_Candidate]:
    """The blocks outside of those that were chosen.

    What is a part of these, such as a convolution with its norm, is none, but at the top of a network without sums in
    its blocks: the first block of an encoder may stand there alone.
    """
    outside = _outside(repeated, chosen)
    parts = {one.kind for one in repeated if one not in outside and one not in chosen}
    summing = any(one.call.first <= each.value.index < one.call.last for one in chosen for each in sums)
    found = [one for one in outside if one.kind not in parts or (one.at_top and not summing)]
    return _innermost([one for one in found if not one.plain] or found)


def _preferred(maps: Maps, repeated: list[_Candidate], sums: list[Sum]) -> list[_Candidate]:
    """Those of the kinds with whole residual sums in them, or else of those in containers, or else all."""
    whole = [(_first(maps, one), one.value.index) for one in sums]
    with_sums = {
        one.kind for one in repeated for first, end in whole if one.call.first <= first and end < one.call.last
    }
    contained = {one.kind for one in repeated if one.contained}
    kinds = with_sums or contained
    return [one for one in repeated if one.kind in kinds] or repeated


def _first(maps: Maps, one: Sum) -> int:
    """The first value that the branches of a sum do not share with the shortcut."""
    common = reduce(and_, (operand.ancestors for operand in one.operands))
    path = reduce(or_, (branch.ancestors & ~common for branch in one.branches))
    while path:
        index = (path & -path).bit_length() - 1
        if maps.seen.is_data(maps.seen.values[index]):
            return index
        path &= path - 1
    return one.value.index


def _outside(candidates: list[_Candidate], chosen: list[_Candidate]) -> list[_Candidate]:
    """Those that are neither in nor around the chosen ones."""
    return [
        one
        for one in candidates
        if all(one.call.last <= other.call.first or other.call.last <= one.call.first for other in chosen)
    ]


def _with_plain_part(maps: Maps, blocks: list[Block], plain: bool) -> list[Block]:
    """The blocks, and the convolutions before them where these make smaller maps than any block gives.

    So it is with an encoder of plain convolutions before a decoder of blocks. Where the blocks are `plain`, all is.
    """
    before = [unit for unit in _units(maps) if unit.end.index < blocks[0].first]
    smallest = min((prod(maps.size(block.end)) for block in blocks), default=0)
    return [*before, *blocks] if plain or any(prod(maps.size(unit.end)) < smallest for unit in before) else blocks


def of_tokens(maps: Maps, blocks: list[Block]) -> list[str]:
    """The names of the repeated blocks outside of the others that give tokens, which are no maps."""

    def gives_tokens(value: Value) -> bool:
        return len(value.shape) > 2 and maps.seen.is_data(value) and not maps.is_map(value)

    found = _innermost(_repeated(_candidates(maps, gives_tokens), "wide_layers"))
    apart = [one for one in found if all(one.call.last <= each.first or each.last <= one.call.first for each in blocks)]
    return list(dict.fromkeys(one.call.name for one in apart if not one.plain))


def stage_ends(maps: Maps, sums: list[Sum], blocks: list[Block]) -> list[Value]:
    """The maps with which the stages of a network end.

    A stage is a run of blocks, and of residual sums outside of them, whose maps have the same size; on 1x1 maps, which
    a stride does not make smaller, each stride begins a stage. A stage ends with the first map of a layer through which
    all goes that later depends on maps of its size; where there is none, as in networks whose cells take the outputs of
    two others, with that of the last block.
    """
    inside = {index for block in blocks for index in range(block.first, block.last)}
    beside = [one.value for one in sums if one.value.index not in inside]
    # blocks that come once, such as the first of many networks
    ends = {block.end.index for block in blocks} | {one.index for one in beside}
    for one in (each for each in _candidates(maps) if not each.plain):
        extent = set(range(one.call.first, one.call.last))
        if one.contained and one.layers > 1 and not extent & inside and not extent & ends:
            beside.append(one.end)
    values = {
        one.index: one for one in (*(block.end for block in blocks), *beside) if not _is_in_branch(one, sums, blocks)
    }
    # windows of a map are no maps of the network
    ordered = [values[index] for index in sorted(values) if values[index].shape[0] == maps.batch]
    strides = [call.first for call in maps.calls if call.y is not None and _is_strided(layer_of(call.module))]

    def size_and_strides(value: Value) -> tuple[tuple[int, ...], int]:
        size = maps.size(value)
        return size, sum(first <= value.index for first in strides) if prod(size) == 1 else 0

    runs = [list(run) for _, run in groupby(ordered, key=size_and_strides)]
    limits = [*(run[0].index for run in runs), len(maps.seen.values)][1:]
    last_use = {
        value.index: max(maps.seen.users.get(value.index, [-1])) for value in maps.seen.values if maps.is_map(value)
    }
    return [_end(maps, run[-1], limit, last_use) for run, limit in zip(runs, limits, strict=True)]


def _is_strided(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with a stride, which makes maps smaller that have several positions."""
    stride = layer.stride if isinstance(layer, CONVOLUTIONS[:3]) else 1
    return any(step > 1 for step in (stride if isinstance(stride, tuple) else (stride,)))


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


def _candidates(maps: Maps, gives: Callable[[Value], bool] | None = None) -> list[_Candidate]:
    """The calls that give a map, or a value of which `gives` is true."""
    values = maps.seen.values
    # how many of the values up to each one were given by weights, and are maps and not pooled
    layers = list(accumulate((_is_weighted_map(maps, value) for value in values), initial=0))
    wide = list(
        accumulate((_is_weighted_map(maps, value) and not _is_depthwise(maps, value) for value in values), initial=0)
    )
    called = {call.name: layer_of(call.module) for call in maps.seen.calls}
    tops = {call.name for call in maps.seen.calls if 2 * (layers[call.last] - layers[call.first]) > layers[-1]} | {""}
    found = []
    for call in maps.calls:
        layer = layer_of(call.module)
        given = [values[index] for index in call.outputs if (gives or maps.is_map)(values[index])]
        kind = _kind(layer)
        if given and kind:
            end = max(given, key=lambda value: value.ancestors.bit_count())
            parent = call.name.rpartition(".")[0]
            # lists and dictionaries of modules are never called, and so are found by having been left out
            contained = parent != "" and isinstance(called.get(parent, nn.ModuleList()), CONTAINERS)
            counts = (count[call.last] - count[call.first] for count in (layers, wide))
            found.append(_Candidate(call, kind, parent, contained, parent in tops, end, *counts))
    return found


def _kind(layer: nn.Module) -> object:
    """What the blocks of a network have in common; nothing where a layer is none."""
    if type(layer) is nn.Sequential:
        leaves = [one for one in layer.modules() if any(True for _ in one.parameters(recurse=False))]
        return tuple(map(type, leaves))
    return type(layer) if type(layer) not in CONTAINERS and any(True for _ in layer.children()) else None


def _repeated(candidates: list[_Candidate], layers: str) -> list[_Candidate]:
    """Those of a kind that is called several times, one after the other, and has two layers of weights."""
    kinds: dict[object, list[_Candidate]] = defaultdict(list)
    for one in candidates:
        kinds[one.kind].append(one)
    groups = [group for group in kinds.values() if any(getattr(one, layers) > 1 for one in group)]
    return [one for group in groups if _follow_each_other(group) and _in_company(group) for one in group]


def _in_company(group: list[_Candidate]) -> bool:
    """Whether one is in a container, beside another, or at the top: what each block of a class has once is no block."""
    beside = len({one.parent for one in group}) < len(group)
    return beside or (len(group) > 1 and any(one.contained or one.at_top for one in group))


def _follow_each_other(group: list[_Candidate]) -> bool:
    """Whether most depend on an earlier one beside them, or, where none are beside each other, on the one before."""
    siblings = [(one, [each for each in group[:n] if each.parent == one.parent]) for n, one in enumerate(group)]
    pairs = [pair for pair in siblings if pair[1]] or [(b, [a]) for a, b in pairwise(group)]
    return sum(any(one.end.depends_on(each.end) for each in earlier) for one, earlier in pairs) * 2 > len(pairs)


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
    """Each convolution, transposed or not, with the norm and the activation behind it, but that of the logits."""
    found = []
    last = max((value.index for value in maps.seen.values if _weighs(maps, value)), default=-1)
    for call in maps.calls:
        if call.y is None or not isinstance(layer_of(call.module), CONVOLUTIONS):
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
