"""Attention without the network that it is attached to, as files.

A folder holds `attention.safetensors`, the added parameters and buffers alone, and `attention.json`: versions, the
sites, and a fingerprint of the base network, so that it cannot be put into another one unnoticed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from convattn import checks, registry
from convattn.attachment.attaching import attached, exchange, partners, wrapped
from convattn.attachment.plans import UNCHANGED, Site, own_entry
from convattn.attachment.sites import Place
from convattn.attachment.wrapper import ATTENTION, Attached
from convattn.errors import AttachError, InvalidOption, WeightsError
from convattn.registry import Entry

FORMAT = 1
ABOUT, WEIGHTS = "attention.json", "attention.safetensors"
# counts training steps; no output depends on it
COUNTER = "num_batches_tracked"

Fingerprint = dict[str, list[Any]]


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write what was attached to a network, and nothing of the network itself, to a folder.

    Args:
        model: a network with attention.
        folder: created if need be; of what it holds, only files of the same names are replaced.

    Returns:
        The folder.

    Raises:
        AttachError: the model has no attention.
        InvalidOption: an option of a factory's module that JSON cannot hold.

    Example:
        >>> import tempfile
        >>> from convattn import attach, networks
        >>> folder = save(attach(networks.resnet20(), "se"), tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['attention.json', 'attention.safetensors']
    """
    sites = attached(model)
    if not sites:
        raise AttachError(f"{type(model).__name__} has no attention to save.")
    about = {
        "format": FORMAT,
        "convattn": version("convattn"),
        "torch": torch.__version__,
        "base": {"network": _network(model), "tensors": _fingerprint(model)},
        "sites": [_described(model, name, wrapper) for name, wrapper in sites],
    }
    try:
        text = json.dumps(about, indent=1)
    except TypeError as error:
        raise InvalidOption(f"save: an option of a module cannot be written to JSON ({error}).") from error
    tensors = {
        f"{name}.{ATTENTION}.{key}": value.detach().cpu().clone().contiguous()
        for name, wrapper in sites
        for key, value in wrapper.attention.state_dict().items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # the description last: where it stands, the weights stand
    _write(folder / WEIGHTS, safetensors.torch.save(tensors))
    _write(folder / ABOUT, text.encode())
    return folder


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    weights: str = "same",
    factories: Mapping[str, Callable[[int], nn.Module]] | None = None,
) -> nn.Module:
    """Attach what `save` wrote, with its parameters, in place, and return the model.

    Args:
        model: the network that the attention was saved from, without attention at those sites.
        folder: written by `save`.
        weights: `"same"` refuses a network with other weights than the attention was saved with, which would give
            another output; `"any"` takes any of the same structure.
        factories: the classes or factories, by name, of modules that `convattn.register` has not entered.

    Raises:
        WeightsError: no such files, or of another network; the message says by name and shape what differs.
        AttachError: the network has attention there already.

    Example:
        >>> import tempfile
        >>> from convattn import attach, detach, networks
        >>> network = networks.resnet20()
        >>> folder = save(attach(network, "se"), tempfile.mkdtemp())
        >>> load(detach(network), folder).layer1[0].bn2.attention.strength.item()
        0.0
    """
    checks.choice("load", "weights", weights, ("same", "any"))
    folder = Path(folder)
    about, tensors = _read(folder)
    _refuse_another(model, about["base"], folder, weights)
    pairs = []
    for site in about["sites"]:
        made = _site(site)
        try:
            found = wrapped(model, made, _entry(made, factories or {}))
        except (TypeError, InvalidOption) as error:
            raise WeightsError(
                f"{folder / ABOUT}: no module can be made for {made.name!r} ({error}) {UNCHANGED}"
            ) from error
        wrapper = found[0][1]
        prefix = f"{made.name}.{ATTENTION}."
        state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            wrapper.get_submodule(ATTENTION).load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise WeightsError(f"{folder}: the weights at {made.name!r} do not fit ({reason}) {UNCHANGED}") from error
        pairs += found
    exchange(model, pairs)
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsError(f"No {name} in {folder}: give a folder that `convattn.save` wrote. {UNCHANGED}")
    try:
        about = json.loads((folder / ABOUT).read_text())
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be read ({error}). {UNCHANGED}") from error
    if not _is_description(about):
        raise WeightsError(f"{folder / ABOUT} does not describe attention. {UNCHANGED}")
    if about["format"] != FORMAT:
        raise WeightsError(
            f"{folder} has the format {about['format']}, written by convattn {about.get('convattn')}; this version "
            f"reads format {FORMAT}. {UNCHANGED}"
        )
    return about, tensors


