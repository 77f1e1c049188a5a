"""CBAM and its halves against the paper's formulas, position by position in NumPy."""

import math
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convattn.errors import InvalidOption, ShapeMismatch
from convattn.nn import CBAM, ChannelAttention, SpatialAttention
from tolerances import assert_close, is_close

POOLS = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "l2": lambda values: math.sqrt(sum(v * v for v in values)),
    "logsumexp": lambda values: math.log(sum(math.exp(v) for v in values)),
}
SIZES = [(7,), (5, 4), (2, 3, 4)]
State = dict[str, np.ndarray]


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def channel_gate(x: np.ndarray, state: State, pools: tuple[str, ...]) -> np.ndarray:
    """Equation 2 of the paper; the pools beyond mean and maximum are those of the authors' code."""
    first, second = state["fc1.weight"], state["fc2.weight"]
    hidden_width, channels = first.shape
    first_bias = state.get("fc1.bias", np.zeros(hidden_width))
    second_bias = state.get("fc2.bias", np.zeros(channels))
    gate = np.empty((len(x), channels) + (1,) * (x.ndim - 2))
    for b in range(len(x)):
        logits = [0.0] * channels
        for pool in pools:
            pooled = [POOLS[pool](list(x[b, c].flat)) for c in range(channels)]
            hidden = [max(0.0, first_bias[h] + sum(first[h] * pooled)) for h in range(hidden_width)]
            for c in range(channels):
                logits[c] += second_bias[c] + sum(second[c] * hidden)
        for c in range(channels):
            gate[b, c] = sigmoid(logits[c])
    return gate


