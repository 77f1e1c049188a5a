"""What every test starts from: one thread and a fixed seed."""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "slow_unless(**values): parameters are slow but for these: of each name one value or a list of values, "
        "`id` the whole id; of several such marks one is enough",
    )


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, Any, Any]:
    items = yield
    if isinstance(items, list):
        mark_slow(items)
    return items


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Marks the tests of one function as slow that no `slow_unless` of it allows; each has to allow one."""
    tests = [item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    allowed = set()
    for mark in tests[0].iter_markers("slow_unless") if tests else ():
        fast = {test for test in tests if is_allowed(test, mark.kwargs) and not test.get_closest_marker("slow")}
        assert fast, f"{tests[0].nodeid} has no fast parameters like {mark.kwargs}"
        allowed |= fast
    for test in tests:
        if test.get_closest_marker("slow_unless") and test not in allowed:
            test.add_marker(pytest.mark.slow)


def is_allowed(test: pytest.Function, values: dict[str, Any]) -> bool:
    parameters = {**test.callspec.params, "id": test.callspec.id}
    return all(
        parameters[name] in value if isinstance(value, list) else parameters[name] == value
        for name, value in values.items()
    )
