"""Change a network as planned, and change it back."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from convattn.attachment import freezing
from convattn.attachment.guard import Children, guard
from convattn.attachment.plans import UNCHANGED, Plan, Site, Where, built, plan, signature
from convattn.attachment.wrapper import (
    Attached,
    AttachedBefore,
    AttachedBranch,
    AttachedHead,
    AttachedInputSource,
    AttachedMany,
    AttachedMap,
    AttachedShortcut,
    AttachedSource,
    AttachedVector,
    Passage,
    Passing,
    layer_of,
    like,
)
from convattn.errors import AttachError, InvalidOption
from convattn.networks.watching import exclusive
from convattn.registry import Entry

Pair = tuple[nn.Module, nn.Module]


@exclusive
def attach(
    model: nn.Module,
    attention: str | Plan | Callable[[int], nn.Module],
    *,
    at: str | None = None,
    example: Any = None,
    where: Where = None,
    stages: Sequence[int] | int | None = None,
    start: str | None = None,
    replace: bool = False,
    **options: Any,
) -> nn.Module:
    """Put attention into a network, in place, and return it.

    With the start `"identity"` the output is unchanged to the bit for finite inputs until a parameter `strength`, one
    at each site, moves away from 0. Parameter names and state-dict keys of the network stay as they are, and a
    checkpoint of the plain network still loads, with only the keys of the attention missing. Every site is validated
    before anything changes; where one fails, the model is as it was.

    Args:
        model: the network.
        attention: a registered name, a gate or update and a head joined with `+`, a class or factory, see `plan`, or
            a plan of this model.
        at: where gates stand, see `plan`; `"residual"` by default.
        example: an input, see `plan`.
        where: only some of the sites, see `plan`.
        stages: only sites in stages of these numbers.
        start: `"identity"` (default) or `"paper"`.
        replace: put the new attention where there is some already; otherwise that is an error.
        **options: of the module.

    A plan has all of these but `replace` already.

    Raises:
        UnknownName: no such attention.
        InvalidOption: an option that none of the modules takes, or with a wrong value.
        AttachError: the network has no such place, or has attention there already.

    Example:
        >>> from convattn import networks
        >>> network = attach(networks.resnet20(), "cbam", reduction=8)
        >>> network.layer1[0].bn2.attention.strength.item()
        0.0
    """
    if isinstance(attention, Plan):
        given = {"at": at, "example": example, "where": where, "stages": stages, "start": start, **options}
        if any(value is not None for value in given.values()):
            raise InvalidOption(
                f"attach: a plan has its sites, example, start and options already; give them to `plan`. {UNCHANGED}"
            )
        chosen = attention
        if chosen.network != signature(model):
            raise AttachError(
                f"The plan is of another network, or of this one before it was changed: plan it anew. {UNCHANGED}"
            )
    else:
        chosen = plan(
            model,
            attention,
            at=at or "residual",
            example=example,
            where=where,
            stages=stages,
            start=start or "identity",
            **options,
        )
    pairs = [pair for site in chosen for pair in wrapped(model, site, chosen.entries[site.attention], replace)]
    _refuse_two_at_once(model, pairs)
    exchange(model, pairs + partners(model, [old for old, _ in pairs]))
    return model


@exclusive
def detach(model: nn.Module) -> nn.Module:
    """Take all attention out again, in place, and return the model with the very same layers as before.

    What `freeze_base` froze is as it was before that, too.

    Example:
        >>> from convattn import networks
        >>> network = networks.resnet20()
        >>> layer = network.layer1[0].bn2
        >>> detach(attach(network, "se")).layer1[0].bn2 is layer
        True
    """
    exchange(model, [(module, layer_of(module)) for module in model.modules() if isinstance(module, Attached)])
    freezing.release(model)
    return model


def remove(model: nn.Module, name: str) -> None:
    """Take the attention of one site out again."""
    wrapper = model.get_submodule(name)
    if isinstance(wrapper, Attached):
        exchange(model, [(wrapper, layer_of(wrapper)), *partners(model, [wrapper])])


def attached(model: nn.Module) -> list[tuple[str, Attached]]:
    """The names and wrappers of all sites that have attention."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Attached) and not isinstance(module, AttachedSource)
    ]


