"""The arithmetic of attention as functions of tensors.

`reference` is the truth that every other backend must meet; `backends` chooses, and `use` asks for one.
"""

from convattn.ops.backends import choice, follow, gated, mean_max, normed, takes_norms, use
from convattn.ops.gates import Gates, Mlp, Norm, Window
from convattn.ops.reference import POOLS, apply_gate, blend, broadcast, spatial_summary, squeeze

__all__ = [
    "POOLS",
    "Gates",
    "Mlp",
    "Norm",
    "Window",
    "apply_gate",
    "blend",
    "broadcast",
    "choice",
    "follow",
    "gated",
    "mean_max",
    "normed",
    "spatial_summary",
    "squeeze",
    "takes_norms",
    "use",
]
