"""Costs of modules, against numbers that follow from their definition."""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from functools import partial

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
        (CBAM(32), (1, 32, 5, 5), 3 * 32 * 2 + 2 * 49 * 25),
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


def test_a_rate_of_a_spread() -> None:
    # the longest time is the lowest rate
    assert astuple(cost.Spread(20.0, 10.0, 40.0).rate(1000.0)) == (50.0, 25.0, 100.0)


def test_no_step_has_a_place_of_its_own() -> None:
    calls: list[str] = []
    steps = {name: partial(calls.append, name) for name in "abc"}
    cost.interleaved(steps, repeats=6)
    rounds = ["".join(calls[start : start + 3]) for start in range(3, 21, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    for place in range(3):
        assert Counter(one[place] for one in rounds) == {"a": 2, "b": 2, "c": 2}
    behind = Counter(pair for one in rounds for pair in itertools.pairwise(one))
    assert set(behind) == set(itertools.permutations("abc", 2)) and set(behind.values()) == {2}


def test_on_cuda_by_the_events_of_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("empty"))
    latency, _ = cost.interleaved({"one": lambda: said.append("step")}, repeats=3, device=torch.device("cuda", 0))
    assert said == ["step", *["empty", "record", "step", "record", "wait"] * 3]
    assert astuple(latency["one"]) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize(
    "step, expected",
    [
        (lambda x: None, 0),
        # what was there before is no cost, looked at or changed
        (lambda x: x.view(-1)[3:].add_(1), 0),
        (lambda x: x + 1, 4000),
        # 1 and 2, then the sum beside both, though neither has a name
        (lambda x: (x + 1) + (x + 2), 12000),
        # each is gone when the next one is made, but for its sum
        (lambda x: [(x + number).sum() for number in range(9)], 4000 + 9 * 4),
        (lambda x: x.double(), 8000),
    ],
)
def test_peak_bytes(step: Callable[[torch.Tensor], object], expected: int) -> None:
    x = torch.randn(10, 100)
    assert cost.peak_bytes(lambda: step(x)) == expected


def test_peak_bytes_of_a_training_step() -> None:
    """A chain of layers whose memory follows from their shapes."""
    layers = nn.Sequential(nn.Linear(50, 200, bias=False), nn.Sigmoid(), nn.Linear(200, 50, bias=False))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    x = torch.randn(1000, 50)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        layers(x).sum().backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    # when the sigmoid goes back: its output and the gradients before and behind it, each (1000, 200), the gradient of
    # the last layer's weights, the sum and its gradient; nothing keeps the last layer's output, and the sum's
    # gradient is one number seen as many
    expected = 4 * (3 * 1000 * 200 + 200 * 50 + 2)
    measured = []
    for _ in range(2):
        measured.append(cost.peak_bytes(step))
        optimizer.zero_grad(set_to_none=True)
    assert measured == [expected, expected]


def test_peak_bytes_are_the_same_in_every_run_and_more_with_attention() -> None:
    x, peaks = torch.randn(8, 3, 32, 32), []
    for attention in (None, None, "se", "cbam"):
        network = networks.resnet20().train()
        if attention:
            attach(network, attention)
        peaks.append(cost.peak_bytes(lambda network=network: network(x).sum().backward()))
    assert peaks[0] == peaks[1] < peaks[2] < peaks[3]


def test_on_cuda_peak_bytes_are_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for name, found in (("synchronize", None), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, found=found: said.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    assert cost.peak_bytes(lambda: said.append("step"), torch.device("cuda", 0)) == 700
    assert said == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]


def test_steps_are_timed_in_turn() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    steps = {"short": lambda: step("short", 0.002), "long": lambda: step("long", 0.02)}
    latency, ratio = cost.interleaved(steps, repeats=4)
    # one round to warm up, and then neither is always the first
    assert calls == ["short", "long", "short", "long", "long", "short", "long", "short", "short", "long"]
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
