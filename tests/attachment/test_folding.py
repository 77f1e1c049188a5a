"""Constant gates merged into the weights beside them: the same output without them, and no gate that does something."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import convattn
from convattn import attach, detach, errors, fold
from convattn.attachment import Attached, Folds, attached
from convattn.attachment.attaching import remove
from convattn.networks.cifar_resnet import CifarResNet
from convattn.nn.base import Gate

GATES, HEADS = convattn.names("gate"), convattn.names("head")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NAMES = ("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2")
# the largest difference relative to the largest logit
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}
# gates that are constant once `constant` has set them, with the options with which they are attached
CONSTANT = {
    "se": ("se", {"bias": True}),
    "se hardsigmoid": ("se", {"bias": True, "gate_activation": "hardsigmoid"}),
    "se without biases": ("se", {}),
    "channel": ("channel", {}),
    "channel of all pools": ("channel", {"pools": ("mean", "max", "l2", "logsumexp")}),
    "spatial": ("spatial", {}),
    "spatial without norm": ("spatial", {"norm": None}),
    "cbam": ("cbam", {}),
    "cbam parallel": ("cbam", {"order": "parallel"}),
    "cbam spatial-channel": ("cbam", {"order": "spatial-channel"}),
}


class Branch(nn.Module):
    """A network with one residual branch, of a first and a last layer."""

    def __init__(self, first: nn.Module, last: nn.Module, *, dimensions: int = 2, channels_last: bool = False) -> None:
        super().__init__()
        self.stem = CONVOLUTIONS[dimensions](3, 8, 3, padding=1)
        self.first = first
        self.relu = nn.ReLU()
        self.last = last
        self.head = nn.Linear(8, 5)
        self.dimensions, self.channels_last = dimensions, channels_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        axis = -1 if self.channels_last else 1
        x = x.movedim(1, axis)
        x = x + self.last(self.relu(self.first(x)))
        return self.head(x.movedim(axis, 1).flatten(2).mean(2))


def conv(groups: int = 1, bias: bool = True, dimensions: int = 2, **options: Any) -> nn.Module:
    return CONVOLUTIONS[dimensions](8, 8, 3, padding=1, groups=groups, bias=bias, **options)


def randomised(model: nn.Module) -> nn.Module:
    """With random weights and statistics in every norm."""
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), torch.Tensor):
            nn.init.uniform_(module.weight, 0.5, 2)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.eval()


def network(blocks: int = 1) -> nn.Module:
    return randomised(CifarResNet(blocks, classes=4))


def constant(model: nn.Module, which: str = "both") -> nn.Module:
    """Let gates depend on nothing: no weight sees the input, and biases, norms and strength are random."""
    for _, wrapper in attached(model):
        for name, parameter in wrapper.attention.named_parameters():
            if name.endswith("strength"):
                nn.init.uniform_(parameter, 0.3, 0.9)
            elif name.endswith("bias"):
                nn.init.normal_(parameter)
            elif name.endswith(("fc2.weight", "conv.weight")):
                spatial = name.endswith("conv.weight")
                (nn.init.zeros_ if which in ("both", "spatial" if spatial else "channel") else nn.init.normal_)(
                    parameter
                )
        randomised_norms = [one for one in wrapper.attention.modules() if isinstance(one, nn.BatchNorm2d)]
        for norm in randomised_norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def images(count: int = 4, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # every image with a level of its own, so that it gets a class of its own
    return torch.randn(count, 3, side, side, dtype=dtype) + 2 * torch.randn(count, 3, 1, 1, dtype=dtype)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def wrappers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Attached)]


def check_folded(model: nn.Module, x: torch.Tensor, *, moved: bool = True) -> Folds:
    """Everything is folded, nothing of it is left, and the output stays, which it does not without the gates."""
    before = outputs(model, x)
    assert not moved or difference(outputs(detach(copy.deepcopy(model)), x), before) > 1e-3
    names = [name for name, _ in attached(model)]
    found = fold(model)
    assert found.folded == names and names and [one.name for one in found] == names
    assert not wrappers(model) and not any(".attention." in name for name in model.state_dict())
    assert difference(outputs(model, x), before) <= RELATIVE[x.dtype]
    return found


def check_kept(model: nn.Module, x: torch.Tensor, reason: str, **options: Any) -> Folds:
    """Nothing is folded, for one reason, and nothing is changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    y, around = outputs(model, x), wrappers(model)
    found = fold(model, **options)
    assert found.folded == [] and {one.reason for one in found} == {reason} and len(found) == len(attached(model)) > 0
    assert wrappers(model) == around
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(outputs(model, x), y)
    return found


# gates that do nothing


@pytest.mark.parametrize("attention", [*GATES, *HEADS, "cbam+dual"])
def test_gates_of_strength_zero_are_removed(attention: str) -> None:
    plain = network()
    layers, state = list(plain.named_modules()), {key: value.clone() for key, value in plain.state_dict().items()}
    x = images()
    y = outputs(plain, x)
    found = fold(attach(plain, attention))
    assert all(one.folded and one.deviation == 0 and one.reason == "" for one in found) and len(found) > 0
    assert found.accuracy is None and {one.change_points for one in found} == {one.agreement for one in found} == {None}
    # the very same network, to the bit
    assert list(plain.named_modules()) == layers
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(outputs(plain, x), y)


@pytest.mark.parametrize("attention", [*GATES, *HEADS, "cbam+dual"])
def test_gates_of_strength_zero_are_removed_with_data(attention: str) -> None:
    plain, x = network(), images()
    y = outputs(plain, x)
    model = attach(plain, attention)
    found = fold(model, (x, y.argmax(1)), tolerance=0)
    assert len(found.folded) == len(found) > 0 and not wrappers(model)
    assert {one.change_points for one in found} == {0} and {one.agreement for one in found} == {1}
    assert found.accuracy == (1, 1) and torch.equal(outputs(model, x), y)