def spatial_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The convolution of equation 3 over the channels' mean and maximum, with zeros around the map."""
    size, kernel = x.shape[2:], weight.shape[2:]
    logits = np.zeros((len(x), 1, *size))
    for b in range(len(x)):
        for position in product(*map(range, size)):
            for offset in product(*map(range, kernel)):
                seen = tuple(p + o - k // 2 for p, o, k in zip(position, offset, kernel, strict=True))
                if all(0 <= s < n for s, n in zip(seen, size, strict=True)):
                    values = x[(b, slice(None), *seen)]
                    mean, maximum = sum(values) / len(values), max(values)
                    logits[(b, 0, *position)] += weight[(0, 0, *offset)] * mean + weight[(0, 1, *offset)] * maximum
    return logits


def spatial_gate(x: np.ndarray, state: State, training: bool) -> np.ndarray:
    """Equation 3, with the batch norm of the authors' code where the state has one."""
    logits = spatial_logits(x, state["conv.weight"])
    if "norm.weight" in state:
        mean = logits.mean() if training else state["norm.running_mean"][0]
        variance = logits.var() if training else state["norm.running_var"][0]
        normal = (logits - mean) / np.sqrt(variance + 1e-5)
        logits = normal * state["norm.weight"][0] + state["norm.bias"][0]
    return np.vectorize(sigmoid)(logits)


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            # logits of order 1: a saturated gate would hide its weights
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def numpy_state(module: nn.Module) -> State:
    return {key: value.clone().numpy() for key, value in module.state_dict().items()}


def a_map(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_every_weight_matters(module: nn.Module, x: torch.Tensor, expected: np.ndarray) -> None:
    gradients = torch.autograd.grad((module(x) * torch.randn_like(x)).sum(), list(module.parameters()))
    for (name, parameter), gradient in zip(module.named_parameters(), gradients, strict=True):
        # a weight of a dead hidden unit cannot matter
        strongest = gradient.abs().argmax()
        with torch.no_grad():
            parameter.view(-1)[strongest] += 1
            assert not is_close(module(x), expected), name
            parameter.view(-1)[strongest] -= 1
    assert_close(module(x), expected)


# channel attention


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "pools", [("mean", "max"), ("max", "mean"), ("mean",), ("l2",), ("logsumexp",), ("mean", "max", "l2", "logsumexp")]
)
def test_channel_attention(size: tuple[int, ...], bias: bool, pools: tuple[str, ...]) -> None:
    module = ChannelAttention(12, hidden=10, bias=bias, pools=pools, dimensions=len(size)).double()
    randomize(module)
    x = a_map(3, 12, *size)
    gate = channel_gate(x.numpy(), numpy_state(module), pools)
    assert_close(module.gate(x), gate)
    assert_close(module(x), x * torch.as_tensor(gate))
    assert not is_close(module.gate(x)[:1], module.gate(x)[1:2])
    assert_every_weight_matters(module, x, x.numpy() * gate)


@pytest.mark.parametrize("channels, options, hidden", [(64, {}, 4), (8, {}, 1), (8, {"hidden": 3}, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_width(channels: int, options: dict[str, int], hidden: int, bias: bool) -> None:
    for module in (ChannelAttention(channels, bias=bias, **options), CBAM(channels, bias=bias, **options).channel):
        assert module.fc1.weight.shape == (hidden, channels)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == 2 * channels * hidden + bias * (hidden + channels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": 0}, "reduction must be a whole number of at least 1, got 0."),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0."),
        ({"activation": "sigmoid"}, "activation must be one of 'relu', 'silu', 'gelu', 'hardswish', got 'sigmoid'."),
        ({"pools": ("avg",)}, "each of pools must be one of 'mean', 'max', 'l2', 'logsumexp', got 'avg'."),
        ({"pools": ()}, "pools must be a sequence of different names out of mean, max, l2, logsumexp, got ()."),
        ({"pools": "mean"}, "pools must be a sequence of different names out of mean, max, l2, logsumexp, got 'mean'."),
        (
            {"pools": ["max", "max"]},
            "pools must be a sequence of different names out of mean, max, l2, logsumexp, got ['max', 'max'].",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [ChannelAttention, CBAM])
def test_wrong_channel_option(cls: type[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=f"^ChannelAttention: {re.escape(message)}$"):
        cls(64, **options)


# spatial attention


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_spatial_attention(size: tuple[int, ...], kernel_size: int, norm: str | None, training: bool) -> None:
    module = SpatialAttention(kernel_size=kernel_size, norm=norm, dimensions=len(size)).double()
    randomize(module.train(training))
    x = a_map(2, 5, *size)
    gate = spatial_gate(x.numpy(), numpy_state(module), training)
    assert_close(module.gate(x), gate)
    assert_close(module(x), x * torch.as_tensor(gate))
    assert not is_close(module.gate(x)[:1], module.gate(x)[1:])
    assert_every_weight_matters(module, x, x.numpy() * gate)


@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    "build", [SpatialAttention, lambda **options: CBAM(5, **options).spatial], ids=["spatial", "cbam"]
)
def test_running_statistics(build: Any, momentum: float) -> None:
    module = build(norm_momentum=momentum).double()
    randomize(module)
    before = numpy_state(module)
    x = a_map(2, 5, 5, 4)
    module(x)
    logits = spatial_logits(x.numpy(), before["conv.weight"])
    mean = (1 - momentum) * before["norm.running_mean"] + momentum * logits.mean()
    variance = (1 - momentum) * before["norm.running_var"] + momentum * logits.var(ddof=1)
    assert_close(module.norm.running_mean, mean)
    assert_close(module.norm.running_var, variance)
    assert module.norm.num_batches_tracked.item() == 1
    after = numpy_state(module)
    module.eval()(x)
    assert all(np.array_equal(after[key], value) for key, value in numpy_state(module).items())


def test_default_momentum_is_that_of_the_authors() -> None:
    assert SpatialAttention().norm.momentum == 0.01
    assert CBAM(16).spatial.norm.momentum == 0.01


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 5, 7])
@pytest.mark.parametrize("norm", ["batch", None])
def test_spatial_parameters(dimensions: int, kernel_size: int, norm: str | None) -> None:
    module = SpatialAttention(kernel_size=kernel_size, norm=norm, dimensions=dimensions)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == 2 * kernel_size**dimensions + (2 if norm else 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4."),
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, got 0."),
        ({"kernel_size": (7, 7)}, "kernel_size must be a whole number of at least 1, got (7, 7)."),
        ({"norm": "layer"}, "norm must be one of 'batch', None, got 'layer'."),
        ({"norm": True}, "norm must be one of 'batch', None, got True."),
        ({"norm_momentum": -0.1}, "norm_momentum must be a number from 0 to 1, got -0.1."),
        ({"norm_momentum": None}, "norm_momentum must be a number from 0 to 1, got None."),
        ({"norm_momentum": 1.5}, "norm_momentum must be a number from 0 to 1, got 1.5."),
        ({"norm_momentum": math.nan}, "norm_momentum must be a number from 0 to 1, got nan."),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [SpatialAttention, lambda **options: CBAM(64, **options)], ids=["spatial", "cbam"])
def test_wrong_spatial_option(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=f"^SpatialAttention: {re.escape(message)}$"):
        build(**options)


@pytest.mark.parametrize("build", [SpatialAttention, lambda **options: CBAM(5, **options)], ids=["spatial", "cbam"])
def test_batch_norm_cannot_train_on_one_position(build: Any) -> None:
    x = torch.randn(1, 5, 1, 1)
    message = (
        "SpatialAttention: batch norm needs more than one position to train on, got a map of shape (1, 5, 1, 1); "
        "use a larger batch or map, norm=None, or eval()."
    )
    with pytest.raises(ShapeMismatch, match=f"^{re.escape(message)}$"):
        build()(x)
    # each way out that the message names
    assert build()(torch.randn(2, 5, 1, 1)).shape == (2, 5, 1, 1)
    assert build()(torch.randn(1, 5, 2, 1)).shape == (1, 5, 2, 1)
    assert build(norm=None)(x).shape == x.shape
    assert build().eval()(x).shape == x.shape


# both


def part(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def both(x: np.ndarray, state: State, order: str, training: bool, pools: tuple[str, ...]) -> np.ndarray:
    """Equation 1, and the other two arrangements of table 3."""

    def channel(y: np.ndarray) -> np.ndarray:
        return channel_gate(y, part(state, "channel"), pools)

    def spatial(y: np.ndarray) -> np.ndarray:
        return spatial_gate(y, part(state, "spatial"), training)

    if order == "parallel":
        return x * channel(x) * spatial(x)
    first, second = (channel, spatial) if order == "channel-spatial" else (spatial, channel)
    y = x * first(x)
    return y * second(y)


@pytest.mark.slow_unless(training=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("order", ["channel-spatial", "spatial-channel", "parallel"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "norm": None, "kernel_size": 3}, {"pools": ("l2", "logsumexp", "max"), "kernel_size": 3}],
    ids=["authors", "paper", "pools"],
)
def test_cbam(size: tuple[int, ...], order: str, training: bool, options: dict[str, Any]) -> None:
    module = CBAM(8, hidden=8, order=order, dimensions=len(size), **options).double()
    randomize(module.train(training))
    x = a_map(3, 8, *size)
    expected = both(x.numpy(), numpy_state(module), order, training, options.get("pools", ("mean", "max")))
    assert_close(module(x), expected)
    assert_close(x * module.gate(x), expected)
    gates = module.gates(x)
    assert gates["channel"].shape == (3, 8, *[1] * len(size)) and gates["spatial"].shape == (3, 1, *size)
    assert_close(x * gates["channel"] * gates["spatial"], expected)
    for gate in gates.values():
        assert not is_close(gate[:1], gate[1:2])
    assert_every_weight_matters(module, x, expected)


def test_orders_differ() -> None:
    modules = [
        CBAM(8, hidden=8, order=order).double().eval() for order in ("channel-spatial", "spatial-channel", "parallel")
    ]
    randomize(modules[0])
    x = a_map(3, 8, 5, 4)
    for module in modules:
        module.load_state_dict(modules[0].state_dict())
    one, two, three = (module(x) for module in modules)
    assert not is_close(one, two) and not is_close(two, three) and not is_close(one, three)


@pytest.mark.parametrize("order", ["channel-spatial", "spatial-channel", "parallel"])
@pytest.mark.parametrize("strength", [-0.5, 0.3])
def test_partial_strength(order: str, strength: float) -> None:
    module = CBAM(8, hidden=8, order=order, start="identity").double().eval()
    randomize(module)
    nn.init.constant_(module.strength, strength)
    state = numpy_state(module)
    x = a_map(3, 8, 5, 4).numpy()

    def gated(y: np.ndarray, seen: np.ndarray, half: str) -> np.ndarray:
        gates = {
            "channel": lambda: channel_gate(seen, part(state, "channel"), ("mean", "max")),
            "spatial": lambda: spatial_gate(seen, part(state, "spatial"), False),
        }
        return y * (1 + strength * (gates[half]() - 1))

    first, second = ("spatial", "channel") if order == "spatial-channel" else ("channel", "spatial")
    y = gated(x, x, first)
    expected = gated(y, x if order == "parallel" else y, second)
    assert_close(module(torch.as_tensor(x)), expected)


def test_one_strength_for_both_halves() -> None:
    module = CBAM(8, start="identity")
    assert [name for name, _ in module.named_parameters() if "strength" in name] == ["strength"]


# channels of the residual blocks, and the parameters that the authors' gates add to the plain network
RESNET18 = [64, 64, 128, 128, 256, 256, 512, 512]
RESNET50 = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3


@pytest.mark.parametrize(
    "blocks, options, added",
    [
        (RESNET18, {}, 11_779_392 - 11_689_512),
        (RESNET18, {"bias": False, "norm": None}, 11_777_336 - 11_689_512),
        (RESNET50, {}, 28_089_624 - 25_557_032),
        (RESNET50, {"bias": False, "norm": None}, 28_073_544 - 25_557_032),
    ],
    ids=["resnet18-authors", "resnet18-paper", "resnet50-authors", "resnet50-paper"],
)
def test_parameters_of_published_networks(blocks: list[int], options: dict[str, Any], added: int) -> None:
    gates = [CBAM(channels, **options) for channels in blocks]
    assert sum(parameter.numel() for gate in gates for parameter in gate.parameters()) == added


def test_wrong_order() -> None:
    message = "CBAM: order must be one of 'channel-spatial', 'spatial-channel', 'parallel', got 'channel'."
    with pytest.raises(InvalidOption, match=f"^{re.escape(message)}$"):
        CBAM(64, order="channel")


def test_identity_start_where_pooling_overflows() -> None:
    # the sum of squares exceeds the largest half-precision number, and the logits become infinity minus infinity
    x = (torch.randn(2, 64, 56, 56) * 3000).half()
    module = ChannelAttention(64, pools=("l2",), start="identity").half()
    assert module.gate(x).isnan().any()
    assert torch.equal(module(x), x)


def test_frozen_norm_takes_a_single_position() -> None:
    module = SpatialAttention().train()
    assert module.norm is not None
    module.norm.eval()
    assert module(torch.randn(1, 8, 1, 1)).shape == (1, 8, 1, 1)
