"""What a map is gated with, as the fused operators take it, and what their backward pass needs of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

Tensor = torch.Tensor
# a tensor, or None: which of them there are depends on the gates, and types cannot follow that
Maybe = Any
_aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda d, x: _aten.threshold_backward(d, x, 0)),
    "silu": (functional.silu, _aten.silu_backward),
    "gelu": (functional.gelu, _aten.gelu_backward),
    "hardswish": (functional.hardswish, _aten.hardswish_backward),
}
GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
}


# those in which the channels of a place lie together, by the number of dimensions
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_last(x: Tensor) -> bool:
    """Whether a tensor is in one piece with its second dimension last in memory."""
    kind = FORMATS.get(x.dim())
    # to move a dimension takes ten times as long as to look
    return x.movedim(1, -1).is_contiguous() if kind is None else x.is_contiguous(memory_format=kind)


def convolve(summary: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a summary with zeros around it."""
    operator = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    return operator(summary, weight, padding=weight.shape[-1] // 2)


class Mlp(NamedTuple):
    """A channel gate: gate(sum over pools of second(activation(first(pool))))."""

    pools: tuple[str, ...]
    activation: str
    gate: str
    first: Tensor
    first_bias: Maybe
    second: Tensor
    second_bias: Maybe

    def reference(self, pooled: list[Tensor]) -> Tensor:
        """The gate (B, C) in plain PyTorch, from poolings that are each (B, C)."""
        activate = ACTIVATIONS[self.activation][0]
        hidden = activate(functional.linear(torch.stack(pooled), self.first, self.first_bias))
        logits = functional.linear(hidden, self.second, self.second_bias).sum(0)
        return GATE_ACTIVATIONS[self.gate](logits)


class Window(NamedTuple):
    """A spatial gate: sigmoid(norm(conv(summary))); without norm where `mean` is None.

    In training the norm's mean and variance are those of the batch, else the running ones.
    """

    weight: Tensor
    norm_weight: Maybe = None
    norm_bias: Maybe = None
    mean: Maybe = None
    var: Maybe = None
    training: bool = False
    eps: float = 0.0
    # what lets the running ones follow in training, as `torch.nn.BatchNorm2d` has it
    tracked: Maybe = None
    momentum: float | None = None

    def reference(self, summary: Tensor) -> Tensor:
        """The gate (B, 1, *spatial) in plain PyTorch, from the summary (B, 2, *spatial)."""
        logits = convolve(summary, self.weight)
        if self.mean is not None:
            mean, var = (None, None) if self.training else (self.mean, self.var)
            logits = functional.batch_norm(
                logits, mean, var, self.norm_weight, self.norm_bias, training=self.training, eps=self.eps
            )
        return torch.sigmoid(logits)


class Gates(NamedTuple):
    """What a map is multiplied with; either gate may be absent."""

    channel: Mlp | None
    spatial: Window | None
    # the spatial gate sees the map before the channel gate
    parallel: bool = False

    def tensors(self) -> tuple[Maybe, ...]:
        """All that gradients are computed for."""
        mlp, window = self.channel, self.spatial
        return (*(mlp[3:] if mlp else (None,) * 4), *(window[:3] if window else (None,) * 3))

    def running(self, moments: Maybe) -> tuple[Maybe, Maybe]:
        """Mean and variance that the norm has used: those of the batch, or the running ones."""
        if moments is not None:
            mean, var = torch.unbind(moments.view(2, 1))
            return mean, var
        return (self.spatial.mean, self.spatial.var) if self.spatial else (None, None)

    def of(self, tensors: tuple[Maybe, ...]) -> "Gates":
        """The same gates with other tensors: all that gradients are computed for, and behind them mean and variance."""
        mlp = Mlp(*self.channel[:3], *tensors[:4]) if self.channel else None
        window = Window._make((*tensors[4:9], *self.spatial[5:])) if self.spatial else None
        return Gates(mlp, window, self.parallel)


class Kept(NamedTuple):
    """What the backward pass needs beside the map and the parameters: small maps, in float32."""

    # means, then maxima, as far as they are asked for (pools, B, C)
    pooled: Maybe = None
    # behind the first layer (pools, B, hidden), the sum behind the activation (B, hidden), and the logits (B, C)
    first: Maybe = None
    hidden: Maybe = None
    logits: Maybe = None
    # the channel gate as it is multiplied (B, C)
    channel: Maybe = None
    # means, then maxima, over the channels (2, B, *spatial); behind the convolution (B, *spatial)
    planes: Maybe = None
    window: Maybe = None
    # the spatial gate as it is multiplied (B, *spatial)
    spatial: Maybe = None
    # all of this in one piece, and in an order that is known to the kernels that compute all at once
    together: Maybe = None


def shapes_kept(shape: Any, pools: int, width: Any, window: bool) -> dict[str, tuple[Any, ...]]:
    """Shapes of what is in `Kept` of a map of a shape, by name; without pools there is no channel gate."""
    batch, channels, *positions = shape
    found: dict[str, tuple[Any, ...]] = {}
    if pools:
        found |= {"pooled": (pools, batch, channels), "first": (pools, batch, width), "hidden": (batch, width)}
        found |= dict.fromkeys(("logits", "channel"), (batch, channels))
    if window:
        found |= {"planes": (2, batch, *positions)} | dict.fromkeys(("window", "spatial"), (batch, *positions))
    return found


class Norm(NamedTuple):
    """A batch norm straight before the gates, so that the map is norm(u) and u is what lies in memory.

    In training its mean and variance are those of the batch, else the running ones.
    """

    weight: Maybe
    bias: Maybe
    mean: Maybe
    var: Maybe
    training: bool
    eps: float
    tracked: Maybe = None
    momentum: float | None = None

    def tensors(self) -> tuple[Maybe, ...]:
        """All that gradients are computed for."""
        return self.weight, self.bias

    def reference(self, u: Tensor) -> Tensor:
        """The map in plain PyTorch."""
        mean, var = (None, None) if self.training else (self.mean, self.var)
        return functional.batch_norm(u, mean, var, self.weight, self.bias, training=self.training, eps=self.eps)


class Normed(NamedTuple):
    """What the backward pass needs of a norm, in float32, unless `Kept` has it: the map is weight * hat + bias."""

    # inverse and offset, with which hat = inverse * u + offset, and weight and bias (4, C)
    affine: Maybe
    # mean and biased variance that it has used (2, C)
    moments: Tensor
    # means of hat (B, C)
    hat: Maybe


class Kernels(Protocol):
    """What computes whole passes over maps, made for a dense map `x` of a device."""

    def __init__(self, x: Tensor) -> None: ...

    @staticmethod
    def follows(norm: Norm | Window | None) -> bool:
        """Whether the running mean and variance of a norm in training have followed when a forward pass is done."""

    @classmethod
    def at_once(
        cls, x: Tensor, gates: Gates, strength: Maybe, shortcut: Maybe, norm: Norm | None
    ) -> tuple[Tensor, Maybe, Kept, Normed | None] | None:
        """What `fused.forward` returns; None from `Steps` that are better taken one by one."""

    @classmethod
    def grad_at_once(
        cls,
        x: Tensor,
        dy: Tensor,
        gates: Gates,
        strength: Maybe,
        kept: Kept,
        needs_map: bool,
        norm: Norm | None,
        normed: Normed | None,
    ) -> tuple[Maybe, Maybe, tuple[Maybe, ...]] | None:
        """What `fused.backward` returns; None from `Steps` that are better taken one by one."""

    def pool(self, x: Tensor, mean: bool, maximum: bool) -> Tensor:
        """Means and maxima over positions (pools, B, C)."""

    def grad_pool(self, x: Tensor, pooled: Tensor, dpooled: Tensor) -> Tensor:
        """The gradient of the map by its means and maxima over positions (2, B, C)."""


class Steps(Kernels, Protocol):
    """What also computes each step of a pass by itself, as `fused` asks for them."""

    def apart(self, kept: "Kept", gates: Gates) -> "Kept":
        """What is kept, piece by piece, where it lies in one piece."""

    def normalise(self, x: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        """Means and maxima over positions of the map behind a norm (2, B, C), and what is kept.

        From there on all is computed of the map behind the norm, and `x` is still what is before it.
        """

    def restore(self, kept: Normed) -> None:
        """The same again in the backward pass."""

    def mlp(self, mlp: Mlp, pooled: Tensor) -> tuple[Tensor, "Kept"]:
        """The channel gate (B, C) of poolings, and what is kept; by `mlp` where there is nothing quicker."""

    def grad_mlp(self, mlp: Mlp, kept: "Kept", dgate: Tensor) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Gradients of the poolings, and of the weights and biases; by `grad_mlp` where there is nothing quicker."""

    def summarise(self, x: Tensor, channel: Maybe) -> Tensor:
        """Means and maxima over channels (2, B, *spatial), of the map or of the map with its channels gated."""

    def apply(self, x: Tensor, channel: Maybe, spatial: Maybe, shortcut: Maybe) -> Tensor:
        """The map times its gates; with a shortcut relu(that + shortcut)."""

    def grad_gates(
        self, x: Tensor, dy: Tensor, channel: Maybe, spatial: Maybe, maximum: Maybe, gated: bool
    ) -> tuple[Maybe, Maybe, Maybe]:
        """Gradients of the gates, and where the given maxima over channels are.

        With a norm there are, in place of the gradient of the channel gate, the sums of the gradient of the gated map
        times hat and those of the gradient itself (2, B, C).
        """

    def grad_summary(
        self, x: Tensor, channel: Maybe, summary: tuple[Maybe, ...], maximum: Maybe, dchannel: Maybe
    ) -> tuple[Maybe, Maybe]:
        """Add to the gradient of the channel gate what comes by the summary; where the maxima over positions are.

        With a norm also the mean of hat over the places of each.
        """

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
        """The gradient of the map, also where none comes from y and there are no gates.

        With a norm, that of what is before it; `through` are then the means of the gradient of the map and of that
        times hat (2, C), where the norm's mean and variance are those of the batch.
        """

    def window(self, planes: Tensor, window: Window, strength: Maybe) -> tuple[Tensor, Tensor, Maybe]:
        """The spatial gate, the logits behind the convolution, and their moments in training."""

    def grad_window(
        self, planes: Tensor, window: Window, strength: Maybe, kept: Kept, dgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the planes, of the weight, and of norm weight, norm bias and strength together (3)."""
