"""Units: layers that a method such as `fuse` or `reparameterize` merges into one, and whether a gate survives that.

A gate stands on a unit as a whole. Where that cannot be, inside of a larger unit, a copy of the unit is merged with a
gate there: only if the copy computes the same before and after, gate included, the gate may stand there.
"""

import copy
import dis
import inspect
import types
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from convattn.attachment import merging
from convattn.attachment.wrapper import Attached, AttachedBefore, layer_of

# a method that goes through modules merges what these say, and is that of a network and not of a unit
WALKS = frozenset(("modules", "named_modules", "children", "named_children"))
USUAL = ("fuse", "reparameterize", "switch_to_deploy")
# between outputs before and after merging, relative to the largest; rounding is about 1e-6
SAME = 1e-3


def enclosing(model: nn.Module, name: str) -> list[str]:
    """The names of the units around a layer, the innermost first; the network itself is none."""
    units = []
    while name := name.rpartition(".")[0]:
        if is_unit(type(layer_of(model.get_submodule(name)))):  # type: ignore[arg-type]
            units.append(name)
    return units


@lru_cache(maxsize=4096)
def is_unit(kind: Any) -> bool:
    """Whether a class of layers is merged into one by a method of its own, or by its network."""
    return bool(_methods(kind)) or any(merging.FORWARD.fullmatch(name) for name in dir(kind))


@lru_cache(maxsize=4096)
def _methods(kind: Any) -> tuple[str, ...]:
    """The methods of a class that merge its layers and that can be called without arguments, the usual one first."""
    names = [name for name in dir(kind) if merging.METHODS.fullmatch(name) and _merges(getattr(kind, name))]
    return tuple(sorted(names, key=lambda name: (name.startswith("get_"), name not in USUAL, name)))


def _merges(method: Any) -> bool:
    if not callable(method) or isinstance(method, type):
        return False
    function = inspect.unwrap(method)
    try:
        _self, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    optional = all(
        other.default is not other.empty or other.kind in (other.VAR_POSITIONAL, other.VAR_KEYWORD) for other in others
    )
    return optional and not any(WALKS.intersection(_called(code)) for code in _codes(function))


def _codes(function: Any) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions of its file and those imported there that it names."""
    code = getattr(function, "__code__", None)
    if code is not None:
        yield code
        named = (function.__globals__.get(name) for name in code.co_names)
        yield from (used.__code__ for used in named if isinstance(used, types.FunctionType))


def _called(code: types.CodeType) -> Iterator[str]:
    """The names of the methods that a function calls, and those defined in it."""
    for instruction in dis.get_instructions(code):
        # from Python 3.12 on a method is an attribute with a mark
        is_marked = instruction.opname == "LOAD_ATTR" and "NULL|self" in instruction.argrepr
        if instruction.opname == "LOAD_METHOD" or is_marked:
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _called(constant)


def survives_merging(unit: nn.Module, path: str, shape: tuple[int, ...], *, before: bool, channels_last: bool) -> bool:
    """Whether a gate at a layer of a unit is still there, and computes the same, when the unit has been merged.

    Args:
        unit: the unit; it is not changed.
        path: of the layer, seen from the unit.
        shape: of the tensor that the unit takes.
        before: whether the gate stands on the layer's input.
        channels_last: whether the layer's maps have their channels in the last dimension.
    """
    units = [unit, *(unit.get_submodule(name) for name in enclosing(unit, path))]
    if not all(_methods(type(layer_of(module))) for module in units):  # type: ignore[arg-type]
        # merged by whoever goes through the network: by which layers is not known
        return False
    if any(tensor.is_meta for tensor in (*unit.parameters(), *unit.buffers())):
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return _is_same_when_merged(unit, path, shape, before, channels_last)
    except Exception:
        # whatever a method of somebody else's runs into
        return False


def _is_same_when_merged(unit: nn.Module, path: str, shape: tuple[int, ...], before: bool, channels_last: bool) -> bool:
    trial = copy.deepcopy(unit).eval()
    _randomise(trial)
    layer = layer_of(trial.get_submodule(path))
    kind = AttachedBefore if before else Attached
    probe = _Probe()
    trial.set_submodule(path, kind(layer, probe, channels_last=channels_last))
    like = next(iter(trial.parameters()))
    x = torch.randn(shape, device=like.device, dtype=like.dtype)
    expected = _first_tensor(trial(x))
    holder = nn.Sequential(trial)
    merge_all(holder)
    probe.called = False
    y = _first_tensor(holder(x))
    kept = any(module is probe for module in holder.modules()) and probe.called
    return kept and bool((y - expected).abs().max() <= SAME * expected.abs().max())


def merge_all(model: nn.Module) -> None:
    """Merge every unit below, in place, the outer ones first."""
    for name, child in list(model.named_children()):
        for method in _methods(type(layer_of(child)))[:1]:  # type: ignore[arg-type]
            merged = getattr(child, method)()
            if isinstance(merged, nn.Module):
                setattr(model, name, merged)
        merge_all(model.get_submodule(name))


class _Probe(nn.Module):
    """A gate of one fixed number for each channel."""

    called = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.called = True
        gains = torch.linspace(0.5, 1.0, x.shape[1], device=x.device, dtype=x.dtype)
        return x * gains.view(1, -1, *[1] * (x.dim() - 2))


def _randomise(module: nn.Module) -> None:
    """Give the numbers that a layer has for each channel a size: a branch that is scaled by 0 would hide its gate."""
    tensors: list[tuple[str, torch.Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and max(tensor.shape, default=1) == tensor.numel():
            centre = 0.0 if name.endswith(("bias", "mean")) else 1.0
            tensor.copy_(centre + torch.empty_like(tensor).uniform_(-0.5, 0.5))


def _first_tensor(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor
