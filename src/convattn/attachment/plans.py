"""Which sites will be changed and what goes there. Pure: a model in, a list of sites out."""

import fnmatch
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convattn import checks, cost, own_code, tables
from convattn.attachment.sites import PLACES, Place, Skipped, Survey
from convattn.attachment.wrapper import Attached, Blended, BlendedHead, layer_of
from convattn.errors import AttachError, InvalidOption
from convattn.networks.watching import exclusive
from convattn.nn.base import STARTS, Gate, Head, Update
from convattn.registry import Entry, Factory, entry, entry_of, is_known, names

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
UNCHANGED = "The model was not changed."
UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Site:
    """One place and what goes there. Every parameter added is called `<name>.attention.<...>`.

    Attributes:
        name: the layer, as in `model.named_modules()`.
        place: what kind of place it is, as in `plan`'s `at`.
        side: where attention stands: `after` or `before` the layer; a head beside a layer that pools (`pool`), on the
            map that a function pools (`map`), or on the vector that a function pooled (`vector`).
        stage: the number of the stage in which the map is, from 1; None where the network has no blocks.
        channels: of the map.
        size: the map's spatial dimensions on the example.
        channels_last: whether the channels are the map's last dimension.
        attention: the registered name, or that of the factory.
        parameters: added here.
        multiply_adds: added here for one image of the example's size.
        start: `identity` or `paper`.
        options: of the module.
        found: the place with all that `attach` needs.
        registered: whether the attention is registered, and not made by a factory.
    """

    name: str
    place: str
    side: str
    stage: int | None
    channels: int
    size: tuple[int, ...]
    channels_last: bool
    attention: str
    parameters: int
    multiply_adds: int
    start: str
    options: dict[str, Any]
    found: Place = field(repr=False)
    registered: bool = True

    @property
    def dimensions(self) -> int:
        """The spatial dimensions of the map."""
        return len(self.size)


@dataclass(frozen=True)
class Plan:
    """The sites that `attach` will change, in the order of the network; print it to see them.

    `skipped` are the places at which nothing can stand, with the reasons; `network` tells whose plan it is.
    """

    attention: str
    start: str
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    network: str
    entries: dict[str, Entry] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        head = ("site", "place", "stage", "attention", "channels", "map", "parameters", "multiply-adds")
        rows = [head, *(_row(site) for site in self.sites)]
        parameters, multiply_adds = (
            sum(getattr(site, name) for site in self) for name in ("parameters", "multiply_adds")
        )
        rows.append(("total added", "", "", "", "", "", f"{parameters:,}", f"{multiply_adds:,}"))
        left_out = [f"no site in {one.name or 'the network'}: {one.reason}" for one in self.skipped]
        return "\n".join([*tables.aligned(rows, "<<><>>>>"), *left_out])


