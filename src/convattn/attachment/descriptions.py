"""The description beside saved attention: read with suspicion, since files come from others and get damaged."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from convattn import checks
from convattn.attachment.plans import UNCHANGED, Site
from convattn.attachment.sites import PLACES, SIDES, Place
from convattn.attachment.sums import ACTIVATIONS
from convattn.errors import WeightsError
from convattn.nn.base import STARTS

# 1 held attention alone, and no check sums
FORMATS = (1, 2)
ABOUT = "attention.json"
DIGEST = "digest"
# by name, the shape, the dtype and a hash of a tensor
Fingerprint = dict[str, list[Any]]


@dataclasses.dataclass(frozen=True)
class Saved:
    """What `attention.json` says.

    Attributes:
        network: the class of the network.
        base: the fingerprint of the network without attention.
        trained: which of its tensors were saved as well, by their keys in the state dict.
        sites: where attention stood.
        tensors: the fingerprint of what was saved; None in format 1.
        is_whole: whether the description is the one that was written; format 1 cannot tell.
    """

    network: str
    base: Fingerprint
    trained: tuple[str, ...]
    sites: tuple[Site, ...]
    tensors: Fingerprint | None
    is_whole: bool


def written(about: dict[str, Any]) -> str:
    """A description as text, with its check sum.

    Raises:
        TypeError: JSON cannot hold it.
    """
    return json.dumps({**about, DIGEST: _digest(json.loads(json.dumps(about)))}, indent=1)


def read(path: Path) -> Saved:
    """The description in a file.

    Raises:
        WeightsError: it is damaged, or of another version.
    """
    try:
        about = json.loads(path.read_bytes(), parse_constant=_number)
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path.parent} cannot be read ({checks.reason(error)}). {UNCHANGED}") from error
    if not isinstance(about, dict) or not {"format", "base", "sites"} <= about.keys():
        raise WeightsError(f"{path} does not describe attention. {UNCHANGED}")
    number = about["format"]
    if type(number) is not int or number not in FORMATS:
        raise WeightsError(
            f"{path.parent} has the format {_shown(number)}, written by convattn {_shown(about.get('convattn'))}; this "
            f"version reads formats {' and '.join(map(str, FORMATS))}. {UNCHANGED}"
        )
    try:
        return _saved(about, number)
    except ValueError as error:
        raise WeightsError(f"{path} is not as `convattn.save` writes it: {error}. {UNCHANGED}") from error


def _saved(about: dict[str, Any], number: int) -> Saved:
    base = about["base"]
    _require(isinstance(base, dict) and _is_name(base.get("network")), "base names no network")
    trained = base.get("trained", [])
    _require(isinstance(trained, list) and all(map(_is_name, trained)), "base.trained are no names")
    _require(len(set(trained)) == len(trained), "base.trained has a name twice")
    tensors = None if number == 1 else _fingerprint(about.get("tensors"), "tensors")
    _require(isinstance(about["sites"], list), "sites is no list")
    sites = tuple(_site(one, f"sites[{position}]") for position, one in enumerate(about["sites"]))
    is_whole = number == 1 or about.get(DIGEST) == _digest(about)
    known = _fingerprint(base.get("tensors"), "base.tensors")
    return Saved(base["network"], known, tuple(trained), sites, tensors, is_whole)


def _fingerprint(described: Any, where: str) -> Fingerprint:
    _require(isinstance(described, dict) and all(map(_is_name, described)), f"{where} are no tensors by name")
    for key, entry in described.items():
        known = isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], list)
        known = known and all(type(length) is int and length >= 0 for length in entry[0])
        _require(known and all(map(_is_name, filter(None, entry[1:]))), f"{where} says something else of {_shown(key)}")
    return described  # type: ignore[no-any-return]


def _site(described: Any, where: str) -> Site:
    site: Site = _made(Site, described, where)
    found = site.found
    _require(bool(site.name) and _is_name(site.name), f"{where}.name is no name of a layer")
    for name in ("place", "side", "stage", "channels", "size", "channels_last"):
        _require(getattr(site, name) == getattr(found, name), f"{where}.{name} is not what {where}.found says")
    for name, known in (("place", PLACES), ("side", SIDES), ("start", STARTS)):
        _require(getattr(site, name) in known, f"{where}.{name} must be one of {', '.join(known)}")
    _require((site.place == "pool") == (site.side in ("pool", "map", "vector")), f"{where}.side is none of its place")
    _require(found.pool in ("mean", "max"), f"{where}.found.pool must be mean or max")
    _require(len(site.size) in checks.SPATIAL and min(site.size) > 0, f"{where}.size must be 1 to 3 positive numbers")
    _require(
        site.channels > 0 and site.stage != 0 and (site.stage or 1) > 0, f"{where} has channels or a stage below 1"
    )
    _require(min(site.parameters, site.multiply_adds, found.width) >= 0, f"{where} has a negative count")
    _require(found.width > 0 or site.place != "pool", f"{where}.found.width must be positive")
    dtype = getattr(torch, found.dtype, None) if found.dtype else torch.float32
    is_dtype = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    _require(is_dtype, f"{where}.found.dtype is no dtype of floating-point numbers")
    for call in found.functions:
        _check_function(*call, where=f"{where}.found.functions")
    # what is saved of a part of a network goes by the names there
    return dataclasses.replace(site, found=dataclasses.replace(found, name=site.name))


def _check_function(name: str, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...], *, where: str) -> None:
    """Only activations are run by name, and only on what they take."""
    _require(name in ACTIVATIONS, f"{where} has something else than activations ({', '.join(ACTIVATIONS)})")
    x = torch.zeros(2, 3)
    try:
        y = getattr(torch.ops.aten, name)(x, *arguments, **dict(options))
    except Exception as error:
        raise ValueError(f"{where} has arguments that {name} does not take") from error
    _require(isinstance(y, torch.Tensor) and y.shape == x.shape, f"{where} has arguments that {name} does not take")


def _made(kind: Any, described: Any, where: str) -> Any:
    """A dataclass from its fields in JSON, each of the declared type."""
    _require(isinstance(described, dict), f"{where} has no fields by name")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in described if name not in fields]
    _require(not unknown, f"{where} has an unknown field {_shown(unknown[:1])}")
    for name, field in fields.items():
        is_optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        _require(name in described or is_optional, f"{where} has no field {name!r}")
    return kind(**{name: _typed(value, hints[name], f"{where}.{name}") for name, value in described.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value of JSON as a field of that type has it: JSON has lists for tuples."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is Place:
        return _made(Place, value, where)
    if origin in (Union, UnionType):
        fitting = [part for part in parts if type(value) is (get_origin(part) or part)]
        _require(bool(fitting), f"{where} has the wrong type")
        return _typed(value, fitting[0], where)
    if origin is Literal:
        _require(value in parts, f"{where} must be one of {', '.join(map(str, parts))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list), f"{where} is no list")
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        _require(len(kinds) == len(value), f"{where} has not {len(kinds)} entries")
        return tuple(_typed(one, kind, where) for one, kind in zip(value, kinds, strict=True))
    # by exact type: True is a whole number, too
    expected = origin or hint
    _require(type(value) is expected or (expected is float and type(value) is int), f"{where} has the wrong type")
    return value


def _number(constant: str) -> float:
    """Infinity is the limit of some activations; no setting is NaN."""
    _require(constant != "NaN", "a setting is NaN")
    return float(constant)


def _digest(about: dict[str, Any]) -> str:
    content = {name: value for name, value in about.items() if name != DIGEST}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_name(value: Any) -> bool:
    # messages stay one line
    return isinstance(value, str) and value.isprintable()


def _shown(value: Any) -> str:
    """Any value in a message, short and in one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
