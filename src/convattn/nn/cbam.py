"""Convolutional block attention (Woo et al., 2018): its channel half, its spatial half, and both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from convattn import checks, ops
from convattn.errors import InvalidOption, ShapeMismatch
from convattn.nn.base import ACTIVATIONS, Gate, described, described_norm, follow, held, hidden_width, plain
from convattn.registry import register

ORDERS = ("channel-spatial", "spatial-channel", "parallel")
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_CONVOLUTIONS = frozenset(CONVOLUTIONS.values())


def _is_window(conv: Any) -> bool:
    """Whether a layer is the convolution that the fused operators know."""
    if type(conv) not in _CONVOLUTIONS or not plain(conv):
        return False
    width, dimensions = conv.kernel_size[0], len(conv.kernel_size)
    return bool(
        width % 2 == 1
        and conv.kernel_size == (width,) * dimensions
        and conv.padding == (width // 2,) * dimensions
        and conv.stride == conv.dilation == (1,) * dimensions
        and (conv.in_channels, conv.out_channels, conv.groups) == (2, 1, 1)
        and conv.padding_mode == "zeros"
        and held(conv, "bias") is None
    )


@register("channel", "gate")
class ChannelAttention(Gate):
    """Gate each channel by one shared MLP over several global poolings.

    gate = sigmoid(sum over pools of MLP(pool(x))),  y = x * gate

    Shape:
        x: (B, C, *spatial), gate: (B, C, 1, ...), y as x.

    Cost:
        2 C hidden + hidden + C parameters; one reduction of the map for each pool, one product with it.

    Paper:
        Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon: CBAM: Convolutional Block Attention Module,
        ECCV 2018, arXiv:1807.06521, equation 2.

    Differs from the paper:
        The paper writes the MLP without biases; the authors' code has them, and so has the default here
        (`bias=False` for the paper's equation). The pools `l2` and `logsumexp` are in their code only.

    Args:
        channels: channels of the map.
        reduction: hidden width is channels // reduction, at least 1.
        hidden: the hidden width itself, instead of `reduction`.
        pools: any of `"mean"`, `"max"`, `"l2"` (root of the sum of squares) and `"logsumexp"`.
        bias: biases in both linear layers.
        activation: between the linear layers, `"relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength` that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `gate`, a map of another shape.

    Example:
        >>> import torch
        >>> ChannelAttention(64).gate(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 1, 1])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden: int | None = None,
        pools: Sequence[str] = ("mean", "max"),
        bias: bool = True,
        activation: str = "relu",
        dimensions: int = 2,
        start: str = "paper",
    ) -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        checks.choice("ChannelAttention", "activation", activation, ACTIVATIONS)
        if not isinstance(pools, list | tuple) or not pools or any(pools.count(pool) > 1 for pool in pools):
            raise InvalidOption(
                f"ChannelAttention: pools must be a sequence of different names out of {', '.join(ops.POOLS)}, "
                f"got {pools!r}."
            )
        for pool in pools:
            checks.choice("ChannelAttention", "each of pools", pool, ops.POOLS)
        width = hidden_width("ChannelAttention", channels, reduction, hidden)
        self.pools = tuple(pools)
        self.fc1 = nn.Linear(channels, width, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(width, channels, bias=bias)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The channel gate (B, C, 1, ...)."""
        self.check(x)
        return ops.broadcast(
            self.of_pools([ops.squeeze(x, pool, self.dimensions) for pool in self.pools]), self.dimensions
        )

    def of_pools(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        """The gate (B, C) from poolings of the map, each (B, C)."""
        if not is_scripting():
            if isinstance(pooled[0], torch.fx.Proxy):
                # a trace says what the paper says: whoever quantises it finds a range for each pooling
                logits, *others = [self.fc2(self.activation(self.fc1(one))) for one in pooled]
                for one in others:
                    logits = logits + one
                return torch.sigmoid(logits)
        hidden = self.activation(self.fc1(torch.stack(pooled)))  # [pools, B, hidden]
        if not is_scripting():
            if type(self.fc2) is nn.Linear:
                # the sum of what a linear layer makes of two is what it makes of their sum, but for the bias
                logits = self.fc2(hidden.sum(0))
                bias = self.fc2.bias
                return torch.sigmoid(logits if bias is None else logits + (len(pooled) - 1) * bias)
        return torch.sigmoid(self.fc2(hidden).sum(0))

    def mlp(self) -> ops.Mlp | None:
        """The same as the fused operators take it; None where they have none like it."""
        return described(self.pools, held(self, "fc1"), held(self, "activation"), held(self, "fc2"), "sigmoid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated map, of the shape, dtype and memory format of `x`."""
        if not is_scripting():
            self.check(x)
            mlp = self.mlp()
            return ops.gated(
                x,
                channel=self.of_pools,
                pools=self.pools,
                strength=held(self, "strength"),
                dimensions=self.dimensions,
                gates=None if mlp is None else ops.Gates(mlp, None),
            )[0]
        return ops.apply_gate(x, self.gate(x), self.strength)

    @torch.jit.unused
    def fused(self) -> ops.Gates | None:
        """All of `forward` as the fused operators take it behind a norm; None where they cannot."""
        mlp = self.mlp() if type(self) is ChannelAttention else None
        return None if mlp is None else ops.Gates(mlp, None)


@register("spatial", "gate", takes_channels=False)
class SpatialAttention(Gate):
    """Gate each position by a convolution over the channels' mean and maximum there.

    gate = sigmoid(norm(conv([mean over C; max over C]))),  y = x * gate

    Shape:
        x: (B, C, *spatial), gate: (B, 1, *spatial), y as x.

    Cost:
        2 k^dimensions parameters, with norm 2 more; two reductions of the map over channels, one product with it.

    Paper:
        Woo et al.: CBAM: Convolutional Block Attention Module, ECCV 2018, arXiv:1807.06521, equation 3.

    Differs from the paper:
        The paper has no norm after the convolution; the authors' code has batch norm, and so has the default here
        (`norm=None` for the paper's equation). Their code concatenates (max, mean), their paper and this module
        (mean, max). Their ResNet, not their module, sets the norm's weight to 0 at first, which makes the gate 0.5
        everywhere; this module starts with weight 1.

    Args:
        kernel_size: odd width of the convolution.
        norm: `"batch"` or None.
        norm_momentum: momentum of the batch norm, 0.01 in the authors' code.
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength` that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `gate`, a map of another shape, or in training with batch norm a batch of
            a single position, which has no variance.

    Example:
        >>> import torch
        >>> SpatialAttention(kernel_size=3).gate(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    axis = "spatial"

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        norm: str | None = "batch",
        norm_momentum: float = 0.01,
        dimensions: int = 2,
        start: str = "paper",
    ) -> None:
        super().__init__(channels=None, dimensions=dimensions, start=start)
        checks.positive("SpatialAttention", "kernel_size", kernel_size)
        checks.choice("SpatialAttention", "norm", norm, ("batch", None))
        if kernel_size % 2 == 0:
            raise InvalidOption(f"SpatialAttention: kernel_size must be odd, got {kernel_size}.")
        checks.between("SpatialAttention", "norm_momentum", norm_momentum, 0, 1)
        self.conv = CONVOLUTIONS[dimensions](2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = NORMS[dimensions](1, momentum=norm_momentum) if norm else None

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The spatial gate (B, 1, *spatial)."""
        self.check(x)
        self.check_positions(x)
        return self.of_summary(ops.spatial_summary(x))

    def check_positions(self, x: torch.Tensor) -> None:
        """Raise `ShapeMismatch` where batch norm would be trained on a single position, which has no variance."""
        if not is_scripting():
            # a symbolic trace knows no shapes
            norm = held(self, "norm")
            if norm is None or not norm.training or isinstance(x, torch.fx.Proxy):
                return
            if x.numel() == x.shape[1]:
                raise ShapeMismatch(
                    f"SpatialAttention: batch norm needs more than one position to train on, got a map of shape "
                    f"{tuple(x.shape)}; use a larger batch or map, norm=None, or eval()."
                )

    def of_summary(self, summary: torch.Tensor) -> torch.Tensor:
        """The gate (B, 1, *spatial) from mean and maximum of the map over its channels, (B, 2, *spatial)."""
        logits = self.conv(summary)
        return torch.sigmoid(logits if self.norm is None else self.norm(logits))

    @torch.jit.unused
    def window(self) -> ops.Window | None:
        """The same as the fused operators take it; None where they have none like it."""
        conv, layer = held(self, "conv"), held(self, "norm")
        if not _is_window(conv):
            return None
        if layer is None:
            return ops.Window(held(conv, "weight"))
        norm = described_norm(layer)
        return None if norm is None else ops.Window(held(conv, "weight"), *norm)

    @torch.jit.unused
    def track(self, moments: torch.Tensor | None, count: int) -> None:
        """Let the norm's running mean and variance follow those of so many logits, where it is trained."""
        if moments is not None:
            follow(held(self, "norm"), moments, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated map, of the shape, dtype and memory format of `x`."""
        if not is_scripting():
            self.check(x)
            self.check_positions(x)
            return self.gated(x, held(self, "strength"))
        return ops.apply_gate(x, self.gate(x), self.strength)

    @torch.jit.unused
    def gated(self, x: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
        """The gated map with a strength from elsewhere."""
        window = self.window()
        y, moments = ops.gated(
            x,
            spatial=self.of_summary,
            strength=strength,
            dimensions=self.dimensions,
            gates=None if window is None else ops.Gates(None, window),
        )
        if moments is not None:
            self.track(moments, x.numel() // x.shape[1])
        return y


@register("cbam", "gate")
class CBAM(Gate):
    """Channel attention, then spatial attention.

    y = x * Mc(x),  z = y * Ms(y)

    Shape:
        x: (B, C, *spatial), gate: as x, y as x.

    Cost:
        The parameters of `ChannelAttention` and `SpatialAttention`; four reductions of the map, two products with it.

    Paper:
        Woo et al.: CBAM: Convolutional Block Attention Module, ECCV 2018, arXiv:1807.06521, equation 1; the orders
        are those of its table 3.

    Differs from the paper:
        As `ChannelAttention` and `SpatialAttention` do: biases and batch norm as in the authors' code;
        `bias=False, norm=None` gives the paper's equations. In the order `"parallel"` both gates see x.

    Args:
        channels: channels of the map.
        reduction: hidden width of the channel MLP is channels // reduction, at least 1.
        hidden: the hidden width itself, instead of `reduction`.
        pools: poolings of the channel half: any of `"mean"`, `"max"`, `"l2"`, `"logsumexp"`.
        bias: biases in the channel MLP.
        activation: in the channel MLP, `"relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        kernel_size: odd width of the spatial convolution.
        norm: `"batch"` or None, after the spatial convolution.
        norm_momentum: momentum of the batch norm.
        order: `"channel-spatial"`, `"spatial-channel"` or `"parallel"`.
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength`, shared by both gates, that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `gate`, a map of another shape, or in training with batch norm a batch of
            a single position, which has no variance.

    Example:
        >>> import torch
        >>> CBAM(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden: int | None = None,
        pools: Sequence[str] = ("mean", "max"),
        bias: bool = True,
        activation: str = "relu",
        kernel_size: int = 7,
        norm: str | None = "batch",
        norm_momentum: float = 0.01,
        order: str = "channel-spatial",
        dimensions: int = 2,
        start: str = "paper",
    ) -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        checks.choice("CBAM", "order", order, ORDERS)
        self.order = order
        self.channel = ChannelAttention(
            channels,
            reduction=reduction,
            hidden=hidden,
            pools=pools,
            bias=bias,
            activation=activation,
            dimensions=dimensions,
        )
        self.spatial = SpatialAttention(
            kernel_size=kernel_size, norm=norm, norm_momentum=norm_momentum, dimensions=dimensions
        )

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The paper's gate: the product of both gates, of the shape of `x`."""
        self.check(x)
        if self.order == "spatial-channel":
            spatial = self.spatial.gate(x)
            return spatial * self.channel.gate(ops.apply_gate(x, spatial))
        channel = self.channel.gate(x)
        return channel * self.spatial.gate(x if self.order == "parallel" else ops.apply_gate(x, channel))

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The channel gate (B, C, 1, ...) and the spatial gate (B, 1, *spatial) as `forward` applies them."""
        self.check(x)
        if self.order == "spatial-channel":
            spatial = ops.blend(self.spatial.gate(x), self.strength)
            channel = ops.blend(self.channel.gate(ops.apply_gate(x, spatial)), self.strength)
        else:
            channel = ops.blend(self.channel.gate(x), self.strength)
            seen = x if self.order == "parallel" else ops.apply_gate(x, channel)
            spatial = ops.blend(self.spatial.gate(seen), self.strength)
        return {"channel": channel, "spatial": spatial}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated map, of the shape, dtype and memory format of `x`."""
        self.check(x)
        if not is_scripting():
            channel, spatial = held(self, "channel"), held(self, "spatial")
            # whoever put another module there has its gate used
            if type(channel) is ChannelAttention and type(spatial) is SpatialAttention:
                return self._fused(x, channel, spatial)
        if self.order == "spatial-channel":
            y = ops.apply_gate(x, self.spatial.gate(x), self.strength)
            return ops.apply_gate(y, self.channel.gate(y), self.strength)
        y = ops.apply_gate(x, self.channel.gate(x), self.strength)
        return ops.apply_gate(y, self.spatial.gate(x if self.order == "parallel" else y), self.strength)

    @torch.jit.unused
    def _fused(self, x: torch.Tensor, channel: ChannelAttention, spatial: SpatialAttention) -> torch.Tensor:
        strength = held(self, "strength")
        spatial.check_positions(x)
        mlp = channel.mlp()
        if self.order == "spatial-channel":
            return ops.gated(
                spatial.gated(x, strength),
                channel=channel.of_pools,
                pools=channel.pools,
                strength=strength,
                dimensions=self.dimensions,
                gates=None if mlp is None else ops.Gates(mlp, None),
            )[0]
        window, parallel = spatial.window(), self.order == "parallel"
        y, moments = ops.gated(
            x,
            channel=channel.of_pools,
            spatial=spatial.of_summary,
            pools=channel.pools,
            strength=strength,
            parallel=parallel,
            dimensions=self.dimensions,
            gates=None if mlp is None or window is None else ops.Gates(mlp, window, parallel),
        )
        if moments is not None:
            spatial.track(moments, x.numel() // x.shape[1])
        return y

    @torch.jit.unused
    def fused(self) -> ops.Gates | None:
        """All of `forward` as the fused operators take it behind a norm; None where they cannot."""
        channel, spatial = held(self, "channel"), held(self, "spatial")
        known = type(self) is CBAM and type(channel) is ChannelAttention and type(spatial) is SpatialAttention
        if not known or self.order != "channel-spatial":
            return None
        mlp, window = channel.mlp(), spatial.window()
        return None if mlp is None or window is None else ops.Gates(mlp, window)

    @torch.jit.unused
    def track(self, moments: torch.Tensor | None, count: int) -> None:
        """Let the norm's running mean and variance follow those of so many logits, where it is trained."""
        held(self, "spatial").track(moments, count)
