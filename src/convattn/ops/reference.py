"""Attention in plain PyTorch: the truth.

Global pooling is `mean` and `amax`: deterministic on every device, exportable, and free of the NaN that adaptive
pooling gave under mixed precision with channels_last. `amax` shares the gradient between equal maxima.
"""

import torch

from convattn.errors import InvalidOption

POOLS = ("mean", "max", "l2", "logsumexp")


def squeeze(x: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool a map (B, C, *spatial) to (B, C).

    `l2` is the square root of the sum of squares and `logsumexp` the logarithm of the sum of exponentials over all
    positions, as in the official CBAM code: sums, not means.
    """
    dims = list(range(2, x.dim()))
    if pool == "mean":
        return x.mean(dim=dims)
    if pool == "max":
        return x.amax(dim=dims)
    if pool == "l2":
        return torch.linalg.vector_norm(x, dim=dims)  # type: ignore[no-any-return]
    if pool == "logsumexp":
        return torch.logsumexp(x, dim=dims)
    raise InvalidOption(f"squeeze: pool must be one of mean, max, l2, logsumexp, got {pool}.")


def mean_max(x: torch.Tensor) -> torch.Tensor:
    """Pool a map (B, C, *spatial) to (B, 2C): the means, then the maxima."""
    return torch.cat([squeeze(x, "mean"), squeeze(x, "max")], dim=1)


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
    return x * blend(gate, strength).to(x.dtype)
