"""The arithmetic of attention as functions of tensors. `reference` is the truth that every other backend must meet."""

from convattn.ops.reference import POOLS, apply_gate, blend, broadcast, mean_max, spatial_summary, squeeze

__all__ = ["POOLS", "apply_gate", "blend", "broadcast", "mean_max", "spatial_summary", "squeeze"]
