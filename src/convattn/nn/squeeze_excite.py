"""Squeeze-and-excitation (Hu et al., 2018)."""

import torch
from torch import nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from convattn import checks, ops
from convattn.nn.base import ACTIVATIONS, GATE_ACTIVATIONS, Gate, described, held, hidden_width
from convattn.registry import register


@register("se", "gate")
class SqueezeExcite(Gate):
    """Gate each channel by what all channels contain on average.

    gate = sigmoid(W2 relu(W1 mean(x))),  y = x * gate

    Shape:
        x: (B, C, *spatial), gate: (B, C, 1, ...), y as x.

    Cost:
        2 C hidden parameters without biases; one mean over the map, one product with it.

    Paper:
        Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Enhua Wu: Squeeze-and-Excitation Networks, CVPR 2018,
        arXiv:1709.01507, equations 2 to 4.

    Differs from the paper:
        Nothing. Biases are off, as in the authors' network counts; hidden is at least 1.

    Args:
        channels: channels of the map.
        reduction: hidden width is channels // reduction.
        hidden: the hidden width itself, instead of `reduction`.
        bias: biases in both linear layers.
        activation: between the linear layers, `"relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        gate_activation: `"sigmoid"` or `"hardsigmoid"` (MobileNetV3).
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength` that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `gate`, a map of another shape.

    Example:
        >>> import torch
        >>> SqueezeExcite(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden: int | None = None,
        bias: bool = False,
        activation: str = "relu",
        gate_activation: str = "sigmoid",
        dimensions: int = 2,
        start: str = "paper",
    ) -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        checks.choice("SqueezeExcite", "activation", activation, ACTIVATIONS)
        checks.choice("SqueezeExcite", "gate_activation", gate_activation, GATE_ACTIVATIONS)
        width = hidden_width("SqueezeExcite", channels, reduction, hidden)
        self.fc1 = nn.Linear(channels, width, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(width, channels, bias=bias)
        self.gate_activation = GATE_ACTIVATIONS[gate_activation]()

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The channel gate (B, C, 1, ...)."""
        self.check(x)
        return ops.broadcast(self._excite([ops.squeeze(x, "mean", self.dimensions)]), self.dimensions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated map, of the shape, dtype and memory format of `x`."""
        if not is_scripting():
            self.check(x)
            mlp = self.mlp()
            return ops.gated(
                x,
                channel=self._excite,
                pools=("mean",),
                strength=held(self, "strength"),
                dimensions=self.dimensions,
                gates=None if mlp is None else ops.Gates(mlp, None),
            )[0]
        return ops.apply_gate(x, self.gate(x), self.strength)

    @torch.jit.unused
    def mlp(self) -> ops.Mlp | None:
        """The same as the fused operators take it; None where they have none like it."""
        return described(
            ("mean",), held(self, "fc1"), held(self, "activation"), held(self, "fc2"), held(self, "gate_activation")
        )

    @torch.jit.unused
    def fused(self) -> ops.Gates | None:
        """All of `forward` as the fused operators take it behind a norm; None where they cannot."""
        mlp = self.mlp() if type(self) is SqueezeExcite else None
        return None if mlp is None else ops.Gates(mlp, None)

    def _excite(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        return self.gate_activation(self.fc2(self.activation(self.fc1(pooled[0]))))  # type: ignore[no-any-return]
