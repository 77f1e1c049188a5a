"""A batch norm that rides along in the passes of the gate behind it, against plain PyTorch in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convattn import attach, networks, ops
from convattn.attachment.wrapper import Attached
from convattn.nn import CBAM, ChannelAttention, SpatialAttention, SqueezeExcite
from convattn.nn.base import Gate
from convattn.ops.cpu import library
from gradients_by_name import check, gradients
from tolerances import assert_close

pytestmark = pytest.mark.skipif(library.WHY_NOT is not None, reason=f"no fused operators: {library.WHY_NOT}")

BUILDS: dict[str, Callable[[int, int], Gate]] = {
    "se": lambda c, d: SqueezeExcite(c, reduction=2, dimensions=d),
    "se, identity": lambda c, d: SqueezeExcite(c, hidden=3, bias=True, start="identity", dimensions=d),
    "channel": lambda c, d: ChannelAttention(c, reduction=2, dimensions=d),
    "channel, max": lambda c, d: ChannelAttention(c, reduction=2, pools=("max",), dimensions=d),
    "cbam": lambda c, d: CBAM(c, reduction=2, dimensions=d),
    "cbam, without norm": lambda c, d: CBAM(c, reduction=2, norm=None, kernel_size=3, dimensions=d),
    "cbam, identity": lambda c, d: CBAM(c, reduction=2, start="identity", dimensions=d),
}
each_build = pytest.mark.parametrize("name", BUILDS)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def noting(patched: pytest.MonkeyPatch) -> list[str]:
    """A note for each time that a norm rode along."""
    notes: list[str] = []
    original = ops.normed

    def noted(*given: Any) -> Any:
        found = original(*given)
        notes.append("refused" if found is None else "served")
        return found

    patched.setattr(ops, "normed", noted)
    return notes


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noting(monkeypatch)


def built(name: str, channels: int, dimensions: int = 2, **options: Any) -> Attached:
    return behind_norm(BUILDS[name](channels, dimensions), dimensions, **options)


def behind_norm(gate: nn.Module, dimensions: int, **options: Any) -> Attached:
    module = Attached(NORMS[dimensions](gate.channels, **options), gate)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2)
    return module


def in_format(x: torch.Tensor, last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in module.named_buffers()}


def check_norm(module: Attached, u: torch.Tensor, served: list[str]) -> None:
    dy = torch.randn(u.shape)
    other = copy.deepcopy(module)
    found = gradients(module, u, dy)
    assert served == ["served"]
    assert found["y"].stride() == found["x"].stride() == u.stride()
    with ops.use("reference"):
        check(other, u, dy, found)
        other(u)
    served.clear()
    # the check ran the other one in copies
    for name, one in buffers(other).items():
        assert_close(buffers(module)[name].float(), one.float())


@pytest.mark.slow_unless(training=True, last=True)
@pytest.mark.slow_unless(training=False, last=False, dimensions=2)
@each_build
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_they_are_true(name: str, dimensions: int, last: bool, training: bool, served: list[str]) -> None:
    module = built(name, 6, dimensions).train(training)
    check_norm(module, in_format(3 * torch.randn(3, 6, *[7, 5, 4][:dimensions]) + 2, last), served)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shapes_of_all_kinds(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    name = data.draw(st.sampled_from(list(BUILDS)))
    sizes = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 13)))
    # a single sample behind a norm over itself has means of nothing but rounding
    shape = (data.draw(st.integers(2, 4)), data.draw(st.integers(1, 37)), *sizes)
    module = built(name, shape[1]).train(data.draw(st.booleans()) and shape[0] * sum(sizes) > 8)
    with pytest.MonkeyPatch.context() as patched:
        check_norm(module, in_format(torch.randn(shape), data.draw(st.booleans())), noting(patched))


@pytest.mark.slow_unless(last=True)
@pytest.mark.parametrize("shape", [(2, 5000, 3, 3), (1, 3, 130, 141), (5, 1, 9, 9), (30, 70, 1, 1), (40, 64, 14, 14)])
@pytest.mark.parametrize("last", [False, True])
def test_large_and_narrow_shapes(shape: tuple[int, ...], last: bool, served: list[str]) -> None:
    module = behind_norm(CBAM(shape[1]), 2)
    for parameter in module.attention.channel.parameters():
        parameter.data.mul_(0.1)
    check_norm(module, in_format(torch.randn(shape), last), served)


@pytest.mark.slow_unless(threads=3)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("avx2", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_every_path_with_any_number_of_threads(threads: int, avx2: bool, last: bool, served: list[str]) -> None:
    loaded = library.LOADED
    before = loaded.instructions
    torch.set_num_threads(threads)
    try:
        loaded.use_avx2(avx2)
        check_norm(built("cbam", 33), in_format(torch.randn(3, 33, 45, 19), last), served)
    finally:
        loaded.use_avx2(before == "AVX2")
        torch.set_num_threads(1)


@pytest.mark.slow_unless(last=True)
@each_build
@pytest.mark.parametrize("last", [False, True])
def test_a_norm_whose_weight_is_zero_is_trained(name: str, last: bool, served: list[str]) -> None:
    # as that of the last norm of a residual branch at first: all elements of a channel are its maximum
    module = built(name, 6)
    nn.init.zeros_(module.weight)
    u = in_format(torch.randn(3, 6, 7, 5), last)
    assert float(gradients(copy.deepcopy(module), u, torch.randn(u.shape))["weight"].abs().max()) > 0
    served.clear()
    check_norm(module, u, served)


@pytest.mark.slow_unless(last=True)
@each_build
@pytest.mark.parametrize("last", [False, True])
def test_equal_maxima_share_their_gradient(name: str, last: bool, served: list[str]) -> None:
    check_norm(built(name, 6), in_format(torch.randint(-2, 3, (3, 6, 7, 5)).float(), last), served)


@each_build
def test_a_norm_without_weight_and_one_that_is_frozen(name: str, served: list[str]) -> None:
    check_norm(built(name, 6, affine=False), torch.randn(3, 6, 7, 5), served)
    module = built(name, 6)
    module.convattn_inner.eval()
    check_norm(module, torch.randn(3, 6, 7, 5), served)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None, served: list[str]) -> None:
    module = built("se", 6, momentum=momentum)
    other = copy.deepcopy(module)
    for _ in range(3):
        u = 100 + torch.randn(3, 6, 5, 4)
        module(u)
        with ops.use("reference"):
            other(u)
    assert served == ["served"] * 3
    for name, one in buffers(other).items():
        torch.testing.assert_close(buffers(module)[name], one, rtol=1e-4, atol=1e-5)


def test_what_is_far_from_zero_has_the_variance_that_it_has(served: list[str]) -> None:
    module = built("se", 3)
    u = 1000 + torch.randn(4, 3, 50, 50)
    module.running_var.zero_()
    module(u)
    assert_close(module.running_var, 0.1 * u.double().var((0, 2, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_no_number_goes_where_it_goes_in_the_reference(value: float, training: bool) -> None:
    module = built("cbam", 6).train(training)
    u = torch.randn(2, 6, 5, 4)
    u[0, 2, 1, 3] = value
    dy = torch.randn_like(u)
    with ops.use("reference"):
        expected = gradients(copy.deepcopy(module), u, dy)
    found = gradients(module, u, dy)
    # what is no number times the zeros around a map is none here, and in PyTorch that depends on the algorithm
    del found["attention.spatial.conv.weight"]
    for key, one in found.items():
        assert torch.equal(one.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("last", [False, True])
def test_mixed_precision(last: bool, served: list[str]) -> None:
    module = built("cbam", 6)
    u = in_format(torch.randn(3, 6, 9, 8).bfloat16(), last)
    dy = torch.randn(u.shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(copy.deepcopy(module), u, dy)
    assert served == ["served"]
    with ops.use("reference"):
        expected = gradients(module, u.float(), dy.float())
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    for name, one in found.items():
        error = float((one.float() - expected[name]).abs().max())
        assert error <= 0.02 * float(expected[name].abs().max()), name


def test_the_gradient_of_a_gradient() -> None:
    for training in (True, False):
        module = built("cbam", 3).double().train(training)
        u = torch.randn(2, 3, 3, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradgradcheck(module, (u,))
        single = built("cbam", 3).train(training)
        u = torch.randn(2, 3, 4, 3, requires_grad=True)
        found = []
        for backend in (None, "reference"):
            with ops.use(backend):
                (first,) = torch.autograd.grad(copy.deepcopy(single)(u).square().sum(), u, create_graph=True)
                found.append(torch.autograd.grad(first.square().sum(), u)[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


# what is kept


def kept(module: nn.Module, u: torch.Tensor) -> int:
    """The bytes of different tensors that are saved for the backward pass, parameters aside."""
    own = {one.untyped_storage().data_ptr() for one in module.parameters()}
    seen: dict[int, int] = {}

    def note(one: torch.Tensor) -> torch.Tensor:
        seen[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        y = module(u)
    assert y.grad_fn is not None
    return sum(size for place, size in seen.items() if place not in own)


def test_no_map_is_kept_but_the_norms_input() -> None:
    network = networks.resnet20()
    u = torch.randn(4, 3, 32, 32)
    plain = kept(network, u)
    attach(network, "cbam", start="paper")
    with ops.use("reference"):
        usual = kept(network, u)
    assert 0 < kept(network, u) - plain < 0.15 * (usual - plain)


# who is not served


def test_at_the_start_nothing_changes_to_the_bit(served: list[str]) -> None:
    network = networks.resnet20()
    u = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        network.train(training)
        expected = copy.deepcopy(network)(u)
        attached = attach(copy.deepcopy(network), "cbam")
        assert torch.equal(attached(u), expected)
        assert not served
        for name, one in attached.named_parameters():
            if name.endswith("strength"):
                one.data.fill_(0.5)
        attached(u)
        assert served == ["served"] * 9
        served.clear()


def watched_norm(module: Attached) -> None:
    module.convattn_inner.register_forward_hook(lambda *given: 2 * given[-1])


def watched_gate(module: Attached) -> None:
    module.attention.register_forward_pre_hook(lambda _, given: (2 * given[0],))


def own_gate(module: Attached) -> None:
    class Half(SqueezeExcite):
        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((x.shape[0], x.shape[1], 1, 1), 0.5)

    module.attention = Half(6)


def own_forward(module: Attached) -> None:
    module.attention.forward = lambda x: 3 * x


def another_norm(module: Attached) -> None:
    module.convattn_inner = nn.InstanceNorm2d(6)


def another_gate(module: Attached) -> None:
    module.attention = SpatialAttention()


def another_order(module: Attached) -> None:
    module.attention = CBAM(6, order="parallel")


def without_running_statistics(module: Attached) -> None:
    module.convattn_inner = nn.BatchNorm2d(6, track_running_stats=False)


@pytest.mark.parametrize(
    "change",
    [
        watched_norm,
        watched_gate,
        own_gate,
        own_forward,
        another_norm,
        another_gate,
        another_order,
        without_running_statistics,
    ],
)
def test_layers_of_ones_own_are_used(change: Callable[[Attached], None], served: list[str]) -> None:
    module = built("cbam", 6)
    change(module)
    u = torch.randn(3, 6, 9, 8)
    expected = copy.deepcopy(module.attention)(copy.deepcopy(module.convattn_inner)(u))
    assert torch.equal(module(u), expected)
    assert not served


def test_a_single_position_is_refused_as_ever(served: list[str]) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        built("se", 6)(torch.randn(1, 6, 1, 1))
    assert not served


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.9, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_follow_as_ever(momentum: float | None, dtype: torch.dtype) -> None:
    # float64 is left to PyTorch
    norm = nn.BatchNorm2d(5, momentum=momentum, dtype=dtype)
    other = copy.deepcopy(norm)
    for _ in range(4):
        x = 2 * torch.randn(3, 5, 4, 4, dtype=dtype) + 1
        norm(x)
        moments = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)])
        ops.follow(other.running_mean, other.running_var, other.num_batches_tracked, momentum, moments, 48)
        for name, one in buffers(norm).items():
            assert_close(buffers(other)[name], one)
    assert int(other.num_batches_tracked) == 4


def test_whoever_kept_running_statistics_for_a_gradient_is_told_that_they_changed() -> None:
    module = CBAM(6)
    kept = torch.ones(1, requires_grad=True) * module.spatial.norm.running_mean
    module(torch.randn(2, 6, 5, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.slow_unless(last=False)
@pytest.mark.parametrize("last", [False, True])
def test_two_hundred_steps_of_training_agree(last: bool, served: list[str]) -> None:
    losses = {}
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), built("cbam, identity", 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        x, labels = in_format(torch.randn(32, 3, 8, 8), last), torch.randint(3, (32,))
        losses[backend] = []
        with ops.use(backend):
            for _ in range(200):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(x), labels)
                loss.backward()
                optimizer.step()
                losses[backend].append(float(loss.detach()))
    assert served == ["served"] * 200
    assert losses["cpu"][-1] < 0.3 * losses["cpu"][0]
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-3)
