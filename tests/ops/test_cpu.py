"""The fused operators on the CPU against plain PyTorch in float64, and all that must not come between them."""

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convattn import ops
from convattn.attachment.wrapper import Attached
from convattn.errors import BackendUnavailable, InvalidOption
from convattn.nn import CBAM, ChannelAttention, DualPool, SpatialAttention, SqueezeExcite
from convattn.ops import cpu, reference
from convattn.ops.cpu import library
from gradients_by_name import check, gradients, truth
from tolerances import assert_close

pytestmark = pytest.mark.skipif(library.WHY_NOT is not None, reason=f"no fused operators: {library.WHY_NOT}")

BUILDS: dict[str, Callable[[int, int], nn.Module]] = {
    "se": lambda c, d: SqueezeExcite(c, reduction=2, dimensions=d),
    "se, identity": lambda c, d: SqueezeExcite(c, hidden=3, bias=True, start="identity", dimensions=d),
    "channel": lambda c, d: ChannelAttention(c, reduction=2, dimensions=d),
    "channel, max": lambda c, d: ChannelAttention(c, reduction=2, pools=("max",), dimensions=d),
    "channel, silu": lambda c, d: ChannelAttention(c, hidden=3, activation="silu", pools=("max", "mean"), dimensions=d),
    "channel, gelu": lambda c, d: ChannelAttention(c, hidden=3, activation="gelu", bias=False, dimensions=d),
    "se, hard": lambda c, d: SqueezeExcite(
        c, hidden=3, activation="hardswish", gate_activation="hardsigmoid", dimensions=d
    ),
    "spatial": lambda c, d: SpatialAttention(kernel_size=3, dimensions=d),
    "spatial, identity": lambda c, d: SpatialAttention(kernel_size=5, start="identity", dimensions=d),
    "cbam": lambda c, d: CBAM(c, reduction=2, dimensions=d),
    "cbam, without norm": lambda c, d: CBAM(c, reduction=2, norm=None, kernel_size=3, dimensions=d),
    "cbam, identity": lambda c, d: CBAM(c, reduction=2, start="identity", dimensions=d),
    "cbam, spatial first": lambda c, d: CBAM(c, reduction=2, order="spatial-channel", dimensions=d),
    "cbam, parallel": lambda c, d: CBAM(c, reduction=2, order="parallel", start="identity", dimensions=d),
}
each_build = pytest.mark.parametrize("name", BUILDS)


@pytest.fixture
def only_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever computes in plain PyTorch instead is found out."""

    def other(*_: Any) -> torch.Tensor:
        raise AssertionError("not the fused operators")

    with monkeypatch.context() as patched:
        patched.setattr(reference, "gated", other)
        yield


def built(name: str, channels: int, dimensions: int = 2) -> nn.Module:
    return drawn(BUILDS[name](channels, dimensions))


def drawn(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def in_format(x: torch.Tensor, last: bool) -> torch.Tensor:
    """The same map with its channels first or last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


@each_build
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_they_are_fused(name: str, dimensions: int, last: bool, training: bool, only_fused: None) -> None:
    module = built(name, 6, dimensions).train(training)
    x = in_format(torch.randn(3, 6, *[7, 5, 4][:dimensions]), last)
    dy = torch.randn(x.shape)
    found = gradients(module, x, dy)
    assert found["y"].stride() == found["x"].stride() == x.stride()
    with torch.no_grad():
        # without a graph it is the same to the bit
        assert torch.equal(module(x), found["y"])


@each_build
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_they_are_true(name: str, dimensions: int, last: bool, training: bool) -> None:
    module = built(name, 6, dimensions).train(training)
    x = in_format(torch.randn(3, 6, *[7, 5, 4][:dimensions]), last)
    assert ops.choice(x) == "cpu"
    check(module, x, torch.randn(x.shape))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shapes_of_all_kinds(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    name = data.draw(st.sampled_from(list(BUILDS)))
    dimensions = data.draw(st.integers(1, 3))
    sizes = data.draw(st.tuples(*[st.integers(1, 13)] * dimensions))
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 37)), *sizes)
    module = built(name, shape[1], dimensions).train(data.draw(st.booleans()) and shape[0] * sum(sizes) > 4)
    x = in_format(torch.randn(shape), data.draw(st.booleans()))
    assert ops.choice(x) == "cpu"
    check(module, x, in_format(torch.randn(shape), data.draw(st.booleans())))


