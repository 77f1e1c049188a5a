"""What attention does to a map: the gates that it multiplies with, or what it adds."""

from math import prod

import torch
from torch import nn

from convattn.attachment.wrapper import Blended
from convattn.nn.base import Gate, Update, aligned


def has_gates(attention: nn.Module) -> bool:
    """Whether attention multiplies a map with gates that it can name."""
    one = attention.module if isinstance(attention, Blended) else attention
    # whoever has a forward alone has no gate to show
    return isinstance(one, Gate) and not (type(one).gate is Gate.gate and type(one).gates is Gate.gates)


def gates(attention: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gates by name, as applied, each with as many dimensions as the map, and 1 where it does not vary.

    A gate may vary over groups of channels; its second dimension is then their number.
    """
    if not isinstance(attention, Blended):
        return {name: aligned(gate, x) for name, gate in attention.gates(x).items()}  # type: ignore[operator]
    found = gates(attention.module, x)
    strength = attention.strength
    if strength is None:
        return found
    # blended from outside as a whole: with several gates, only their product is blended
    first, *rest = found.values()
    whole = prod((per_channel(gate, x) for gate in rest), start=per_channel(first, x) if rest else first)
    return {" and ".join(found): 1 + strength * torch.nan_to_num(whole - 1)}


def added(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What attention adds to a map, as applied, with as many dimensions as the map.

    Of a module that is neither a gate nor an update, it is the difference that it makes.
    """
    inner = attention.module if isinstance(attention, Blended) else attention
    if not isinstance(inner, Update) or type(inner).update is Update.update:
        return attention(x) - x  # type: ignore[no-any-return]
    update, strength = aligned(inner.added(x), x), attention.strength
    return update if inner is attention or not isinstance(strength, torch.Tensor) else strength * update


def per_channel(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate of groups of channels as one of channels."""
    groups = gate.shape[1]
    return gate if groups in (1, x.shape[1]) else gate.repeat_interleave(x.shape[1] // groups, dim=1)
