"""Modules of a user's own, which convattn does not have: one that adds, and gates that vary over other axes."""

import torch
from torch import nn

from convattn import checks, ops
from convattn.nn import Gate, Update
from convattn.nn.base import hidden_width
from convattn.registry import Entry

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class GlobalContext(Update):
    """Add to each position what the map contains where it is attended to.

    update = W2 relu(W1 sum(softmax(w x) x)),  y = x + update

    Shape:
        x: (B, C, *spatial), update: (B, C, 1, ...), y as x.

    Cost:
        C + 2 C hidden parameters and the biases; two reductions of the map, one sum with it.

    Paper:
        Yue Cao, Jiarui Xu, Stephen Lin, Fangyun Wei, Han Hu: GCNet, ICCV 2019 workshops, arXiv:1904.11492, equation 5.

    Differs from the paper:
        There is no layer norm.

    Args:
        channels: channels of the map.
        reduction: hidden width is channels // reduction.
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength` that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `update`, a map of another shape.

    Example:
        >>> import torch
        >>> GlobalContext(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, channels: int, *, reduction: int = 16, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        width = hidden_width("GlobalContext", channels, reduction, None)
        self.attend = CONVOLUTIONS[dimensions](channels, 1, 1, bias=False)
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, channels)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What is added (B, C, 1, ...)."""
        self.check(x)
        weights = self.attend(x).flatten(2).softmax(dim=-1)
        context = (x.flatten(2) * weights).sum(dim=-1)
        return ops.broadcast(self.fc2(torch.relu(self.fc1(context))), self.dimensions)


class Elementwise(Gate):
    """Gate every element by all channels of its position.

    gate = sigmoid(W x),  y = x * gate

    Shape:
        x: (B, C, *spatial), gate and y as x.

    Cost:
        C * C parameters; one pointwise convolution, one product.

    Paper:
        None.

    Differs from the paper:
        Nothing to differ from.

    Args:
        channels: channels of the map.
        dimensions: spatial dimensions of the map, 1 to 3.
        start: `"paper"`, or `"identity"` for an additional `strength` that starts at 0.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward` and `gate`, a map of another shape.

    Example:
        >>> import torch
        >>> Elementwise(64).gate(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    axis = "both"

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        self.conv = CONVOLUTIONS[dimensions](channels, channels, 1, bias=False)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """The gate, of the shape of `x`."""
        self.check(x)
        return torch.sigmoid(self.conv(x))


class Means(Gate):
    """A gate that is the sigmoid of weighted means over the axes that it does not vary over."""

    def __init__(
        self, channels: int, *, over: tuple[int, ...] = (3,), groups: int = 0, dimensions: int = 2, start: str = "paper"
    ) -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)
        checks.positive("Means", "channels", channels)
        self.over, self.groups = over, groups
        self.weight = nn.Parameter(torch.full((1,), 2.0))

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x)
        if self.groups:
            x = x.unflatten(1, (self.groups, -1)).mean(2)
        return torch.sigmoid(self.weight * x.mean(dim=self.over, keepdim=True) if self.over else self.weight * x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.groups:
            return ops.apply_gate(x, self.gate(x), self.strength)
        parts = x.unflatten(1, (self.groups, -1))
        return ops.apply_gate(parts, self.gate(x).unsqueeze(2), self.strength).flatten(1, 2)


OWN = {
    "global-context": Entry("global-context", "update", GlobalContext, GlobalContext),
    "elementwise": Entry("elementwise", "gate", Elementwise, Elementwise),
}
