"""An existing network in, the same network with attention out.

Select first, change second: `plan` looks and computes, `attach` changes, `detach` restores.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convattn import checks
from convattn.attachment import sites as find
from convattn.attachment.wrapper import Attached, AttachedHead, BlendedHead
from convattn.errors import AttachError, InvalidOption
from convattn.nn.base import STARTS
from convattn.registry import Entry, entry

__all__ = ["Attached", "AttachedHead", "BlendedHead", "Plan", "Site", "attach", "attached", "detach", "plan"]


@dataclass(frozen=True)
class Site:
    """One place and what goes there. Every parameter added is called `<name>.attention.<...>`."""

    name: str
    place: str
    channels: int
    dimensions: int
    attention: str
    parameters: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The sites that `attach` will change, in the order of the network; print it to see them."""

    attention: str
    start: str
    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [("site", "place", "attention", "channels", "parameters added")]
        rows += [(s.name, s.place, s.attention, f"{s.channels:,}", f"{s.parameters:,}") for s in self.sites]
        rows += [("total", "", "", "", f"{sum(site.parameters for site in self.sites):,}")]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
        return "\n".join(
            "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
            for row in rows
        )


def plan(model: nn.Module, attention: str, *, start: str = "identity", **options: Any) -> Plan:
    """List the sites at which `attach` would put attention. The model is not changed.

    Gates stand at the end of the residual branch of every block, just before the sum; a pooling head stands beside the
    network's own global pooling.

    Args:
        model: a network with residual blocks (ResNets of timm, torchvision and convattn).
        attention: a registered name, or a gate and a head joined with `+`: `"cbam+dual"`.
        start: `"identity"` leaves the output as it is at first, `"paper"` does not.
        **options: of the module, for instance `reduction=8`.

    Raises:
        UnknownName: no such attention.
        InvalidOption: an option that none of the modules takes, or with a wrong value.
        AttachError: the network has no place for it.

    Example:
        >>> from convattn import networks
        >>> len(plan(networks.resnet20(), "cbam"))
        9
    """
    checks.choice("plan", "start", start, STARTS)
    entries = [entry(name) for name in (attention.split("+") if isinstance(attention, str) else [attention])]
    kinds = [one.kind for one in entries]
    if len(set(kinds)) < len(kinds):
        raise AttachError(
            f"{attention!r} names two modules for the same sites; one gate and one head can be joined. "
            f"The model was not changed."
        )
    chosen: list[Site] = []
    shares = _shares(entries, options)
    for one in entries:
        places = find.residual(model) if one.kind == "gate" else find.pool(model)
        chosen += [_site(one, place, start, shares[one.name]) for place in places]
    return Plan(attention, start, tuple(chosen))


def attach(model: nn.Module, attention: str | Plan, *, start: str | None = None, **options: Any) -> nn.Module:
    """Put attention into a network, in place, and return it.

    With the start `"identity"` the output is unchanged to the bit for finite inputs until a parameter `strength`, one
    at each site, moves away from 0. Parameter names and state-dict keys of the network stay as they are, and a
    checkpoint of the plain network still loads, with only the keys of the attention missing.

    Args:
        model: the network.
        attention: a registered name as in `plan`, or a plan of this model.
        start: `"identity"` (default) or `"paper"`; not with a plan, which has one.
        **options: of the module; not with a plan.

    Raises:
        UnknownName: no such attention.
        InvalidOption: an option that none of the modules takes, or with a wrong value.
        AttachError: the network has no place for it, or has attention there already.

    Example:
        >>> from convattn import networks
        >>> network = attach(networks.resnet20(), "cbam", reduction=8)
        >>> network.layer1[0].bn2.attention.strength.item()
        0.0
    """
    if isinstance(attention, Plan):
        if start is not None or options:
            raise InvalidOption("attach: a plan has its start and options already; give them to `plan`.")
        chosen = attention
        _check_places(model, chosen)
    else:
        chosen = plan(model, attention, start=start or "identity", **options)
    wrappers = [(_layer(model, site), _build(model, site, chosen.start)) for site in chosen]
    # nothing below can fail
    for inner, wrapper in wrappers:
        _replace(model, inner, wrapper)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take all attention out again, in place, and return the model with the very same layers as before.

    Example:
        >>> from convattn import networks
        >>> network = networks.resnet20()
        >>> layer = network.layer1[0].bn2
        >>> detach(attach(network, "se")).layer1[0].bn2 is layer
        True
    """
    for _, wrapper in attached(model):
        _replace(model, wrapper, wrapper.inner)
    return model


def attached(model: nn.Module) -> list[tuple[str, Attached]]:
    """The names and wrappers of all sites that have attention."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attached)]


