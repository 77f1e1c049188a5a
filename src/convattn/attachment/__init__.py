"""An existing network in, the same network with attention out.

Select first, change second: `plan` looks and computes, `attach` changes, `detach` restores.
"""

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convattn import checks
from convattn.attachment import sites as find
from convattn.attachment.wrapper import Attached, AttachedHead, AttachedLast, BlendedHead
from convattn.errors import AttachError, InvalidOption
from convattn.nn.base import STARTS
from convattn.registry import Entry, entry

__all__ = [
    "Attached",
    "AttachedHead",
    "AttachedLast",
    "BlendedHead",
    "Plan",
    "Site",
    "attach",
    "attached",
    "detach",
    "plan",
]


@dataclass(frozen=True)
class Site:
    """One place and what goes there. Every parameter added is called `<name>.attention.<...>`."""

    name: str
    place: str
    channels: int
    size: tuple[int, ...]
    channels_last: bool
    attention: str
    parameters: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dimensions(self) -> int:
        """The spatial dimensions of the map."""
        return len(self.size)


@dataclass(frozen=True)
class Plan:
    """The sites that `attach` will change, in the order of the network; print it to see them.

    `skipped` are the sums at which nothing can stand, with the reasons; `network` tells whose plan it is.
    """

    attention: str
    start: str
    sites: tuple[Site, ...]
    skipped: tuple[find.Skipped, ...]
    network: str

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [("site", "place", "attention", "channels", "map", "parameters added")]
        for s in self.sites:
            size = " x ".join(map(str, s.size)) if s.place == "residual" else ""
            rows.append((s.name, s.place, s.attention, f"{s.channels:,}", size, f"{s.parameters:,}"))
        rows.append(("total", "", "", "", "", f"{sum(site.parameters for site in self.sites):,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        lines = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines + [f"no site in {one.name or 'the network'}: {one.reason}" for one in self.skipped])


def plan(model: nn.Module, attention: str, *, example: Any = None, start: str = "identity", **options: Any) -> Plan:
    """List the sites at which `attach` would put attention. The model is not changed.

    Gates stand at the end of every residual branch, just before the sum with the shortcut; they are found by running
    the network once and watching what is added to what. A pooling head stands beside the network's own global pooling.

    Args:
        model: a network with residual sums for a gate, with a layer of global pooling for a head.
        attention: a registered name, or a gate and a head joined with `+`: `"cbam+dual"`.
        example: an input: a tensor, or a tuple or dict of arguments; by default two random images of the size that the
            network was made for, or 64 pixels.
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
    skipped: list[find.Skipped] = []
    shares = _shares(entries, options)
    for one in entries:
        places, passed = find.residual(model, example) if one.kind == "gate" else (find.pool(model), [])
        chosen += [_site(one, place, start, shares[one.name]) for place in places]
        skipped += passed
    return Plan(attention, start, tuple(chosen), tuple(skipped), _signature(model))


def attach(
    model: nn.Module, attention: str | Plan, *, example: Any = None, start: str | None = None, **options: Any
) -> nn.Module:
    """Put attention into a network, in place, and return it.

    With the start `"identity"` the output is unchanged to the bit for finite inputs until a parameter `strength`, one
    at each site, moves away from 0. Parameter names and state-dict keys of the network stay as they are, and a
    checkpoint of the plain network still loads, with only the keys of the attention missing.

    Args:
        model: the network.
        attention: a registered name as in `plan`, or a plan of this model.
        example: an input, as in `plan`; not with a plan.
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
        if start is not None or example is not None or options:
            raise InvalidOption("attach: a plan has its example, start and options already; give them to `plan`.")
        chosen = attention
        if chosen.network != _signature(model):
            raise AttachError(
                "The plan is of another network, or of this one before it was changed: plan it anew. "
                "The model was not changed."
            )
    else:
        chosen = plan(model, attention, example=example, start=start or "identity", **options)
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
        module = _module(one, place.channels, len(place.size), start, options)
    head = module.head if isinstance(module, BlendedHead) else None
    if head is not None and head.features != place.channels:
        raise AttachError(
            f"{one.name!r} pools {place.channels} channels to {head.features} features, and the classifier behind "
            f"{place.name!r} takes {place.channels}: use 'dual', which reduces them. The model was not changed."
        )
    added = sum(parameter.numel() for parameter in module.parameters())
    return Site(place.name, place.place, place.channels, place.size, place.channels_last, one.name, added, options)


def _module(one: Entry, channels: int, dimensions: int, start: str, options: dict[str, Any]) -> nn.Module:
    if one.kind == "head":
        return BlendedHead(one.build(channels, dimensions=dimensions, **options), start=start)
    return one.build(channels, dimensions=dimensions, start=start, **options)  # type: ignore[no-any-return]


def _signature(model: nn.Module) -> str:
    """The names and types of a network's modules and the shapes of its parameters, hashed."""
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.blake2b(repr((modules, shapes)).encode(), digest_size=16).hexdigest()


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
    if site.place == "pool":
        return AttachedHead(layer, module)
    return AttachedLast(layer, module) if site.channels_last else Attached(layer, module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    # by identity: a layer may be reachable under several names
    holders = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    for parent, key in holders:
        if parent is not new:
            parent._modules[key] = new