def test_factories_of_strength_zero_are_removed() -> None:
    plain, x = network(), images()
    y = outputs(plain, x)
    model = attach(plain, lambda channels: nn.Conv2d(channels, channels, 1))
    assert len(fold(model).folded) == 3 and not wrappers(model) and torch.equal(outputs(model, x), y)


@pytest.mark.parametrize("form", ["map", "functions"])
def test_heads_beside_functions_are_removed(form: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.head((torch.relu(x) if form == "functions" else x).mean((2, 3)))

    plain, x = Functional(), images()
    y = outputs(plain, x)
    model = attach(plain, "dual")
    assert len(wrappers(model)) == (2 if form == "functions" else 1)
    assert fold(model).folded == [name for name, _ in attached(attach(copy.deepcopy(plain), "dual"))]
    assert not wrappers(model) and torch.equal(outputs(model, x), y)


def test_a_head_that_does_something_is_kept() -> None:
    model = attach(network(), "dual")
    nn.init.constant_(model.avgpool.attention.strength, 0.5)
    check_kept(model, images(), "it is no gate")
    check_kept(model, images(), "it is no gate", data=images())


def test_a_factory_that_does_something_is_kept() -> None:
    model = attach(network(), lambda channels: nn.Conv2d(channels, channels, 1), start="paper")
    check_kept(model, images(), "it is no gate")


def test_a_network_without_attention() -> None:
    plain = network()
    state = plain.state_dict()
    found = fold(plain)
    assert len(found) == 0 and found.folded == [] and list(plain.state_dict()) == list(state)


# gates that are constant by construction


@pytest.mark.slow_unless(start="paper", dtype=torch.float32)
@pytest.mark.slow_unless(
    id=["se-identity-torch.float64", "cbam-identity-torch.float64", "channel-identity-torch.float64"]
)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("kind", CONSTANT)
def test_constant_gates_are_merged(kind: str, start: str, dtype: torch.dtype) -> None:
    attention, options = CONSTANT[kind]
    model = constant(attach(network(), attention, start=start, **options)).to(dtype)
    found = check_folded(model, images(dtype=dtype))
    assert all(one.deviation < 1e-9 and one.attention == attention for one in found)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_a_first_layer_that_sees_nothing_is_constant_too(dtype: torch.dtype) -> None:
    model = constant(attach(network(), "se", bias=True)).to(dtype)
    for _, wrapper in attached(model):
        nn.init.zeros_(wrapper.attention.fc1.weight)
        nn.init.normal_(wrapper.attention.fc2.weight)
    check_folded(model, images(dtype=dtype))


LAST = {
    "batch norm": lambda: (nn.BatchNorm2d(8), {}),
    "sync batch norm": lambda: (nn.SyncBatchNorm(8), {}),
    "group norm": lambda: (nn.GroupNorm(2, 8), {}),
    "convolution": lambda: (conv(), {}),
    "convolution without bias": lambda: (conv(bias=False), {}),
    "grouped convolution": lambda: (conv(groups=2), {}),
    "depthwise convolution": lambda: (conv(groups=8, bias=False), {}),
    "convolution with other padding": lambda: (conv(padding_mode="reflect"), {}),
    "1-D convolution": lambda: (conv(dimensions=1), {"dimensions": 1}),
    "1-D batch norm": lambda: (nn.BatchNorm1d(8), {"dimensions": 1}),
    "3-D convolution": lambda: (conv(dimensions=3), {"dimensions": 3}),
    "3-D batch norm": lambda: (nn.BatchNorm3d(8), {"dimensions": 3}),
    "linear": lambda: (nn.Linear(8, 8), {"channels_last": True}),
    "linear without bias": lambda: (nn.Linear(8, 8, bias=False), {"channels_last": True}),
    "layer norm": lambda: (nn.LayerNorm(8), {"channels_last": True}),
    "layer norm without bias": lambda: (nn.LayerNorm(8, bias=False), {"channels_last": True}),
    "sequence": lambda: (nn.Sequential(nn.ReLU(), nn.Sequential(conv(), nn.BatchNorm2d(8))), {}),
}
FIRST = {
    "convolution": lambda: (conv(), {}),
    "convolution without bias": lambda: (conv(bias=False), {}),
    "grouped convolution": lambda: (conv(groups=4), {}),
    "depthwise convolution": lambda: (conv(groups=8), {}),
    "strided groups": lambda: (nn.Conv2d(8, 16, 1, groups=2), {}),
    "1-D convolution": lambda: (conv(groups=2, dimensions=1), {"dimensions": 1}),
    "3-D convolution": lambda: (conv(groups=2, dimensions=3), {"dimensions": 3}),
    "linear": lambda: (nn.Linear(8, 8), {"channels_last": True}),
    "wider linear": lambda: (nn.Linear(8, 24, bias=False), {"channels_last": True}),
    "sequence": lambda: (nn.Sequential(conv(groups=2), nn.ReLU()), {}),
}


def branched(first: nn.Module, last: nn.Module, dtype: torch.dtype, **shape: Any) -> tuple[nn.Module, torch.Tensor]:
    """A network with such a branch, and images for it."""
    side = 6 if shape.get("dimensions") == 3 else 12
    x = torch.randn(3, 3, *[side] * shape.get("dimensions", 2), dtype=dtype)
    return randomised(Branch(first, last, **shape)).to(dtype), x


def between(shape: dict[str, Any]) -> nn.Module:
    """A layer for the other end of a branch."""
    return nn.Linear(8, 8) if "channels_last" in shape else conv(dimensions=shape.get("dimensions", 2))


@pytest.mark.slow_unless(dtype=torch.float64)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("layer", LAST)
def test_layers_that_take_the_gate_behind_them(layer: str, dtype: torch.dtype) -> None:
    last, shape = LAST[layer]()
    model, x = branched(between(shape), last, dtype, **shape)
    constant(attach(model, "se", example=x, bias=True, hidden=2))
    assert len(attached(model)) == 1 and model.get_submodule(attached(model)[0][0]).site.side == "after"
    training = copy.deepcopy(model).train()
    check_folded(model, x)
    # in train mode too, with the statistics of the batch
    if layer != "sync batch norm":
        assert difference(outputs(model.train(), x), outputs(training, x)) <= RELATIVE[dtype]


@pytest.mark.slow_unless(dtype=torch.float64)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("layer", FIRST)
def test_layers_that_take_the_gate_before_them(layer: str, dtype: torch.dtype) -> None:
    first, shape = FIRST[layer]()
    last = between(shape)
    if layer in ("strided groups", "wider linear"):
        last = nn.Conv2d(16, 8, 1) if layer == "strided groups" else nn.Linear(24, 8)
    model, x = branched(first, last, dtype, **shape)
    constant(attach(model, "se", at="residual-pre", example=x, bias=True, hidden=2))
    assert len(attached(model)) == 1 and model.get_submodule(attached(model)[0][0]).site.side == "before"
    bias = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("bias")}
    check_folded(model, x)
    # a gate on the input does not touch what is added
    assert all(torch.equal(one, bias[key]) for key, one in model.state_dict().items() if key.endswith("bias"))