def _shares(entries: list[Entry], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each option to the modules that take it."""
    accepted = {one.name: _accepted(one) for one in entries}
    for option in options:
        if not any(option in known for known in accepted.values()):
            known = sorted(set().union(*accepted.values()))
            raise InvalidOption(
                f"{'+'.join(accepted)} takes no option {option!r}. {checks.suggestion(option, known)} "
                f"The model was not changed."
            )
    return {name: {key: value for key, value in options.items() if key in known} for name, known in accepted.items()}


def _accepted(one: Entry) -> set[str]:
    # channels and dimensions come from the network, the start from the plan, and the classifier stays the network's own
    given = {"channels", "dimensions", "start", "features", "classes", "dropout"}
    return {name for name in inspect.signature(one.module).parameters if name not in given}


def _site(one: Entry, place: find.Place, start: str, options: dict[str, Any]) -> Site:
    # on no device: options are checked and parameters counted without memory or random numbers
    with torch.device("meta"):
        module = _module(one, place.channels, place.dimensions, start, options)
    head = module.head if isinstance(module, BlendedHead) else None
    if head is not None and head.features != place.channels:
        raise AttachError(
            f"{one.name!r} pools {place.channels} channels to {head.features} features, and the classifier behind "
            f"{place.name!r} takes {place.channels}: use 'dual', which reduces them. The model was not changed."
        )
    added = sum(parameter.numel() for parameter in module.parameters())
    return Site(place.name, place.place, place.channels, place.dimensions, one.name, added, options)


def _module(one: Entry, channels: int, dimensions: int, start: str, options: dict[str, Any]) -> nn.Module:
    if one.kind == "head":
        return BlendedHead(one.build(channels, dimensions=dimensions, **options), start=start)
    return one.build(channels, dimensions=dimensions, start=start, **options)  # type: ignore[no-any-return]


def _check_places(model: nn.Module, chosen: Plan) -> None:
    kinds = {site.place for site in chosen}
    there = (find.residual(model) if "residual" in kinds else []) + (find.pool(model) if "pool" in kinds else [])
    for site in chosen:
        if find.Place(site.name, site.place, site.channels, site.dimensions) not in there:
            raise AttachError(
                f"The plan is of another network: this one has no place {site.name!r} with {site.channels} channels. "
                f"The model was not changed."
            )


def _layer(model: nn.Module, site: Site) -> nn.Module:
    try:
        layer = model.get_submodule(site.name)
    except AttributeError as error:
        raise AttachError(f"The model has no layer {site.name!r}. The model was not changed.") from error
    if isinstance(layer, Attached):
        raise AttachError(f"{site.name!r} has attention already; detach the model first. The model was not changed.")
    return layer


def _build(model: nn.Module, site: Site, start: str) -> Attached:
    layer = _layer(model, site)
    module = _module(entry(site.attention), site.channels, site.dimensions, start, site.options)
    like = next((p for p in (*layer.parameters(), *model.parameters()) if p.is_floating_point()), torch.empty(0))
    module.to(like.device, like.dtype).train(layer.training)
    return AttachedHead(layer, module) if site.place == "pool" else Attached(layer, module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    # by identity: a layer may be reachable under several names
    holders = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    for parent, key in holders:
        if parent is not new:
            parent._modules[key] = new
