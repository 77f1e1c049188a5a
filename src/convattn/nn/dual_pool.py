"""Dual pooling: mean and maximum, reduced by a 1x1 convolution, classified."""

import torch
from torch import nn

from convattn import checks, ops
from convattn.nn.base import Head
from convattn.registry import register


@register("dual", "head")
class DualPool(Head):
    """Reduce global average and global max pooling together to one vector, and classify it if asked to.

    y = W [mean(x); max(x)] + b,  with classes: V dropout(y) + c

    There is no non-linearity between the two linear maps: in eval mode the whole head equals one linear map of
    [mean(x); max(x)].

    Shape:
        x: (B, C, *spatial), y: (B, features), with classes (B, classes).

    Cost:
        2 C features + features parameters, with classes (features + 1) classes more; two reductions of the map.

    Paper:
        None; the blog post "CBAM and dual pooling in PyTorch".

    Differs from the paper:
        The post drops out half of y before the classifier (`dropout=0.5`); the default here is none. A 1x1 convolution
        of a pooled map is a linear layer, and is one here.

    Args:
        channels: channels of the map.
        features: width of y, by default `channels`.
        classes: number of classes; None for a head without classifier.
        dropout: probability of dropping an element of y before the classifier, from 0 to 1.
        dimensions: spatial dimensions of the map, 1 to 3.

    Raises:
        InvalidOption: an option out of its range.
        ShapeMismatch: from `forward`, a map of another shape.

    Example:
        >>> import torch
        >>> DualPool(512, classes=10, dropout=0.5)(torch.randn(2, 512, 7, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        *,
        features: int | None = None,
        classes: int | None = None,
        dropout: float = 0.0,
        dimensions: int = 2,
    ) -> None:
        checks.positive("DualPool", "channels", channels)
        width = channels if features is None else features
        checks.positive("DualPool", "features", width)
        if classes is not None:
            checks.positive("DualPool", "classes", classes)
        checks.between("DualPool", "dropout", dropout, 0, 1)
        super().__init__(channels=channels, dimensions=dimensions, features=classes or width)
        self.reduce = nn.Linear(2 * channels, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes) if classes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled vector (B, features), or the logits (B, classes)."""
        self.check(x)
        pooled = self.dropout(self.reduce(ops.mean_max(x, self.dimensions)))
        return pooled if self.classifier is None else self.classifier(pooled)  # type: ignore[no-any-return]