def _is_description(about: Any) -> bool:
    if not isinstance(about, dict) or not {"format", "base", "sites"} <= about.keys():
        return False
    base, sites = about["base"], about["sites"]
    tensors = base.get("tensors") if isinstance(base, dict) and "network" in base else None
    entries = isinstance(tensors, dict) and all(isinstance(one, list) and len(one) == 3 for one in tensors.values())
    return entries and isinstance(sites, list) and all(isinstance(site, dict) for site in sites)


def _refuse_another(model: nn.Module, base: dict[str, Any], folder: Path, weights: str) -> None:
    saved: Fingerprint = base["tensors"]
    here = _fingerprint(model)
    missing, added = [key for key in saved if key not in here], [key for key in here if key not in saved]
    shapes = [key for key in saved if key in here and saved[key][0] != here[key][0]]
    parts = []
    if missing:
        parts.append(f"{_counted(missing)} only there")
    if added:
        parts.append(f"{_counted(added)} only here")
    if shapes:
        first = shapes[0]
        parts.append(f"{_counted(shapes)} of another shape ({saved[first][0]} there, {here[first][0]} here)")
    if parts:
        raise WeightsError(
            f"{folder} holds attention for {base['network']}, and this is another network, {_network(model)}: "
            f"{'; '.join(parts)}. {UNCHANGED}"
        )
    other = [key for key in saved if saved[key][1:] != here[key][1:]]
    if other and weights == "same":
        dtypes = saved[other[0]][1], here[other[0]][1]
        how = f" ({dtypes[0]} there, {dtypes[1]} here)" if dtypes[0] != dtypes[1] else ""
        raise WeightsError(
            f"{folder} holds attention for {base['network']} with other weights than this network has: "
            f"{_counted(other)} of {len(saved)}{how}. Load the network's own weights first, or give weights='any'. "
            f"{UNCHANGED}"
        )


def _counted(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({keys[0]}{', ...' if len(keys) > 1 else ''})"


def _network(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _fingerprint(model: nn.Module) -> Fingerprint:
    """Shape, dtype and a hash of every tensor of the plain network."""
    # under every name: a layer may have several
    wrappers = [name for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, Attached)]
    prefixes = tuple(f"{name}.{ATTENTION}." for name in wrappers)
    return {
        key: [list(value.shape), str(value.dtype).removeprefix("torch."), _hash(value)]
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not key.startswith(prefixes) and not key.endswith(COUNTER)
    }


def _hash(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return ""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=8).hexdigest()


def _described(model: nn.Module, name: str, wrapper: Attached) -> dict[str, Any]:
    """A site, under the names that its layers have here: what is saved may be a part of what was attached to."""
    sources = [other for other, _ in partners(model, [wrapper])]
    source = next((other for other, one in model.named_modules() if one in sources), "")
    found = dataclasses.replace(wrapper.convattn_site.found, name=name, source=source)
    return dataclasses.asdict(dataclasses.replace(wrapper.convattn_site, name=name, found=found))


def _site(described: dict[str, Any]) -> Site:
    try:
        found = dict(described["found"])
        found["size"] = tuple(found["size"])
        found["functions"] = tuple(
            (name, tuple(arguments), tuple(map(tuple, options))) for name, arguments, options in found["functions"]
        )
        return Site(**{**described, "size": tuple(described["size"]), "found": Place(**found)})
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"A site of {ABOUT} is not described as `convattn.save` does it ({error}). {UNCHANGED}"
        ) from error


def _entry(site: Site, factories: Mapping[str, Callable[[int], nn.Module]]) -> Entry:
    if site.registered:
        return registry.entry(site.attention)
    if site.attention not in factories:
        raise WeightsError(
            f"The attention at {site.name!r} was made by a factory called {site.attention!r}: give it with "
            f"factories={{{site.attention!r}: ...}}. {UNCHANGED}"
        )
    return own_entry(factories[site.attention], site.place, site.attention)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
