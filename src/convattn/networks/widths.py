"""The option of a network that sets its width, and the value at which it has a given number of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from convattn.errors import InvalidOption

Build = Callable[[Mapping[str, Any]], nn.Module]
Width = float | int | tuple[int, ...]

# by source, each with the value that leaves a network as it is; where that does not hold, the option is not taken
OPTIONS: dict[str, tuple[tuple[str, Width], ...]] = {
    "own": (("width", 1.0),),
    "timm": (("width_factor", 1.0), ("channels", (64, 128, 256, 512)), ("base_width", 64), ("growth_rate", 32)),
    "torchvision": (("width_mult", 1.0), ("width_per_group", 64)),
}
# beyond this a network is another one
MOST = 16.0
# finer than a channel of any stage
STEP = 1e-3


def options(name: str, source: str, build: Build, parameters: int) -> dict[str, Width]:
    """The option with which a network has the number of parameters nearest to `parameters`, and more than without it.

    Raises:
        InvalidOption: the network has no such option, or that many parameters already.
    """
    with torch.random.fork_rng(devices=[]):
        plain = count(build({}))
        if parameters <= plain:
            raise InvalidOption(f"{name} has {plain:,} parameters already: {parameters:,} are not more.")
        option, normal = _option(name, OPTIONS.get(source, ()), build, plain)
        counts: dict[Width, int] = {}

        def counted(factor: float) -> int:
            value = scaled(normal, factor)
            if value not in counts:
                counts[value] = count(build({option: value}))
            return counts[value]

        low, high = 1.0, 1.0 + STEP
        while counted(high) < parameters:
            low, high = high, 1 + 2 * (high - 1)
            if high > MOST:
                raise InvalidOption(f"{name} reaches {counted(low):,} parameters by width, not {parameters:,}.")
        while high - low > STEP:
            middle = (low + high) / 2
            low, high = (middle, high) if counted(middle) < parameters else (low, middle)
    wider = [value for value in counts if counts[value] > plain]
    return {option: min(wider, key=lambda value: abs(counts[value] - parameters))}


def scaled(normal: Width, factor: float) -> Width:
    """A width times a factor, whole where it was whole."""
    if isinstance(normal, tuple):
        return tuple(round(one * factor) for one in normal)
    return round(normal * factor) if isinstance(normal, int) else normal * factor


def count(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def _option(name: str, candidates: tuple[tuple[str, Width], ...], build: Build, plain: int) -> tuple[str, Width]:
    for option, normal in candidates:
        try:
            same, double = (count(build({option: scaled(normal, factor)})) for factor in (1.0, 2.0))
        except Exception:
            # networks answer an option that they do not have as they like
            continue
        if same == plain < double:
            return option, normal
    raise InvalidOption(f"{name} has no option for its width (tried: {', '.join(option for option, _ in candidates)}).")