def test_a_spatial_gate_is_one_number_for_all_channels() -> None:
    for at in ("residual", "residual-pre"):
        model, x = branched(conv(groups=2), nn.BatchNorm2d(8), torch.float64)
        constant(attach(model, "spatial", at=at, example=x))
        check_folded(model, x)


def test_the_weights_take_the_gate_itself() -> None:
    model = constant(attach(network(), "se", bias=True))
    plain = detach(copy.deepcopy(model)).state_dict()
    expected = {}
    for name, wrapper in attached(model):
        gate = 1 / (1 + np.exp(-wrapper.attention.fc2.bias.detach().double().numpy()))
        gate = 1 + wrapper.attention.strength.item() * (gate - 1)
        for key in ("weight", "bias"):
            expected[f"{name}.{key}"] = plain[f"{name}.{key}"].double().numpy() * gate
    fold(model)
    for key, value in model.state_dict().items():
        if key in expected:
            np.testing.assert_allclose(value.double().numpy(), expected[key], rtol=1e-6)
        else:
            assert torch.equal(value, plain[key])


def test_parameters_stay_the_same_objects() -> None:
    # an optimizer that was built before goes on with them
    model = constant(attach(network(), "cbam"))
    base = {name: one for name, one in model.named_parameters() if ".attention." not in name}
    fold(model)
    assert all(parameter is base[name] and parameter.requires_grad for name, parameter in model.named_parameters())
    model(images()).sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_random_numbers_are_left_alone(training: bool) -> None:
    model = constant(attach(network(), "cbam")).train(training)
    model.layer2.train(not training)
    modes = {name: module.training for name, module in detach(copy.deepcopy(model)).named_modules()}
    random = torch.get_rng_state()
    fold(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_only_the_constant_ones() -> None:
    model = constant(attach(network(), "cbam"))
    nn.init.normal_(model.layer2[0].bn2.attention.channel.fc2.weight)
    x = images()
    y = outputs(model, x)
    found = fold(model)
    assert found.folded == ["layer1.0.bn2", "layer3.0.bn2"]
    assert [one.reason for one in found] == ["", "it depends on the input", ""]
    assert [name for name, _ in attached(model)] == ["layer2.0.bn2"]
    assert difference(outputs(model, x), y) <= 1e-6


def test_gates_within_gates() -> None:
    model = attach(attach(network(), "se", at="block", bias=True), "cbam", at="residual")
    attach(model, "se", at="residual-pre", bias=True)
    constant(model)
    x = images()
    y = outputs(model, x)
    found = fold(model)
    layers = ("bn2", "conv1")
    assert sorted(found.folded) == sorted(f"layer{stage}.0.{layer}" for stage in (1, 2, 3) for layer in layers)
    assert [name for name, _ in attached(model)] == ["layer1.0", "layer2.0", "layer3.0"]
    assert difference(outputs(model, x), y) <= 1e-6


def test_a_gate_around_a_gate_is_merged_the_second_time() -> None:
    last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model, x = branched(conv(), last, torch.float64)
    attach(model, "se", example=x, bias=True)
    attach(model, "se", at="layer", where=lambda name, layer: name == "last", example=x, bias=True)
    constant(model)
    y = outputs(model, x)
    assert fold(model).folded == ["last.1"] and fold(model).folded == ["last"]
    assert not wrappers(model) and difference(outputs(model, x), y) <= 1e-12


def test_a_layer_with_several_names_is_scaled_once() -> None:
    model = network(2)
    model.layer1[1].bn2 = model.layer1[0].bn2
    constant(attach(model, "se", bias=True))
    check_folded(model, images())
    assert model.layer1[1].bn2 is model.layer1[0].bn2


# gates that are not


@pytest.mark.slow_unless(start="paper")
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("kind", CONSTANT)
def test_gates_that_depend_on_the_input_are_kept(kind: str, start: str) -> None:
    attention, options = CONSTANT[kind]
    model = constant(attach(network(), attention, start=start, **options), which="none")
    found = check_kept(model, images(), "it depends on the input")
    assert all(one.deviation > 0.01 for one in found)


class OfBatch(Gate):
    """One gate of all images of a batch, of an odd function of them."""

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(4 * x.tanh().mean((0, 2, 3), keepdim=True))


def test_gates_that_depend_on_the_batch_are_kept() -> None:
    found = check_kept(attach(network(), OfBatch, start="paper"), images(), "it depends on the input")
    assert all(one.deviation > 0.01 for one in found)


@pytest.mark.slow_unless(id=["channel-channel-spatial", "spatial-spatial-channel", "spatial-parallel"])
@pytest.mark.parametrize("order", ["channel-spatial", "spatial-channel", "parallel"])
@pytest.mark.parametrize("which", ["channel", "spatial"])
def test_one_constant_half_is_not_enough(which: str, order: str) -> None:
    model = constant(attach(network(), "cbam", order=order), which=which)
    check_kept(model, images(), "it depends on the input")


@pytest.mark.slow_unless(id=["0.1-1", "100-2"])
@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("threshold", [0.1, 1, 10, 100, 1e3, 1e4, 1e6])
def test_gates_that_are_constant_for_small_maps_only(threshold: float, hidden: int) -> None:
    # every hidden unit is off for small maps, and one is on for large ones, whatever their direction
    for seed in range(24):
        torch.manual_seed(seed)
        model, x = branched(conv(), conv(), torch.float32)
        constant(attach(model, "se", example=x, bias=True, hidden=hidden), which="none")
        nn.init.constant_(model.last.attention.fc1.bias, -threshold)
        assert fold(model).folded == [], seed


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_gates_that_hardly_move_for_small_maps(scale: float) -> None:
    model = constant(attach(network(), "se", bias=True))
    for _, wrapper in attached(model):
        nn.init.normal_(wrapper.attention.fc1.weight)
        nn.init.normal_(wrapper.attention.fc2.weight, std=scale)
    check_kept(model, images(), "it depends on the input")


@pytest.mark.parametrize("strength", [1e-6, 1e-4, -1e-3])
def test_gates_that_hardly_move_for_any_map(strength: float) -> None:
    # without data nothing but rounding may change
    model = constant(attach(network(), "cbam"), which="none")
    for _, wrapper in attached(model):
        nn.init.constant_(wrapper.attention.strength, strength)
    found = check_kept(model, images(), "it depends on the input", tolerance=0.5)
    assert all(0.01 * abs(strength) < one.deviation < 2 * abs(strength) for one in found)


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_spatial_gates_that_hardly_move_for_small_maps(scale: float) -> None:
    model = constant(attach(network(), "spatial"))
    for _, wrapper in attached(model):
        nn.init.normal_(wrapper.attention.conv.weight, std=scale)
    check_kept(model, images(), "it depends on the input")


@pytest.mark.parametrize("data", [False, True])
def test_gates_that_are_no_number_are_kept(data: bool) -> None:
    # merged, they would ruin the weights for all images
    model, x = attach(network(), "se", start="paper"), images()
    if data:
        x[1, 0, 3, 3] = math.nan
    else:
        nn.init.constant_(model.layer2[0].bn2.attention.fc1.weight, math.nan)
    found = fold(model, x if data else None, 10 if data else 0.01)
    assert "layer2.0.bn2" not in found.folded
    assert all(value.isfinite().all() for key, value in model.state_dict().items() if ".attention." not in key)


# layers that cannot take a gate


class StdConv2d(nn.Conv2d):
    """A convolution with standardised weights, which takes out what is multiplied to them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Bent(nn.BatchNorm2d):
    """A norm with an activation, as timm has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x))


