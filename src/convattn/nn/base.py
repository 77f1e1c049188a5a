"""What all modules share: the contracts of a gate, of an update and of a pooling head."""

from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

from convattn import checks, ops

STARTS = ("paper", "identity")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}
GATE_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


class OnMaps(nn.Module):
    """A module that takes maps (B, C, *spatial); `channels` None stands for any number of them."""

    def __init__(self, *, channels: int | None, dimensions: int) -> None:
        super().__init__()
        checks.dimensions(type(self).__name__, dimensions)
        if channels is not None:
            checks.positive(type(self).__name__, "channels", channels)
        self.channels = channels
        self.dimensions = dimensions

    def check(self, x: torch.Tensor) -> None:
        """Raise `ShapeMismatch` unless `x` is a map that this module takes."""
        if not is_scripting():
            if isinstance(x, Proxy) or is_tracing():  # type: ignore[no-untyped-call]
                # a symbolic trace knows no shapes, and the other kind would warn of every one that is looked at
                return
            checks.feature_map(type(self).__name__, x, self.channels, self.dimensions)


class WithStrength(OnMaps):
    """A map to a map of the same shape, by the paper or, with `start="identity"`, with a `strength` that starts at 0.

    A subclass of a contract, `Gate` or `Update`, says in one method what it computes.
    """

    # the kind of a module, and the name of that method
    convattn_kind = ""
    # one element and not a scalar: sharding wrappers refuse parameters without a dimension
    strength: nn.Parameter | None

    def __init__(self, *, channels: int | None, dimensions: int, start: str) -> None:
        super().__init__(channels=channels, dimensions=dimensions)
        checks.choice(type(self).__name__, "start", start, STARTS)
        self.register_parameter("strength", nn.Parameter(torch.zeros(1)) if start == "identity" else None)

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        # whoever has another such method and no forward of its own means that, and not what was fused for the other
        if cls.convattn_kind in vars(cls) and "forward" not in vars(cls):
            contract: Any = next(base for base in cls.__mro__ if "convattn_kind" in vars(base))
            cls.forward = contract.forward


