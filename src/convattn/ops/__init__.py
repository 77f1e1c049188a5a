"""The arithmetic of attention as functions of tensors. `reference` is the truth that every other backend must meet."""

import torch.fx

from convattn.ops.reference import POOLS, apply_gate, blend, broadcast, mean_max, spatial_summary, squeeze

# the number of dimensions is unknown to a symbolic trace
torch.fx.wrap("squeeze")
torch.fx.wrap("mean_max")

__all__ = ["POOLS", "apply_gate", "blend", "broadcast", "mean_max", "spatial_summary", "squeeze"]
