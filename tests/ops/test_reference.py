"""The reference operators against NumPy."""

import numpy as np
import pytest
import torch

from convattn import ops
from convattn.errors import InvalidOption
from tolerances import assert_close

POOLS = {
    "mean": lambda rows: rows.sum(-1) / rows.shape[-1],
    "max": lambda rows: np.sort(rows, axis=-1)[..., -1],
    "l2": lambda rows: np.sqrt((rows**2).sum(-1)),
    "logsumexp": lambda rows: np.log(np.exp(rows).sum(-1)),
}
each_size = pytest.mark.parametrize("size", [(7,), (5, 4), (2, 3, 4), (1,), (1, 1)], ids=str)


def a_map(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) - 1


def test_every_pool_is_tested() -> None:
    assert tuple(POOLS) == ops.POOLS


@each_size
@pytest.mark.parametrize("pool", POOLS)
def test_squeeze(size: tuple[int, ...], pool: str) -> None:
    x = a_map(3, 6, *size)
    assert_close(ops.squeeze(x, pool), POOLS[pool](x.numpy().reshape(3, 6, -1)))


def test_logsumexp_does_not_overflow() -> None:
    # exp(1000) is infinite in float64
    x = torch.full((1, 1, 2, 2), 1000.0, dtype=torch.float64)
    assert_close(ops.squeeze(x, "logsumexp"), np.array([[1000 + np.log(4)]]))


@each_size
def test_mean_max(size: tuple[int, ...]) -> None:
    x = a_map(3, 6, *size)
    rows = x.numpy().reshape(3, 6, -1)
    assert_close(ops.mean_max(x), np.concatenate([rows.mean(-1), rows.max(-1)], axis=1))


@each_size
def test_spatial_summary(size: tuple[int, ...]) -> None:
    x = a_map(3, 6, *size)
    expected = np.stack([x.numpy().mean(1), x.numpy().max(1)], axis=1)
    assert_close(ops.spatial_summary(x), expected)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_broadcast(spatial: int) -> None:
    gate = a_map(3, 6)
    y = ops.broadcast(gate, spatial)
    assert y.shape == (3, 6, *[1] * spatial)
    assert torch.equal(y.flatten(1), gate)


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.25, 1.0, 3.0])
def test_blend(strength: float) -> None:
    gate = torch.rand(3, 6, 1, 1, dtype=torch.float64)
    blended = ops.blend(gate, torch.tensor([strength], dtype=torch.float64))
    assert_close(blended, (1 - strength) + strength * gate.numpy())
    assert ops.blend(gate, None) is gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_apply_gate(dtype: torch.dtype) -> None:
    x, gate = torch.randn(3, 6, 5, 4, dtype=dtype), torch.rand(3, 6, 1, 1)
    assert torch.equal(ops.apply_gate(x, gate), x * gate.to(dtype))
    # a gate in another dtype does not change that of the map
    assert ops.apply_gate(x, gate).dtype == dtype
    assert torch.equal(ops.apply_gate(x, gate, torch.zeros(1)), x)


def test_equal_maxima_share_the_gradient() -> None:
    x = torch.tensor([[[1.0, 2.0, 2.0, 2.0]]], requires_grad=True)
    ops.squeeze(x, "max").sum().backward()
    assert x.grad is not None
    assert_close(x.grad, np.array([[[0, 1 / 3, 1 / 3, 1 / 3]]]))


def test_unknown_pool() -> None:
    with pytest.raises(InvalidOption, match="pool must be one of mean, max, l2, logsumexp, got avg"):
        ops.squeeze(a_map(1, 2, 3), "avg")


def test_blend_where_pooling_overflowed() -> None:
    gate = torch.tensor([0.25, torch.nan])
    assert torch.equal(ops.blend(gate, torch.zeros(1)), torch.ones(2))
    assert torch.equal(ops.blend(gate, torch.ones(1)), torch.tensor([0.25, 1.0]))
    # without strength nothing is hidden
    assert ops.blend(gate, None).isnan().tolist() == [False, True]
