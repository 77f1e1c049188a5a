"""Pooling heads without parameters: mean, maximum, their average, and both side by side."""

import torch

from convattn import ops
from convattn.nn.base import Head
from convattn.registry import register


@register("avg", "head")
class AvgPool(Head):
    """Global average pooling: y = mean(x).

    Shape:
        x: (B, C, *spatial), y: (B, C).

    Cost:
        No parameters; one reduction of the map.

    Paper:
        Min Lin, Qiang Chen, Shuicheng Yan: Network In Network, ICLR 2014, arXiv:1312.4400, section 3.2.

    Differs from the paper:
        Nothing.

    Args:
        channels: channels of the map; None takes any number.
        dimensions: spatial dimensions of the map, 1 to 3.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward`, a map of another shape.

    Example:
        >>> import torch
        >>> AvgPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, channels: int | None = None, *, dimensions: int = 2) -> None:
        super().__init__(channels=channels, dimensions=dimensions, features=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled vector (B, C)."""
        self.check(x)
        return ops.squeeze(x, "mean", self.dimensions)


@register("max", "head")
class MaxPool(Head):
    """Global max pooling: y = max(x).

    Shape:
        x: (B, C, *spatial), y: (B, C).

    Cost:
        No parameters; one reduction of the map.

    Paper:
        Maxime Oquab, Léon Bottou, Ivan Laptev, Josef Sivic: Is object localization for free? CVPR 2015, section 3.1.

    Differs from the paper:
        Nothing. Equal maxima share the gradient.

    Args:
        channels: channels of the map; None takes any number.
        dimensions: spatial dimensions of the map, 1 to 3.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward`, a map of another shape.

    Example:
        >>> import torch
        >>> MaxPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, channels: int | None = None, *, dimensions: int = 2) -> None:
        super().__init__(channels=channels, dimensions=dimensions, features=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled vector (B, C)."""
        self.check(x)
        return ops.squeeze(x, "max", self.dimensions)


@register("avgmax", "head")
class AvgMaxPool(Head):
    """The average of global average and global max pooling: y = (mean(x) + max(x)) / 2.

    Shape:
        x: (B, C, *spatial), y: (B, C).

    Cost:
        No parameters; two reductions of the map.

    Paper:
        Chen-Yu Lee, Patrick Gallagher, Zhuowen Tu: Generalizing Pooling Functions in Convolutional Neural Networks,
        AISTATS 2016, arXiv:1509.08985, equation 1 with a fixed mixing proportion of 1/2.

    Differs from the paper:
        The mixing proportion is fixed, not learned.

    Args:
        channels: channels of the map; None takes any number.
        dimensions: spatial dimensions of the map, 1 to 3.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward`, a map of another shape.

    Example:
        >>> import torch
        >>> AvgMaxPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, channels: int | None = None, *, dimensions: int = 2) -> None:
        super().__init__(channels=channels, dimensions=dimensions, features=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled vector (B, C)."""
        self.check(x)
        return 0.5 * (ops.squeeze(x, "mean", self.dimensions) + ops.squeeze(x, "max", self.dimensions))


@register("concat", "head")
class ConcatPool(Head):
    """Global average and global max pooling side by side: y = [mean(x); max(x)].

    Shape:
        x: (B, C, *spatial), y: (B, 2C).

    Cost:
        No parameters; two reductions of the map, and twice the weights in the classifier behind.

    Paper:
        None; a common trick, known from fastai as AdaptiveConcatPool (there the maximum comes first).

    Differs from the paper:
        Nothing to differ from.

    Args:
        channels: channels of the map; None takes any number.
        dimensions: spatial dimensions of the map, 1 to 3.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward`, a map of another shape.

    Example:
        >>> import torch
        >>> ConcatPool(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 128])
    """

    def __init__(self, channels: int | None = None, *, dimensions: int = 2) -> None:
        super().__init__(channels=channels, dimensions=dimensions, features=channels and 2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled vector (B, 2C)."""
        self.check(x)
        return ops.mean_max(x, self.dimensions)
