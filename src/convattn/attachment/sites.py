"""Where attention can stand in a network. Pure: a model in, places out."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from convattn.attachment import blocks, pooling, units
from convattn.attachment.blocks import Block
from convattn.attachment.maps import Maps, before_functions
from convattn.attachment.sums import ACTIVATIONS, Sum, sums
from convattn.attachment.wrapper import ATTENTION, Attached, Functions, layer_of, like
from convattn.networks.watching import Call, Value

PLACES = ("residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final", "layer", "pool")
SIDES = ("after", "before", "shortcut", "pool", "map", "vector")


@dataclass(frozen=True)
class Place:
    """A layer at which attention can stand, and the map there.

    `side` tells where: `after` or `before` the layer; for a head `pool`, beside the layer that pools, `map`, on the map
    that a function pools, or `vector`, on the vector that a function pooled, the map being that of the layer `source`
    after `functions`. `size` are the map's spatial dimensions on the example, `width` is that of the pooled vector,
    `alone` says that the layer takes one tensor and nothing else, `dtype` names that of the map where it is not that
    of the layer.
    """

    name: str
    place: str
    channels: int
    size: tuple[int, ...]
    channels_last: bool
    side: str = "after"
    alone: bool = True
    dtype: str = ""
    stage: int | None = None
    width: int = 0
    pool: str = "mean"
    source: str = ""
    functions: Functions = ()


@dataclass(frozen=True)
class Skipped:
    """A place at which nothing can stand: a layer near it, and the reason."""

    name: str
    reason: str


Found = Place | Skipped
# of layers within one another the inner one or the outer one: `min` or `max`
Pick = Callable[..., Call]
# which of the layers that give one and the same value is asked first
Order = Callable[[Maps, list[Call]], list[Call]]

ELSEWHERE = "its output is used elsewhere as well"
HAS_PART = f"it has a part called {ATTENTION!r} already"
TOKENS = "a sum of tokens, not of maps"


class Survey:
    """The places of a network, from one forward pass on an example.

    Raises:
        AttachError: the network does not run on the example.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self.maps = Maps(model, example)
        self._known_units: dict[str, list[str]] = {}

    def find(self, at: str, taken: Collection[str] = ()) -> tuple[list[Place], list[Skipped]]:
        """The places of one kind, in the order of the network, and where there is none though one might expect it.

        Heads keep off the layers that are taken already, where others will do as well.
        """
        found: dict[str, Callable[[], Iterable[Found]]] = {
            "residual": self._residual,
            "residual-pre": self._before,
            "residual-post": self._post,
            "shortcut": self._shortcuts,
            "block": self._blocks,
            "stage": self._stages,
            "final": self._final,
            "layer": self._layers,
            "pool": lambda: self._pool(taken),
        }
        places: dict[int, Place] = {}
        skipped: list[Skipped] = []
        for one in found[at]():
            if isinstance(one, Skipped):
                skipped.append(one)
            else:
                # a layer that ends several branches is one place
                places.setdefault(id(self.model.get_submodule(one.name)), replace(one, place=at))
        return list(places.values()), list(dict.fromkeys(skipped))

    @cached_property
    def sums(self) -> list[Sum]:
        return sums(self.maps.seen)

    @cached_property
    def residual_sums(self) -> list[Sum]:
        return [one for one in self.sums if one.residual and self.maps.is_map(one.value)]

    @cached_property
    def blocks(self) -> list[Block]:
        return blocks.find(self.maps, self.residual_sums)

    @cached_property
    def stage_ends(self) -> list[Value]:
        sums = [one for one in self.sums if one.shortcut is not None and self.maps.is_map(one.value)]
        return [self._end_of_unit(end) for end in blocks.stage_ends(self.maps, sums, self.blocks)]

    @cached_property
    def branches(self) -> list[tuple[Sum, Value]]:
        """All branches, each with its sum."""
        return [(one, branch) for one in self.residual_sums for branch in one.branches]

    def _residual(self) -> Iterable[Found]:
        yield from self._not_residual()
        for one, branch in self.branches:
            found = self._end_of(one, branch, _inner_first)
            for before in before_functions(self.maps, branch) if isinstance(found, Skipped) else ():
                # a gate before a constant factor is the gate behind it
                earlier = self._end_of(one, before, _inner_first)
                if isinstance(earlier, Place):
                    found = earlier
                    break
            yield found

    def _end_of(self, one: Sum, branch: Value, order: Order) -> Found:
        """The last layer of a branch."""
        return self._after(branch, self._branch_ends, order, near=one.value.within, what="the branch")

    @cached_property
    def _branch_ends(self) -> list[Value]:
        """The values with which branches end, and those of which functions make these and nothing else."""
        return [value for _, branch in self.branches for value in (branch, *before_functions(self.maps, branch))]

    def _not_residual(self) -> Iterable[Skipped]:
        for one in self.sums:
            if not one.residual:
                yield Skipped(one.value.within, one.reason)
            elif not self.maps.is_map(one.value):
                yield Skipped(one.value.within, TOKENS)

    def _before(self) -> Iterable[Found]:
        for _, branch in self.branches:
            first = self._firsts[branch.index]
            if isinstance(first, Skipped):
                yield first
            else:
                # the stage is that of the block, whose input may be of the one before
                place = self._place(first, self.maps.seen.values[first.x or 0], side="before")
                yield replace(place, stage=self._stage_of(branch))

    @cached_property
    def _firsts(self) -> dict[int, Call | Skipped]:
        """The first layer of each branch, by the value with which the branch ends."""
        return self._first_layers(min)

    @cached_property
    def _outer_firsts(self) -> dict[int, Call | Skipped]:
        """The outermost layer with which each branch begins, by the value with which the branch ends."""
        return self._first_layers(max)

    def _first_layers(self, pick: Pick) -> dict[int, Call | Skipped]:
        found = {branch.index: self._first_layer(one, branch, pick) for one, branch in self.branches}
        chosen = {(id(call.module), call.first) for call in found.values() if isinstance(call, Call)}
        for index, call in found.items():
            if isinstance(call, Skipped):
                continue
            if any((id(each.module), each.first) not in chosen for each in self.maps.calls_of(call.module)):
                found[index] = Skipped(call.name, "it is used elsewhere as well")
            elif _has_part(call.module):
                found[index] = Skipped(call.name, HAS_PART)
        return found

    def _first_layer(self, one: Sum, branch: Value, pick: Pick) -> Call | Skipped:
        """The layer with which a branch begins: all that the branch takes from outside comes in there."""
        seen, shortcut = self.maps.seen, one.shortcut
        if shortcut is None:
            return Skipped(one.value.within, one.reason)
        if one.value.operator.endswith("_") and seen.values[one.value.inputs[0]] is shortcut:
            # attention keeps its input for the gradient
            return Skipped(one.value.within, "the sum is written over the block's input")
        common = branch.ancestors & shortcut.ancestors
        path = [seen.values[index] for index in _bits(branch.ancestors & ~common)]
        entries = [
            value
            for value in path
            if any(common >> index & 1 and seen.is_data(seen.values[index]) for index in value.inputs)
        ]
        sources = {
            index
            for value in entries
            for index in value.inputs
            if common >> index & 1 and seen.is_data(seen.values[index])
        }
        if len(sources) == 1:
            (source,) = sources
            outside = {one.value.index, shortcut.index} if shortcut.index not in sources else {one.value.index}
            calls = [
                call
                for call in self.maps.calls
                if call.x == source
                and call.alone
                and self.maps.is_map(seen.values[source])
                and all(call.first <= value.index < call.last for value in entries)
                and not any(call.first <= index < call.last for index in outside)
            ]
            whole = self._whole(calls)
            if whole:
                call = pick(whole, key=lambda call: call.last - call.first)
                lost = self._is_lost(call, seen.values[source], before=True)
                return Skipped(call.name, self._merged_by(call)) if lost else call
        return Skipped(one.value.within, "the branch does not begin with one layer that takes one map")

    def _post(self) -> Iterable[Found]:
        totals = [one.value for one in self.residual_sums]
        targets = [self._activated(total) for total in totals]
        for total, target in zip(totals, targets, strict=True):
            # the block rather than what is around it
            order = _around(total)
            found = self._after(target, targets, order, near=total.within)
            if isinstance(found, Skipped) and target is not total:
                found = self._after(total, [*targets, *totals], order, near=total.within)
            yield found

    def _activated(self, total: Value) -> Value:
        """A sum after the activation with which its block ends."""
        first, *others = [*self.maps.users(total), total]
        activates = len(others) == 1 and first.operator.rstrip("_") in ACTIVATIONS
        return first if activates and _is_inside(first.within, total.within) else total

    def _shortcuts(self) -> Iterable[Found]:
        targets = [one.shortcut for one in self.residual_sums if one.shortcut is not None]
        for one in self.residual_sums:
            value = one.shortcut
            if value is None:
                continue
            if all(user.index == one.value.index for user in self.maps.users(value)):
                yield self._after(value, targets, _outer_first, near=one.value.within)
            else:
                yield self._passed_on(one, value) or self._beside(one, value)

    def _passed_on(self, one: Sum, value: Value) -> Place | None:
        """The place on a shortcut that is the block's input, where a layer of its own passes it on."""
        entered = min((user.index for user in self.maps.users(value) if user.index != one.value.index), default=0)
        for call in self.maps.calls:
            passes = call.x == call.y == value.index and _is_inside(call.name, one.value.within)
            # a layer that came before the branch took its input would stand on the branch as well
            if passes and call.alone and entered < call.first <= one.value.index and not _has_part(call.module):
                return self._place(call, value)
        return None

    def _beside(self, one: Sum, value: Value) -> Found:
        """The place on a shortcut that is the block's input: between the first layer of the branch and its last."""
        for branch in one.branches:
            first, last = self._enclosing.get(branch.index, (None, None))
            if first is None or last is None or first.x != value.index:
                continue
            # a layer that is shared by two blocks has to leave the map for one and the same other layer
            alike = [
                pair for pair in self._enclosing.values() if pair[0].name == first.name or pair[1].name == last.name
            ]
            if all((a.name, b.name) == (first.name, last.name) for a, b in alike):
                return replace(last, side="shortcut", source=first.name)
        reason = "the shortcut is the block's input, and no two layers of its own begin and end its branch"
        return Skipped(one.value.within, reason)

    @cached_property
    def _enclosing(self) -> dict[int, tuple[Call, Place]]:
        """The first layer of each branch and the last one, by the value with which the branch ends.

        The outermost ones, both among the parts of the block: what is a leaf to a symbolic trace holds both or neither.
        They may be one and the same layer.
        """
        found = {}
        for one, branch in self.branches:
            first, last = self._outer_firsts[branch.index], self._end_of(one, branch, _last_first)
            if isinstance(first, Call) and isinstance(last, Place) and last.alone:
                found[branch.index] = first, last
        return found

    def _blocks(self) -> Iterable[Found]:
        ends = [block.end for block in self.blocks]
        for block in self.blocks:
            yield self._after(block.end, ends, _named(block.name), near=block.name or block.end.within)
        yield from self._token_blocks

    def _stages(self) -> Iterable[Found]:
        for end in self.stage_ends:
            yield self._after(end, self.stage_ends, self._outer_or_block(end), near=end.within)
        yield from self._token_blocks

    @cached_property
    def _token_blocks(self) -> list[Skipped]:
        return [Skipped(name, "a block of tokens, not of maps") for name in blocks.of_tokens(self.maps, self.blocks)]

    def _end_of_unit(self, value: Value) -> Value:
        """The map that a unit gives, for a map of the same kind inside of it."""
        around = [call for call in self.maps.calls if call.first <= value.index < call.last and call.y is not None]
        for call in reversed(around):
            end = self.maps.seen.values[call.y or 0]
            alike = self.maps.is_map(end) and self.maps.kind(end) == self.maps.kind(value)
            if alike and units.is_unit(type(layer_of(call.module))):  # type: ignore[arg-type]
                return end
        return value

    def _final(self) -> Iterable[Found]:
        pools = pooling.find(self.maps)
        end = pooling.last_map(self.maps, pools[-1].map) if pools else None
        end = end or pooling.before_output(self.maps, self.blocks)
        if end is None and self.stage_ends:
            end = self.stage_ends[-1]
            if not pooling.all_goes_through(self.maps, end):
                yield Skipped(end.within, "no map is the last: the output is made of several")
                return
        if end is not None:
            yield self._after(end, [end], self._outer_or_block(end), near=end.within)

    def _outer_or_block(self, end: Value) -> Order:
        """The outermost layer that computed a value, or before it a container that is a block."""
        containers = {call.name for call in self.maps.by_output.get(end.index, []) if self.maps.is_container(call)}
        return _named(next((block.name for block in self.blocks if block.end is end and block.name in containers), ""))

    def _layers(self) -> Iterable[Found]:
        for call in self.maps.calls:
            value = None if call.y is None else self.maps.seen.values[call.y]
            if value is not None and self.maps.is_map(value) and not _has_part(call.module):
                if self._units(call.name):
                    yield Skipped(call.name, self._merged_by(call))
                    continue
                alike = [each.y for each in self.maps.calls if each.module is call.module]
                shapes = {self.maps.kind(self.maps.seen.values[y]) if y is not None else None for y in alike}
                if len(shapes) == 1:
                    yield self._place(call, value)

    def _pool(self, taken: Collection[str]) -> Iterable[Found]:
        for one in pooling.find(self.maps):
            layers = [layer for layer in one.layers if not _has_part(layer.module)]
            if not layers:
                yield Skipped(one.layers[0].name if one.layers else one.map.within, one.reason or HAS_PART)
                continue
            layer = _first_free(layers, taken)
            source = _first_free(list(one.sources), taken).name if one.sources else ""
            place = self._place(layer, one.map, side=one.side)
            yield replace(place, width=one.width, pool=one.pool, source=source, functions=one.functions)

    def _after(self, value: Value, targets: list[Value], order: Order, *, near: str, what: str = "it") -> Found:
        """The first layer, in some order, whose output is a value and which gives nothing but such values."""
        if not self.maps.is_map(value):
            return Skipped(near, TOKENS)
        kind = self.maps.kind(value)
        alike = {each.index for each in targets if self.maps.is_map(each) and self.maps.kind(each) == kind}
        calls = order(self.maps, self.maps.by_output.get(value.index, []))
        calls.sort(key=lambda call: not call.alone)
        reasons = []
        for call in self._whole(calls):
            if any(each.y not in alike for each in self.maps.calls_of(call.module)):
                reasons.append(Skipped(call.name, ELSEWHERE))
            elif _has_part(call.module):
                reasons.append(Skipped(call.name, HAS_PART))
            elif self._is_lost(call, value):
                reasons.append(Skipped(call.name, self._merged_by(call)))
            else:
                return self._place(call, value)
        return reasons[0] if reasons else Skipped(near, f"{what} ends in a function ({value.operator}), not in a layer")

    def _whole(self, calls: list[Call]) -> list[Call]:
        """The calls but those of layers inside of a unit that is among them: it is taken as a whole."""
        names = {call.name for call in calls}
        return [call for call in calls if not names.intersection(self._units(call.name))]

    def _units(self, name: str) -> list[str]:
        """The units around a layer, the innermost first: see `units`."""
        if name not in self._known_units:
            self._known_units[name] = units.enclosing(self.model, name)
        return self._known_units[name]

    def _merged_by(self, call: Call) -> str:
        unit = self._units(call.name)[-1]
        kind = type(layer_of(self.model.get_submodule(unit))).__name__
        return f"it lies in {unit} ({kind}), whose layers can be merged into one, and the gate would be lost"

    def _is_lost(self, call: Call, value: Value, *, before: bool = False) -> bool:
        """Whether a gate at a layer inside of a unit is lost when the unit is merged."""
        if not self._units(call.name):
            return False
        outer = self._units(call.name)[-1]
        around = next((each for each in self.maps.calls if each.name == outer), None)
        if around is None or around.x is None or not around.alone:
            return True
        shape = self.maps.seen.values[around.x].shape
        last = self.maps.axis(value) == len(value.shape) - 1
        path = call.name[len(outer) + 1 :]
        return not units.survives_merging(layer_of(around.module), path, shape, before=before, channels_last=last)

    def _place(self, call: Call, value: Value, side: str = "after") -> Place:
        axis, last = self.maps.axis(value), len(value.shape) - 1
        size = tuple(length for dimension, length in enumerate(value.shape) if dimension not in (0, axis))
        alone = all(each.alone for each in self.maps.calls_of(call.module))
        stage, dtype = self._stage_of(value), self._dtype_of(call, value)
        return Place(call.name, "", value.shape[axis], size, axis == last, side, alone, dtype, stage)

    def _dtype_of(self, call: Call, value: Value) -> str:
        """The dtype of a map where it is not that of the layer, unless it was chosen for this pass alone."""
        device = self.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return ""
        same = value.dtype == like(layer_of(call.module), self.model).dtype
        return "" if same else str(value.dtype).removeprefix("torch.")

    def _stage_of(self, value: Value) -> int | None:
        after = [number for number, end in enumerate(self.stage_ends, 1) if value.index <= end.index]
        return after[0] if after else len(self.stage_ends) or None


