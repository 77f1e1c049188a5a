"""The names of attention modules and pooling heads: one short key each, no aliases.

A module registers itself where it is defined; nothing else has to know of it.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from convattn import checks
from convattn.errors import InvalidOption, UnknownName

Kind = Literal["gate", "update", "head"]
KINDS: tuple[str, ...] = get_args(Kind)
Class = TypeVar("Class", bound=type)
# it becomes the name of a folder and a part of "cbam+dual" and "se,cbam"
NAME = re.compile(r"[\w.-]+")
# what a comparison calls networks of its own
RESERVED = ("baseline", "noise")


class Factory:
    """What stands for the class of a module in the entry of a factory."""


@dataclass(frozen=True)
class Entry:
    """A module with a name: `build(channels, **options)` makes one of class `module`.

    `registered` tells that it is known by its name to everything in this process.
    """

    name: str
    kind: Kind
    module: type
    build: Callable[..., Any]
    registered: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is a module of convattn, and not of the user."""
        return self.registered and self.module.__module__.startswith("convattn.nn.")

    @property
    def source(self) -> Callable[..., Any]:
        """The class or the factory that was given."""
        return self.build if self.module is Factory else self.module


_entries: dict[str, Entry] = {}
_also: ContextVar[Mapping[str, Entry]] = ContextVar("also", default={})  # noqa: B039


def register(name: str, kind: Kind, *, takes_channels: bool = True) -> Callable[[Class], Class]:
    """Class decorator that enters a module under `name`, which then works wherever the names of modules do.

    Args:
        name: letters, digits and `. _ -`.
        kind: `"gate"` for a module that multiplies a map, best a `convattn.nn.Gate`; `"update"` for one that adds to
            it, a `convattn.nn.Update`; `"head"` for one that pools it, a `convattn.nn.Head`.
        takes_channels: whether the class takes the number of channels as its first argument.

    Raises:
        InvalidOption: a wrong name, one that another class has, an unknown kind, or something that is no class.

    Example:
        >>> import torch
        >>> from convattn import nn
        >>> @register("channel-mean", "gate")
        ... class ChannelMean(nn.Gate):
        ...     def __init__(self, channels, *, dimensions=2, start="paper"):
        ...         super().__init__(channels=channels, dimensions=dimensions, start=start)
        ...         self.weight = torch.nn.Parameter(torch.ones(channels, *[1] * dimensions))
        ...
        ...     def gate(self, x):
        ...         return torch.sigmoid(self.weight * x.mean(dim=tuple(range(2, x.dim())), keepdim=True))
        >>> "channel-mean" in names("gate")
        True
    """
    check_name("register", name)
    checks.choice("register", "kind", kind, KINDS)

    def enter(cls: Class) -> Class:
        if not isinstance(cls, type):
            raise InvalidOption(f"register: expected a class under the name {name!r}, got {checks.said(cls)}.")
        if not cls.__module__.startswith("convattn."):
            # a class of the user may be the first that is registered, and must not take the name of ours
            _load()
        there = _entries.get(name)
        if there is not None and not _is_same(there.module, cls):
            raise InvalidOption(f"register: {name!r} is the name of {there.module.__name__} already.")
        contract = getattr(cls, "convattn_kind", kind)
        if contract != kind:
            raise InvalidOption(f"register: {cls.__name__} is of the kind {contract!r}, got {kind!r}.")
        build = cls if takes_channels else partial(_without_channels, cls)
        _entries[name] = Entry(name, kind, cls, build)
        return cls

    return enter


def check_name(where: str, name: object) -> None:
    """Raise `InvalidOption` unless a name may be that of a module."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
        raise InvalidOption(
            f"{where}: expected a name of letters, digits and . _ - for a module, and none of {', '.join(RESERVED)}; "
            f"got {checks.said(name)}."
        )


def names(kind: Kind | None = None) -> list[str]:
    """The registered names, sorted; only those of a kind, `"gate"`, `"update"` or `"head"`, if it is given."""
    _load()
    checks.choice("names", "kind", kind, (None, *KINDS))
    return sorted(entry.name for entry in _entries.values() if kind in (None, entry.kind))


def entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UnknownName: no such name; the message suggests the nearest.
    """
    _load()
    known = {**_entries, **_also.get()}
    if not isinstance(name, str) or name not in known:
        raise UnknownName(f"No attention or pooling head is called {name!r}. {checks.suggestion(name, known)}")
    return known[name]


def is_known(name: str) -> bool:
    """Whether there is an entry of that name."""
    _load()
    return name in _entries or name in _also.get()


def entry_of(cls: object) -> Entry | None:
    """The entry under which a class is registered; None where it is not."""
    _load()
    return next((one for one in _entries.values() if one.module is cls), None)


@contextlib.contextmanager
def also(entries: Iterable[Entry]) -> Iterator[None]:
    """Let `entry` know others in this thread, for as long as it lasts."""
    token = _also.set({**_also.get(), **{one.name: one for one in entries}})
    try:
        yield
    finally:
        _also.reset(token)


def _without_channels(cls: type, channels: int, **options: Any) -> Any:
    return cls(**options)


def _is_same(there: type, cls: type) -> bool:
    """Whether a class is the one that has the name, or what became of it where its file or notebook cell ran again."""
    where = (there.__module__, there.__qualname__)
    return there is cls or (where == (cls.__module__, cls.__qualname__) and not cls.__module__.startswith("convattn."))


def _load() -> None:
    # the modules enter themselves when their package is imported; by name, so that the arrow of imports points down
    import importlib

    importlib.import_module("convattn.nn")