class Projected(nn.Module):
    """A block whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut = conv(), conv(), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x)


OBSTACLES = {
    "standardised convolution": (lambda: StdConv2d(8, 8, 3, padding=1), "its layer is a StdConv2d"),
    "norm with activation": (lambda: Bent(8), "its layer is a Bent"),
    "norm with activation in a sequence": (lambda: nn.Sequential(conv(), Bent(8)), "its layer is a Bent"),
    "timm": (lambda: timm.layers.BatchNormAct2d(8), "its layer is a BatchNormAct2d"),
    "block": (Block, "its layer is a Block"),
    "activation": (nn.Tanh, "its layer is a Tanh"),
    "activation in a sequence": (lambda: nn.Sequential(conv(), nn.Tanh()), "its layer is a Tanh"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(8, 8, 1), "its layer is a ConvTranspose2d"),
    "instance norm": (lambda: nn.InstanceNorm2d(8, affine=True), "its layer is a InstanceNorm2d"),
    "weight norm": (lambda: parametrizations.weight_norm(conv()), "its layer is a ParametrizedConv2d"),
    "batch norm without affine": (lambda: nn.BatchNorm2d(8, affine=False), "its BatchNorm2d has no weight of its own"),
    "group norm without affine": (lambda: nn.GroupNorm(2, 8, affine=False), "its GroupNorm has no weight of its own"),
    "norm of positions": (lambda: nn.LayerNorm([8, 12, 12]), "its norm scales positions, not channels"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_layers_that_do_not_take_a_gate(obstacle: str) -> None:
    build, reason = OBSTACLES[obstacle]
    model, x = branched(conv(), build(), torch.float32)
    name = "last" if not isinstance(model.last, nn.Sequential) else "last.1"
    attach(model, "se", at="layer", where=lambda one, layer: one == name, example=x, bias=True)
    constant(model)
    cannot = ", which cannot take it" if reason.startswith("its layer") else ""
    check_kept(model, x, reason + cannot)
    check_kept(model, x, reason + cannot, data=x)
    # but a gate that does nothing is taken out of anywhere
    for _, wrapper in attached(model):
        nn.init.zeros_(wrapper.attention.strength)
    assert fold(model).folded == [name]


@pytest.mark.parametrize(
    "build, name, reason",
    [
        # a norm would take out what its input is multiplied with
        (lambda: nn.BatchNorm2d(8), "first", "its layer is a BatchNorm2d, which cannot take it"),
        (lambda: nn.GroupNorm(2, 8), "first", "its layer is a GroupNorm, which cannot take it"),
        (lambda: nn.Sequential(nn.ReLU(), conv()), "first.0", "its layer is a ReLU, which cannot take it"),
        (lambda: StdConv2d(8, 8, 3, padding=1), "first", "its layer is a StdConv2d, which cannot take it"),
    ],
)
def test_layers_that_do_not_take_a_gate_before_them(build: Callable[[], nn.Module], name: str, reason: str) -> None:
    model, x = branched(build(), conv(), torch.float32)
    constant(attach(model, "se", at="residual-pre", example=x, bias=True))
    assert [one for one, _ in attached(model)] == [name]
    check_kept(model, x, reason)


def test_a_gate_before_a_block_is_merged_into_its_first_layer() -> None:
    model, x = branched(Block(), conv(), torch.float32)
    constant(attach(model, "se", at="residual-pre", example=x, bias=True))
    assert check_folded(model, x).folded == ["first.conv"]


@pytest.mark.parametrize("data", [False, True])
def test_a_gate_on_a_shortcut_without_a_layer(data: bool) -> None:
    # there is nothing on the shortcut that it could be merged into, and the branch is not what it scales
    model, x = branched(conv(), conv(), torch.float32)
    constant(attach(model, "se", at="shortcut", example=x, bias=True))
    y = outputs(model, x)
    found = fold(model, x if data else None)
    assert difference(outputs(model, x), y) <= 1e-6
    assert found.folded == [] and len(found) == 1 and all(one.reason for one in found)
    nn.init.zeros_(attached(model)[0][1].attention.strength)
    assert len(fold(model).folded) == 1 and not wrappers(model)


def test_a_gate_on_a_shortcut_with_a_layer_is_merged_into_it() -> None:
    model, x = branched(conv(), conv(), torch.float64)
    model = nn.Sequential(model.stem, Projected(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    constant(attach(model, "se", at="shortcut", example=x, bias=True))
    assert check_folded(model, x).folded == ["1.shortcut"]


def test_weights_that_are_used_elsewhere() -> None:
    model = constant(attach(network(2), "se", at="layer", where=["layer1.0.conv2", "layer2.1.bn2"], bias=True))
    # one of a gated layer and one of a plain one, of which one is the weight and one the bias
    model.layer1[1].conv2.weight = model.layer1[0].conv2.weight
    model.layer2[0].bn1.bias = model.layer2[1].bn2.bias
    check_kept(model, images(), "its weights are used elsewhere as well")


def test_a_layer_of_a_sequence_that_is_used_elsewhere() -> None:
    class Twice(nn.Module):
        """Two sequences with one layer in common, of which one has a gate."""

        def __init__(self) -> None:
            super().__init__()
            shared = conv()
            self.stem = nn.Conv2d(3, 8, 3)
            self.one, self.other = nn.Sequential(nn.ReLU(), shared), nn.Sequential(nn.Tanh(), shared)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head((self.one(x) - self.other(x)).mean((2, 3)))

    model = attach(Twice(), "se", at="layer", where=lambda name, layer: name == "one", bias=True)
    check_kept(constant(model), images(), "its weights are used elsewhere as well")


def test_a_layer_whose_output_a_hook_changes() -> None:
    model = network()
    model.layer1[0].bn2.register_forward_hook(lambda module, args, output: torch.tanh(output))
    constant(attach(model, "se", bias=True))
    x = images()
    y = outputs(model, x)
    assert fold(model).folded == ["layer2.0.bn2", "layer3.0.bn2"]
    assert difference(outputs(model, x), y) <= 1e-6


def test_norms_with_activation_in_a_network_of_timm() -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model("efficientnet_b0", num_classes=3))
    where = "blocks.2.1*"
    constant(attach(model, "se", where=where, example=torch.randn(1, 3, 32, 32), bias=True))
    assert [name for name, _ in attached(model)] == ["blocks.2.1.bn3"]
    check_kept(model, images(2, 32), "its layer is a BatchNormAct2d, which cannot take it")


# with data


def sigmoid(x: np.ndarray) -> np.ndarray:
    # without overflow
    return np.exp(-np.logaddexp(0, -x))


def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
    return x @ layer.weight.detach().double().numpy().T + bias


def squeeze_excite(attention: Any, x: np.ndarray) -> np.ndarray:
    """The blended gate (B, C, 1, 1) of a map."""
    gate = sigmoid(linear(attention.fc2, np.maximum(linear(attention.fc1, x.mean((2, 3))), 0)))
    return (1 + attention.strength.item() * (gate - 1))[:, :, None, None]


def cbam(attention: Any, x: np.ndarray) -> np.ndarray:
    """The product (B, C, H, W) of both blended gates of a map."""
    strength = attention.strength.item()
    mlp = [
        linear(attention.channel.fc2, np.maximum(linear(attention.channel.fc1, pooled), 0))
        for pooled in (x.mean((2, 3)), x.max((2, 3)))
    ]
    channel = (1 + strength * (sigmoid(mlp[0] + mlp[1]) - 1))[:, :, None, None]
    y = x * channel
    summary = np.stack([y.mean(1), y.max(1)], 1)
    weight = attention.spatial.conv.weight.detach().double().numpy()[0]
    width = weight.shape[-1] // 2
    padded = np.pad(summary, ((0, 0), (0, 0), (width, width), (width, width)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[1:], (2, 3))
    logits = np.einsum("bchwij,cij->bhw", windows, weight)
    mean, variance, scale, shift = (
        getattr(attention.spatial.norm, name).item() for name in ("running_mean", "running_var", "weight", "bias")
    )
    logits = (logits - mean) / math.sqrt(variance + attention.spatial.norm.eps) * scale + shift
    return channel * (1 + strength * (sigmoid(logits)[:, None] - 1))


FORMULAS = {"se": squeeze_excite, "cbam": cbam}


def nearly_constant(attention: str, blocks: int = 1, scale: float = 0.02) -> nn.Module:
    """A network whose gates are the nearer to constants, the later they stand."""
    model = attach(network(blocks), attention, reduction=4, bias=True)
    constant(model, which="none")
    for number, (_, wrapper) in enumerate(attached(model)):
        for name, parameter in wrapper.attention.named_parameters():
            if name.endswith(("fc2.weight", "conv.weight")):
                parameter.data.normal_(std=scale * 0.3**number)
    return model


def gates_of(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """The gates of all sites, computed by hand from the maps that they see."""
    maps: dict[str, np.ndarray] = {}
    handles = [
        wrapper.attention.register_forward_pre_hook(
            lambda module, args, name=name: maps.update({name: args[0].double().numpy()})
        )
        for name, wrapper in attached(model)
    ]
    outputs(model, x)
    for handle in handles:
        handle.remove()
    return {name: FORMULAS[wrapper.site.attention](wrapper.attention, maps[name]) for name, wrapper in attached(model)}


def of_constants(gates: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """For each site the mean gate of each channel, and the largest distance from it."""
    means = {name: gate.mean((0, 2, 3)) for name, gate in gates.items()}
    return {name: (mean, np.abs(gates[name] - mean[None, :, None, None]).max()) for name, mean in means.items()}


class Scaled(nn.Module):
    """A layer and a number for each channel."""

    def __init__(self, layer: nn.Module, scale: np.ndarray) -> None:
        super().__init__()
        self.layer, self.scale = layer, torch.from_numpy(scale).float()[:, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def by_hand(model: nn.Module, means: dict[str, np.ndarray]) -> nn.Module:
    """A copy of a network with numbers for some of its gates."""
    other = copy.deepcopy(model)
    for name, mean in means.items():
        parent, _, key = name.rpartition(".")
        remove(other, name)
        setattr(other.get_submodule(parent), key, Scaled(other.get_submodule(name), mean))
    return other


def classes(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    return outputs(model, x).argmax(1).numpy()


def labelled(model: nn.Module, count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of which a network gets some right and some wrong, with classes that are about as frequent."""
    x = images(count)
    model.linear.bias.data -= outputs(model, x).mean(0)
    right = torch.rand(count) < 0.7
    return x, torch.where(right, outputs(model, x).argmax(1), torch.randint(0, 4, (count,)))


