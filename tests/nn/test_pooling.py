"""Pooling heads without parameters against sums and comparisons in NumPy."""

import numpy as np
import pytest
import torch

from convattn.errors import ShapeMismatch
from convattn.nn import AvgMaxPool, AvgPool, ConcatPool, Head, MaxPool
from tolerances import assert_close, is_close


def pooled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means, maxima = np.zeros(x.shape[:2]), np.zeros(x.shape[:2])
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            total, largest = 0.0, -np.inf
            for value in x[b, c].flat:
                total += value
                largest = max(largest, value)
            means[b, c], maxima[b, c] = total / x[b, c].size, largest
    return means, maxima


FORMULAS = {
    AvgPool: lambda mean, maximum: mean,
    MaxPool: lambda mean, maximum: maximum,
    AvgMaxPool: lambda mean, maximum: (mean + maximum) / 2,
    ConcatPool: lambda mean, maximum: np.concatenate([mean, maximum], axis=1),
}
each_head = pytest.mark.parametrize("cls", FORMULAS)


@each_head
@pytest.mark.parametrize("size", [(7,), (5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("channels", [6, None])
def test_formula(cls: type[Head], size: tuple[int, ...], channels: int | None) -> None:
    head = cls(channels, dimensions=len(size))
    # mostly below zero: a maximum that starts at 0 would show
    x = torch.randn(3, 6, *size, dtype=torch.float64) - 3
    expected = FORMULAS[cls](*pooled(x.numpy()))
    assert_close(head(x), expected)
    x[1, 2] += 1
    assert not is_close(head(x), expected)


@each_head
def test_width(cls: type[Head]) -> None:
    width = 12 if cls is ConcatPool else 6
    assert cls(6).features == width
    assert cls(6)(torch.randn(2, 6, 3, 3)).shape == (2, width)
    assert cls().features is None
    assert not list(cls(6).parameters())


@each_head
def test_any_channels_where_none_are_given(cls: type[Head]) -> None:
    assert len(cls()(torch.randn(2, 5, 3, 3))) == len(cls()(torch.randn(2, 9, 3, 3))) == 2
    with pytest.raises(ShapeMismatch, match=r"expected a map of shape \(B, C, H, W\), got \(2, 5\)"):
        cls()(torch.randn(2, 5))
    with pytest.raises(ShapeMismatch, match=r"expected a map of shape \(B, 6, H, W\), got \(2, 5, 3, 3\)"):
        cls(6)(torch.randn(2, 5, 3, 3))


def test_equal_maxima_share_the_gradient() -> None:
    x = torch.tensor([[[[1.0, 3.0], [3.0, 2.0]]]], requires_grad=True)
    MaxPool()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[[0.0, 0.5], [0.5, 0.0]]]]
