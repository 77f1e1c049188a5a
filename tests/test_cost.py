"""Costs of modules, against numbers that follow from their definition."""

import time
from dataclasses import astuple

import pytest
import torch
from torch import nn

from convattn import attach, cost, networks
from convattn.nn import CBAM, SqueezeExcite


def test_parameters_are_counted_once() -> None:
    linear = nn.Linear(3, 4)
    assert cost.parameters(linear) == 16
    assert cost.parameters(nn.Sequential(linear, nn.Linear(4, 3), linear)) == 16 + 15
    assert cost.parameters(nn.ReLU()) == 0


def test_parameters_of_an_attached_network() -> None:
    plain = cost.parameters(networks.resnet20())
    assert cost.parameters(attach(networks.resnet20(), "se", start="paper")) == plain + 2 * 3 * (16 + 2 * 32 + 4 * 64)


@pytest.mark.parametrize(
    "module, shape, expected",
    [
        (nn.Linear(10, 5), (3, 10), 3 * 10 * 5),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 7), 2 * 6 * 8 * 7 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 8, 8), 6 * 4 * 4 * 4 * 9),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (1, 4, 5, 5), 4 * 5 * 5 * 9),
        (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 9), 6 * 9 * 4 * 3),
        (SqueezeExcite(32, reduction=4), (2, 32, 5, 5), 2 * 2 * 32 * 8),
        (CBAM(32), (1, 32, 5, 5), 2 * 2 * 32 * 2 + 2 * 49 * 25),
        (nn.ReLU(), (1, 4, 5, 5), 0),
    ],
    ids=str,
)
def test_multiply_adds(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert cost.multiply_adds(module, torch.randn(shape)) == expected


def test_multiply_adds_of_resnet20() -> None:
    # three stages of equal cost, the first layer of the second and the third stage at half of a layer
    layer = 16 * 16 * 9 * 32 * 32
    expected = 3 * 16 * 9 * 32 * 32 + 6 * layer + 2 * (layer // 2 + 5 * layer) + 64 * 10
    assert cost.multiply_adds(networks.resnet20(), torch.randn(1, 3, 32, 32)) == expected


def test_multiply_adds_of_a_published_network() -> None:
    model = networks.create("torchvision:resnet18")
    assert cost.multiply_adds(model, torch.randn(1, 3, 224, 224)) / 1e9 == pytest.approx(1.814, abs=0.001)


@pytest.mark.parametrize(
    "module, of_images, of_maps",
    [
        # a sigmoid keeps its output for its derivative, but no derivative is taken with respect to images
        (nn.Sigmoid(), 0, 1),
        (nn.Sequential(nn.Sigmoid(), nn.Tanh()), 0, 2),
        # one storage, though both layers keep it
        (nn.Sequential(nn.Sigmoid(), nn.Conv2d(4, 4, 1)), 1, 1),
        (nn.Conv2d(4, 4, 1), 0, 0),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU()), 2, 2),
        (nn.Identity(), 0, 0),
    ],
    ids=str,
)
def test_saved_bytes(module: nn.Module, of_images: int, of_maps: int) -> None:
    x = torch.randn(3, 4, 10, 10)
    assert cost.saved_bytes(module, x) == of_images * x.nbytes
    assert cost.saved_bytes(module, x.requires_grad_()) == of_maps * x.nbytes
    with torch.no_grad():
        assert cost.saved_bytes(module, x) == of_maps * x.nbytes


def test_attention_saves_activations() -> None:
    x = torch.randn(2, 32, 8, 8)
    assert cost.saved_bytes(SqueezeExcite(32), x) < cost.saved_bytes(CBAM(32), x)
    body = nn.Conv2d(32, 32, 1)
    more = cost.saved_bytes(nn.Sequential(body, SqueezeExcite(32)), x) - cost.saved_bytes(body, x)
    # the map before the gate is kept for the gate's gradient
    assert more >= x.nbytes


@pytest.mark.parametrize("training", [True, False])
def test_measure(training: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), SqueezeExcite(8)).train(training)
    module[2].train(not training)
    x = torch.randn(2, 3, 9, 9)
    modes = [part.training for part in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    measured = cost.measure(module, x, repeats=3)
    assert measured.parameters == cost.parameters(module) == 224 + 16 + 16
    assert measured.multiply_adds == cost.multiply_adds(module, x) == 2 * (8 * 7 * 7 * 27 + 16)
    assert measured.saved_bytes > 0
    assert 0 < measured.latency_ms.low <= measured.latency_ms.median <= measured.latency_ms.high
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    # measuring is not training
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_modes_stay_after_a_failure() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).train()
    with pytest.raises(RuntimeError):
        cost.multiply_adds(module, torch.randn(1, 5))
    assert all(part.training for part in module.modules())


def test_spread() -> None:
    assert astuple(cost.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])) == (3.0, 2.0, 4.0)
    assert astuple(cost.Spread.of([1.0, 2.0])) == (1.5, 1.25, 1.75)


def test_steps_are_timed_in_turn() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    steps = {"short": lambda: step("short", 0.002), "long": lambda: step("long", 0.02)}
    latency, ratio = cost.interleaved(steps, repeats=4)
    # one round to warm up
    assert calls == ["short", "long"] * 5
    assert list(latency) == list(ratio) == ["short", "long"]
    assert latency["short"].median >= 2 and latency["long"].median >= 20
    assert astuple(ratio["short"]) == (1, 1, 1)
    assert ratio["long"].median > 1


@pytest.mark.parametrize("repeats, seconds, rounds", [(1, 60, 3), (5, 60, 5), (100, 0, 3), (1000, 0.05, None)])
def test_rounds(repeats: int, seconds: float, rounds: int | None) -> None:
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        time.sleep(0.001)

    cost.interleaved({"one": step}, repeats=repeats, seconds=seconds)
    if rounds is None:
        assert 3 <= len(calls) - 1 < repeats
    else:
        assert len(calls) - 1 == rounds