# a strength above 1 makes small gates negative
@pytest.mark.parametrize("strength", [0.5, 3, -2])
@pytest.mark.parametrize("attention", FORMULAS)
def test_deviation_is_the_largest_distance_from_the_mean(attention: str, strength: float) -> None:
    model, x = nearly_constant(attention, scale=0.2), images(6)
    for _, wrapper in attached(model):
        nn.init.constant_(wrapper.attention.strength, strength)
    gates = gates_of(model, x)
    expected = of_constants(gates)
    found = fold(model, x, allow=())
    assert [one.name for one in found] == list(expected)
    for one in found:
        assert one.deviation == pytest.approx(expected[one.name][1], rel=1e-3, abs=1e-6)
    assert all(one.deviation > 1e-4 for one in found)
    assert strength < 1 or any((gate < 0).any() and (gate > 0).any() for gate in gates.values())


@pytest.mark.slow_unless(attention="se")
@pytest.mark.parametrize("attention", FORMULAS)
def test_gates_within_the_tolerance_become_their_means(attention: str) -> None:
    model, x = nearly_constant(attention), images(6)
    expected = of_constants(gates_of(model, x))
    names = list(expected)
    deviations = [deviation for _, deviation in expected.values()]
    # between two of them, by a hair
    for kept, tolerance in ((1, deviations[1] * 1.01), (2, deviations[1] * 0.99), (0, deviations[0] * 1.01)):
        folded = copy.deepcopy(model)
        found = fold(folded, x, tolerance)
        assert found.folded == names[kept:] and [name for name, _ in attached(folded)] == names[:kept]
        assert [one.reason for one in found] == ["it depends on the input"] * kept + [""] * (3 - kept)
        means = {name: expected[name][0] for name in names[kept:]}
        assert difference(outputs(folded, x), outputs(by_hand(model, means), x)) < 1e-5
        state, before = folded.state_dict(), detach(copy.deepcopy(model)).state_dict()
        for name, mean in means.items():
            for key in ("weight", "bias"):
                value = before[f"{name}.{key}"].double().numpy() * mean
                np.testing.assert_allclose(state[f"{name}.{key}"].double().numpy(), value, rtol=1e-5)


