"""How far gates move over what they see: random maps of all magnitudes, or the images of a user."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from convattn.attachment import effects
from convattn.attachment.plans import Site
from convattn.attachment.wrapper import Attached

# a gate is constant if it is so for maps of all these magnitudes, each in several directions and their opposites
SCALES = (0.0, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e9, 1e12)
PROBES = 8
# positions of a probe in each dimension at most: whether a gate is constant does not depend on them
PROBE_SIDE = 8


@dataclass
class Movement:
    """A gate over inputs: for each channel its mean and its extremes."""

    mean: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def deviation(self) -> float:
        """The largest distance of the gate from its mean."""
        return float(torch.maximum(self.high - self.mean, self.mean - self.low).max())


class _Collector:
    """Adds up the gates of one site."""

    def __init__(self) -> None:
        self.sum: torch.Tensor = torch.zeros(())
        self.count = 0
        self.low: torch.Tensor = torch.zeros(())
        self.high: torch.Tensor = torch.zeros(())

    def add(self, gates: dict[str, torch.Tensor], x: torch.Tensor) -> None:
        """The gates of a batch of maps."""
        whole = torch.ones((), dtype=torch.float64)
        low, high = whole, whole
        for gate in _separate([effects.per_channel(gate, x).detach().double().cpu() for gate in gates.values()]):
            flat = gate.flatten(2)
            whole = whole * flat.mean(2).unsqueeze(-1)
            # of a product the extremes are among the products of extremes
            corners = torch.stack([low * flat.amin(2), low * flat.amax(2), high * flat.amin(2), high * flat.amax(2)])
            low, high = corners.amin(0), corners.amax(0)
        mean = whole.squeeze(-1)
        if self.count == 0:
            self.sum, self.low, self.high = torch.zeros(mean.shape[1:]).double(), low.amin(0), high.amax(0)
        self.sum = self.sum + mean.sum(0)
        self.count += len(mean)
        self.low, self.high = torch.minimum(self.low, low.amin(0)), torch.maximum(self.high, high.amax(0))

    @property
    def movement(self) -> Movement:
        return Movement(self.sum / self.count, self.low, self.high)


def _separate(gates: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gates of which no two vary over the same axis, as others are multiplied out: means and extremes then multiply."""
    shapes = [[size > 1 for size in gate.shape[1:]] for gate in gates]
    shared = any(sum(axes) > 1 for axes in zip(*shapes, strict=True))
    # positions are averaged together, so that two of their axes are as one
    positions = sum(any(axes[1:]) for axes in shapes)
    return [prod(gates[1:], start=gates[0])] if shared or positions > 1 else gates


def over_probes(sites: Mapping[str, Attached]) -> dict[str, Movement]:
    """How the gates move over random maps of all magnitudes."""
    found = {}
    for name, wrapper in sites.items():
        if effects.has_gates(wrapper.attention):
            gate = copy.deepcopy(wrapper.attention).cpu().double().eval()
            collector = _Collector()
            with torch.no_grad():
                for probe in _probes(gate, wrapper.convattn_site):
                    collector.add(effects.gates(gate, probe), probe)
            found[name] = collector.movement
    return found


def _probes(gate: nn.Module, site: Site) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (PROBES, site.channels, *_sides(gate, site))
    for scale in SCALES:
        # each channel with a level of its own: of zero-mean maps every mean would be nearly 0
        level = torch.randn(*shape[:2], *[1] * len(site.size), generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        probe = scale * (level + noise)
        # in two batches: in one the mean over the batch would be 0 at all magnitudes
        yield probe
        yield -probe


def _sides(gate: nn.Module, site: Site) -> tuple[int, ...]:
    small = tuple(min(side, PROBE_SIDE) for side in site.size)
    try:
        effects.gates(gate, torch.zeros(1, site.channels, *small, dtype=torch.float64))
    except Exception:
        # a module of the user's own may hold a number for each position
        return site.size
    return small


def over_images(sites: Mapping[str, Attached], run: Callable[[], object]) -> dict[str, Movement]:
    """How the gates move over the images on which the network is run."""
    collectors = {name: _Collector() for name, one in sites.items() if effects.has_gates(one.attention)}

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            collectors[name].add(effects.gates(module, args[0]), args[0])

        return hook

    with ExitStack() as handles:
        for name in collectors:
            handles.callback(sites[name].attention.register_forward_pre_hook(keep(name)).remove)
        run()
    return {name: collector.movement for name, collector in collectors.items() if collector.count}
