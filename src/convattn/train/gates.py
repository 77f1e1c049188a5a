"""How far the gates of a trained network have left identity."""

from typing import Any

import torch
from torch import nn

from convattn.attachment import Attached, attached, effects

# enough to tell whether a gate does anything
IMAGES = 128


def departures(network: nn.Module, x: torch.Tensor) -> list[dict[str, Any]]:
    """For each site its mean distance from identity on some images, and its `strength` (None if it has none).

    For a gate that is the mean of |gate - 1| over what it varies over, the mean of all for a gate of several factors;
    for a pooling head the length of what it adds over the length of the pooled vector, for any other module the same of
    the map.
    """
    sites = attached(network)
    if not sites:
        return []
    seen: dict[str, float] = {}
    handles = [wrapper.attention.register_forward_hook(_recorder(name, seen)) for name, wrapper in sites]
    network.eval()
    try:
        with torch.no_grad():
            network(x[:IMAGES].to(next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return [
        {
            "site": name,
            "place": wrapper.convattn_site.place,
            "departure": seen[name],
            "strength": _strength(wrapper),
        }
        for name, wrapper in sites
    ]


def _strength(wrapper: Attached) -> float | None:
    strength = getattr(wrapper.attention, "strength", None)
    return strength.item() if isinstance(strength, torch.Tensor) else None


def _recorder(name: str, seen: dict[str, float]) -> Any:
    def record(attention: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if effects.has_gates(attention):
            gates = effects.gates(attention, args[0]).values()
            seen[name] = float(torch.stack([(gate - 1).abs().mean() for gate in gates]).mean())
        else:
            # of a head the pooled vector, of other modules the map
            before = args[-1]
            seen[name] = float((output - before).norm() / before.norm())

    return record