def test_tolerance_is_one_hundredth() -> None:
    model, x = nearly_constant("se"), images(6)
    deviations = [deviation for _, deviation in of_constants(gates_of(model, x)).values()]
    assert deviations[0] > 0.01 > deviations[2]
    within = [name for name, deviation in zip(NAMES, deviations, strict=True) if deviation <= 0.01]
    assert fold(model, x).folded == within


@pytest.mark.slow_unless(attention="se")
@pytest.mark.parametrize("attention", FORMULAS)
def test_change_of_each_gate_alone(attention: str) -> None:
    torch.manual_seed(2)
    model = nearly_constant(attention, scale=3)
    x, labels = labelled(model)
    expected = of_constants(gates_of(model, x))
    before = classes(model, x)
    found = fold(copy.deepcopy(model), (x, labels), tolerance=10, allow=())
    for one in found:
        now = classes(by_hand(model, {one.name: expected[one.name][0]}), x)
        change = 100 * ((now == labels.numpy()).mean() - (before == labels.numpy()).mean())
        assert one.change_points == pytest.approx(change, abs=1e-9)
        assert one.agreement == pytest.approx((now == before).mean())
        assert (one.folded, one.reason) == (False, "not allowed")
    # of labels that are neither all right nor all wrong, and of gates that make a difference
    assert len(set(before)) > 2 and 0.5 < (before == labels.numpy()).mean() < 0.95
    assert any(one.change_points for one in found) and any(one.agreement < 1 for one in found)
    assert found.accuracy == pytest.approx([(before == labels.numpy()).mean()] * 2)


