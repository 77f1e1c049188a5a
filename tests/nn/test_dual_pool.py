"""Dual pooling against its formula in NumPy, and against the one linear layer that it equals."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convattn.errors import InvalidOption
from convattn.nn import ConcatPool, DualPool
from tolerances import assert_close, is_close


def formula(x: np.ndarray, state: dict[str, np.ndarray]) -> np.ndarray:
    """A 1x1 convolution of [mean; max], then, if there is one, the classifier."""
    weight, bias = state["reduce.weight"], state["reduce.bias"]
    outputs = []
    for image in x:
        pooled = [sum(channel.flat) / channel.size for channel in image] + [max(channel.flat) for channel in image]
        y = [sum(w * p for w, p in zip(row, pooled, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        if "classifier.weight" in state:
            rows = zip(state["classifier.weight"], state["classifier.bias"], strict=True)
            y = [sum(w * v for w, v in zip(row, y, strict=True)) + b for row, b in rows]
        outputs.append(y)
    return np.array(outputs)


def random_head(channels: int, **options: Any) -> DualPool:
    head = DualPool(channels, **options).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def a_map(*shape: int) -> torch.Tensor:
    # mostly below zero: a maximum that starts at 0 would show
    return torch.randn(*shape, dtype=torch.float64) - 2


@pytest.mark.parametrize("size", [(7,), (5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "options, width", [({}, 6), ({"features": 5}, 5), ({"classes": 3}, 3), ({"features": 4, "classes": 3}, 3)]
)
def test_formula(size: tuple[int, ...], options: dict[str, int], width: int) -> None:
    head = random_head(6, dimensions=len(size), **options)
    x = a_map(4, 6, *size)
    expected = formula(x.numpy(), {key: value.numpy() for key, value in head.state_dict().items()})
    y = head(x)
    assert y.shape == (4, width) and head.features == width
    assert_close(y, expected)
    assert not is_close(y[:1], y[1:2])
    for name, parameter in head.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
            assert not is_close(head(x), expected), name
            parameter.view(-1)[0] -= 1


@pytest.mark.parametrize("features", [None, 4, 20])
def test_equals_one_linear_layer_in_eval(features: int | None) -> None:
    head = random_head(6, features=features, classes=3, dropout=0.5).eval()
    assert head.classifier is not None
    linear = nn.Linear(12, 3).double()
    with torch.no_grad():
        linear.weight.copy_(head.classifier.weight @ head.reduce.weight)
        linear.bias.copy_(head.classifier.weight @ head.reduce.bias + head.classifier.bias)
    x = a_map(4, 6, 5, 4)
    assert_close(head(x), linear(ConcatPool()(x)))


def test_dropout_is_between_the_linear_layers_and_only_in_training() -> None:
    head = random_head(6, features=4, classes=3, dropout=0.5)
    assert head.classifier is not None
    with torch.no_grad():
        # the logits are the features, so that dropped ones can be seen
        head.classifier.weight.copy_(torch.eye(4)[:3])
        head.classifier.bias.zero_()
    x = a_map(500, 6, 2, 2)
    kept = head.eval()(x)
    trained = head.train()(x)
    dropped = trained == 0
    # 1500 draws of one half: five standard deviations are 0.065
    assert abs(dropped.double().mean().item() - 0.5) < 0.065
    assert_close(trained[~dropped], 2 * kept[~dropped])


def test_no_dropout_by_default() -> None:
    head = random_head(6, classes=3)
    x = a_map(4, 6, 5, 4)
    assert torch.equal(head.train()(x), head.eval()(x))


@pytest.mark.parametrize("channels, features, classes", [(6, None, None), (6, 5, None), (6, None, 3), (512, 256, 10)])
def test_parameters(channels: int, features: int | None, classes: int | None) -> None:
    width = features or channels
    head = DualPool(channels, features=features, classes=classes)
    count = sum(parameter.numel() for parameter in head.parameters())
    assert count == 2 * channels * width + width + (classes * (width + 1) if classes else 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": 0}, "features must be a whole number of at least 1, got 0."),
        ({"classes": 0}, "classes must be a whole number of at least 1, got 0."),
        ({"classes": 2.0}, "classes must be a whole number of at least 1, got 2.0."),
        ({"dropout": 1.1}, "dropout must be a number from 0 to 1, got 1.1."),
        ({"dropout": "0.5"}, "dropout must be a number from 0 to 1, got '0.5'."),
        ({"dropout": -0.1}, "dropout must be a number from 0 to 1, got -0.1."),
        ({"dropout": math.nan}, "dropout must be a number from 0 to 1, got nan."),
    ],
    ids=str,
)
def test_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=f"^{re.escape(f'DualPool: {message}')}$"):
        DualPool(64, **options)