@pytest.mark.parametrize("shape", [(2, 5000, 3, 3), (1, 3, 130, 141), (5, 1, 9, 9), (3, 70, 1, 1), (40, 64, 14, 14)])
@pytest.mark.parametrize("last", [False, True])
def test_large_and_narrow_shapes(shape: tuple[int, ...], last: bool) -> None:
    module = drawn(CBAM(shape[1]))
    for parameter in module.channel.parameters():
        parameter.data.mul_(0.1)
    x = in_format(torch.randn(shape), last)
    assert ops.choice(x) == "cpu"
    check(module, x, torch.randn(shape))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("avx2", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_every_path_with_any_number_of_threads(threads: int, avx2: bool, last: bool) -> None:
    loaded = library.LOADED
    before = loaded.instructions
    torch.set_num_threads(threads)
    try:
        assert loaded.use_avx2(avx2) == ("AVX2" if avx2 and before == "AVX2" else "portable")
        module = built("cbam", 33)
        x = in_format(torch.randn(3, 33, 45, 19), last)
        assert x.numel() > library.FEW
        check(module, x, torch.randn(x.shape))
    finally:
        loaded.use_avx2(before == "AVX2")
        torch.set_num_threads(1)


@pytest.mark.parametrize("last", [False, True])
def test_passes_from_either_end_are_the_same_to_the_bit(last: bool) -> None:
    x, dy = (in_format(torch.randn(2, 40, 60, 50), last) for _ in range(2))
    channel, spatial = torch.rand(2, 40), torch.rand(2, 60, 50)
    kernels = cpu.Kernels(x)
    top = kernels.pool(x, False, True)[0]
    planes = kernels.summarise(x, channel)
    _, _, places = kernels.grad_gates(x, dy, channel, spatial, planes[1], True)
    summary = (planes[1], planes[0] / 8, planes[1] / 8, places)
    at, _ = kernels.grad_summary(x, channel, summary, top, torch.zeros(2, 40))

    def summarised() -> list[torch.Tensor | None]:
        dchannel = torch.zeros(2, 40)
        return [*kernels.grad_summary(x, channel, summary, top, dchannel), dchannel]

    def normed() -> list[torch.Tensor]:
        pooled, kept = kernels.normalise(x, ops.Norm(None, None, None, None, training=True, eps=1e-5))
        return [pooled, *kept]

    passes: dict[str, Callable[[], Any]] = {
        "pool": lambda: [kernels.pool(x, True, True)],
        "summarise": lambda: [kernels.summarise(x, channel)],
        "apply": lambda: [kernels.apply(x, channel, spatial, None)],
        "grad_gates": lambda: kernels.grad_gates(x, dy, channel, spatial, planes[1], True),
        "grad_summary": summarised,
        "grad_input": lambda: [kernels.grad_input(x, dy, channel, spatial, summary, (top, top / 8, top / 8, at))],
        "statistics": normed,
    }
    for name, one in passes.items():
        directions, found = [], []
        for _ in range(2):
            found.append(one())
            directions.append(kernels.back)
        assert sorted(directions) == [False, True]
        for first, second in zip(*found, strict=True):
            assert (first is None and second is None) or torch.equal(first, second), name


@each_build
@pytest.mark.parametrize("last", [False, True])
def test_equal_maxima_share_their_gradient(name: str, last: bool) -> None:
    # of few different values, most maxima are in several places
    x = in_format(torch.randint(-1, 2, (3, 9, 6, 5)).float(), last)
    module = built(name, 9)
    check(module, x, torch.randn(x.shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["se", "channel", "spatial", "cbam", "cbam, identity"])
def test_what_is_no_number_goes_where_it_goes_in_the_reference(name: str, last: bool, value: float) -> None:
    module = built(name, 20).eval()
    x = torch.randn(2, 20, 9, 8)
    x[1, 13, 4, 5] = value
    x = in_format(x, last)
    with torch.no_grad():
        found = module(x)
        with ops.use("reference"):
            expected = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@each_build
def test_bfloat16(name: str, only_fused: None) -> None:
    module = built(name, 16).to(torch.bfloat16)
    x = torch.randn(2, 16, 9, 9).to(torch.bfloat16)
    found = gradients(module, x, torch.ones_like(x))
    assert {one.dtype for one in found.values()} == {torch.bfloat16}


@each_build
def test_bfloat16_is_near_the_truth(name: str) -> None:
    module = built(name, 16).to(torch.bfloat16)
    x, dy = (torch.randn(2, 16, 9, 9).to(torch.bfloat16) for _ in range(2))
    found, expected = gradients(module, x, dy), truth(module, x, dy)
    for key in ("y", "x"):
        # both halves round what is between them
        error = (found[key].double() - expected[key]).norm() / expected[key].norm()
        assert error < 0.02, key


def test_a_strength_of_zero_changes_no_bit(only_fused: None) -> None:
    for name in ("se, identity", "cbam, identity"):
        module = built(name, 8)
        nn.init.zeros_(module.strength)
        x = torch.randn(2, 8, 6, 6) * 10.0 ** torch.randint(-30, 30, (2, 8, 6, 6))
        assert torch.equal(module(x), x)


# what autograd may ask for


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "se, hard"])  # PyTorch has none of hardsigmoid
def test_gradients_of_gradients(name: str) -> None:
    module = built(name, 4).double()
    plain = copy.deepcopy(module).float()
    x = torch.randn(2, 4, 5, 3)

    def second(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        first = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), [x, *module.parameters()]))

    for found, expected in zip(second(plain, x.clone()), second(module, x.double()), strict=True):
        assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


