"""The modules, one paper a file. Each works by hand in any network; `convattn.attach` puts them into an existing one."""

from convattn.nn.base import Gate, Head
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
]
