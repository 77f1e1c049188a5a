"""Where attention can stand in a network. Pure: a model in, places out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from convattn.attachment import blocks, pooling
from convattn.attachment.blocks import Block
from convattn.attachment.maps import Maps
from convattn.attachment.sums import ACTIVATIONS, Sum, sums
from convattn.attachment.wrapper import ATTENTION, Attached
from convattn.networks.watching import Call, Value

PLACES = ("residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final", "layer", "pool")


@dataclass(frozen=True)
class Place:
    """A layer at which attention can stand, and the map there.

    `side` tells where: `after` or `before` the layer; for a head `pool`, beside the layer that pools, `map`, on the map
    that a function pools, or `vector`, on the vector that a function pooled, the map being that of the layer `source`
    after `functions`. `size` are the map's spatial dimensions on the example, `width` is that of the pooled vector,
    `alone` says that the layer takes one tensor and nothing else.
    """

    name: str
    place: str
    channels: int
    size: tuple[int, ...]
    channels_last: bool
    side: str = "after"
    alone: bool = True
    stage: int | None = None
    width: int = 0
    pool: str = "mean"
    source: str = ""
    functions: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A place at which nothing can stand: a layer near it, and the reason."""

    name: str
    reason: str


Found = Place | Skipped


class Survey:
    """The places of a network, from one forward pass on an example.

    Raises:
        AttachError: the network does not run on the example.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.maps = Maps(model, example)

    def find(self, at: str) -> tuple[list[Place], list[Skipped]]:
        """The places of one kind, in the order of the network, and where there is none though one might expect it."""
        found: dict[str, Callable[[], Iterable[Found]]] = {
            "residual": self._residual,
            "residual-pre": self._before,
            "residual-post": self._post,
            "shortcut": self._shortcuts,
            "block": self._blocks,
            "stage": self._stages,
            "final": self._final,
            "layer": self._layers,
            "pool": self._pool,
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
        """All sums of maps but those inside of attention that is attached already."""
        return [one for one in sums(self.maps.seen) if not self.maps.is_attention(one.value.within)]

    @cached_property
    def residual_sums(self) -> list[Sum]:
        return [one for one in self.sums if one.shortcut is not None and self.maps.is_map(one.value)]

    @cached_property
    def blocks(self) -> list[Block]:
        return blocks.find(self.maps, [one.value for one in self.residual_sums])

    @cached_property
    def stage_ends(self) -> list[Value]:
        return blocks.stage_ends(self.maps, self.residual_sums, self.blocks)

    def _residual(self) -> Iterable[Found]:
        yield from self._not_residual()
        for one in self.residual_sums:
            for branch in one.branches:
                yield self._end_of(one, branch)

    def _end_of(self, one: Sum, branch: Value) -> Found:
        """The last layer of a branch."""
        branches = [branch for each in self.residual_sums for branch in each.branches]
        return self._after(branch, branches, near=one.value.within, what="the branch", innermost=True)

    def _not_residual(self) -> Iterable[Skipped]:
        for one in self.sums:
            if one.shortcut is None:
                yield Skipped(one.value.within, one.reason)
            elif not self.maps.is_map(one.value):
                yield Skipped(one.value.within, "a sum of tokens, not of maps")

    def _before(self) -> Iterable[Found]:
        for first in self._firsts.values():
            if isinstance(first, Skipped):
                yield first
            else:
                yield self._place(first, self.maps.seen.values[first.x or 0], side="before")

    @cached_property
    def _firsts(self) -> dict[int, Call | Skipped]:
        """The first layer of each branch, by the value with which the branch ends."""
        found = {branch.index: self._first_layer(one, branch) for one in self.residual_sums for branch in one.branches}
        chosen = {(id(call.module), call.first) for call in found.values() if isinstance(call, Call)}
        for index, call in found.items():
            if isinstance(call, Skipped):
                continue
            if any((id(each.module), each.first) not in chosen for each in self.maps.calls_of(call.module)):
                found[index] = Skipped(call.name, "it is used elsewhere as well")
            elif _has_part(call.module):
                found[index] = Skipped(call.name, f"it has a part called {ATTENTION!r} already")
        return found

    def _first_layer(self, one: Sum, branch: Value) -> Call | Skipped:
        """The layer with which a branch begins: all that the branch takes from outside comes in there."""
        seen, shortcut = self.maps.seen, one.shortcut
        if shortcut is None:
            return Skipped(one.value.within, one.reason)
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
            if calls:
                return min(calls, key=lambda call: call.last - call.first)
        return Skipped(one.value.within, "the branch does not begin with one layer that takes one map")

    def _post(self) -> Iterable[Found]:
        targets = [self._activated(one.value) for one in self.residual_sums]
        for one, target in zip(self.residual_sums, targets, strict=True):
            found = self._after(target, targets, near=one.value.within)
            if isinstance(found, Skipped) and target is not one.value:
                found = self._after(
                    one.value, [*targets, *(each.value for each in self.residual_sums)], near=one.value.within
                )
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
                yield self._after(value, targets, near=one.value.within)
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
            first, last = self._firsts[branch.index], self._end_of(one, branch)
            begins = isinstance(first, Call) and first.x == value.index
            if (
                isinstance(first, Call)
                and begins
                and isinstance(last, Place)
                and last.alone
                and first.name != last.name
            ):
                place = self._place(first, value, side="shortcut")
                return replace(place, name=last.name, source=first.name)
        return Skipped(
            one.value.within, "the shortcut is the block's input, and no two layers begin and end its branch"
        )

    def _blocks(self) -> Iterable[Found]:
        ends = [block.end for block in self.blocks]
        for end in ends:
            yield self._after(end, ends, near=end.within)

    def _stages(self) -> Iterable[Found]:
        for end in self.stage_ends:
            yield self._after(end, self.stage_ends, near=end.within)

    def _final(self) -> Iterable[Found]:
        pools = pooling.find(self.maps)
        end = pooling.last_map(self.maps, pools[-1].map) if pools else None
        if end is None and self.stage_ends:
            end = self.stage_ends[-1]
        if end is not None:
            yield self._after(end, [end], near=end.within)

    def _layers(self) -> Iterable[Found]:
        for call in self.maps.calls:
            value = None if call.y is None else self.maps.seen.values[call.y]
            if value is not None and self.maps.is_map(value) and not _has_part(call.module):
                alike = [each.y for each in self.maps.calls if each.module is call.module]
                shapes = {self.maps.kind(self.maps.seen.values[y]) if y is not None else None for y in alike}
                if len(shapes) == 1:
                    yield self._place(call, value)

    def _pool(self) -> Iterable[Found]:
        for one in pooling.find(self.maps):
            if one.layer is None:
                yield Skipped(one.map.within, one.reason)
            elif _has_part(one.layer.module):
                yield Skipped(one.layer.name, f"it has a part called {ATTENTION!r} already")
            else:
                place = self._place(one.layer, one.map, side=one.side)
                yield replace(place, width=one.width, pool=one.pool, source=one.source, functions=one.functions)

    def _after(
        self, value: Value, targets: list[Value], *, near: str, what: str = "it", innermost: bool = False
    ) -> Found:
        """The layer whose output is a value and which gives nothing but such values."""
        if not self.maps.is_map(value):
            return Skipped(near, "a sum of tokens, not of maps")
        kind = self.maps.kind(value)
        alike = {each.index for each in targets if self.maps.is_map(each) and self.maps.kind(each) == kind}
        calls = self.maps.by_output.get(value.index, [])
        # those that computed the value before those that only pass it on
        ends = [call for call in calls if call.x != call.y]
        if not innermost:
            # the outermost, but what is in a container before the container
            ends = [each for each in ends[::-1] if not _is_container(each)] + [
                each for each in ends if _is_container(each)
            ]
        ends += [call for call in calls if call.x == call.y]
        ends.sort(key=lambda call: not call.alone)
        reasons = []
        for end in ends:
            if any(call.y not in alike for call in self.maps.calls_of(end.module)):
                reasons.append(Skipped(end.name, "its output is used elsewhere as well"))
            elif _has_part(end.module):
                reasons.append(Skipped(end.name, f"it has a part called {ATTENTION!r} already"))
            else:
                return self._place(end, value)
        return reasons[0] if reasons else Skipped(near, f"{what} ends in a function ({value.operator}), not in a layer")

    def _place(self, call: Call, value: Value, side: str = "after") -> Place:
        axis, last = self.maps.axis(value), len(value.shape) - 1
        size = tuple(length for dimension, length in enumerate(value.shape) if dimension not in (0, axis))
        alone = all(each.alone for each in self.maps.calls_of(call.module))
        return Place(call.name, "", value.shape[axis], size, axis == last, side, alone, self._stage_of(value))

    def _stage_of(self, value: Value) -> int | None:
        after = [number for number, end in enumerate(self.stage_ends, 1) if value.index <= end.index]
        return after[0] if after else len(self.stage_ends) or None


def _has_part(module: nn.Module) -> bool:
    return hasattr(module, ATTENTION) and not isinstance(module, Attached)


def _is_inside(name: str, scope: str) -> bool:
    return scope == "" or f"{name}.".startswith(f"{scope}.")


def _is_container(call: Call) -> bool:
    layer = call.module.inner if isinstance(call.module, Attached) else call.module
    return isinstance(layer, nn.Sequential)


def _bits(ancestors: int) -> Iterable[int]:
    while ancestors:
        lowest = ancestors & -ancestors
        yield lowest.bit_length() - 1
        ancestors ^= lowest
