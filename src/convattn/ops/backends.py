"""Who computes: the fused operators where they serve, else plain PyTorch, which is the truth.

The choice depends on the tensor and on what PyTorch is doing, and on nothing else. Under torch.compile and torch.export
it is plain PyTorch, which the compiler fuses itself; so it is under torch.func, dispatch modes and tracing, which see
operators of PyTorch only.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.autograd import forward_ad

from convattn.errors import BackendUnavailable, InvalidOption
from convattn.ops import cpu, reference

# for whoever wants the other one everywhere
VARIABLE = "CONVATTN_BACKEND"
REFERENCE, CPU = "reference", "cpu"
NAMES = (REFERENCE, CPU)
_asked: list[str | None] = []


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
    wanted = asked()
    if wanted == REFERENCE:
        return REFERENCE
    why = why_not_cpu(x)
    if why is None:
        return CPU
    if wanted == CPU:
        raise BackendUnavailable(f"The backend cpu does not serve this: {why}. The backend reference does.")
    return REFERENCE


def asked() -> str | None:
    """The backend that was asked for, by `use` or by the environment variable CONVATTN_BACKEND; None for none."""
    wanted = _asked[-1] if _asked else os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in NAMES:
        raise InvalidOption(f"{VARIABLE}: expected one of {', '.join(NAMES)}, got {wanted!r}.")
    return wanted


def why_not_cpu(x: torch.Tensor) -> str | None:
    """Why the fused operators on the CPU do not serve a map now; None where they do."""
    return _watched(x) or cpu.why_not_for(x)


def _watched(x: torch.Tensor) -> str | None:
    """What wants to see every operator, so that PyTorch's own have to be there."""
    if torch.compiler.is_compiling():
        return "a compiler or exporter reads along"
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"it is for plain tensors, not for {type(x).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the call"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode reads along"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "it is traced"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return None


def convolved(summary: torch.Tensor, conv: torch.nn.Module) -> torch.Tensor:
    """What a layer makes of a summary (B, 2, *spatial), by the fused operators where they compute the same."""
    if summary.dtype is torch.float32 and choice(summary) == CPU and cpu.convolves(summary, conv):
        if torch.is_grad_enabled():
            return cpu.Convolution.apply(summary, conv.weight)  # type: ignore[no-any-return]
        return cpu.convolved(summary, conv.weight)  # type: ignore[arg-type]
    return conv(summary)  # type: ignore[no-any-return]


def gated(
    x: torch.Tensor,
    *,
    channel: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
    spatial: Callable[[torch.Tensor], torch.Tensor] | None = None,
    pools: tuple[str, ...] = ("mean", "max"),
    strength: torch.Tensor | None = None,
    parallel: bool = False,
    dimensions: int = 2,
) -> torch.Tensor:
    """A map times a channel gate, times a spatial gate: see `reference.gated`, the truth of every backend."""
    # other pools are rare, and have no kernels
    fused = set(pools) <= {"mean", "max"} and choice(x) == CPU
    compute = cpu.gated if fused else reference.gated
    return compute(x, pools, channel, spatial, strength, parallel, dimensions)
