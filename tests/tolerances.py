"""How close is equal: one tolerance for each dtype, the same in every test."""

from typing import Any

import torch

# (relative, absolute): a few units in the last place of elements of order 1; whole numbers are exact
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-6, 2**-6),
}


def is_close(actual: torch.Tensor, expected: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether shapes agree and all elements are within the tolerance of `dtype`, by default that of `actual`."""
    expected = torch.as_tensor(expected)
    relative, absolute = TOLERANCES.get(dtype or actual.dtype, (0.0, 0.0))
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected.double(), rtol=relative, atol=absolute
    )


def assert_close(actual: torch.Tensor, expected: Any, dtype: torch.dtype | None = None) -> None:
    """The same as an assertion, which says by how much they differ."""
    relative, absolute = TOLERANCES.get(dtype or actual.dtype, (0.0, 0.0))
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=relative, atol=absolute)