def test_accuracy_before_and_after() -> None:
    torch.manual_seed(2)
    model = nearly_constant("se", scale=3)
    x, labels = labelled(model)
    before = (classes(model, x) == labels.numpy()).mean()
    means = {name: mean for name, (mean, _) in of_constants(gates_of(model, x)).items()}
    after = (classes(by_hand(model, means), x) == labels.numpy()).mean()
    found = fold(model, (x, labels), tolerance=10)
    assert len(found.folded) == 3 and not wrappers(model)
    assert found.accuracy == pytest.approx((before, after)) and before != after
    assert (classes(model, x) == labels.numpy()).mean() == pytest.approx(after)


def test_without_labels() -> None:
    model, x = nearly_constant("se"), images(12)
    before = classes(model, x)
    expected = of_constants(gates_of(model, x))
    found = fold(copy.deepcopy(model), x, tolerance=10)
    assert found.accuracy is None and {one.change_points for one in found} == {None}
    for one in found:
        now = classes(by_hand(model, {one.name: expected[one.name][0]}), x)
        assert one.agreement == pytest.approx((now == before).mean())


class Listed(torch.utils.data.Dataset):
    """Images, with or without labels."""

    def __init__(self, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] if self.labels is None else (self.x[index], self.labels[index])


def parts(x: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # of different sizes
    yield x[:7], labels[:7]
    yield x[7:8], labels[7:8]
    yield x[8:], labels[8:]


FORMS: dict[str, tuple[bool, Callable[[torch.Tensor, torch.Tensor], Any]]] = {
    "tensor": (False, lambda x, labels: x),
    "tuple": (True, lambda x, labels: (x, labels)),
    "pair as a list": (True, lambda x, labels: [x, labels]),
    "list of tensors": (False, lambda x, labels: [one for one, _ in parts(x, labels)]),
    "two tensors": (False, lambda x, labels: [x[:5], x[5:]]),
    "list of tuples": (True, lambda x, labels: list(parts(x, labels))),
    "generator of tensors": (False, lambda x, labels: (one for one, _ in parts(x, labels))),
    "generator of tuples": (True, parts),
    "loader of tensors": (False, lambda x, labels: torch.utils.data.DataLoader(Listed(x, None), batch_size=5)),
    "loader of pairs": (True, lambda x, labels: torch.utils.data.DataLoader(Listed(x, labels), batch_size=5)),
    "loader of a data set of tensors": (
        False,
        lambda x, labels: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5),
    ),
    "some with labels": (False, lambda x, labels: [(x[:5], labels[:5]), x[5:]]),
}


@pytest.mark.slow_unless(form=["tensor", "pair as a list", "loader of pairs"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form: str) -> None:
    torch.manual_seed(2)
    has_labels, given = FORMS[form]
    model = nearly_constant("se", scale=3)
    x, labels = labelled(model, 24)
    expected = fold(copy.deepcopy(model), (x, labels), tolerance=10)
    found = fold(model, given(x, labels), tolerance=10)
    assert found.folded == expected.folded and len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.deviation == pytest.approx(other.deviation, rel=1e-4)
        assert one.agreement == pytest.approx(other.agreement)
        assert one.change_points == (pytest.approx(other.change_points) if has_labels else None)
    assert found.accuracy == (pytest.approx(expected.accuracy) if has_labels else None)


@pytest.mark.parametrize(
    "data",
    [
        [],
        3,
        "images",
        [1, 2],
        np.zeros((2, 3, 16, 16)),
        iter(()),
        {"images": torch.zeros(2, 3, 16, 16)},
        torch.zeros(0, 3, 16, 16),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0)),
        [torch.zeros(0, 3, 16, 16)],
        [(torch.zeros(4, 3, 16, 16), torch.zeros(3))],
    ],
    ids=range(11),
)
def test_data_that_are_none(data: Any) -> None:
    model = nearly_constant("se")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(errors.DataError, match="fold: "):
        fold(model, data)
    assert len(attached(model)) == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("output", [lambda y: {"logits": y}, lambda y: y.argmax(1)])
def test_a_network_that_gives_no_scores(output: Callable[[torch.Tensor], Any]) -> None:
    model = nearly_constant("se")
    model.register_forward_hook(lambda _, __, y: output(y))
    with pytest.raises(errors.DataError, match=r"scores of classes, a tensor \(B, classes\), and \w+ gives"):
        fold(model, images())
    assert len(attached(model)) == 3