@each_build
def test_backward_twice(name: str, only_fused: None) -> None:
    module = built(name, 4)
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    y = module(x)
    first, second = (torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # after one that asked for less
    torch.autograd.grad(y.sum(), list(module.parameters()), retain_graph=True)
    third = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(first, third, strict=True))


@each_build
def test_some_gradients_only(name: str) -> None:
    module = built(name, 4)
    x, dy = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    every = gradients(module, x, dy)
    leaf = x.clone().requires_grad_()
    (alone,) = torch.autograd.grad(module(leaf), [leaf], dy)
    assert torch.equal(alone, every["x"])
    of_parameters = torch.autograd.grad(module(x), list(module.parameters()), dy)
    for found, (key, _) in zip(of_parameters, module.named_parameters(), strict=True):
        assert torch.equal(found, every[key])
    module.requires_grad_(False)
    (alone,) = torch.autograd.grad(module(leaf), [leaf], dy)
    assert torch.equal(alone, every["x"])
    assert not module(x).requires_grad


def test_a_map_that_is_used_elsewhere_too() -> None:
    module = built("cbam", 4)
    x = torch.randn(2, 4, 5, 3)

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (module(x) * x + x.exp() * module(2 * x)).sum()

    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    loss(module, leaf).backward()
    loss(copy.deepcopy(module).double(), double).backward()
    assert_close(leaf.grad, double.grad, torch.float32)