class Gate(WithStrength):
    """A module that multiplies its input with a gate computed from it.

    `gate(x)` is the paper's gate, broadcastable to `x`. With `start="identity"` the module has one parameter more,
    `strength` with one element, initially 0, and multiplies by `1 + strength * (gate - 1)`: a fresh module changes
    nothing, to the bit for finite input, and with strength 1 it is the paper's module.
    """

    convattn_kind = "gate"
    # the name of the gate; what it varies over is read from its shape
    axis = "channel"

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The gate alone, broadcastable to `x`."""
        raise NotImplementedError

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The small gates as `forward` applies them, blended with `strength`, by what they vary over."""
        return {self.axis: ops.blend(self.gate(x), self.strength)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated map, of the shape, dtype and memory format of `x`."""
        return ops.apply_gate(x, self.gate(x), self.strength)

    @torch.jit.unused
    def fused(self) -> ops.Gates | None:
        """All of `forward` as the fused operators take it behind a norm; None where they cannot."""
        return None

    @torch.jit.unused
    def track(self, moments: torch.Tensor | None, count: int) -> None:
        """Let the running mean and variance of a norm inside follow those of so many logits, where it is trained."""

    @torch.jit.unused
    def behind(self, layer: nn.Module, u: torch.Tensor) -> torch.Tensor | None:
        """What `forward` makes of `layer(u)`, for a batch norm, in fewer passes and keeping no map but `u`.

        None where the layer is another one, where someone watches one of both, where no fused operator serves the map,
        and while `strength` is 0 (on CUDA: where there is one), since norms that are computed in another order differ
        in the last bit.
        """
        norm = described_norm(layer) if ops.takes_norms(u) and plain(self) else None
        if norm is None or "forward" in self.__dict__:
            return None
        gates = self.fused()
        if gates is None or u.dim() != self.dimensions + 2 or u.shape[1] != self.channels or u.numel() == 0:
            return None
        count = u.numel() // u.shape[1]
        if count == 1:
            return None
        # to look at a number on a GPU is to wait for all that is computed there
        if self.strength is not None and (self.strength.is_cuda or not self.strength.any()):
            return None
        found = ops.normed(u, norm, gates, self.strength)
        if found is None:
            return None
        y, moments, of_norm = found
        self.track(moments, count)
        if of_norm is not None:
            follow(layer, of_norm, count)
        return y


class Update(WithStrength):
    """A module that adds to its input what it computes from it: y = x + update(x).

    `update(x)` is what the paper adds, broadcastable to `x`. With `start="identity"` the module has one parameter more,
    `strength` with one element, initially 0, and y = x + strength * update(x): a fresh module changes no finite input
    (of a zero the sign may go), and with strength 1 it is the paper's module.

    Example:
        >>> class Context(Update):
        ...     def __init__(self, channels, *, dimensions=2, start="paper"):
        ...         super().__init__(channels=channels, dimensions=dimensions, start=start)
        ...         self.transform = nn.Linear(channels, channels)
        ...
        ...     def update(self, x):
        ...         return ops.broadcast(self.transform(ops.squeeze(x, "mean")), self.dimensions)
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.equal(Context(8, start="identity")(x), x)
        True
    """

    convattn_kind = "update"

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What the paper adds to the map, broadcastable to `x`."""
        raise NotImplementedError

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` adds: the update times `strength`, in the dtype of the map."""
        update, strength = self.update(x), self.strength
        if strength is not None:
            # so that strength 0 changes nothing where the sums of finite values overflowed either
            update = strength * torch.nan_to_num(update)
        return update.type_as(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map with what is added to it, of the shape, dtype and memory format of `x`."""
        return x + self.added(x)


class Head(OnMaps):
    """A module that pools a map (B, C, *spatial) to a vector (B, features)."""

    convattn_kind = "head"

    def __init__(self, *, channels: int | None, dimensions: int, features: int | None) -> None:
        super().__init__(channels=channels, dimensions=dimensions)
        self.features = features


def aligned(small: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate or an update with the batch and the number of dimensions of its map, and 1 where it does not vary.

    One for each group of channels may also have a dimension for them, as a map in groups has: (B, G, 1, *spatial).

    Example:
        >>> x = torch.zeros(2, 8, 4, 4)
        >>> [tuple(aligned(torch.zeros(shape), x).shape) for shape in [(8, 1, 1), (2, 1, 4, 4), (2, 4, 1, 4, 4)]]
        [(2, 8, 1, 1), (2, 1, 4, 4), (2, 4, 4, 4)]
    """
    if small.dim() == x.dim() + 1:
        small = small.flatten(1, 2)
    small = small.reshape([1] * (x.dim() - small.dim()) + list(small.shape))
    return small.expand(len(x), *[-1] * (x.dim() - 1))


def hidden_width(where: str, channels: int, reduction: int, hidden: int | None) -> int:
    """The width of a bottleneck: `hidden` if given, else channels // reduction, at least 1.

    At least 1: a `Linear(channels, 0)` can be built and silently makes the gate a constant.
    """
    checks.positive(where, "channels", channels)
    checks.positive(where, "reduction", reduction)
    if hidden is None:
        return max(1, channels // reduction)
    checks.positive(where, "hidden", hidden)
    return hidden


def described_norm(layer: Any) -> ops.Norm | None:
    """A batch norm as the fused operators take it; None where it is none or where someone watches it."""
    mean, var = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    known = type(layer) in _NORMS or (type(layer) is nn.SyncBatchNorm and not layer.training)
    if not known or mean is None or var is None or not plain(layer) or "forward" in layer.__dict__:
        return None
    tracked = layer._buffers.get("num_batches_tracked")
    given = (held(layer, "weight"), held(layer, "bias"), mean, var, layer.training, layer.eps, tracked, layer.momentum)
    return ops.Norm(*given)


def follow(norm: Any, moments: torch.Tensor, count: int) -> None:
    """Let a batch norm's running mean and variance follow mean and biased variance (2, C) of so many numbers."""
    among = norm._buffers
    running = (among["running_mean"], among["running_var"], among["num_batches_tracked"])
    ops.follow(*running, norm.momentum, moments, count)


def plain(*layers: nn.Module) -> bool:
    """Whether nobody watches or changes what layers of PyTorch compute."""
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return False
    return True


def held(layer: nn.Module, name: str) -> Any:
    """A parameter or a layer in a layer: as an attribute it takes a third of a microsecond, which small maps feel."""
    for among in (layer._parameters, layer._modules):
        if name in among:
            return among[name]
    # computed of another parameter, or an attribute that is None
    return getattr(layer, name)


def described(
    pools: tuple[str, ...], first: Any, activation: Any, second: Any, gate: str | nn.Module
) -> ops.Mlp | None:
    """An MLP as the fused operators take it; None where they have none like it."""
    between = _NAMES.get(type(activation))
    behind = gate if isinstance(gate, str) else _GATE_NAMES.get(type(gate)) if plain(gate) else None
    if between is None or behind is None or not _POOLS.issuperset(pools):
        return None
    if not type(first) is type(second) is nn.Linear or not plain(first, activation, second):
        return None
    if between == "gelu" and activation.approximate != "none":
        return None
    return ops.Mlp(
        pools, between, behind, held(first, "weight"), held(first, "bias"), held(second, "weight"), held(second, "bias")
    )


_NORMS = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
_POOLS = frozenset(("mean", "max"))
_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}
_GATE_NAMES = {kind: name for name, kind in GATE_ACTIVATIONS.items()}