@exclusive
def plan(
    model: nn.Module,
    attention: str | Callable[[int], nn.Module],
    *,
    at: str = "residual",
    example: Any = None,
    where: Where = None,
    stages: Sequence[int] | int | None = None,
    start: str = "identity",
    **options: Any,
) -> Plan:
    """List the sites at which `attach` would put attention. The model is not changed.

    The sites are found by running the network once and watching what is added to what, what is pooled, and where the
    resolution changes. Several plans on disjoint sites can be attached one after the other.

    Args:
        model: the network.
        attention: a registered name, `FILE.py:NAME`, a gate (or update) and a head joined with `+`: `"cbam+dual"`, a
            class of a `Gate`, `Update` or `Head`, or a factory: any callable from a number of channels to a module that
            gives maps of the shape that it takes.
        at: where gates stand:

            - `residual`: on the residual branch, just before the sum with the shortcut
            - `residual-pre`: before the first layer of the branch
            - `residual-post`: after the sum, and after the activation with which the block ends
            - `shortcut`: on the shortcut, where that has a layer of its own
            - `block`: on the output of each repeated block
            - `stage`: at the end of each stage, before the resolution changes
            - `final`: on the last map, the one that is pooled or that goes into the output convolution
            - `layer`: after each layer that `where` names
            - `pool`: where heads stand, beside the global pooling; heads need no `at`
        example: an input: a tensor, or a tuple or dict of arguments; by default two random images of the size that the
            network names, or of the first one that it takes of some usual sizes, from 64 pixels.
        where: only some of these sites: a glob (`"layer4*"`), a list of names or globs, each of a site or of a module
            around it, or a predicate over (name, layer).
        stages: only sites in stages of these numbers, from 1.
        start: `"identity"` leaves the output as it is at first, `"paper"` does not.
        **options: of the module, for instance `reduction=8`.

    Raises:
        UnknownName: no such attention.
        InvalidOption: an option that none of the modules takes, or with a wrong value.
        AttachError: the network has no such place; the message lists those that it has.

    Example:
        >>> from convattn import networks
        >>> len(plan(networks.resnet20(), "cbam"))
        9
        >>> [site.name for site in plan(networks.resnet20(), "cbam", at="stage")]
        ['layer1.2', 'layer2.2', 'layer3.2']
    """
    checks.choice("plan", "start", start, STARTS)
    checks.choice("plan", "at", at, PLACES)
    if at == "layer" and where is None:
        raise InvalidOption("plan: at='layer' means every layer of the network; name those you want with where=...")
    entries = _entries(attention, at)
    shares = _shares(entries, options)
    survey = Survey(model, example)
    chosen: list[Site] = []
    skipped: list[Skipped] = []
    for one in entries:
        kind = "pool" if one.kind == "head" else at
        places, passed = survey.find(kind, [site.name for site in chosen])
        # a filter of gates leaves the head that is joined to them where it is
        joined = one.kind == "head" and len(entries) > 1
        picked = places if joined else _picked(model, places, where, stages, len(survey.stage_ends))
        if not picked or (not joined and _unmatched(places, where)):
            raise AttachError(_nothing(model, survey, kind, where, stages))
        chosen += _sites(one, picked, start, shares[one.name])
        # every layer is asked for; those that nobody named are not missed
        skipped += passed if at != "layer" else _named(passed, where)
    name = "+".join(one.name for one in entries)
    return Plan(name, start, tuple(chosen), tuple(skipped), signature(model), {one.name: one for one in entries})


def built(one: Entry, place: Place, start: str, options: dict[str, Any]) -> nn.Module:
    """The module for a place: on the map, or a head to be blended with the network's own pooling."""
    if one.kind != "head":
        return _on_map(one, place, start, options)
    head = one.build(place.channels, **_offered(one, {"dimensions": len(place.size)}), **options)
    if isinstance(head, Head) and head.features is not None:
        features = head.features
    else:
        features = cost.counted(head, torch.zeros(1, place.channels, *place.size))[0].shape[1]
    return BlendedHead(head, width=place.width, features=features, start=start)


def _on_map(one: Entry, place: Place, start: str, options: dict[str, Any]) -> nn.Module:
    """A gate or an update, which blends itself; or any other module, blended from outside."""
    offered = _offered(one, {"dimensions": len(place.size), "start": start})
    module: nn.Module = one.build(place.channels, **offered, **options)
    of_contract = isinstance(module, Gate | Update)
    if of_contract and start == "identity" and module.strength is not None:
        # a strength of 0 in front of another would never learn
        return module
    return module if of_contract and not _is_factory(one) and start == "paper" else Blended(module, start=start)


def _offered(one: Entry, given: dict[str, Any]) -> dict[str, Any]:
    """What a module is told of its place, as far as it wants to know."""
    if _is_factory(one):
        return {}
    wanted = {each.name for each in _parameters(one)}
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _parameters(one))
    return {name: value for name, value in given.items() if anything or name in wanted}


def signature(model: nn.Module) -> str:
    """The names and types of a plain network's modules and the shapes of its parameters, hashed."""
    wrappers = [one for one in model.modules() if isinstance(one, Attached)]
    added = {part for one in wrappers for part in (layer_of(one), *one.attention.modules())}
    own = {parameter for one in wrappers for parameter in one.attention.parameters()}
    modules = [(name, type(layer_of(one)).__qualname__) for name, one in model.named_modules() if one not in added]
    shapes = [(name, tuple(one.shape)) for name, one in model.named_parameters() if one not in own]
    return hashlib.blake2b(repr((modules, shapes)).encode(), digest_size=16).hexdigest()