def _has_part(module: nn.Module) -> bool:
    return hasattr(module, ATTENTION) and not isinstance(module, Attached)


def _is_inside(name: str, scope: str) -> bool:
    return scope == "" or f"{name}.".startswith(f"{scope}.")


def _first_free(layers: list[Call], taken: Collection[str]) -> Call:
    return next((layer for layer in layers if layer.name not in taken), layers[0])


def _inner_first(maps: Maps, calls: list[Call]) -> list[Call]:
    """The layer that computed a value before those around it, and before those that only pass it on."""
    return sorted(calls, key=lambda call: call.x == call.y)


def _last_first(maps: Maps, calls: list[Call]) -> list[Call]:
    """The layer that passes a value on last, before the outermost one that computed it."""
    outer = calls[::-1]
    outer.sort(key=lambda call: call.x != call.y)
    return outer


def _outer_first(maps: Maps, calls: list[Call]) -> list[Call]:
    """The outermost layer that computed a value, but what is in a container before the container."""
    outer = calls[::-1]
    outer.sort(key=lambda call: (call.x == call.y, maps.is_container(call)))
    return outer


def _around(total: Value) -> Order:
    """The innermost layer that computes a sum before the others."""

    def order(maps: Maps, calls: list[Call]) -> list[Call]:
        around = [call for call in calls if call.first <= total.index < call.last]
        return around + [call for call in _outer_first(maps, calls) if call not in around]

    return order


def _named(name: str) -> Order:
    """The layer of a name before the others."""

    def order(maps: Maps, calls: list[Call]) -> list[Call]:
        return sorted(_outer_first(maps, calls), key=lambda call: call.name != name)

    return order


def _bits(ancestors: int) -> Iterable[int]:
    while ancestors:
        lowest = ancestors & -ancestors
        yield lowest.bit_length() - 1
        ancestors ^= lowest
