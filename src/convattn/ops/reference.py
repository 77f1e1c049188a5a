"""Attention in plain PyTorch: the truth.

Global pooling is `mean` and `amax`: deterministic on every device, exportable, and free of the NaN that adaptive
pooling gave under mixed precision with channels_last. `amax` shares the gradient between equal maxima.
"""

from collections.abc import Callable

import torch

from convattn.errors import InvalidOption

POOLS = ("mean", "max", "l2", "logsumexp")


def squeeze(x: torch.Tensor, pool: str, dimensions: int | None = None) -> torch.Tensor:
    """Pool a map (B, C, *spatial) to (B, C); a symbolic trace has to be told the number of spatial dimensions.

    `l2` is the square root of the sum of squares and `logsumexp` the logarithm of the sum of exponentials over all
    positions, as in the official CBAM code: sums, not means.
    """
    dims = list(range(2, x.dim() if dimensions is None else 2 + dimensions))
    if pool == "mean":
        # quantised maps of one position keep their memory format only with all dimensions
        return x.mean(dim=dims, keepdim=True).flatten(1)
    if pool == "max":
        return x.amax(dim=dims)
    if pool == "l2":
        return torch.linalg.vector_norm(x, dim=dims)  # type: ignore[no-any-return]
    if pool == "logsumexp":
        return torch.logsumexp(x, dim=dims)
    raise InvalidOption(f"squeeze: pool must be one of mean, max, l2, logsumexp, got {pool}.")


def mean_max(x: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
    """Pool a map (B, C, *spatial) to (B, 2C): the means, then the maxima."""
    return torch.cat([squeeze(x, "mean", dimensions), squeeze(x, "max", dimensions)], dim=1)


def spatial_summary(x: torch.Tensor) -> torch.Tensor:
    """Summarise a map (B, C, *spatial) over its channels to (B, 2, *spatial): the mean, then the maximum."""
    return torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)


def broadcast(gate: torch.Tensor, spatial: int) -> torch.Tensor:
    """Give a channel gate (B, C) that many trailing dimensions of size 1."""
    for _ in range(spatial):
        gate = gate.unsqueeze(-1)
    return gate


def blend(gate: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
    """The gate between none and all of itself: 1 + strength * (gate - 1); the gate where there is no strength.

    Where the pooling of finite values overflowed and the gate is no number, it counts as 1, so that strength 0 changes
    nothing there either.
    """
    return gate if strength is None else 1 + strength * torch.nan_to_num(gate - 1)


def apply_gate(x: torch.Tensor, gate: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply a map with a (blended) gate, in the dtype of the map."""
    return x * blend(gate, strength).type_as(x)


def gated(
    x: torch.Tensor,
    pools: tuple[str, ...],
    channel: Callable[[list[torch.Tensor]], torch.Tensor] | None,
    spatial: Callable[[torch.Tensor], torch.Tensor] | None,
    strength: torch.Tensor | None,
    parallel: bool,
    dimensions: int,
    shortcut: torch.Tensor | None = None,
) -> torch.Tensor:
    """A map times a channel gate, times a spatial gate, either of which may be absent.

    y = x * c, c = channel(pools of x);  z = y * s, s = spatial(summary of y);  with a shortcut relu(z + shortcut)

    Args:
        x: the map (B, C, *spatial).
        pools: what the channel gate is computed from, see `squeeze`.
        channel: from the list of poolings, each (B, C), to the gate (B, C).
        spatial: from the summary (B, 2, *spatial), see `spatial_summary`, to the gate (B, 1, *spatial).
        strength: see `blend`.
        parallel: the spatial gate is computed from x instead of y.
        dimensions: spatial dimensions of the map.
        shortcut: what a residual block adds before its last activation, a map as x.
    """
    y = x
    if channel is not None:
        gate = channel([squeeze(x, pool, dimensions) for pool in pools])
        y = apply_gate(x, broadcast(gate, dimensions), strength)
    if spatial is not None:
        y = apply_gate(y, spatial(spatial_summary(x if parallel else y)), strength)
    return y if shortcut is None else torch.relu(y + shortcut)
