"""Tensors whose numbers are not those in their memory: the negatives that PyTorch makes lazily, and its zeros."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from convattn import attach, ops
from convattn.nn import CBAM, ChannelAttention, DualPool, SpatialAttention, SqueezeExcite
from tolerances import assert_close

MODULES: dict[str, Callable[[], nn.Module]] = {
    "se": lambda: SqueezeExcite(8, reduction=2, bias=True, start="identity"),
    "channel": lambda: ChannelAttention(8, reduction=2),
    "spatial": lambda: SpatialAttention(start="identity"),
    "cbam": lambda: CBAM(8, reduction=2, start="identity"),
    "dual": lambda: DualPool(8),
}


def negative(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, as the lazy negative of what lies in memory."""
    y = torch._neg_view(-x)
    assert y.is_neg() and torch.equal(y, x)
    return y


def module(name: str) -> nn.Module:
    one = MODULES[name]()
    if isinstance(getattr(one, "strength", None), nn.Parameter):
        nn.init.constant_(one.strength, 0.7)
    return one


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_map_and_gradient(name: str, training: bool) -> None:
    one, x = module(name).train(training), torch.randn(2, 8, 5, 6)
    results = []
    for given in (x, negative(x)):
        other = copy.deepcopy(one)
        leaf = given.detach().requires_grad_(True)
        y = other(leaf)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y)
        # the gradient comes as a negative too
        y.backward(dy if given is x else negative(dy))
        results.append([y, leaf.grad, *(parameter.grad for parameter in other.parameters())])
    assert all(found is not None for found in results[0])
    for found, expected in zip(*results[::-1], strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("name", MODULES)
def test_parameters_and_statistics(name: str) -> None:
    one, x = module(name).eval(), torch.randn(2, 8, 5, 6)
    expected = one(x)
    tensors = {**dict(one.named_parameters()), **dict(one.named_buffers())}
    for key, value in tensors.items():
        if value.is_floating_point():
            found = torch.func.functional_call(one, {key: negative(value.detach())}, (x,))
            assert_close(found, expected)


def test_norm_in_front() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    attach(model, "cbam", at="layer", where="1", example=torch.randn(2, 3, 9, 9))
    nn.init.constant_(model[1].attention.strength, 0.7)
    u = torch.randn(2, 8, 5, 6)
    expected = model[1](u)
    assert_close(model[1](negative(u)), expected)
    norm = model[1].inner
    norm.running_mean = negative(norm.running_mean)
    assert_close(model[1](u), expected)


def test_zeros_that_lie_nowhere() -> None:
    one, x = module("cbam"), torch.randn(2, 8, 5, 6, requires_grad=True)
    one(x).backward(torch._efficientzerotensor((2, 8, 5, 6)))
    assert not x.grad.any() and not any(parameter.grad.any() for parameter in one.parameters())


def test_operator_for_compilers() -> None:
    one, x = module("cbam").eval(), torch.randn(2, 8, 5, 6)
    with ops.use("reference"):
        expected = one(x)
    compiled = torch.compile(one, backend="aot_eager")
    assert_close(compiled(negative(x)), expected)
