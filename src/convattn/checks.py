"""Checks of arguments, each with the message that a user reads."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from convattn.errors import InvalidOption, MissingExtra, ShapeMismatch

if TYPE_CHECKING:
    # the command line imports this module, and torch takes seconds
    import torch

SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}


def positive(where: str, name: str, value: object) -> None:
    """Raise `InvalidOption` unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidOption(f"{where}: {name} must be a whole number of at least 1, got {value!r}.")


def between(where: str, name: str, value: object, low: float, high: float) -> None:
    """Raise `InvalidOption` unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidOption(f"{where}: {name} must be a number from {low:g} to {high:g}, got {value!r}.")


def choice(where: str, name: str, value: object, options: Iterable[object]) -> None:
    """Raise `InvalidOption` unless `value` is one of `options`."""
    known = list(options)
    if value not in known:
        listed = ", ".join(repr(option) for option in known)
        raise InvalidOption(f"{where}: {name} must be one of {listed}, got {value!r}.")


def dimensions(where: str, value: object) -> None:
    """Raise `InvalidOption` unless `value` is 1, 2 or 3."""
    # by type as well: True and 2.0 are equal to whole numbers
    if type(value) is not int or value not in SPATIAL:
        raise InvalidOption(f"{where}: dimensions must be one of 1, 2, 3, got {value!r}.")


def feature_map(where: str, x: "torch.Tensor", channels: int | None, spatial: int) -> None:
    """Raise `ShapeMismatch` unless `x` is (B, channels, *spatial) with that many spatial dimensions, none empty."""
    if x.dim() != spatial + 2 or (channels is not None and x.shape[1] != channels):
        raise ShapeMismatch(
            f"{where}: expected a map of shape (B, {channels or 'C'}, {SPATIAL[spatial]}), got {tuple(x.shape)}; "
            f"the module was built with dimensions={spatial}"
            + (f" and channels={channels}." if channels is not None else ".")
        )
    # a slice of a shape is a shape again, which takes longer than all the rest
    _, *sizes = x.shape
    if 0 in sizes:
        raise ShapeMismatch(f"{where}: the map has no elements in one of its dimensions: {tuple(x.shape)}.")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The ending of a message about an unknown name: the nearest known ones, and all where they are few."""
    listed = sorted(known)
    if not listed:
        return "There are none."
    near = difflib.get_close_matches(str(name).lower(), listed, n=3 if len(listed) > 20 else 1, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
    every = f"Known: {', '.join(listed)}." if len(listed) <= 20 else "" if near else f"{len(listed)} names are known."
    return f"{hint} {every}".strip()


def said(thing: object) -> str:
    """A thing as a message shows it: in one line, of an object with a long text its class alone."""
    text = repr(thing)
    return text if len(text) <= 80 and text.isprintable() else f"a {type(thing).__name__}"


def quoted(name: object) -> str:
    """A name from a file as a message shows it: in quotes, in one line, the beginning of a long one."""
    text = str(name)
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def shown(name: object) -> str:
    """A name from a file as a message shows it: as it is, but quoted where it is long or not in one line."""
    text = str(name)
    return text if len(text) <= 80 and text.isprintable() else quoted(text)


def printable(text: object) -> str:
    """A text in one line that every encoding can write: other characters as escapes of Python, such as \\udce9."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(text)
    )


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def extra(package: str, needed_for: str, name: str = "compare") -> ModuleType:
    """Import `package`, or raise `MissingExtra` that says which extra of convattn brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f'{needed_for} needs the package {package.partition(".")[0]}: pip install "convattn[{name}]" ({error}).'
        ) from error