class Stop(torch.autograd.Function):
    """The same, with no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("before", [nn.Identity, lambda: nn.BatchNorm2d(6)])
def test_where_no_gradient_comes_none_goes(before: Callable[[], nn.Module]) -> None:
    module = Attached(before(), CBAM(6))
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    Stop.apply(module(x)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is None for one in (x, *module.parameters()))


def test_many_gradients_at_once() -> None:
    module = built("cbam", 4).eval()
    x, several = torch.randn(2, 4, 5, 3, requires_grad=True), torch.randn(3, 2, 4, 5, 3)
    y = module(x)
    (found,) = torch.autograd.grad(y, [x], several, is_grads_batched=True, retain_graph=True)
    assert_close(found, torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in several]))


def test_checkpointing() -> None:
    module = built("cbam", 4)
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    expected = torch.autograd.grad(module(x).sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)


def test_a_change_in_place_is_found() -> None:
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    z = x * 1
    y = built("cbam", 4)(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_for_the_backward_pass_are_the_map_and_small_maps() -> None:
    x = torch.randn(4, 64, 20, 20, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(one: torch.Tensor) -> torch.Tensor:
        saved[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        built("cbam", 64)(x)
    del saved[x.untyped_storage().data_ptr()]
    assert sum(saved.values()) < 0.25 * x.untyped_storage().nbytes()


# how a map may lie in memory, and who may read along


def test_maps_that_are_not_in_one_piece(only_fused: None) -> None:
    module = built("cbam", 4).eval()
    whole = torch.randn(2, 8, 10, 6)
    for x in (whole[:, ::2], whole[:, :4, ::2], whole.transpose(2, 3)[:, :4], whole[:, :4].flip(3)):
        assert torch.equal(module(x), module(x.contiguous()))


def test_weights_in_channels_last(only_fused: None) -> None:
    module = built("cbam", 8).eval()
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    expected = module(x)
    assert_close(module.to(memory_format=torch.channels_last)(x), expected)


def test_an_empty_batch() -> None:
    module = built("cbam", 4).eval()
    x = torch.randn(0, 4, 5, 3, requires_grad=True)
    assert ops.choice(x) == "reference"
    module(x).sum().backward()
    assert x.grad.shape == x.shape


def test_automatic_mixed_precision() -> None:
    module = built("cbam", 8)
    for x in (torch.randn(2, 8, 9, 7), torch.randn(2, 8, 9, 7).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ops.choice(x) == "cpu"
            found = module(x)
            with ops.use("reference"):
                expected = module(x)
        assert found.dtype == x.dtype
        assert_close(found, expected, torch.bfloat16)


def test_deterministic(deterministic: None) -> None:
    module = built("cbam", 8)
    x = torch.randn(2, 8, 40, 40)
    first, second = gradients(module, x, torch.ones_like(x)), gradients(module, x, torch.ones_like(x))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_transforms_of_functions() -> None:
    module = built("cbam", 4).eval()
    x = torch.randn(3, 2, 4, 5, 5)
    with torch.no_grad():
        mapped = torch.func.vmap(module)(x)
        assert_close(mapped, torch.stack([module(one) for one in x]))
    slope = torch.func.grad(lambda x: module(x).sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    module(leaf).sum().backward()
    assert_close(slope, leaf.grad)
    _, forward = torch.func.jvp(module, (x[0],), (torch.ones_like(x[0]),))
    assert forward.shape == x[0].shape


# the choice


def test_the_choice() -> None:
    x = torch.randn(1, 2, 3, 3)
    assert ops.choice(x) == "cpu"
    assert ops.choice(x.double()) == ops.choice(x.half()) == ops.choice(x.to("meta")) == "reference"
    with ops.use("reference"):
        assert ops.choice(x) == "reference"
        with ops.use(None):
            assert ops.choice(x) == "cpu"
    with ops.use("cpu"), pytest.raises(BackendUnavailable, match=r"cpu does not serve this: it is for float32 and bfl"):
        built("se", 2).double()(x.double())
    with pytest.raises(InvalidOption, match="expected one of reference, cpu, cuda, got 'gpu'"), ops.use("gpu"):
        pass


def test_the_choice_by_environment() -> None:
    asks = "import torch; from convattn import ops; print(ops.choice(torch.ones(1, 2, 3, 3)))"
    for backend, said in (("reference", "reference\n"), ("quick", "CONVATTN_BACKEND: expected one of"), ("", "cpu\n")):
        environment = os.environ | {"CONVATTN_BACKEND": backend}
        ran = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True)
        assert said in ran.stdout + ran.stderr
        assert (ran.returncode == 0) == (backend != "quick")


def test_what_the_kernels_are_called_with() -> None:
    follow = library.FUNCTIONS["follow", torch.float32]
    mean, tracked = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    wrong: list[tuple[list[Any], type[Exception], str]] = [
        ([1, 2], TypeError, "expected 7 arguments, got 2"),
        ([1, 2, 0.1, "moments", mean, mean, tracked], AttributeError, "data_ptr"),
        ([1, 2.5, 0.1, mean, mean, mean, tracked], TypeError, "integer"),
        ([1 << 64, 2, 0.1, mean, mean, mean, tracked], OverflowError, "too big"),
    ]
    for arguments, error, words in wrong:
        with pytest.raises(error, match=words):
            follow(*arguments)
    moments, var = torch.tensor([3.0, 5.0]), torch.ones(1)
    follow(1, 2, 0.5, moments, mean.data_ptr(), var, tracked)
    assert (mean.item(), var.item(), tracked.item()) == (1.5, 5.5, 1)


def test_a_weight_that_is_no_parameter(only_fused: None) -> None:
    module = built("se", 4)
    x = torch.randn(2, 4, 5, 5)
    expected = module(x)
    weight = module.fc1.weight.detach()
    del module.fc1.weight
    module.fc1.weight = weight
    assert_close(module(x), expected)


def test_without_the_library_it_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LOADED", None)
    monkeypatch.setattr(library, "WHY_NOT", "it was not compiled")
    x = torch.randn(1, 2, 3, 3)
    assert ops.choice(x) == "reference"
    built("se", 2)(x)
    with ops.use("cpu"), pytest.raises(BackendUnavailable, match="it was not compiled"):
        ops.choice(x)


def test_a_gate_of_ones_own_is_used() -> None:
    class Half(SqueezeExcite):
        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((x.shape[0], x.shape[1], 1, 1), 0.5)

    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(Half(4)(x), x / 2)


# threads and processes


def test_two_threads_at_once() -> None:
    torch.set_num_threads(2)
    module, x = built("cbam", 16).eval(), torch.randn(4, 16, 40, 40)
    expected = gradients(module, x, x)["x"]
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(gradients(module, x, x)["x"] for _ in range(20))) for _ in range(2)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        torch.set_num_threads(1)
    assert len(found) == 40 and all(torch.equal(one, expected) for one in found)


class Gated(torch.utils.data.Dataset[torch.Tensor]):
    """Images that go through a gate in the process that loads them."""

    def __init__(self) -> None:
        self.module = built("cbam", 16).eval()
        self.x = torch.randn(6, 16, 60, 60)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(self.x[place : place + 1])[0]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_process_that_was_forked_after_use() -> None:
    torch.set_num_threads(2)
    try:
        images = Gated()
        expected = torch.stack([images[place] for place in range(6)])
        loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2, multiprocessing_context="fork")
        assert_close(torch.cat(list(loader)), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("last", [False, True])
def test_two_hundred_steps_of_training_agree(last: bool) -> None:
    losses = {}
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), CBAM(8, reduction=2), nn.Flatten(), nn.Linear(8 * 36, 3))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        x, labels = in_format(torch.randn(32, 3, 8, 8), last), torch.randint(3, (32,))
        losses[backend] = []
        with ops.use(backend):
            for _ in range(200):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(x), labels)
                loss.backward()
                optimizer.step()
                losses[backend].append(float(loss.detach()))
    assert losses["cpu"][-1] < 0.3 * losses["cpu"][0]
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-3)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_mean_max_pooling(dimensions: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = DualPool(11, features=4, dimensions=dimensions)
    x = in_format(torch.randn(3, 11, *[7, 5, 4][:dimensions]), last)
    x.flatten(2)[0, 2, :3] = 9
    expected = truth(head, x, dy := torch.randn(3, 4))
    monkeypatch.setattr(reference, "mean_max", None)
    for name, found in gradients(head, x, dy).items():
        assert_close(found, expected[name].float())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["se", "cbam", "cbam, parallel", "spatial, identity"])
def test_a_shortcut_is_added_and_rectified_in_the_same_pass(name: str, last: bool) -> None:
    module = built(name, 6)
    spatial = module if isinstance(module, SpatialAttention) else getattr(module, "spatial", None)
    channel = None if isinstance(module, SpatialAttention) else getattr(module, "channel", module)
    mlp = None
    if isinstance(channel, SqueezeExcite):
        mlp = ops.Mlp(("mean",), "relu", "sigmoid", channel.fc1.weight, None, channel.fc2.weight, None)
    elif channel is not None:
        mlp = channel.mlp()
    gates = ops.Gates(mlp, None if spatial is None else spatial.window(), name == "cbam, parallel")
    x, shortcut = (in_format(torch.randn(3, 6, 5, 4), last).requires_grad_() for _ in range(2))
    dy = torch.randn(x.shape)
    y, _ = ops.gated(x, gates=gates, strength=module.strength, shortcut=shortcut)
    expected = torch.relu(module(x) + shortcut)
    assert_close(y, expected)
    inputs = [x, shortcut, *module.parameters()]
    found = torch.autograd.grad(y, inputs, dy)
    for one, two in zip(found, torch.autograd.grad(expected, inputs, dy), strict=True):
        assert_close(one, two)
    # the gradient of the gradient, too
    y, _ = ops.gated(x, gates=gates, strength=module.strength, shortcut=shortcut)
    (again,) = torch.autograd.grad(y, shortcut, dy.requires_grad_(), create_graph=True)
    assert_close(torch.autograd.grad(again.sum(), dy)[0], (y > 0).to(y.dtype))


@pytest.mark.parametrize("momentum", [0.01, 0.3, None])
def test_the_norm_is_trained_as_ever(momentum: float | None) -> None:
    module = built("cbam", 6)
    module.spatial.norm.momentum = momentum
    other = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(3, 6, 5, 4)
        module(x)
        with ops.use("reference"):
            other(x)
    for (name, one), two in zip(module.named_buffers(), other.buffers(), strict=True):
        assert one.dtype == two.dtype, name
        assert_close(one, two)


def test_running_statistics_that_change_before_the_backward_pass_are_found() -> None:
    module = built("cbam", 6).eval()
    x = torch.randn(3, 6, 5, 4, requires_grad=True)
    y = module(x)
    module.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def changed_norm(module: CBAM) -> None:
    module.spatial.norm = nn.InstanceNorm2d(1)


def changed_convolution(module: CBAM) -> None:
    module.spatial.conv.dilation = (2, 2)
    module.spatial.conv.padding = (6, 6)


def changed_layer(module: CBAM) -> None:
    module.channel.fc1 = nn.Sequential(module.channel.fc1, nn.Dropout(0.0))


def watched_layer(module: CBAM) -> None:
    module.channel.fc2.register_forward_hook(lambda *given: 2 * given[-1])


def parametrised(module: CBAM) -> None:
    nn.utils.parametrizations.weight_norm(module.channel.fc1)


def without_running_statistics(module: CBAM) -> None:
    module.spatial.norm = nn.BatchNorm2d(1, track_running_stats=False)


@pytest.mark.parametrize(
    "change",
    [
        changed_norm,
        changed_convolution,
        changed_layer,
        watched_layer,
        parametrised,
        without_running_statistics,
    ],
)
def test_layers_of_ones_own_are_used(change: Callable[[CBAM], None]) -> None:
    module = built("cbam", 6)
    change(module)
    x = torch.randn(3, 6, 19, 18)
    with ops.use("reference"):
        expected = copy.deepcopy(module)(x)
    assert torch.equal(module(x), expected)


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0


@pytest.mark.slow
@pytest.mark.skipif(memory_gb() < 20, reason="it takes 14 GB of memory")
@pytest.mark.parametrize("last", [False, True])
def test_more_elements_than_32_bits_count(last: bool, only_fused: None) -> None:
    channels, side = 300, 2700
    x = torch.zeros(1, channels, side, side, dtype=torch.bfloat16)
    if last:
        x = torch.zeros(1, side, side, channels, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    x[0, -2:] = torch.randn(2, side, side)
    x[0, :, -1, -1] = torch.randn(channels)
    module = built("cbam", channels).eval()
    module.channel.fc1.weight.data.mul_(0.1)
    # the poolings, the summary and the product, one channel after the other
    with torch.no_grad():
        pooled = [torch.stack([x[0, c].float().mean() for c in range(channels)])[None], x.amax((2, 3)).float()]
        channel = module.channel.of_pools(pooled)[0]
        total, top = torch.zeros(side, side), torch.full((side, side), -torch.inf)
        for c in range(channels):
            gated = x[0, c].float() * channel[c]
            total, top = total + gated, torch.maximum(top, gated)
        spatial = module.spatial.of_summary(torch.stack([total / channels, top])[None])[0, 0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        for c in (0, channels - 2, channels - 1):
            assert_close(y[0, c], (x[0, c].float() * channel[c] * spatial).bfloat16())
    assert y[0, -1, -1, -1] != 0
    del y
    # the gradient, of a gate that is the same everywhere in a channel
    se = built("se", channels)
    se.fc1.weight.data.mul_(0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = se(x.requires_grad_())
    (found,) = torch.autograd.grad(y, x, x.detach())
    del y
    leaf = pooled[0].clone().requires_grad_()
    gate = se._excite([leaf])
    dgate = torch.stack([x[0, c].detach().float().square().sum() for c in range(channels)])[None]
    (dpooled,) = torch.autograd.grad(gate, leaf, dgate)
    for c in (0, channels - 2, channels - 1):
        expected = x[0, c].detach().float() * gate[0, c] + dpooled[0, c] / side**2
        assert_close(found[0, c], expected.detach().bfloat16())