def _refuse_two_at_once(model: nn.Module, pairs: list[Pair]) -> None:
    layers = [old for old, _ in pairs]
    for name, module in model.named_modules():
        if layers.count(module) > 1:
            raise AttachError(
                f"The gate and the head would both stand at {name!r}: put the gate at another place, or attach one of "
                f"them. {UNCHANGED}"
            )


def partners(model: nn.Module, replaced: list[nn.Module]) -> list[Pair]:
    """What stands at the other end of a passage goes with what is replaced."""
    passages = {id(one.convattn_passage) for one in replaced if isinstance(one, Passing)}
    others = [one for one in model.modules() if isinstance(one, Passing) and one not in replaced]
    return [(one, layer_of(one)) for one in others if id(one.convattn_passage) in passages]


def wrapped(model: nn.Module, site: Site, one: Entry, replace: bool = False) -> list[Pair]:
    """The layers that change at a site, each with what takes its place, the one with the attention first.

    Raises:
        AttachError: no such layer, or one that has attention already.
    """
    place = site.found
    layer = _layer(model, site.name)
    inner = _plain(layer, site.name, replace)
    # tensors made for inference could never be trained
    with torch.inference_mode(False):
        module = built(one, place, site.start, site.options)
        tensor = like(inner, model)
        dtype: torch.dtype = getattr(torch, place.dtype) if place.dtype else tensor.dtype
        module.to(tensor.device, dtype).train(inner.training)
    kept: dict[str, Any] = {"site": site, "channels_last": site.channels_last}
    if place.side == "vector":
        source = _layer(model, place.source)
        passage = Passage()
        return [
            (layer, AttachedVector(inner, module, passage, place.functions, **kept)),
            (source, AttachedSource(_plain(source, place.source, replace), passage, **kept)),
        ]
    if place.side == "shortcut" and place.source == site.name:
        return [(layer, AttachedBranch(inner, module, **kept))]
    if place.side == "shortcut":
        source = _layer(model, place.source)
        passage = Passage()
        return [
            (layer, AttachedShortcut(inner, module, passage, **kept)),
            (source, AttachedInputSource(_plain(source, place.source, replace), passage, **kept)),
        ]
    if place.side == "map":
        return [(layer, AttachedMap(inner, module, pool=place.pool, dimensions=len(place.size), **kept))]
    kinds: dict[str, type[Attached]] = {"pool": AttachedHead, "before": AttachedBefore}
    kind = kinds.get(place.side, Attached if place.alone else AttachedMany)
    return [(layer, kind(inner, module, **kept))]


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AttachError(f"The model has no layer {name!r}. {UNCHANGED}") from error


def _plain(layer: nn.Module, name: str, replace: bool) -> nn.Module:
    """The layer without attention."""
    if not isinstance(layer, Attached):
        return layer
    if not replace:
        raise AttachError(f"{name!r} has attention already; detach the model first, or give replace=True. {UNCHANGED}")
    return layer_of(layer)


def exchange(model: nn.Module, pairs: list[Pair]) -> None:
    """Put the second module of each pair wherever the first one is; all of them or none."""
    new = dict(pairs)
    done: list[tuple[Any, Any, Any]] = []
    try:
        for holder, key, old in [place for parent in model.modules() for place in _held(parent, new)]:
            done.append((holder, key, old))
            # what stood there is lost on purpose
            put = holder.put if isinstance(holder, Children) else holder.__setitem__
            put(key, tuple(new.get(one, one) for one in old) if isinstance(old, tuple) else new[old])
    except BaseException:
        for holder, key, old in reversed(done):
            # past whatever refused: the way back must not fail
            (dict if isinstance(holder, dict) else list).__setitem__(holder, key, old)
        raise
    guard(model)


def _held(parent: nn.Module, modules: Container[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Where a module holds one of others, by identity: as a child, or in a list, tuple or dictionary of its own."""
    for name, value in vars(parent).items():
        if isinstance(value, dict):
            yield from ((value, key, one) for key, one in value.items() if _is_one(one, modules))
        elif isinstance(value, list):
            yield from ((value, index, one) for index, one in enumerate(value) if _is_one(one, modules))
        elif isinstance(value, tuple) and any(_is_one(one, modules) for one in value):
            yield vars(parent), name, value


def _is_one(thing: Any, modules: Container[Any]) -> bool:
    return isinstance(thing, nn.Module) and thing in modules
