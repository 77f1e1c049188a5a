"""The operators in Triton against plain PyTorch: in Triton's interpreter, or on a GPU where TRITON_INTERPRET is 0."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from convattn import ops
from convattn.attachment.wrapper import Attached
from convattn.errors import BackendUnavailable
from convattn.nn import CBAM, ChannelAttention, SpatialAttention, SqueezeExcite
from convattn.ops import backends, cuda, fused, reference
from convattn.ops.gates import Gates, Norm
from gradients_by_name import check, gradients, truth
from tolerances import assert_close

pytest.importorskip("triton")
DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"

BUILDS: dict[str, Callable[[int, int], nn.Module]] = {
    "se": lambda c, d: SqueezeExcite(c, reduction=2, dimensions=d),
    "channel": lambda c, d: ChannelAttention(c, reduction=2, start="identity", dimensions=d),
    "channel, max": lambda c, d: ChannelAttention(c, reduction=2, pools=("max",), dimensions=d),
    "spatial": lambda c, d: SpatialAttention(kernel_size=3, dimensions=d),
    "cbam": lambda c, d: CBAM(c, reduction=2, dimensions=d),
    "cbam, without norm": lambda c, d: CBAM(c, reduction=2, norm=None, kernel_size=3, dimensions=d),
    "cbam, 3 wide": lambda c, d: CBAM(c, reduction=2, kernel_size=3, dimensions=d),
    "cbam, identity": lambda c, d: CBAM(c, reduction=2, kernel_size=3, start="identity", dimensions=d),
    "cbam, parallel": lambda c, d: CBAM(
        c, reduction=2, kernel_size=3, order="parallel", start="identity", dimensions=d
    ),
}
each_build = pytest.mark.parametrize("name", BUILDS)


@pytest.fixture(autouse=True, scope="module")
def without_checks_for_overflow() -> Iterator[None]:
    """A third of the interpreter's time goes into them, and what is counted here is small."""
    from triton.runtime.interpreter import interpreter_builder as interpreter

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "options", dataclasses.replace(interpreter.options, sanitize_overflow=False))
        yield


def built(name: str, channels: int, dimensions: int = 2) -> nn.Module:
    return drawn(BUILDS[name](channels, dimensions))


