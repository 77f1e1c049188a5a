"""The kernels of `kernels.py`, in Triton, as `fused` asks for them.

Tested in Triton's interpreter, and not measured on a GPU yet: they serve only where they are asked for, by
`ops.use("cuda")` or CONVATTN_BACKEND=cuda.
"""

import importlib.util
from typing import Any

import torch

from convattn.ops import between
from convattn.ops.gates import Gates, Kept, Mlp, Window

Tensor = torch.Tensor
Maybe = Any
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# enough for a GPU to be busy
PROGRAMS = 512


def why_not_for(x: Tensor) -> str | None:
    """Why a map is not served; None where it is."""
    if x.device.type != "cuda":
        return f"it is for maps on a CUDA device, not on {x.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "it takes the package triton"
    if x.dtype not in DTYPES:
        return f"it is for float32, float16 and bfloat16, not for {str(x.dtype).removeprefix('torch.')}"
    return "the map is empty" if x.numel() == 0 else None


class Kernels:
    """See `gates.Kernels`. Where maxima are is asked of the map again; what is kept is in how many places each is."""

    def __init__(self, x: Tensor) -> None:
        # imported where it is needed: it takes time, and is not there for every system
        from convattn.ops.cuda import kernels

        self.kernels = kernels
        self.batch, self.channels = x.shape[:2]
        self.positions = x.shape[2:]
        count = x.numel() // (self.batch * self.channels)
        last = not x.is_contiguous()
        # the sides of a block: the longer one along what lies together in memory
        self.sides = {"BLOCK_C": 64, "BLOCK_N": 16} if last else {"BLOCK_C": 8, "BLOCK_N": 128}
        self.shape = (self.channels, count, *((1, self.channels) if last else (count, 1)))
        self.blocks_c, self.blocks_n = -(-self.channels // self.sides["BLOCK_C"]), -(-count // self.sides["BLOCK_N"])

    def at_once(self, x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe) -> None:
        """There is no such pass."""

    def grad_at_once(self, x: Tensor, dy: Tensor, gates: Gates, strength: Maybe, kept: Kept, needs_map: bool) -> None:
        """There is no such pass."""

    def pool(self, x: Tensor, mean: bool, maximum: bool) -> Tensor:
        """Means and maxima over positions (pools, B, C)."""
        found = self._small(2, self.batch, self.channels, like=x)
        self.kernels.pool[self.blocks_c, self.batch](x, found[0], found[1], *self.shape, **self.sides)
        return found if mean and maximum else found[:1] if mean else found[1:]

    def mlp(self, mlp: Mlp, pooled: Tensor) -> tuple[Tensor, Kept]:
        """The channel gate (B, C) of poolings, and what is kept."""
        return between.mlp(mlp, pooled)

    def grad_mlp(self, mlp: Mlp, kept: Kept, dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Gradients of the poolings, and of the weights and biases."""
        return between.grad_mlp(mlp, kept, dgate)

    def summarise(self, x: Tensor, channel: Maybe) -> Tensor:
        """Means and maxima over channels (2, B, *spatial)."""
        found = self._small(2, self.batch, *self.positions, like=x)
        grid = self.blocks_n, self.batch
        gated = {"GATED": channel is not None}
        self.kernels.summarise[grid](x, _or(channel, x), found[0], found[1], *self.shape, **gated, **self.sides)
        return found

    def apply(self, x: Tensor, channel: Maybe, spatial: Maybe, shortcut: Maybe) -> Tensor:
        """The map times its gates; with a shortcut relu(that + shortcut)."""
        y = torch.empty_like(x)
        there = {"CHANNEL": channel is not None, "SPATIAL": spatial is not None, "SHORTCUT": shortcut is not None}
        given = (x, _or(channel, x), _or(spatial, x), _or(shortcut, x), y)
        self.kernels.apply[self.blocks_n, self.blocks_c, self.batch](*given, *self.shape, **there, **self.sides)
        return y

    def grad_gates(
        self, x: Tensor, dy: Tensor, channel: Maybe, spatial: Maybe, maximum: Maybe, gated: bool
    ) -> tuple[Maybe, Maybe, Maybe]:
        """Gradients of the gates, and in how many places the given maxima over channels are."""
        # a part of each sum from each block, then their sum: the same in every run
        by_channel = self._small(self.batch, self.blocks_n, self.channels, like=x)
        groups = min(self.blocks_c, -(-PROGRAMS // (self.batch * self.blocks_n)))
        by_place = self._small(2, self.batch, groups, self.shape[1], like=x)
        there = {"CHANNEL": channel is not None, "SPATIAL": spatial is not None, "GATED": gated}
        given = (x, dy, _or(channel, x), _or(spatial, x), _or(maximum, x), by_channel, by_place[0], by_place[1])
        self.kernels.grad_gates[self.blocks_n, groups, self.batch](
            *given, *self.shape, groups, self.blocks_n, **there, COUNT=maximum is not None, **self.sides
        )
        return (
            None if channel is None else by_channel.sum(1),
            None if spatial is None else by_place[0].sum(1).view(spatial.shape),
            None if maximum is None else by_place[1].sum(1).view(maximum.shape),
        )

    def grad_summary(
        self, x: Tensor, channel: Maybe, summary: tuple[Maybe, ...], maximum: Maybe, dchannel: Maybe
    ) -> tuple[Maybe, Maybe]:
        """Add to the gradient of the channel gate what comes by the summary; count the maxima over positions."""
        seen, dmean, dmax, places = summary
        count = None if maximum is None else torch.empty_like(maximum)
        share = None if places is None else dmax / places
        mean = None if dmean is None else dmean / self.channels
        there = {"SUMMARY": seen is not None, "GATED": channel is not None, "COUNT": maximum is not None}
        given = (x, *(_or(one, x) for one in (channel, seen, mean, share, maximum, dchannel, count)))
        self.kernels.grad_summary[self.blocks_c, self.batch](*given, *self.shape, **there, **self.sides)
        return count, None

    def grad_input(
        self,
        x: Tensor,
        dy: Maybe,
        channel: Maybe,
        spatial: Maybe,
        summary: tuple[Maybe, ...],
        pools: tuple[Maybe, ...],
        through: Maybe = None,
    ) -> Tensor:
        """The gradient of the map."""
        dx = torch.empty_like(x)
        seen, dmean, dmax, places = summary
        top, dpmean, dpmax, counts = pools
        mean, share = (None, None) if seen is None else (dmean / self.channels, dmax / places)
        pooled = None if dpmean is None else dpmean / self.shape[1]
        pool_share = None if dpmax is None else dpmax / counts
        there = {
            "GIVEN": dy is not None,
            "CHANNEL": channel is not None,
            "SPATIAL": spatial is not None,
            "SUMMARY": seen is not None,
            "POOL_MEAN": pooled is not None,
            "POOL_MAX": pool_share is not None,
        }
        small = (dy, channel, spatial, seen, mean, share, top, pooled, pool_share)
        given = (x, *(_or(one, x) for one in small), dx)
        self.kernels.grad_input[self.blocks_n, self.blocks_c, self.batch](*given, *self.shape, **there, **self.sides)
        return dx

    def window(self, planes: Tensor, window: Window, strength: Maybe) -> tuple[Tensor, Tensor, Maybe]:
        """The spatial gate, the logits behind the convolution, and their moments in training."""
        return between.window(planes, window, strength)

    def grad_window(
        self, planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the planes, of the weight, and of norm weight, norm bias and strength together (3)."""
        return between.grad_window(planes, window, strength, kept, dgate)

    def _small(self, *sizes: int, like: Tensor) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=like.device)


def _or(one: Maybe, other: Tensor) -> Tensor:
    """A tensor for a place that is not read where there is none."""
    return other if one is None else one