def own_entry(attention: Any, at: str | None = None, name: str | None = None) -> Entry:
    """The entry of a class or of a factory, which needs no registered name.

    Raises:
        InvalidOption: neither of them.
    """
    if not callable(attention) or isinstance(attention, nn.Module):
        raise InvalidOption(
            f"plan: expected a name, or a class or factory that makes a module of a number of channels, got "
            f"{checks.said(attention)}. {UNCHANGED}"
        )
    known = entry_of(attention)
    if known is not None and name in (None, known.name):
        return known
    name = name or str(getattr(attention, "__name__", type(attention).__name__))
    if isinstance(attention, type) and issubclass(attention, Gate | Update | Head):
        build = attention if known is None else known.build
        return Entry(name, attention.convattn_kind, attention, build, registered=False)  # type: ignore[arg-type]
    return Entry(name, "head" if at == "pool" else "gate", Factory, attention, registered=False)


def entries_of(attention: str, at: str | None = None) -> list[Entry]:
    """The entries of a name, or of two that are joined with `+`; those of `FILE.py:NAME` run that file.

    Raises:
        UnknownName: no such name.
    """
    return [
        own_entry(own_code.load(name), at, name) if own_code.is_named(name) and not is_known(name) else entry(name)
        for name in attention.split("+")
    ]


def _entries(attention: Any, at: str) -> list[Entry]:
    if callable(attention):
        found = [own_entry(attention, at)]
    else:
        found = entries_of(attention, at) if isinstance(attention, str) else [entry(attention)]
    on_maps = [one for one in found if one.kind != "head"]
    if len(on_maps) > 1 or len(found) - len(on_maps) > 1:
        raise AttachError(
            f"{attention!r} names two modules for the same sites; one gate or update and one head can be joined. "
            f"{UNCHANGED}"
        )
    if at == "pool" and on_maps:
        raise InvalidOption(
            f"plan: at='pool' takes a pooling head, and {attention!r} has "
            f"{'a gate' if on_maps[0].kind == 'gate' else 'an update'}, which stands at='final'; "
            f"heads are {', '.join(names('head'))}. {UNCHANGED}"
        )
    return found


def _is_factory(one: Entry) -> bool:
    return one.module is Factory


