"""One trained network as one file: its weights, and beside them what is needed to build it again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from convattn import checks, files, networks, own_code, registry
from convattn.attachment import attach
from convattn.attachment.plans import own_entry
from convattn.errors import WeightsError
from convattn.train import controls

BASELINE = "baseline"
# sizes of images, and means and deviations of their pixels, are below this
LARGEST = 1 << 16
# and the values of pixels
LARGEST_VALUE = 1 << 32
KEYS = ("backbone", "variant", "start", "classes", "image_size", "mean", "std")


def build(about: dict[str, Any], *, weights: str | None = None, base: nn.Module | None = None) -> nn.Module:
    """The network that `about` describes: its backbone, with the variant's attention or its control if it has any.

    `base` is the backbone where the user has built it.
    """
    kind, variant = controls.parts(about["variant"])
    if kind == controls.WIDER:
        return controls.wider(about, variant, weights=weights)
    network = base
    if network is None:
        network = networks.create(about["backbone"], classes=len(about["classes"]), weights=weights)
    if variant != BASELINE and kind != controls.NOISE:
        side = about["image_size"]
        attach(network, variant, example=torch.zeros(1, 3, side, side), start=about["start"])
        if kind is not None:
            controls.exchange(network, kind, variant)
    return network


def save(path: Path, network: nn.Module, about: dict[str, Any]) -> None:
    """Write a network to a safetensors file, with `about` in its metadata.

    `about` has the keys `backbone`, `variant` (`"baseline"`, a name for `attach`, or a control), `start`, `classes` (a
    list of their names), `image_size`, `mean` and `std`; and `scale` (`low` and `high`) where its data have images with
    more than 8 bits a channel.
    """
    files.write(path, serialized(network, metadata={"convattn": json.dumps(about)}))


def serialized(network: nn.Module, *, metadata: dict[str, str] | None = None) -> bytes:
    """The weights of a network as the content of a safetensors file."""
    # cloned: the format refuses tensors that share memory
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    return safetensors.torch.save(state, metadata=metadata)


def load(
    path: Path | str,
    *,
    trust: own_code.Trust = (),
    factories: Mapping[str, Callable[..., nn.Module]] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint written by `save`, in eval mode, and its `about`.

    Args:
        path: the file.
        trust: code of the form `FILE.py:NAME` that may be run if the file names it; no other is.
        factories: classes or factories of modules, by the names that they have in the file and are not registered with.

    Raises:
        WeightsError: no such file, or not such a checkpoint.
        UntrustedCode: the file names code that is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No checkpoint at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("convattn", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        # ValueError: no JSON, or a number with thousands of digits in it
        raise WeightsError(f"{path} is not a checkpoint of convattn: {checks.reason(error)}.") from error
    if not _is_about(about):
        raise WeightsError(
            f"{path} holds weights but not what they belong to: give a weights.safetensors that `convattn compare` "
            f"wrote."
        )
    if about.get("built"):
        raise WeightsError(
            f"{path} holds the weights of a network that the function {checks.shown(about['built'])} built: call that "
            f"function and load them with safetensors.torch.load_model."
        )
    given = factories or {}
    modules = modules_of(about["variant"])
    own_code.check([about["backbone"], *(name for name in modules if name not in given)], path, trust)
    with registry.also([own_entry(factory, name=name) for name, factory in given.items()]):
        _refuse_unknown(modules, about, path)
        network = build(about)
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise WeightsError(
            f"The weights in {path} do not fit {about['backbone']} with {about['variant']}: "
            f"{str(error).splitlines()[-1].strip()} Has the network's code changed since?"
        ) from error
    return network.eval(), about


def modules_of(name: str) -> list[str]:
    """The modules that a variant or a control of one is made of, as `attach` takes them apart."""
    kind, variant = controls.parts(name)
    return [] if kind == controls.NOISE or variant == BASELINE else variant.split("+")


def _is_about(about: Any) -> bool:
    if not isinstance(about, dict) or not set(KEYS) <= set(about):
        return False
    lists = [about[key] for key in ("classes", "mean", "std")]
    if not all(isinstance(values, list) and values for values in lists):
        return False
    words = [about[key] for key in ("backbone", "variant", "start")]
    classes, mean, std = lists
    return (
        all(isinstance(word, str) for word in (*words, *classes))
        and len(mean) == len(std) == 3
        and all(type(number) in (int, float) and abs(number) < LARGEST for number in (*mean, *std))
        and all(number > 0 for number in std)
        and type(about["image_size"]) is int
        and 0 < about["image_size"] < LARGEST
        and _is_scale(about.get("scale"))
    )


def _is_scale(scale: Any) -> bool:
    if scale is None:
        return True
    if not isinstance(scale, dict) or scale.keys() != {"low", "high"}:
        return False
    low, high = scale["low"], scale["high"]
    return type(low) is type(high) is int and -LARGEST_VALUE < low < high < LARGEST_VALUE


def _refuse_unknown(modules: list[str], about: dict[str, Any], path: Path) -> None:
    """Say where a module of the user's is to come from that nobody has named here."""
    own = about.get("own")
    for name in modules:
        if isinstance(own, dict) and name in own and not registry.is_known(name):
            raise WeightsError(
                f"{path} holds a network with {name!r}, a module of the user's own ({checks.shown(own[name])}): call "
                f"convattn.register for it before, or give factories={{{name!r}: ...}}, from Python both."
            )