def drawn(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(DEVICE)


def described(module: nn.Module) -> Gates:
    taken: list[Gates] = []
    with pytest.MonkeyPatch.context() as patched:
        original = ops.gated
        patched.setattr(ops, "gated", lambda *given, **more: taken.append(more["gates"]) or original(*given, **more))
        module(torch.randn(2, module.channels or 4, *[3] * module.dimensions, device=DEVICE))
    return taken[0]


def results(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient, by name, by the kernels."""
    gates = described(module)
    x = x.detach().requires_grad_()
    y, _ = fused.gated(cuda.Kernels, x, gates, module.strength)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [x, *parameters], dy)
    return dict(zip(["y", "x", *names], [y.detach(), *found], strict=True))


def check_kernels(name: str, x: torch.Tensor, training: bool = True) -> None:
    check_module(built(name, x.shape[1], x.dim() - 2).train(training), x)


def check_module(module: nn.Module, x: torch.Tensor) -> None:
    x = x.to(DEVICE)
    dy = torch.randn_like(x)
    found = results(module, x, dy)
    assert found["y"].stride() == found["x"].stride() == x.stride()
    check(module, x, dy, found)


@pytest.mark.slow_unless(training=True, last=True, name=["se", "channel", "channel, max", "spatial"])
@pytest.mark.slow_unless(training=False, last=True, name="cbam")
@pytest.mark.slow_unless(training=False, last=False, name="cbam, parallel")
@pytest.mark.slow_unless(training=True, last=False, name="cbam, 3 wide")
@each_build
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_they_are_true(name: str, last: bool, training: bool) -> None:
    x = torch.randn(3, 6, 7, 5)
    check_kernels(name, x.contiguous(memory_format=torch.channels_last) if last else x, training)


@pytest.mark.slow_unless(gate="hardsigmoid", activation="gelu")
@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish"])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_activations(activation: str, gate: str) -> None:
    module = SqueezeExcite(6, hidden=5, bias=True, activation=activation, gate_activation=gate)
    check_module(drawn(module), torch.randn(40, 6, 3, 2))


SHAPES = [
    ("cbam", (2, 70, 13, 11)),
    ("cbam, 3 wide", (2, 9, 17, 19)),
    ("cbam", (2, 5, 300)),
    ("cbam, 3 wide", (2, 3, 5, 70)),
    ("channel", (40, 9, 3, 3)),
    ("cbam, 3 wide", (2, 4, 3, 4, 5)),
    # the interpreter takes long for each of the many neighbours
    pytest.param("cbam", (2, 4, 3, 4, 5), marks=pytest.mark.slow),
]


@pytest.mark.slow_unless(last=True, shape=[(2, 70, 13, 11), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize(("name", "shape"), [*SHAPES, ("cbam", (1, 130, 1, 1))])
@pytest.mark.parametrize("last", [False, True])
def test_more_than_a_block_and_less(name: str, shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape)
    check_kernels(name, x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x, training=False)


@pytest.mark.slow_unless(last=True, name=["channel", "channel, max", "spatial", "cbam"])
@each_build
@pytest.mark.parametrize("last", [False, True])
def test_equal_maxima_share_their_gradient(name: str, last: bool) -> None:
    x = torch.randint(-2, 3, (3, 6, 7, 5)).float()
    check_kernels(name, x.contiguous(memory_format=torch.channels_last) if last else x)


# the interpreter's numpy says so of what a GPU is silent about
@pytest.mark.slow_unless(id=["se-nan", "channel-nan", "spatial-nan", "cbam-inf"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["se", "channel", "spatial", "cbam"])
def test_what_is_no_number_goes_where_it_goes_in_the_reference(name: str, value: float) -> None:
    module = built(name, 6).eval()
    x = torch.randn(2, 6, 5, 4, device=DEVICE)
    x[0, 2, 1, 3] = value
    dy = torch.randn_like(x)
    with ops.use("reference"):
        expected = gradients(module, x, dy)
    for key, one in results(module, x, dy).items():
        two = expected[key]
        assert torch.equal(one.isnan(), two.isnan()), key
        assert_close(one[~one.isnan()], two[~two.isnan()])


@pytest.mark.slow_unless(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    module = built("cbam", 6)
    x = torch.randn(3, 6, 7, 5, device=DEVICE).to(dtype)
    dy = torch.randn_like(x)
    expected = truth(module, x, dy)
    for name, one in results(module, x, dy).items():
        error = float((one.double() - expected[name]).abs().max())
        assert error <= 4 * torch.finfo(dtype).eps * float(expected[name].abs().max()), name


@pytest.mark.parametrize("last", [False, True])
def test_a_shortcut(last: bool) -> None:
    module = built("cbam", 6)
    gates = described(module)
    x, other = torch.randn(2, 3, 6, 7, 5, device=DEVICE)
    if last:
        x, other = (one.contiguous(memory_format=torch.channels_last) for one in (x, other))
    y, _ = fused.gated(cuda.Kernels, x, gates, None, other)
    with ops.use("reference"):
        assert_close(y, torch.relu(module(x) + other))


@pytest.mark.slow_unless(training=True, last=True, name=["se", "cbam"])
@pytest.mark.slow_unless(training=False, last=False, name="channel, max")
@pytest.mark.slow_unless(training=False, last=True, name="cbam, 3 wide")
@pytest.mark.parametrize("name", [one for one in BUILDS if one != "spatial" and one != "cbam, parallel"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_rides_along(name: str, last: bool, training: bool) -> None:
    check_norm(name, 3 * torch.randn(3, 6, 7, 5) + 2, last, training)


@pytest.mark.slow_unless(last=True, shape=(2, 4, 3, 4, 5))
@pytest.mark.parametrize(("name", "shape"), SHAPES)
@pytest.mark.parametrize("last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_norm_of_more_than_a_block_and_less(name: str, shape: tuple[int, ...], last: bool) -> None:
    check_norm(name, torch.randn(shape), last, training=True)


@pytest.mark.slow_unless(name=["se", "channel"])
@pytest.mark.parametrize("name", ["se", "channel", "cbam"])
def test_a_norm_with_weights_of_0_as_a_residual_block_may_begin(name: str) -> None:
    check_norm(name, torch.randn(3, 6, 7, 5), last=True, training=True, zeros=3)


def check_norm(name: str, u: torch.Tensor, last: bool, training: bool, zeros: int = 0) -> None:
    u = (u.movedim(1, -1).contiguous().movedim(-1, 1) if last else u).to(DEVICE)
    channels, dimensions = u.shape[1], u.dim() - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](channels)
    module = nn.Sequential(norm, built(name, channels, dimensions)).to(DEVICE).train(training)
    for one in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(one)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    norm.weight.data[:zeros] = 0
    dy = torch.randn_like(u)
    given = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, training, norm.eps)
    leaf = u.detach().requires_grad_()
    y, _, moments = fused.normed(cuda.Kernels, leaf, given, described(module[1]), module[1].strength)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [leaf, *parameters], dy)
    assert y.stride() == u.stride()
    check(module, u, dy, dict(zip(["y", "x", *names], [y.detach(), *found], strict=True)))
    if training:
        dims = [0, *range(2, u.dim())]
        assert_close(moments, torch.stack([u.mean(dims), u.var(dims, correction=0)]))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules run through the kernels wherever their maps lie."""
    monkeypatch.setattr(backends, "choice", lambda x: "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("gradient", [True, False])
def test_running_statistics_follow(momentum: float | None, gradient: bool, served: None) -> None:
    norm = nn.BatchNorm2d(70, momentum=momentum)
    attention = CBAM(70, reduction=16, kernel_size=3)
    attention.spatial.norm.momentum = momentum  # type: ignore[union-attr]
    module = Attached(norm, attention).to(DEVICE)
    other = copy.deepcopy(module)
    for _ in range(3):
        u = torch.randn(4, 70, 5, 3, device=DEVICE) + 1
        version = norm.running_mean._version  # type: ignore[union-attr]
        with torch.set_grad_enabled(gradient):
            module(u)
            with ops.use("reference"):
                other(u)
        assert norm.running_mean._version > version  # type: ignore[union-attr]
    buffers = dict(other.named_buffers())
    assert len(buffers) == 6
    for name, one in module.named_buffers():
        assert_close(buffers[name], one)


@pytest.mark.slow_unless(name="se")
@pytest.mark.parametrize("name", ["se", "spatial", "cbam, identity"])
def test_some_gradients_only_and_backward_twice(name: str, served: None) -> None:
    module = built(name, 4)
    x, dy = torch.randn(2, 2, 4, 3, 2, device=DEVICE)
    every = gradients(module, x, dy)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    (alone,) = torch.autograd.grad(y, [leaf], dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, [leaf], dy)
    assert torch.equal(alone, every["x"]) and torch.equal(again, alone)
    of_parameters = torch.autograd.grad(module(x), list(module.parameters()), dy)
    for found, (key, _) in zip(of_parameters, module.named_parameters(), strict=True):
        assert torch.equal(found, every[key])


def test_gradients_of_gradients(served: None) -> None:
    module = built("cbam, 3 wide", 4)

    def second(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        first = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), [x, *module.parameters()]))

    x = torch.randn(2, 4, 3, 2, device=DEVICE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backends, "choice", lambda x: "reference")
        expected = second(copy.deepcopy(module).double(), x.double())
    for found, true in zip(second(module, x.clone()), expected, strict=True):
        assert float((found - true).abs().max()) <= 1e-3 * float(true.abs().max())


def test_weights_in_channels_last(served: None) -> None:
    module = built("cbam", 4)
    x, dy = torch.randn(2, 2, 4, 3, 2, device=DEVICE)
    expected = gradients(module, x, dy)
    module.to(memory_format=torch.channels_last)
    assert not module.spatial.conv.weight.is_contiguous()
    # and those of linear layers may be transposed
    module.channel.fc1.weight.data = module.channel.fc1.weight.data.t().contiguous().t()
    for name, one in gradients(module, x, dy).items():
        assert_close(one, expected[name])


@pytest.mark.slow_unless(channels=1)
@pytest.mark.parametrize("channels", [1, 5000])
def test_one_channel_and_many(channels: int) -> None:
    module = ChannelAttention(channels, reduction=max(1, channels // 3))
    check_module(drawn(module), torch.randn(2, channels, 3, 2) / channels**0.5)


def test_a_norm_behind_which_it_is_attached(served: None) -> None:
    layer = nn.BatchNorm2d(4).to(DEVICE)
    module = Attached(layer, built("cbam", 4))
    other = copy.deepcopy(module)
    u, dy = torch.randn(2, 3, 4, 3, 2, device=DEVICE)
    found = gradients(module, u, dy)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backends, "choice", lambda x: "reference")
        check(other, u, dy, found)
        other(u)
    for name, one in other.named_buffers():
        assert_close(dict(module.named_buffers())[name].float(), one.float())


@pytest.mark.slow
def test_two_hundred_steps_of_training_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, list[float]] = {"cuda": [], "reference": []}
    for backend, found in losses.items():
        monkeypatch.setattr(backends, "choice", lambda x, backend=backend: backend)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), CBAM(6, reduction=2), nn.Flatten(), nn.Linear(54, 3))
        network.to(DEVICE)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        x, labels = torch.randn(8, 3, 5, 5, device=DEVICE), torch.randint(3, (8,), device=DEVICE)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    assert losses["cuda"][-1] < 0.3 * losses["cuda"][0]
    assert losses["cuda"] == pytest.approx(losses["reference"], rel=1e-3)