def _shares(entries: list[Entry], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each option to the modules that take it."""
    if len(entries) == 1 and _is_factory(entries[0]):
        return {entries[0].name: options}
    for option in options:
        if not any(_takes(one, option) for one in entries):
            known = sorted(set().union(*map(_accepted, entries)))
            raise InvalidOption(
                f"{'+'.join(one.name for one in entries)} takes no option {option!r}. "
                f"{checks.suggestion(option, known)} {UNCHANGED}"
            )
    return {one.name: {key: value for key, value in options.items() if _takes(one, key)} for one in entries}


def _accepted(one: Entry) -> set[str]:
    # channels and dimensions come from the network, the start from the plan, and the classifier stays the network's own
    given = {"channels", "dimensions", "start", "features", "classes", "dropout"}
    return {each.name for each in _parameters(one) if each.kind not in UNNAMED} - given


def _takes(one: Entry, option: str) -> bool:
    return option in _accepted(one) or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _parameters(one))


def _parameters(one: Entry) -> list[inspect.Parameter]:
    """The parameters of a module, without the first one of ours and of others, which is the number of channels."""
    try:
        found = list(inspect.signature(one.build if _is_factory(one) else one.module).parameters.values())
    except (TypeError, ValueError):
        # of what is written in another language nothing is known
        return []
    return found[1:] if found and found[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else found


def _picked(
    model: nn.Module, places: list[Place], where: Where, stages: Sequence[int] | int | None, known: int
) -> list[Place]:
    if stages is not None:
        numbers = [stages] if isinstance(stages, int) else stages
        for number in numbers if isinstance(numbers, Iterable) else [numbers]:
            if type(number) is not int or number not in range(1, known + 1):
                raise InvalidOption(
                    f"plan: stages must be numbers from 1 to {known}, the stages of this network, got {stages!r}. "
                    f"{UNCHANGED}"
                )
        places = [place for place in places if place.stage in numbers]
    if where is None:
        return places
    if callable(where):
        return [place for place in places if where(place.name, _layer(model, place.name))]
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidOption(
            f"plan: where must be a glob, names, or a predicate over (name, layer), got {where!r}. {UNCHANGED}"
        )
    return [place for place in places if any(_matches(place, pattern) for pattern in patterns)]


def _named(skipped: list[Skipped], where: Where) -> list[Skipped]:
    """Those of what was left out that a filter by names asked for."""
    if where is None or callable(where):
        return []
    patterns = [where] if isinstance(where, str) else where
    return [one for one in skipped if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)]


def _matches(place: Place, pattern: str) -> bool:
    # every layer is a place: those inside of one that is named are others
    inside = place.place != "layer" and fnmatch.fnmatchcase(place.name, f"{pattern}.*")
    return inside or fnmatch.fnmatchcase(place.name, pattern)


def _unmatched(places: list[Place], where: Where) -> list[str]:
    """The patterns that match nothing: a mistake, whatever the others match."""
    if where is None or callable(where):
        return []
    patterns = [where] if isinstance(where, str) else where
    return [pattern for pattern in patterns if not any(_matches(place, pattern) for place in places)]


def _layer(model: nn.Module, name: str) -> nn.Module:
    return layer_of(model.get_submodule(name))


def _nothing(model: nn.Module, survey: Survey, at: str, where: Where, stages: Sequence[int] | int | None) -> str:
    """The message where nothing was found: what there is."""
    name = type(model).__name__
    places, skipped = survey.find(at)
    if places:
        unmatched = _unmatched(places, where)
        given = {"where": unmatched[0]} if unmatched else {"where": where, "stages": stages}
        asked = " with ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
        listed = ", ".join(f"{place.name} (stage {place.stage})" for place in places)
        left_out = "".join(f" No site in {one.name}: {one.reason}." for one in _named(skipped, where)[:3])
        return (
            f"{asked} leaves none of the {len(places)} sites that {name} has at {at!r}: {listed}.{left_out} {UNCHANGED}"
        )
    reasons = "; ".join(dict.fromkeys(one.reason for one in skipped))
    counts = {place: len(survey.find(place)[0]) for place in PLACES if place not in (at, "layer")}
    others = ", ".join(f"{place!r} ({count})" for place, count in counts.items() if count)
    return (
        f"{name} has no place at {at!r}{f' ({reasons})' if reasons else ''}. "
        f"{f'It has these, with the number of sites: {others}' if others else 'It has no other either'}. {UNCHANGED}"
    )


def _sites(one: Entry, places: list[Place], start: str, options: dict[str, Any]) -> list[Site]:
    costs: dict[Any, tuple[int, int]] = {}
    found = []
    for place in places:
        key = place.channels, place.size, place.width
        if key not in costs:
            costs[key] = _cost(one, place, start, options)
        shown = (place.name, place.place, place.side, place.stage, place.channels, place.size, place.channels_last)
        found.append(Site(*shown, one.name, *costs[key], start, options, place, one.registered))
    return found


def _cost(one: Entry, place: Place, start: str, options: dict[str, Any]) -> tuple[int, int]:
    """Parameters and multiply-adds, from a module built and run once, which checks its options as well."""
    if one.is_ours:
        # without random numbers, and without the time that they take: what is computed does not matter
        with torch.device("meta"):
            module = built(one, place, start, options)
        return _counted(module.to_empty(device="cpu"), place)
    with torch.random.fork_rng():
        try:
            return _counted(built(one, place, start, options), place)
        except Exception as error:
            if isinstance(error, InvalidOption) and not _is_factory(one):
                # the module says better what is wrong with its options
                raise
            raise AttachError(
                f"{one.name!r} makes no module for the {place.channels} channels of {place.name!r} "
                f"({type(error).__name__}: {checks.reason(error)}). {UNCHANGED}"
            ) from error


def _counted(module: nn.Module, place: Place) -> tuple[int, int]:
    inputs = [torch.zeros(1, place.channels, *place.size, device="cpu")]
    if isinstance(module, BlendedHead):
        inputs.append(torch.zeros(1, place.width, device="cpu"))
    # blending would broadcast what has another shape
    y, multiply_adds = cost.counted(module.module if isinstance(module, Blended) else module, *inputs)
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"it gives a {type(y).__name__}, not a map")
    if y.shape != inputs[-1].shape:
        raise ValueError(f"it gives the shape {tuple(y.shape)} for {tuple(inputs[-1].shape)}")
    return cost.parameters(module), multiply_adds


def _row(site: Site) -> tuple[str, ...]:
    size = " x ".join(map(str, site.size))
    stage = "" if site.stage is None else str(site.stage)
    counts = (f"{site.channels:,}", size, f"{site.parameters:,}", f"{site.multiply_adds:,}")
    return (site.name, site.place, stage, site.attention, *counts)
