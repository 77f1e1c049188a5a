"""The operators that a compiler sees: what they compute, what they are said to return, and when they are called."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from convattn import ops
from convattn.nn import CBAM, ChannelAttention, SpatialAttention, SqueezeExcite
from convattn.ops import fused, operators
from convattn.ops.cpu import library
from convattn.ops.gates import Gates
from tolerances import assert_close

pytestmark = pytest.mark.skipif(library.WHY_NOT is not None, reason=f"no fused operators: {library.WHY_NOT}")

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "cbam": lambda: CBAM(6, reduction=2),
    "cbam, identity": lambda: CBAM(6, reduction=2, start="identity"),
    "cbam, without norm": lambda: CBAM(6, reduction=2, norm=None),
    "cbam, parallel": lambda: CBAM(6, reduction=2, order="parallel"),
    "spatial": lambda: SpatialAttention(kernel_size=3),
}


def gates_of(module: nn.Module) -> Gates:
    if isinstance(module, SpatialAttention):
        return ops.Gates(None, module.window())
    if isinstance(module, ChannelAttention):
        return ops.Gates(module.mlp(), None)
    return ops.Gates(module.channel.mlp(), module.spatial.window(), module.order == "parallel")


@pytest.mark.slow_unless(last=True, training=True, name="spatial")
@pytest.mark.slow_unless(last=True, training=False, name="cbam, parallel")
@pytest.mark.slow_unless(last=False, training=True, name="cbam")
@pytest.mark.slow_unless(last=False, training=False, name="cbam, identity")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_they_are_what_they_are_said_to_be(name: str, training: bool, last: bool) -> None:
    """PyTorch's own check: schema, what is returned for shapes alone, and the gradient as a compiler traces it."""
    module = BUILDS[name]().train(training)
    x = torch.randn(3, 6, 5, 4)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    taken: list[tuple[object, ...]] = []
    with pytest.MonkeyPatch.context() as patched:
        original = operators.gated
        patched.setattr(operators, "gated", lambda *given: taken.append(given) or original(*given))
        operators.call(x, gates_of(module), module.strength, None)
    torch.library.opcheck(operators.gated, taken[0])


@pytest.mark.parametrize("shortcut", [True, False])
def test_they_compute_what_is_computed_without_them(shortcut: bool) -> None:
    module = CBAM(6, reduction=2, start="identity")
    nn.init.constant_(module.strength, 0.7)
    x, other = (torch.randn(3, 6, 5, 4, requires_grad=True) for _ in range(2))
    dy = torch.randn(x.shape)
    inputs = [x, *([other] if shortcut else []), *module.parameters()]
    results = []
    for compute in (operators.call, lambda *given: fused.gated(ops.cpu.Kernels, *given)):
        y, moments = compute(x, gates_of(module), module.strength, other if shortcut else None)
        results.append((y, moments, *torch.autograd.grad(y, inputs, dy)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow_unless(name="cbam, identity")
@pytest.mark.parametrize("name", ["cbam", "cbam, identity"])
def test_compiled_it_is_the_same_operator(name: str) -> None:
    module = BUILDS[name]()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    dy = torch.randn(3, 6, 5, 4)
    results = []
    for one in (module, compiled):
        x = torch.ones(3, 6, 5, 4).cumsum(1).sin().requires_grad_()
        y = one(x)
        y.backward(dy)
        assert one is module or y.grad_fn.name() == "CompiledFunctionBackward"
        results.append((y, x.grad, *(p.grad for p in one.parameters()), *one.buffers()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_what_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("called an operator")

    monkeypatch.setattr(operators, "call", refuse)
    x = torch.randn(3, 6, 5, 4)
    for module, given in (
        (SqueezeExcite(6, reduction=2), x),
        (CBAM(6, reduction=2), x.contiguous(memory_format=torch.channels_last)),
        (CBAM(6, reduction=2).double(), x.double()),
    ):
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
        assert_close(compiled(given), module(given))


def test_exported_it_runs_without_the_package() -> None:
    module = CBAM(6, reduction=2).eval()
    x = torch.randn(3, 6, 5, 4)
    program = torch.export.export(module, (x,))
    assert "convattn" not in str(program.graph)
    assert_close(program.module()(x), module(x))
