"""What every test starts from: one thread and a fixed seed."""

import os
from collections.abc import Iterator

# read when Triton is imported, as PyTorch does; on a machine with a GPU, 0 runs the same tests there
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    # sums in another order differ in the last bit, and many processes with many threads each are slow
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operators without a deterministic implementation raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
