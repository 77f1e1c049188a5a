"""Checkpoint files: read safely, matched to a network before anything is changed."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from convattn import checks
from convattn.errors import WeightsError

# keys under which training scripts keep the weights beside other things
WRAPPERS = ("state_dict", "model")


def read(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: safetensors, or a pickle of tensors only.

    A `state_dict` around them and a `module.` before every name (left by data-parallel training) are taken off.

    Raises:
        WeightsError: no such file, not a checkpoint, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No file of weights at {path}.")
    if path.suffix == ".safetensors":
        try:
            return unwrap(safetensors.torch.load_file(path))
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a safetensors file: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is no checkpoint of tensors only, and nothing else is unpickled: save the network's state_dict()."
        ) from error
    except Exception as error:
        # whatever bytes that are no pickle happen to mean
        raise WeightsError(f"{path} cannot be read as a checkpoint: {checks.reason(error)}.") from error
    return unwrap(content, path)


def unwrap(content: Any, path: Path | str = "The checkpoint") -> dict[str, torch.Tensor]:
    """The tensors by name inside the wrappers that training scripts put around a state dict."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict: expected tensors by name, at the top or under 'state_dict'.")
    state = dict(content)
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load(network: nn.Module, path: Path | str, *, name: str) -> None:
    """Load a checkpoint into a network of the same architecture.

    The classifier alone may have another number of classes: it then keeps its fresh weights, with a warning.

    Raises:
        WeightsError: the checkpoint is of another network. The network was not changed.
    """
    state, own = read(path), network.state_dict()
    # older checkpoints do not count batches
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    reshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    classifiers = _classifiers(network)
    fresh = [key for key in reshaped if _only_classes_differ(key, classifiers, state[key], own[key])]
    wrong = [key for key in reshaped if key not in fresh]
    if missing or unknown or wrong:
        raise WeightsError(
            f"{path} holds weights of another network than {name}: "
            f"{_difference(missing, unknown, wrong, state, own)}. Name the network that it belongs to."
        )
    if fresh:
        was, now = state[fresh[0]].shape[0], own[fresh[0]].shape[0]
        started = " and ".join(dict.fromkeys(repr(key.rpartition(".")[0]) for key in fresh))
        warnings.warn(
            f"{path} classifies {was} classes, not {now}: the classifier {started} starts from random weights.",
            stacklevel=2,
        )
    network.load_state_dict({**own, **{key: value for key, value in state.items() if key not in fresh}})


def _classifiers(network: Any) -> list[str]:
    """The names of the layers that classify: what timm says, or the last linear layer and those that are as wide.

    (Auxiliary and distilled heads are as wide as the last.) A network without linear layers classifies by convolution.
    """
    if callable(getattr(network, "get_classifier", None)):
        stated = network.get_classifier()
        heads = stated if isinstance(stated, tuple | list) else [stated]
        return [name for name, module in network.named_modules() if any(module is head for head in heads)]
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if layers:
        width = layers[-1][1].out_features
        return [name for name, module in layers if module.out_features == width]
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][-1:]


def _only_classes_differ(key: str, classifiers: list[str], theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    inside = any(key.startswith(f"{name}.") for name in classifiers)
    return inside and theirs.dim() == ours.dim() and theirs.shape[1:] == ours.shape[1:]


def _difference(
    missing: list[str],
    unknown: list[str],
    wrong: list[str],
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
) -> str:
    said = []
    if missing:
        said.append(f"{len(missing)} of {len(own)} tensors are missing (first {missing[0]})")
    if unknown:
        said.append(f"{len(unknown)} are unknown (first {unknown[0]})")
    if wrong:
        key = wrong[0]
        said.append(
            f"{len(wrong)} have another shape (first {key}: {tuple(state[key].shape)}, "
            f"expected {tuple(own[key].shape)})"
        )
    return ", ".join(said)
