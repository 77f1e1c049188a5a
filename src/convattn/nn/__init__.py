"""The modules, one paper a file: by hand in any network, or put into an existing one by `convattn.attach`."""

from convattn.nn.base import Gate, Head, Update
from convattn.nn.cbam import CBAM, ChannelAttention, SpatialAttention
from convattn.nn.dual_pool import DualPool
from convattn.nn.pooling import AvgMaxPool, AvgPool, ConcatPool, MaxPool
from convattn.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "AvgMaxPool",
    "AvgPool",
    "CBAM",
    "ChannelAttention",
    "ConcatPool",
    "DualPool",
    "Gate",
    "Head",
    "MaxPool",
    "SpatialAttention",
    "SqueezeExcite",
    "Update",
]
