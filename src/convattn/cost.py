"""What a module costs: parameters, multiply-adds, time and memory.

Multiply-adds alone mislead: attention adds next to none and yet slows a network, since its cost is memory traffic.
Time is therefore always shown beside them, measured in turn with what it is compared to.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# of the quartiles of a ratio; beside one other process on two cores they are within 1.09, on a busy machine beyond 2
UNCLEAR = 1.25


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements with their lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def is_clear(self) -> bool:
        """Whether the middle half of the measurements agree, as they do on a machine that does nothing else."""
        return self.high <= UNCLEAR * self.low

    def rate(self, amount: float) -> "Spread":
        """So much in each of these: what took longest is the lowest rate."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Cost:
    """The cost of one module for one input: latency of inference, bytes of activations kept for the backward pass."""

    parameters: int
    multiply_adds: int
    latency_ms: Spread
    saved_bytes: int


def measure(module: nn.Module, example: torch.Tensor, *, repeats: int = 10) -> Cost:
    """The cost of a module for an input.

    Example:
        >>> from convattn.nn import SqueezeExcite
        >>> measure(SqueezeExcite(64), torch.randn(1, 64, 8, 8)).parameters
        512
    """
    latency, _ = interleaved({"module": lambda: _output(module, example)}, repeats=repeats)
    return Cost(parameters(module), multiply_adds(module, example), latency["module"], saved_bytes(module, example))


def parameters(module: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of convolutions and matrix products in one inference; products with a gate count as nothing."""
    return counted(module, *inputs)[1]


def counted(module: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What a module gives in eval mode and without gradients, and the multiply-adds of that."""
    with _Counter() as counter:
        y = _output(module, *inputs)
    return y, int(counter.operations) // 2


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations, without importing PyTorch's compiler as its own counter does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.operations += int(flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


def saved_bytes(module: nn.Module, example: torch.Tensor) -> int:
    """Bytes of activations that one forward pass keeps for its backward pass, parameters and the input left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), example)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), torch.random.fork_rng(), hooks:
        # the output keeps its graph, and with it every counted storage, alive until the sum is taken
        output = module(example)
        total = sum(kept.values())
    del output
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return total


def peak_bytes(step: Callable[[], object], device: torch.device | None = None) -> int:
    """The most memory that a step holds at a time, beyond what is held when it begins.

    On CUDA by the allocator's own count. Elsewhere the bytes of the tensors that the step makes: the same in every
    run, without what a kernel takes for itself while it works (3 % more in a training step of ResNet-20).

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000))
        12000
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Holdings() as holdings:
        step()
    return int(holdings.peak)


class _Holdings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of new tensors for as long as their storage lives.

    No profiler: it counts the workspaces of kernels too, and writes to stderr on machines without its drivers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # what is changed in place or looked at was there before
        there = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in there and key not in self.held:
                self.held[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, key)
        self.peak = max(self.peak, self.now)
        return result

    def _release(self, key: int) -> None:
        self.now -= self.held.pop(key)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    seconds: float = 60.0,
    device: torch.device | None = None,
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Time several steps in turn: see `rounds` for the arguments.

    Returns:
        Milliseconds of each step, and the ratio of each step to the first, round by round.
    """
    times = rounds(steps, repeats=repeats, seconds=seconds, device=device)
    first = times[next(iter(times))]
    ratios = {name: [value / base for value, base in zip(values, first, strict=True)] for name, values in times.items()}
    return (
        {name: Spread.of(values) for name, values in times.items()},
        {name: Spread.of(values) for name, values in ratios.items()},
    )


def rounds(
    steps: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    seconds: float = 60.0,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Time several steps in turn, so that whatever disturbs the machine disturbs all of them.

    From round to round the order is turned by one place or reversed, so that none is always the first, nor always
    behind the same one, whose data then fill the caches.

    Args:
        steps: what to time, by name; each is called once before the first round.
        repeats: rounds at most.
        seconds: no round is begun after this time, but for the first three.
        device: on CUDA the time is that of events in the device's queue; None for the CPU.

    Returns:
        Milliseconds of each step in each round.
    """
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for done in range(max(3, repeats)):
        if done >= 3 and time.perf_counter() - begun > seconds:
            break
        for name in _order(list(steps), done):
            times[name].append(_milliseconds(steps[name], device))
    return times


def _order(names: list[str], turn: int) -> list[str]:
    first = turn // 2 % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if turn % 2 else turned


def _milliseconds(step: Callable[[], object], device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        return _milliseconds_of_events(step, device)
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def _milliseconds_of_events(step: Callable[[], object], device: torch.device) -> float:
    """The time between two marks in the queue of a CUDA device, by its own clock."""
    with torch.cuda.device(device):
        # a queue that is empty at the first mark: nothing of the step before is counted
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def _output(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            return module.eval()(*inputs)  # type: ignore[no-any-return]
    finally:
        for part, mode in modes.items():
            part.training = mode
