"""Who computes: the fused operators where they serve, else plain PyTorch, which is the truth.

The choice depends on the tensor and on what PyTorch is doing, and on nothing else. A compiler gets plain PyTorch, which
it fuses itself, but for what it is slower at (`operators`). torch.export, torch.func, dispatch modes and tracing, which
see operators of PyTorch only, get plain PyTorch.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.jit import is_scripting  # type: ignore[attr-defined]

from convattn.errors import BackendUnavailable, InvalidOption
from convattn.ops import cpu, cuda, fused, operators, reference
from convattn.ops.cpu import library
from convattn.ops.gates import Gates, Norm

# for whoever wants the other one everywhere: read once, since each look takes as long as the choice
VARIABLE = "CONVATTN_BACKEND"
REFERENCE, CPU, CUDA = "reference", "cpu", "cuda"
NAMES = (REFERENCE, CPU, CUDA)
# those with kernels
_PLACES = {CPU: cpu, CUDA: cuda}
_asked: list[str | None] = [os.environ.get(VARIABLE) or None]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# by way of the modules that they are in, these take as long again
_are_transforms_active, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Compute with this backend within the block, in this process; None chooses again by itself.

    Raises:
        InvalidOption: no such backend.
        BackendUnavailable: from a module within the block, maps that it does not serve.

    Example:
        >>> with use("reference"):
        ...     choice(torch.ones(1, 2, 3, 3))
        'reference'
    """
    if backend is not None and backend not in NAMES:
        raise InvalidOption(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}.")
    _asked.append(backend)
    try:
        yield
    finally:
        _asked.pop()


def choice(x: torch.Tensor) -> str:
    """The name of the backend that computes on a map.

    Raises:
        BackendUnavailable: one was asked for that does not serve it.
    """
    wanted = _asked[-1]
    if wanted is not None and asked() == REFERENCE:
        return REFERENCE
    watched = _watched(x)
    # what is traced cannot be asked where it lies
    backend = wanted or (CUDA if watched is None and x.is_cuda else CPU)
    why = watched or _PLACES[backend].why_not_for(x)
    if why is None:
        return backend
    if wanted is not None:
        raise BackendUnavailable(f"The backend {backend} does not serve this: {why}. The backend reference does.")
    return REFERENCE


def asked() -> str | None:
    """The backend that was asked for, by `use` or by the environment variable CONVATTN_BACKEND; None for none."""
    wanted = _asked[-1]
    if wanted is not None and wanted not in NAMES:
        raise InvalidOption(f"{VARIABLE}: expected one of {', '.join(NAMES)}, got {wanted!r}.")
    return wanted


def _watched(x: torch.Tensor) -> str | None:
    """What wants to see every operator, so that PyTorch's own have to be there."""
    if is_compiling():
        return "a compiler or exporter reads along"
    if type(x) not in _PLAIN:
        return f"it is for plain tensors, not for {type(x).__name__}"
    if _are_transforms_active():
        return "torch.func transforms the call"
    if _modes():
        return "a dispatch mode reads along"
    if _is_tracing():
        return "it is traced"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return None


def gated(
    x: torch.Tensor,
    *,
    channel: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
    spatial: Callable[[torch.Tensor], torch.Tensor] | None = None,
    pools: tuple[str, ...] = ("mean", "max"),
    strength: torch.Tensor | None = None,
    parallel: bool = False,
    dimensions: int = 2,
    shortcut: torch.Tensor | None = None,
    gates: Gates | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A map times a channel gate, times a spatial gate: see `reference.gated`, the truth of every backend.

    Args:
        gates: what `channel` and `spatial` compute, as the fused operators take it; None where they cannot.

    Returns:
        The gated map, and the mean and biased variance (2) of the logits of the spatial gate where the fused operators
        computed them for a norm in training, whose running mean and variance are still to be updated.
    """
    if gates is not None:
        if is_compiling():
            if _better_than_compiled(x, gates) and _alike(x, gates):
                return operators.call(x, gates, strength, shortcut)
        elif (backend := choice(x)) != REFERENCE and _are_read(gates, strength) and _alike(x, gates):
            return fused.gated(_PLACES[backend].Kernels, x, gates, strength, shortcut)
    return reference.gated(x, pools, channel, spatial, strength, parallel, dimensions, shortcut), None


def takes_norms(u: torch.Tensor) -> bool:
    """Whether a norm of this map can ride along in the passes of the gates behind it, see `normed`."""
    return not is_compiling() and choice(u) != REFERENCE


def normed(
    u: torch.Tensor, norm: Norm, gates: Gates, strength: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """The gated map of norm(u) without that map ever lying in memory; None where types forbid it.

    Returns:
        The gated map, and mean and biased variance of the logits of the spatial gate (2) and of the norm's input
        (2, C), each where the norm is trained and its running ones are still to be updated.
    """
    if (
        not _are_read(gates, strength, *norm[:4])
        or not _alike(u, gates)
        or any(one is not None and one.dtype is not torch.float32 for one in norm[:4])
    ):
        return None
    return fused.normed(_PLACES[choice(u)].Kernels, u, norm, gates, strength)


def follow(
    mean: torch.Tensor,
    var: torch.Tensor,
    tracked: torch.Tensor,
    momentum: float | None,
    moments: torch.Tensor,
    count: int,
) -> None:
    """Let a norm's running mean and variance (C) follow mean and biased variance, 2C numbers, of so many values.

    As `torch.nn.BatchNorm2d` does in training, and on the CPU in one call: PyTorch's operators for it take longer than
    all that is computed of a small map.
    """
    if not is_compiling() and cpu.takes_running(mean, var, tracked, moments):
        return cpu.follow(mean, var, tracked, momentum, moments, count)
    tracked.add_(1)
    momentum = 1 / int(tracked) if momentum is None else momentum
    with torch.no_grad():
        of_mean, of_var = moments.view(2, -1)
        mean.lerp_(of_mean.to(mean.dtype), momentum)
        var.lerp_(of_var.mul(count / (count - 1)).to(var.dtype), momentum)


def mean_max(x: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
    """Pool a map (B, C, *spatial) to (B, 2C): the means, then the maxima."""
    if not is_scripting():
        return _mean_max(x, dimensions)
    return reference.mean_max(x, dimensions)


def _mean_max(x: torch.Tensor, dimensions: int | None) -> torch.Tensor:
    backend = choice(x)
    return reference.mean_max(x, dimensions) if backend == REFERENCE else fused.mean_max(_PLACES[backend].Kernels, x)


def _better_than_compiled(x: torch.Tensor, gates: Gates) -> bool:
    """Whether a compiler is to call the fused operators: it is slower itself where maxima over channels are far apart.

    Whatever is exported has to run without this package.
    """
    return (
        gates.spatial is not None
        and not torch.compiler.is_exporting()
        and asked() != REFERENCE
        and library.WHY_NOT is None
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and x.is_contiguous()
    )


def _are_read(gates: Gates, *others: torch.Tensor | None) -> bool:
    """Whether kernels can read gates and others where they lie: plain tensors, and not the negatives of others."""
    window = gates.spatial
    if window is not None and window.mean is not None:
        others = (window.mean, window.var, *others)
    for one in (*gates.tensors(), *others):
        if one is not None and (type(one) not in _PLAIN or one.is_neg()):
            return False
    return True


def _alike(x: torch.Tensor, gates: Gates) -> bool:
    """Whether map and gates are of one type, or mixed precision is on purpose: else PyTorch has to object."""
    dtype = x.dtype
    for one in gates.tensors():
        if one is not None and one.dtype is not dtype:
            return torch.is_autocast_enabled(x.device.type)
    return True