def test_mean_max_pooling() -> None:
    x = torch.randn(3, 70, 7, 5, device=DEVICE, requires_grad=True)
    dy = torch.randn(3, 140, device=DEVICE)
    pooled = fused.mean_max(cuda.Kernels, x)
    expected = reference.mean_max(x)
    assert_close(pooled, expected)
    assert_close(torch.autograd.grad(pooled, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


def test_the_moments_of_the_norm() -> None:
    module = built("cbam", 6)
    gates = described(module)
    before = copy.deepcopy(module.spatial.norm)
    x = torch.randn(3, 6, 7, 5, device=DEVICE)
    assert gates.spatial is not None
    # these are left to follow by whoever asks
    gates = gates._replace(spatial=gates.spatial._replace(tracked=None))
    _, moments = fused.gated(cuda.Kernels, x, gates, None)
    with ops.use("reference"):
        module(x)
    mean, var = module.spatial.norm.running_mean, module.spatial.norm.running_var
    assert_close(mean, before.running_mean.lerp(moments[:1], 0.01))
    assert_close(var, before.running_var.lerp(moments[1:] * 105 / 104, 0.01))


def test_they_serve_cuda_and_nothing_else() -> None:
    x = torch.randn(1, 2, 3, 3)
    assert cuda.why_not_for(x) == "it is for maps on a CUDA device, not on cpu"
    with (
        ops.use("cuda"),
        pytest.raises(BackendUnavailable, match="The backend cuda does not serve this: it is for maps"),
    ):
        ops.choice(x)
    meta = torch.empty(1, 2, 3, 3, device="meta")
    assert ops.choice(meta) == "reference"


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((2, 3, 4, 4), torch.float32, None),
        ((2, 3, 4, 4), torch.float64, "it is for float32, float16 and bfloat16, not for float64"),
        ((70000, 1, 1, 1), torch.float32, "it is for batches of at most 65,535, not of 70,000"),
        ((60000, 20000, 1, 1), torch.float16, "places in its poolings are counted in 32 bits"),
        ((0, 3, 4, 4), torch.float32, "the map is empty"),
    ],
)
def test_what_they_serve(shape: tuple[int, ...], dtype: torch.dtype, why: str | None) -> None:
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape, numel=lambda: math.prod(shape))
    assert cuda.why_not_for(x) == why


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["all", pytest.param("each", marks=pytest.mark.slow)])
def test_they_compile_for_a_gpu(flags: str) -> None:
    script = Path(__file__).with_name("compile_for_cuda.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, script, flags], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {line.split()[0] for line in run.stdout.splitlines()}
    small = {"pooled", "normalise", "mlp_first", "mlp_second", "convolve", "gate", "finish", "share"}
    backward = "gates gate planes weight summary logits mlp_second mlp_first mlp_weights norm input"
    assert kernels == {"pool", "summarise", "apply"} | small | {f"grad_{name}" for name in backward.split()}