def test_an_empty_last_batch() -> None:
    model, x = nearly_constant("se"), images()
    expected = fold(copy.deepcopy(model), x, allow=())
    found = fold(model, [x, x[:0]], allow=())
    assert [one.deviation for one in found] == pytest.approx([one.deviation for one in expected])


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = nearly_constant("cbam").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        fold(model, [images(), torch.zeros(2, 5, 16, 16)], tolerance=10)

    def refuse(found: Any) -> bool:
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        fold(model, images(), tolerance=10, allow=refuse)
    assert len(attached(model)) == 3 and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(isinstance(wrapper.attention, Gate) for _, wrapper in attached(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_statistics_are_left_alone(training: bool) -> None:
    model = nearly_constant("cbam").train(training)
    model.layer2.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num" in key}
    x, random = images(), torch.get_rng_state()
    fold(model, x, tolerance=10, allow=())
    assert {name: module.training for name, module in model.named_modules()} == modes
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in statistics.items())
    fold(model, x, tolerance=10)
    assert not wrappers(model) and torch.equal(torch.get_rng_state(), random)
    assert all(module.training == modes[name] for name, module in model.named_modules())
    assert all(torch.equal(one, statistics[key]) for key, one in model.state_dict().items() if key in statistics)


def test_the_gate_is_watched_in_eval_mode() -> None:
    # a spatial gate has batch norm, whose statistics of the batch would give other gates
    model, x = nearly_constant("cbam").train(), images(6)
    expected = of_constants(gates_of(copy.deepcopy(model).eval(), x))
    for one in fold(model, x, allow=()):
        assert one.deviation == pytest.approx(expected[one.name][1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("silent", [False, True])
def test_a_gate_that_is_never_called(silent: bool) -> None:
    class Skipping(nn.Module):
        """A block that leaves its branch out when it is told to."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skips = conv(), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.skips else x + self.conv(torch.relu(x))

    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), Skipping(), Skipping(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        images(),
    )
    constant(attach(model, "se", bias=True))
    if silent:
        nn.init.zeros_(model[1].conv.attention.strength)
    model[1].skips = True
    y = outputs(model, x)
    found = fold(model, x)
    # one that does nothing may go wherever it stands
    assert [one.reason for one in found] == ["" if silent else "it was never called", ""]
    assert difference(outputs(model, x), y) < 1e-6 and len(wrappers(model)) == (0 if silent else 1)


# what the user allows


@pytest.mark.parametrize(
    "allow, folded",
    [
        (None, NAMES),
        ((), ()),
        ([], ()),
        (["layer2.0.bn2"], NAMES[1:2]),
        ({"layer3.0.bn2", "layer1.0.bn2"}, NAMES[::2]),
        (NAMES, NAMES),
        (dict.fromkeys(NAMES[:1]).keys(), NAMES[:1]),
        (lambda found: False, ()),
        (lambda found: found.name.startswith("layer3"), NAMES[2:]),
        (lambda found: found.agreement is not None and found.deviation > 0, NAMES),
    ],
    ids=range(10),
)
def test_what_is_allowed(allow: Any, folded: tuple[str, ...]) -> None:
    model, x = nearly_constant("se"), images(8)
    found = fold(model, x, tolerance=10, allow=allow)
    assert tuple(found.folded) == folded
    assert [one.reason for one in found] == ["" if name in folded else "not allowed" for name in NAMES]
    # those that are not are reported all the same
    assert all(one.agreement is not None and one.deviation > 0 for one in found)
    assert [name for name, _ in attached(model)] == [name for name in NAMES if name not in folded]


def test_a_predicate_over_the_change() -> None:
    torch.manual_seed(2)
    model = nearly_constant("se", scale=3)
    data = labelled(model)
    reported = fold(model, data, tolerance=10, allow=())
    limit = sorted(one.change_points for one in reported)[1]
    found = fold(model, data, tolerance=10, allow=lambda one: one.change_points >= limit)
    assert found.folded == [one.name for one in reported if one.change_points >= limit]
    assert 0 < len(found.folded) < 3


@pytest.mark.parametrize("allow", [["layer9.0.bn2"], [*NAMES, "layer1.0"], "layer1.0.bn2", ["layer1*"], ""])
def test_an_unknown_name(allow: Any) -> None:
    model = constant(attach(network(), "se", bias=True))
    with pytest.raises(errors.InvalidOption, match=r"allow must name sites with attention, layer1\.0\.bn2"):
        fold(model, allow=allow)
    assert len(attached(model)) == 3


def test_a_gate_that_depends_on_the_input_cannot_be_allowed() -> None:
    model = nearly_constant("se", scale=3)
    check_kept(model, images(), "it depends on the input", allow=NAMES, data=images(), tolerance=1e-6)
    check_kept(model, images(), "it depends on the input", allow=lambda found: True)


def test_what_is_allowed_without_data() -> None:
    model = constant(attach(network(), "se", bias=True))
    assert fold(model, allow=["layer2.0.bn2"]).folded == ["layer2.0.bn2"]
    assert [name for name, _ in attached(model)] == ["layer1.0.bn2", "layer3.0.bn2"]


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, "0.1", True, None])
def test_wrong_tolerance(tolerance: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="tolerance must be a number from 0 to inf, got"):
        fold(attach(network(), "se"), images(), tolerance)


# the report


def test_the_report_is_a_table() -> None:
    torch.manual_seed(2)
    model = nearly_constant("se", scale=3)
    found = fold(model, labelled(model), tolerance=10, allow=NAMES[2:])
    lines = str(found).splitlines()
    assert lines[0].split() == ["site", "attention", "deviation", "accuracy", "same", "result"]
    for line, one in zip(lines[1:4], found, strict=True):
        assert line.split()[:4] == [one.name, "se", f"{one.deviation:.2g}", f"{one.change_points:+.2f}"]
        assert f"{100 * one.agreement:.1f} %" in line
        assert line.endswith("  folded" if one.folded else "  kept: not allowed")
    before, after = found.accuracy
    assert lines[4:] == [f"accuracy: {100 * before:.2f} % before, {100 * after:.2f} % after"]
    assert lines == [line.rstrip() for line in lines]


def test_the_report_without_data() -> None:
    model = constant(attach(network(), "cbam"))
    lines = str(fold(model)).splitlines()
    assert len(lines) == 4 and all(line.split()[0] == name for line, name in zip(lines[1:], NAMES, strict=True))
    assert all(line.endswith("folded") and "%" not in line for line in lines[1:])
