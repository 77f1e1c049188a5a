"""Functions of the user in place of ours: what builds a network, what trains it."""

import hashlib
import inspect
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from convattn import checks, networks
from convattn.data import Parts
from convattn.errors import InvalidOption
from convattn.nn import Gate, Head, Update

Build = Callable[[int], nn.Module]
Train = Callable[[nn.Module, Parts, int], Any]
# how far the probabilities of an image may be from 1 together, for those of half precision
ROUNDING = 1e-2
# what the first argument of a factory of attention is usually called
CHANNELS = frozenset(
    ("channels", "channel", "in_channels", "num_channels", "num_features", "in_planes", "inplanes", "planes", "dim")
) | frozenset(("in_chs", "chs", "ch", "c", "width"))


@dataclass(frozen=True)
class Built:
    """Builds a network by a function of the user; what images it wants is said by itself, or is what another one wants.

    Called with a seed, which is PyTorch's too at that moment.
    """

    function: Build
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    input_size: int | None

    def __call__(self, seed: int) -> nn.Module:
        network = self.function(seed)
        if not isinstance(network, nn.Module):
            raise InvalidOption(
                f"compare: {label(self.function)} returned {type(network).__name__}, expected a torch.nn.Module."
            )
        return networks.given(network, like=self)


def builds_network(function: Callable[..., Any], *, otherwise: bool) -> bool:
    """Whether a callable makes a whole network of a `seed`, and not a module of a number of channels.

    `otherwise` is the answer where neither its class nor the name of its first argument tells.
    """
    made: Any = getattr(function, "func", function)
    is_class = isinstance(made, type) and issubclass(made, nn.Module)
    if is_class and issubclass(made, Gate | Update | Head):
        return False
    try:
        first = next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        first = ""
    if first == "seed":
        return True
    return otherwise and not is_class and first.lower() not in CHANNELS


def label(function: Callable[..., Any]) -> str:
    """Where a function is: `module:name`."""
    known = getattr(function, "func", function)
    name = getattr(known, "__qualname__", type(known).__qualname__)
    return f"{getattr(known, '__module__', type(known).__module__)}:{name}"


def fingerprint(functions: Iterable[Callable[..., Any]]) -> str | None:
    """A hash of the source of functions, where they have one; what they call is not in it. None without functions."""
    digest, any_there = hashlib.blake2b(digest_size=16), False
    for function in functions:
        any_there = True
        try:
            digest.update(inspect.getsource(getattr(function, "func", function)).encode())
        except (OSError, TypeError):
            digest.update(label(function).encode())
    return digest.hexdigest() if any_there else None


def check_sendable(functions: Iterable[Callable[..., Any]]) -> None:
    """Raise `InvalidOption` for a function that no other process can be given."""
    for function in functions:
        try:
            pickle.dumps(function)
        # whatever the parts of a callable raise: PicklingError, AttributeError, TypeError
        except Exception as error:
            raise InvalidOption(
                f"compare: {label(function)} cannot be given to other processes ({checks.reason(error)}): define it at "
                f"the top level of a module, or take jobs=1."
            ) from error


def trained(function: Train, network: nn.Module, parts: Parts, seed: int) -> np.ndarray:
    """Train a network by a function of the user: the class probabilities of the test images (N, classes).

    Raises:
        InvalidOption: the function returned something else.
    """
    found = function(network, parts, seed)
    array = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    wanted, where = (len(parts.test), len(parts.classes)), f"compare: {label(function)}"
    if array.shape != wanted:
        raise InvalidOption(
            f"{where} returned an array of shape {array.shape}, expected class probabilities of the test images "
            f"{wanted}."
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all() or array.min() < 0 or np.abs(array.sum(axis=1) - 1).max() > ROUNDING:
        raise InvalidOption(
            f"{where} returned numbers that are no probabilities: expected them from 0 to 1, with a sum of 1 for each "
            f"image; of logits take the softmax."
        )
    return array
