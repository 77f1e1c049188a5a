"""Attention, and what was trained beside it, as files without the rest of the network.

A folder holds `attention.safetensors`, the added parameters and buffers and what `freeze_base` kept trainable, and
`attention.json`: versions, the sites, and fingerprints, so that it cannot be put into another network unnoticed.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from convattn import checks, files, registry
from convattn.attachment import descriptions, freezing
from convattn.attachment.attaching import Pair, attached, exchange, partners, wrapped
from convattn.attachment.descriptions import ABOUT, FORMATS, Fingerprint, Saved
from convattn.attachment.plans import UNCHANGED, Site, built, own_entry
from convattn.attachment.wrapper import ATTENTION, Attached, AttachedBranch, layer_of
from convattn.errors import AttachError, InvalidOption, UnknownName, WeightsError
from convattn.networks.watching import exclusive
from convattn.registry import Entry

WEIGHTS = "attention.safetensors"
# counts training steps; no output depends on it
COUNTER = "num_batches_tracked"
# what a module may raise that is given options of a damaged description
REFUSALS = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError)

Tensors = dict[str, torch.Tensor]


def save(model: nn.Module, folder: str | Path, *, whole: bool = False) -> Path:
    """Write what was attached to a network, and what `freeze_base` kept trainable, to a folder.

    Nothing else of the network is written, unless it is saved whole.

    Args:
        model: a network with attention.
        folder: created if need be; of what it holds, only files of the same names are replaced.
        whole: write all tensors in the network's state dict: for one whose base was trained as well. After
            `unfreeze_base` that is so in any case.

    Returns:
        The folder.

    Raises:
        AttachError: the model has no attention, or is itself one of the layers that have.
        InvalidOption: an option of a factory's module that JSON cannot hold, or a tensor that safetensors cannot.

    Example:
        >>> import tempfile
        >>> from convattn import attach, networks
        >>> folder = save(attach(networks.resnet20(), "se"), tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['attention.json', 'attention.safetensors']
    """
    model = freezing.unwrapped(model)
    sites = attached(model)
    if not sites:
        raise AttachError(f"{type(model).__name__} has no attention to save.")
    if isinstance(model, Attached):
        raise AttachError(
            f"The {type(layer_of(model)).__name__} has attention on itself: save the network that it is in."
        )
    base = _base(model)
    trained = base.keys() if whole else base.keys() & freezing.trained_keys(model)
    beside = [key for key, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if beside and len(trained) == len(base):
        warnings.warn(f"save: only tensors are saved, and not {', '.join(beside)}.", stacklevel=2)
    tensors = {key: base[key] for key in base if key in trained} | {
        f"{name}.{ATTENTION}.{key}": value
        for name, wrapper in sites
        for key, value in wrapper.attention.state_dict().items()
    }
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    about = {
        "format": FORMATS[-1],
        "convattn": version("convattn"),
        "torch": torch.__version__,
        "base": {"network": _network(model), "tensors": _fingerprint(base), "trained": sorted(trained)},
        "sites": [_described(model, name, wrapper) for name, wrapper in sites],
        "tensors": {key: _entry_of(value) for key, value in tensors.items()},
    }
    try:
        text = descriptions.written(about)
    except TypeError as error:
        raise InvalidOption(f"save: an option of a module cannot be written to JSON ({error}).") from error
    try:
        content = safetensors.torch.save(tensors)
    except (LookupError, ValueError, SafetensorError) as error:
        raise InvalidOption(f"save: a tensor cannot be written to safetensors ({checks.reason(error)}).") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # the description last: where it stands, the weights stand
    files.write(folder / WEIGHTS, content)
    files.write(folder / ABOUT, text)
    return folder


@exclusive
def load(
    model: nn.Module,
    folder: str | Path,
    *,
    weights: str = "same",
    factories: Mapping[str, Callable[[int], nn.Module]] | None = None,
) -> nn.Module:
    """Attach what `save` wrote, with its parameters, in place, and return the model.

    Where tensors of the network were saved too, as of a classifier that was trained, or all of a network that was saved
    whole, the model gets them: it then computes what the saved one did.

    Args:
        model: the network that the attention was saved from, without attention at those sites.
        folder: written by `save`.
        weights: `"same"` refuses a network whose own weights differ from those that the attention was trained on, which
            would give another output; `"any"` takes any weights in a network of the same structure, and attention then
            works on these. What was saved of the network is restored in both cases.
        factories: the classes or factories, by name, of modules that `convattn.register` has not entered.

    Raises:
        WeightsError: no such files, damaged ones, or those of another network; the message says what differs.
        AttachError: the network has attention there already, or no such layer.

    Example:
        >>> import tempfile
        >>> from convattn import attach, detach, networks
        >>> network = networks.resnet20()
        >>> folder = save(attach(network, "se"), tempfile.mkdtemp())
        >>> load(detach(network), folder).layer1[0].bn2.attention.strength.item()
        0.0
    """
    checks.choice("load", "weights", weights, ("same", "any"))
    folder, inside = Path(folder), freezing.unwrapped(model)
    try:
        saved, tensors = _read(folder)
        base = _base(inside)
        _refuse_another(inside, base, saved, folder, weights)
        trained = {key: base[key] for key in saved.trained}
        values = {key: tensors[key] for key in trained if key in tensors}
        _refuse_misfit(trained, values, f"{folder}: the weights of the network", weights)
        pairs = _pairs(inside, saved, tensors, folder, weights, factories or {})
        _refuse_damage(saved, tensors, folder)
    except RecursionError as error:
        raise WeightsError(f"{folder / ABOUT} is nested too deeply to be read. {UNCHANGED}") from error
    with _restored(trained, values, folder):
        exchange(inside, pairs)
    if trained:
        freezing.note_trained(inside, trained.values())
    return model


def _read(folder: Path) -> tuple[Saved, Tensors]:
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsError(f"No {name} in {folder}: give a folder that `convattn.save` wrote. {UNCHANGED}")
    saved = descriptions.read(folder / ABOUT)
    try:
        return saved, safetensors.torch.load_file(folder / WEIGHTS)
    except (ValueError, OSError, LookupError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be read ({checks.reason(error)}). {UNCHANGED}") from error


def _pairs(
    model: nn.Module,
    saved: Saved,
    tensors: Tensors,
    folder: Path,
    weights: str,
    factories: Mapping[str, Callable[[int], nn.Module]],
) -> list[Pair]:
    """The layers that change, each with what takes its place, which has its weights already."""
    pairs: list[Pair] = []
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for site in saved.sites:
        if site.name not in names:
            raise AttachError(f"The model has no layer {site.name!r}. {UNCHANGED}")
        one, where = _entry(site, factories, folder), f"{folder}: the weights at {site.name!r}"
        prefix = f"{site.name}.{ATTENTION}."
        state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            if site.registered:
                # without memory: what a damaged description asks for may be larger than the machine
                with torch.device("meta"):
                    module = built(one, site.found, site.start, site.options)
                _refuse_misfit(module.state_dict(), state, where, weights="any")
            found = wrapped(model, site, one)
        except (AttachError, WeightsError):
            raise
        except REFUSALS as error:
            reason = f"{type(error).__name__}: {checks.reason(error)}"
            raise WeightsError(
                f"{folder / ABOUT}: no module can be made for {site.name!r} ({reason}) {UNCHANGED}"
            ) from error
        attention = found[0][1].get_submodule(ATTENTION)
        _refuse_misfit(attention.state_dict(), state, where, weights)
        attention.load_state_dict(state)
        pairs += found
    layers = [old for old, _ in pairs]
    if len(set(layers)) < len(layers) or model in layers:
        raise WeightsError(f"{folder / ABOUT} describes a layer twice, or the network itself as a site. {UNCHANGED}")
    return pairs


def _refuse_misfit(expected: Tensors, state: Tensors, where: str, weights: str) -> None:
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            what = "missing" if key in expected else "unknown"
            raise WeightsError(f"{where} do not fit ({key!r} is {what}). {UNCHANGED}")
        one, other = expected[key], state[key]
        if one.shape != other.shape:
            how = f"has the shape {list(other.shape)}, where {list(one.shape)} is expected"
            raise WeightsError(f"{where} do not fit ({key!r} {how}). {UNCHANGED}")
        # of floating-point numbers every precision will do with weights="any"
        is_taken = weights == "any" and one.is_floating_point() and other.is_floating_point()
        if one.dtype != other.dtype and not is_taken:
            how = f"is {_dtype(other)}, where {_dtype(one)} is expected"
            raise WeightsError(f"{where} do not fit ({key!r} {how}). {UNCHANGED}")


def _refuse_damage(saved: Saved, tensors: Tensors, folder: Path) -> None:
    """Refuse what still fits, and is not what was written."""
    prefixes = tuple(f"{site.name}.{ATTENTION}." for site in saved.sites)
    surplus = [key for key in tensors if key not in saved.trained and not key.startswith(prefixes)]
    if surplus:
        raise WeightsError(f"{folder / WEIGHTS} has {_counted(surplus)} of no site in {ABOUT}. {UNCHANGED}")
    if saved.tensors is not None:
        here = {key: _entry_of(value) for key, value in tensors.items()}
        changed = [key for key in here | saved.tensors if here.get(key) != saved.tensors.get(key)]
        if changed:
            raise WeightsError(
                f"{folder / WEIGHTS} is not what `convattn.save` wrote with {ABOUT}: {_counted(changed)} changed. "
                f"{UNCHANGED}"
            )
    if not saved.is_whole:
        raise WeightsError(f"{folder / ABOUT} was changed after `convattn.save` wrote it. {UNCHANGED}")


@contextmanager
def _restored(own: Tensors, values: Tensors, folder: Path) -> Iterator[None]:
    """Give tensors of a network the saved values; those that they had where anything fails."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for key, value in values.items():
            before.append((own[key], own[key].detach().clone()))
            _copy(own[key], value, f"{folder}: {key!r} of the network cannot be written to")
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        raise


def _copy(tensor: torch.Tensor, value: torch.Tensor, failure: str) -> None:
    try:
        with torch.no_grad():
            tensor.copy_(value)
    except RuntimeError as error:
        # one that shares its own memory, as an expanded buffer does, may have the value already
        if not torch.equal(tensor, value.to(tensor.device, tensor.dtype)):
            raise WeightsError(f"{failure} ({checks.reason(error)}). {UNCHANGED}") from error


def _refuse_another(model: nn.Module, base: Tensors, saved: Saved, folder: Path, weights: str) -> None:
    if any(one.is_meta for one in base.values()):
        raise WeightsError(
            f"{type(model).__name__} is on the device meta, which holds no weights: give it memory with "
            f"to_empty(device=...) and its weights, then load. {UNCHANGED}"
        )
    there, here = saved.base, _fingerprint(base)
    missing, added = [key for key in there if key not in here], [key for key in here if key not in there]
    missing += [key for key in saved.trained if key not in base and key not in there]
    shapes = [key for key in there if key in here and there[key][0] != here[key][0]]
    parts = []
    if missing:
        parts.append(f"{_counted(missing)} only there")
    if added:
        parts.append(f"{_counted(added)} only here")
    if shapes:
        first = shapes[0]
        parts.append(f"{_counted(shapes)} of another shape ({there[first][0]} there, {here[first][0]} here)")
    if parts:
        raise WeightsError(
            f"{folder} holds attention for {saved.network}, and this is another network, {_network(model)}: "
            f"{'; '.join(parts)}. {UNCHANGED}"
        )
    # what was saved itself may be anything here, such as a fresh classifier
    trained = set(saved.trained)
    other = [key for key in there if there[key][1] != here[key][1] or (key not in trained and there[key] != here[key])]
    if other and weights == "same":
        dtypes = there[other[0]][1], here[other[0]][1]
        how = f" ({dtypes[0]} there, {dtypes[1]} here)" if dtypes[0] != dtypes[1] else ""
        raise WeightsError(
            f"{folder} holds attention for {saved.network} with other weights than this network has: "
            f"{_counted(other)} of {len(there)}{how}. Load the network's own weights first; where the base was trained "
            f"too, save it with whole=True; or put the attention on these weights with weights='any', which gives "
            f"another output. {UNCHANGED}"
        )


def _counted(keys: list[str]) -> str:
    several = len(keys) > 1
    return f"{len(keys)} tensor{'s' if several else ''} ({checks.shown(keys[0])}{', ...' if several else ''})"


def _network(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _base(model: nn.Module) -> Tensors:
    """The tensors of the plain network, by their keys in the state dict: not copies."""
    # under every name: a layer may have several
    wrappers = [name for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, Attached)]
    prefixes = tuple(f"{name}.{ATTENTION}." for name in wrappers)
    state = model.state_dict(keep_vars=True)
    return {key: one for key, one in state.items() if isinstance(one, torch.Tensor) and not key.startswith(prefixes)}


def _fingerprint(tensors: Tensors) -> Fingerprint:
    return {key: _entry_of(value) for key, value in tensors.items() if not key.endswith(COUNTER)}


def _entry_of(tensor: torch.Tensor) -> list[Any]:
    """Shape, dtype and a hash of a tensor."""
    return [list(tensor.shape), _dtype(tensor), _hash(tensor)]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hash(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return ""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=8).hexdigest()


def _described(model: nn.Module, name: str, wrapper: Attached) -> dict[str, Any]:
    """A site, under the names that its layers have here: what is saved may be a part of what was attached to."""
    sources = [other for other, _ in partners(model, [wrapper])]
    alone = name if isinstance(wrapper, AttachedBranch) else ""
    source = next((other for other, one in model.named_modules() if one in sources), alone)
    found = dataclasses.replace(wrapper.convattn_site.found, name=name, source=source)
    return dataclasses.asdict(dataclasses.replace(wrapper.convattn_site, name=name, found=found))


def _entry(site: Site, factories: Mapping[str, Callable[[int], nn.Module]], folder: Path) -> Entry:
    if site.registered:
        try:
            one = registry.entry(site.attention)
        except UnknownName as error:
            raise WeightsError(f"{folder / ABOUT}: {error} {UNCHANGED}") from error
        if (one.kind == "head") != (site.place == "pool"):
            raise WeightsError(f"{folder / ABOUT}: no {one.kind} can stand at {site.name!r}. {UNCHANGED}")
        return one
    if site.attention not in factories:
        raise WeightsError(
            f"The attention at {site.name!r} was made by a factory called {site.attention!r}: give it with "
            f"factories={{{site.attention!r}: ...}}. {UNCHANGED}"
        )
    return own_entry(factories[site.attention], site.place, site.attention)
