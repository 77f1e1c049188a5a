"""Squeeze-and-excitation against the paper's formulas, position by position in NumPy."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from convattn.errors import InvalidOption
from convattn.nn import SqueezeExcite
from tolerances import assert_close, is_close

ACTIVATIONS = {
    "relu": lambda v: max(v, 0.0),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
}
GATE_ACTIVATIONS = {
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "hardsigmoid": lambda v: min(max(v + 3, 0.0), 6.0) / 6,
}


def formula(x: np.ndarray, state: dict[str, np.ndarray], activation: str, gate_activation: str) -> np.ndarray:
    """Equations 2 to 4 of the paper."""
    first, second = state["fc1.weight"], state["fc2.weight"]
    hidden_width, channels = first.shape
    first_bias = state.get("fc1.bias", np.zeros(hidden_width))
    second_bias = state.get("fc2.bias", np.zeros(channels))
    y = np.empty_like(x)
    for b in range(len(x)):
        squeezed = [sum(x[b, c].flat) / x[b, c].size for c in range(channels)]
        hidden = []
        for h in range(hidden_width):
            total = first_bias[h] + sum(first[h, c] * squeezed[c] for c in range(channels))
            hidden.append(ACTIVATIONS[activation](total))
        for c in range(channels):
            total = second_bias[c] + sum(second[c, h] * hidden[h] for h in range(hidden_width))
            y[b, c] = x[b, c] * GATE_ACTIVATIONS[gate_activation](total)
    return y


def random_module(channels: int, **options: Any) -> SqueezeExcite:
    module = SqueezeExcite(channels, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("size", [(7,), (5, 4), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
def test_paper(size: tuple[int, ...], bias: bool, activation: str, gate_activation: str) -> None:
    options = {"bias": bias, "activation": activation, "gate_activation": gate_activation}
    module = random_module(12, hidden=5, dimensions=len(size), **options)
    x = torch.randn(3, 12, *size, dtype=torch.float64)
    expected = formula(x.numpy(), numpy_state(module), activation, gate_activation)
    assert_close(module(x), expected)
    gate = module.gate(x)
    assert gate.shape == (3, 12, *[1] * len(size))
    assert not is_close(gate[:1], gate[1:2])
    gradients = torch.autograd.grad((module(x) * torch.randn_like(x)).sum(), list(module.parameters()))
    for (name, parameter), gradient in zip(module.named_parameters(), gradients, strict=True):
        # a weight of a dead hidden unit cannot matter
        strongest = gradient.abs().argmax()
        with torch.no_grad():
            parameter.view(-1)[strongest] += 1
            assert not is_close(module(x), expected), name
            parameter.view(-1)[strongest] -= 1


@pytest.mark.parametrize(
    "channels, options, hidden",
    [
        (64, {}, 4),
        (64, {"reduction": 8}, 8),
        (70, {"reduction": 16}, 4),
        (64, {"hidden": 7}, 7),
        (64, {"hidden": 7, "reduction": 2}, 7),
        (16, {}, 1),
        # a bottleneck without units would make the gate a constant
        (8, {}, 1),
        (1, {"reduction": 1000}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_width(channels: int, options: dict[str, int], hidden: int, bias: bool) -> None:
    module = SqueezeExcite(channels, bias=bias, **options)
    assert module.fc1.weight.shape == (hidden, channels)
    assert module.fc2.weight.shape == (channels, hidden)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == 2 * channels * hidden + bias * (channels + hidden)


def test_narrow_map_has_a_gate_that_depends_on_it() -> None:
    module = random_module(8, bias=True)
    gates = module.gate(torch.randn(16, 8, 4, 4, dtype=torch.float64))
    assert not is_close(gates[:1].expand_as(gates), gates)


# channels of the residual blocks, and the parameters that the authors' gates add to the plain network
RESNET18 = [64, 64, 128, 128, 256, 256, 512, 512]
RESNET50 = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
RESNET20 = [16] * 3 + [32] * 3 + [64] * 3


@pytest.mark.parametrize(
    "blocks, options, added",
    [
        (RESNET18, {}, 11_776_552 - 11_689_512),
        (RESNET50, {}, 28_071_976 - 25_557_032),
        (RESNET50, {"bias": True}, 28_088_024 - 25_557_032),
        (RESNET20, {}, 274_490 - 272_474),
        (RESNET20, {"reduction": 8}, 276_506 - 272_474),
        (RESNET20, {"reduction": 4}, 280_538 - 272_474),
    ],
    ids=["resnet18", "resnet50", "resnet50-bias", "resnet20", "resnet20-r8", "resnet20-r4"],
)
def test_parameters_of_published_networks(blocks: list[int], options: dict[str, Any], added: int) -> None:
    gates = [SqueezeExcite(channels, **options) for channels in blocks]
    assert sum(parameter.numel() for gate in gates for parameter in gate.parameters()) == added


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": 0}, "reduction must be a whole number of at least 1, got 0."),
        ({"reduction": 2.5}, "reduction must be a whole number of at least 1, got 2.5."),
        ({"reduction": -16}, "reduction must be a whole number of at least 1, got -16."),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0."),
        ({"hidden": True}, "hidden must be a whole number of at least 1, got True."),
        ({"activation": "tanh"}, "activation must be one of 'relu', 'silu', 'gelu', 'hardswish', got 'tanh'."),
        ({"gate_activation": "relu"}, "gate_activation must be one of 'sigmoid', 'hardsigmoid', got 'relu'."),
    ],
    ids=str,
)
def test_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=f"^{re.escape(f'SqueezeExcite: {message}')}$"):
        SqueezeExcite(64, **options)
