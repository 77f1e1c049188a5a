"""The names of attention modules and pooling heads: one short key each, no aliases.

A module registers itself where it is defined; nothing else has to know of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from convattn import checks
from convattn.errors import InvalidOption, UnknownName

Kind = Literal["gate", "head"]
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered module: `build(channels, **options)` makes one of class `module`."""

    name: str
    kind: Kind
    module: type
    build: Callable[..., Any]


_entries: dict[str, Entry] = {}


def register(name: str, kind: Kind, *, takes_channels: bool = True) -> Callable[[Class], Class]:
    """Class decorator that enters a module under `name`."""

    def enter(cls: Class) -> Class:
        if name in _entries and _entries[name].module is not cls:
            raise InvalidOption(f"register: {name!r} is the name of {_entries[name].module.__name__} already.")
        build = cls if takes_channels else lambda channels, **options: cls(**options)
        _entries[name] = Entry(name, kind, cls, build)
        return cls

    return enter


def names(kind: Kind | None = None) -> list[str]:
    """The registered names, sorted; only the gates or only the heads if `kind` is given."""
    _load()
    checks.choice("names", "kind", kind, (None, "gate", "head"))
    return sorted(entry.name for entry in _entries.values() if kind in (None, entry.kind))


def entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UnknownName: no such name; the message suggests the nearest.
    """
    _load()
    if not isinstance(name, str) or name not in _entries:
        raise UnknownName(f"No attention or pooling head is called {name!r}. {checks.suggestion(name, _entries)}")
    return _entries[name]


def _load() -> None:
    # the modules enter themselves when their package is imported; by name, so that the arrow of imports points down
    import importlib

    importlib.import_module("convattn.nn")
