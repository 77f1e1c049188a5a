"""State dicts of other implementations: against numbers computed with their authors' code, and against live modules."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.layers import SEModule
from timm.layers.cbam import CbamModule, ChannelAttn, LightCbamModule, SpatialAttn
from torch import nn
from torchvision.ops import SqueezeExcitation

from convattn import module_from
from convattn.attachment import Attached
from convattn.errors import InvalidOption, LayoutError, UnknownName
from convattn.layouts import LAYOUTS
from convattn.networks import BasicBlock, resnet20
from convattn.nn import CBAM, ChannelAttention, DualPool, Gate, SpatialAttention, SqueezeExcite
from tolerances import assert_close, is_close

DATA = Path(__file__).parent / "data"

LINEAR_PAIR = {"fc.0": "fc1", "fc.2": "fc2"}
OFFICIAL_CHANNEL = {"ChannelGate.mlp.1": "channel.fc1", "ChannelGate.mlp.3": "channel.fc2"}
OFFICIAL = {**OFFICIAL_CHANNEL, "SpatialGate.spatial.conv": "spatial.conv", "SpatialGate.spatial.bn": "spatial.norm"}
TIMM_CBAM = {"spatial.conv.conv": "spatial.conv", "spatial.conv.bn": "spatial.norm"}
GATES_OF_BLOCK = {
    "ca.fc1": "bn2.attention.channel.fc1",
    "ca.fc2": "bn2.attention.channel.fc2",
    "ca.fc.0": "bn2.attention.channel.fc1",
    "ca.fc.2": "bn2.attention.channel.fc2",
    "sa.conv1": "bn2.attention.spatial.conv",
}


@dataclass(frozen=True)
class Case:
    """A file of numbers, the class that has to come back, and which of our layers are which of theirs."""

    file: str
    ours: type[nn.Module]
    layers: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.file


CASES = [
    Case("cbam_basic_block_seed_c32", BasicBlock, GATES_OF_BLOCK),
    Case("cbam_official_c32_avg_max_lp_lse", CBAM, OFFICIAL, {"pools": ("mean", "max", "l2", "logsumexp")}),
    Case("cbam_official_c32_channel_only", ChannelAttention, {"ChannelGate.mlp.1": "fc1", "ChannelGate.mlp.3": "fc2"}),
    Case("cbam_official_c64_eval", CBAM, OFFICIAL),
    Case("cbam_official_c64_train", CBAM, OFFICIAL),
    Case("cbam_official_ties_c32", CBAM, OFFICIAL),
    Case("channel_attention_seed_c64", ChannelAttention, overrides={"layout": "post"}),
    Case("dual_pooling_head_seed", DualPool, {"reduce_layer": "reduce", "fc.1": "classifier"}),
    Case("se_moskomule_c64", SqueezeExcite, LINEAR_PAIR),
    Case("spatial_attention_seed_k3", SpatialAttention, {"conv1": "conv"}),
    Case("spatial_attention_seed_k7", SpatialAttention, {"conv1": "conv"}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Numbers:
    """What another implementation computed: tensors by name, and what the file says of them."""

    def __init__(self, case: Case) -> None:
        with safe_open(DATA / f"{case.file}.safetensors", "pt") as file:
            self.about = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        self.training = self.about["mode"] == "train"
        self.gate_alone = "returns the gate" in self.about["note"]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start so, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def output_of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What of our module equals their output, for as many images as there are numbers."""
        function = module.gate if self.gate_alone else module
        return function(x)[: len(self.tensors["output"])]


def as_ours(theirs: dict[str, torch.Tensor], case_layers: dict[str, str], module: nn.Module) -> dict[str, torch.Tensor]:
    """Their tensors under our names and in our shapes."""
    own, renamed = module.state_dict(keep_vars=True), {}
    for key, value in theirs.items():
        layer, _, kind = key.rpartition(".")
        name = f"{case_layers.get(layer, layer)}.{kind}"
        # the official code concatenates (max, mean)
        value = value.flip(1) if key.endswith("spatial.conv.weight") and "SpatialGate" in key else value
        renamed[name] = value.reshape(own[name].shape)
    return renamed


def gate_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The gate, wherever it stands in the module."""
    gates: list[torch.Tensor] = []
    for part in module.modules():
        if isinstance(part, Gate):
            part.register_forward_pre_hook(lambda gate, args: gates.append(gate.gate(args[0])))
    module(x)
    return gates[0].detach()


@each_case
def test_computes_their_numbers(case: Case) -> None:
    numbers = Numbers(case)
    module = module_from(numbers.below("state/"), **case.overrides).train(numbers.training)
    assert type(module) is case.ours
    x = numbers.tensors["input"].requires_grad_()
    y = (module.gate if numbers.gate_alone else module)(x)
    y.backward(numbers.tensors["grad_output"])
    assert_close(y[: len(numbers.tensors["output"])], numbers.tensors["output"])
    if "ties" not in case.file:
        assert_close(x.grad[: len(numbers.tensors["grad_input"])], numbers.tensors["grad_input"])
    gradients = as_ours(numbers.below("grad/"), case.layers, module)
    assert set(gradients) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, gradients[name])
    assert numbers.training == bool(numbers.below("state_after/"))
    for name, expected in as_ours(numbers.below("state_after/"), case.layers, module).items():
        assert_close(module.state_dict()[name], expected)


@each_case
def test_their_numbers_are_not_trivial(case: Case) -> None:
    numbers = Numbers(case)
    module = module_from(numbers.below("state/"), **case.overrides).train(numbers.training)
    x, expected = numbers.tensors["input"], numbers.tensors["output"]
    # a head has no gate: it is the output that must not be constant
    value = expected if case.ours is DualPool else gate_of(copy.deepcopy(module), x)
    assert value.std() > 0.01
    assert (value[0] - value[-1]).abs().max() > 0.01 or len(value) == 1
    y = numbers.output_of(copy.deepcopy(module), x)
    assert is_close(y, expected)
    names, parameters = zip(*module.named_parameters(), strict=True)
    influence = torch.autograd.grad(numbers.output_of(module, x).square().sum(), parameters)
    for name, gradient in zip(names, influence, strict=True):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[gradient.abs().argmax()] += 1e-4
            assert not is_close(numbers.output_of(changed, x), expected), name


def test_every_file_is_used_and_says_what_it_is() -> None:
    assert sorted(path.stem for path in DATA.glob("*.safetensors")) == sorted(case.file for case in CASES)
    for case in CASES:
        assert {"source", "class", "mode"} <= set(Numbers(case).about)


# other shapes and options, against live modules


class TheirSE(nn.Module):
    """Squeeze-and-excitation of the post, and of moskomule: linear layers without biases."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        linear = [nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)]
        self.fc = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class TheirChannel(nn.Module):
    """Channel attention of luuuyi, HEAD: 1x1 convolutions in a sequence; returns the gate."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        narrow, wide = nn.Conv2d(channels, hidden, 1, bias=False), nn.Conv2d(hidden, channels, 1, bias=False)
        self.fc = nn.Sequential(narrow, nn.ReLU(), wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [nn.functional.adaptive_avg_pool2d(x, 1), nn.functional.adaptive_max_pool2d(x, 1)]
        return sum(self.fc(value) for value in pooled).sigmoid()


class TheirChannelNamed(nn.Module):
    """Channel attention of the post, and of luuuyi in 2018: the same under other names."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [nn.functional.adaptive_avg_pool2d(x, 1), nn.functional.adaptive_max_pool2d(x, 1)]
        return sum(self.fc2(self.fc1(value).relu()) for value in pooled).sigmoid()


class FaceSE(nn.Module):
    """The SE of networks for faces (InsightFace, FastReID): the keys of the post's channel attention, one pool."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avg_pool, self.relu, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Sigmoid()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class TheirSpatial(nn.Module):
    """Spatial attention of the post and of luuuyi: (mean, max), no norm; returns the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, width, padding=width // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(torch.stack([x.mean(1), x.max(1).values], 1)).sigmoid()


class TheirBlock(nn.Module):
    """The residual block of the post and of luuuyi: both gates after the second norm, before the sum."""

    def __init__(self, channels: int, channel: nn.Module, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.ca, self.sa = channel, TheirSpatial(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = y * self.ca(y)
        return (x + y * self.sa(y)).relu()


class TheirHead(nn.Module):
    """The post's head: both poolings, reduced by a 1x1 convolution, dropped out, classified."""

    def __init__(self, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.reduce_layer = nn.Conv2d(2 * channels, features, 1)
        self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(features, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 1)
        return self.fc(self.reduce_layer(pooled).flatten(1))


class OfficialSpatial(nn.Module):
    """The spatial gate of the official CBAM: (max, mean), batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Module()
        self.spatial.conv = nn.Conv2d(2, 1, width, padding=width // 2, bias=False)
        self.spatial.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summary = torch.stack([x.max(1).values, x.mean(1)], 1)
        return x * self.spatial.bn(self.spatial.conv(summary)).sigmoid()


class OfficialCBAM(nn.Module):
    """The official CBAM: biases in the MLP; with or without its spatial half."""

    def __init__(self, channels: int, hidden: int, width: int) -> None:
        super().__init__()
        self.ChannelGate = nn.Module()
        layers = [nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)]
        self.ChannelGate.mlp = nn.Sequential(*layers)
        self.SpatialGate = OfficialSpatial(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = (self.ChannelGate.mlp(x.mean((2, 3))) + self.ChannelGate.mlp(x.amax((2, 3)))).sigmoid()
        return self.SpatialGate(x * gate[:, :, None, None])


@dataclass(frozen=True)
class Live:
    """A module of another implementation, how it is asked for, and what has to come back."""

    name: str
    theirs: Callable[[], nn.Module]
    channels: int
    ours: type[nn.Module]
    layers: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    gate_alone: bool = False

    def __str__(self) -> str:
        return self.name


def _lives() -> Iterator[Live]:
    se = {"layout": "timm-se"}
    yield Live("timm-se", lambda: SEModule(24), 24, SqueezeExcite, asked=se)
    yield Live("timm-se-narrow", lambda: SEModule(64, rd_ratio=1 / 4, rd_divisor=1), 64, SqueezeExcite, asked=se)
    yield Live("timm-se-one", lambda: SEModule(5, rd_channels=1), 5, SqueezeExcite, asked=se)
    yield Live("timm-se-no-bias", lambda: SEModule(32, bias=False), 32, SqueezeExcite, asked=se)
    yield Live(
        "timm-se-silu", lambda: SEModule(32, act_layer=nn.SiLU), 32, SqueezeExcite, asked={**se, "activation": "silu"}
    )
    yield Live(
        "timm-se-mobilenet",
        lambda: SEModule(32, gate_layer="hard_sigmoid"),
        32,
        SqueezeExcite,
        asked={"gate_activation": "hardsigmoid"},
    )
    tv = {"layout": "torchvision-se"}
    yield Live("torchvision-se", lambda: SqueezeExcitation(48, 12), 48, SqueezeExcite, asked=tv)
    yield Live(
        "torchvision-se-efficientnet",
        lambda: SqueezeExcitation(32, 8, activation=nn.SiLU),
        32,
        SqueezeExcite,
        asked={"activation": nn.SiLU},
    )
    yield Live(
        "torchvision-se-mobilenet",
        lambda: SqueezeExcitation(16, 8, scale_activation=nn.Hardsigmoid),
        16,
        SqueezeExcite,
        asked={"gate_activation": "hardsigmoid"},
    )
    yield Live(
        "torchvision-se-both",
        lambda: SqueezeExcitation(16, 3, activation=nn.Hardswish, scale_activation=nn.Hardsigmoid),
        16,
        SqueezeExcite,
        asked={**tv, "activation": "hardswish", "gate_activation": "hardsigmoid"},
    )
    yield Live("timm-cbam", lambda: CbamModule(64), 64, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-narrow", lambda: CbamModule(24, rd_ratio=1 / 8), 24, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-hidden-5", lambda: CbamModule(24, rd_channels=5), 24, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-divisor", lambda: CbamModule(40, rd_divisor=8), 40, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-k3", lambda: CbamModule(32, spatial_kernel_size=3), 32, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-bias", lambda: CbamModule(32, mlp_bias=True), 32, CBAM, TIMM_CBAM)
    yield Live("timm-cbam-silu", lambda: CbamModule(32, act_layer=nn.SiLU), 32, CBAM, TIMM_CBAM, {"activation": "SiLU"})
    yield Live("timm-channel", lambda: ChannelAttn(32), 32, ChannelAttention, asked={"layout": "timm-cbam"})
    yield Live(
        "timm-channel-bias",
        lambda: ChannelAttn(32, mlp_bias=True),
        32,
        ChannelAttention,
        asked={"layout": "timm-cbam"},
    )
    yield Live("timm-spatial", lambda: SpatialAttn(5), 9, SpatialAttention, {"conv.conv": "conv", "conv.bn": "norm"})
    for channels, hidden in ((64, 4), (8, 1), (48, 12)):
        yield Live(
            f"se-{channels}-{hidden}", lambda c=channels, h=hidden: TheirSE(c, h), channels, SqueezeExcite, LINEAR_PAIR
        )
        yield Live(
            f"channel-head-{channels}-{hidden}",
            lambda c=channels, h=hidden: TheirChannel(c, h),
            channels,
            ChannelAttention,
            LINEAR_PAIR,
            gate_alone=True,
        )
    yield Live(
        "channel-named",
        lambda: TheirChannelNamed(32, 2),
        32,
        ChannelAttention,
        asked={"layout": "luuuyi"},
        gate_alone=True,
    )
    yield Live("face-se", lambda: FaceSE(32, 2), 32, SqueezeExcite, asked={"layout": "insightface-se"})
    for width in (1, 3, 5, 9):
        yield Live(
            f"spatial-{width}", lambda w=width: TheirSpatial(w), 7, SpatialAttention, {"conv1": "conv"}, gate_alone=True
        )
    yield Live("block-head", lambda: TheirBlock(16, TheirChannel(16, 1), 7), 16, BasicBlock, GATES_OF_BLOCK)
    yield Live("block-named", lambda: TheirBlock(24, TheirChannelNamed(24, 3), 3), 24, BasicBlock, GATES_OF_BLOCK)
    yield Live("head", lambda: TheirHead(12, 5, 3), 12, DualPool, {"reduce_layer": "reduce", "fc.1": "classifier"})
    yield Live("official", lambda: OfficialCBAM(24, 3, 7), 24, CBAM, OFFICIAL)
    yield Live("official-k3", lambda: OfficialCBAM(16, 16, 3), 16, CBAM, OFFICIAL)


LIVES = list(_lives())
each_live = pytest.mark.parametrize("live", LIVES, ids=str)
each_training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def randomized(module: nn.Module) -> nn.Module:
    """In float64, with random weights and random batch-norm statistics: a fresh module would hide faults."""
    with torch.no_grad():
        for name, value in module.double().state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(std=0.5)
    return module


@pytest.mark.slow_unless(training=False)
@each_live
@each_training
def test_computes_what_they_compute(live: Live, training: bool) -> None:
    theirs = randomized(live.theirs()).train(training)
    ours = module_from(theirs.state_dict(), **live.asked).train(training)
    assert type(ours) is live.ours
    for part in (*ours.modules(), *theirs.modules()):
        # dropout draws other numbers in another module
        if isinstance(part, nn.Dropout):
            part.eval()
    for size in ((7, 5), (4, 4)):
        x = torch.randn(3, live.channels, *size, dtype=torch.float64)
        mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = (ours.gate if live.gate_alone else ours)(mine), theirs(its)
        weights = torch.randn_like(y)
        assert_close(y, expected)
        for module, value in ((ours, y), (theirs, expected)):
            module.zero_grad()
            (value * weights).sum().backward()
        assert_close(mine.grad, its.grad)
        gradients = as_ours({k: p.grad for k, p in theirs.named_parameters()}, live.layers, ours)
        assert set(gradients) == {name for name, _ in ours.named_parameters()}
        for name, parameter in ours.named_parameters():
            assert_close(parameter.grad, gradients[name])
        for name, buffer in as_ours(dict(theirs.named_buffers()), live.layers, ours).items():
            assert_close(ours.state_dict()[name], buffer)
    if live.ours is not DualPool:
        assert gate_of(ours, x).std() > 0.01


@each_live
def test_one_weight_changed_is_seen(live: Live) -> None:
    theirs = randomized(live.theirs()).eval()
    ours = module_from(theirs.state_dict(), **live.asked).eval()
    x = torch.randn(4, live.channels, 6, 6, dtype=torch.float64)
    function = ours.gate if live.gate_alone else ours
    expected = theirs(x)
    assert is_close(function(x), expected)
    function(x).square().sum().backward()
    for parameter in ours.parameters():
        with torch.no_grad():
            position = parameter.grad.abs().argmax()
            parameter.view(-1)[position] += 1e-3
            assert not is_close(function(x), expected)
            parameter.view(-1)[position] -= 1e-3


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions_come_from_the_convolutions(dimensions: int) -> None:
    ones = [1] * dimensions
    state = {"fc1.weight": torch.randn(2, 8, *ones), "fc2.weight": torch.randn(8, 2, *ones)}
    x = torch.randn(2, 8, *[5] * dimensions)
    y = module_from(state, layout="post")(x)
    pooled = (x.flatten(2).mean(2), x.flatten(2).amax(2))
    first, second = (state[f"fc{i}.weight"].flatten(1) for i in (1, 2))
    gate = sum((value @ first.T).relu() @ second.T for value in pooled).sigmoid()
    assert_close(y, x * gate.reshape(2, 8, *ones))
    spatial = module_from({"conv1.weight": torch.randn(1, 2, *[3] * dimensions)})
    assert spatial.dimensions == dimensions and spatial.gate(x).shape == (2, 1, *x.shape[2:])


def test_linear_layers_take_any_dimensions() -> None:
    state = TheirSE(8, 2).state_dict()
    x = torch.randn(2, 8, 5)
    assert_close(module_from(state, dimensions=1)(x), module_from(state)(x[..., None])[..., 0])


# which layout it is


STATES: dict[str, Callable[[], nn.Module]] = {
    "post": lambda: TheirHead(8, 4, 3),
    "luuuyi": lambda: TheirChannel(8, 2),
    "moskomule-se": lambda: TheirSE(8, 2),
    "insightface-se": lambda: FaceSE(8, 2),
    "official-cbam": lambda: OfficialCBAM(8, 2, 7),
    "timm-se": lambda: SEModule(8),
    "timm-cbam": lambda: CbamModule(8, rd_channels=2),
    "torchvision-se": lambda: SqueezeExcitation(8, 2),
}


def test_every_layout_has_an_example() -> None:
    assert set(STATES) == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_by_name(layout: str) -> None:
    theirs = randomized(STATES[layout]()).eval()
    module = module_from(theirs.state_dict(), layout=layout).eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(module.gate(x) if layout == "luuuyi" else module(x), theirs(x))


WRONG = [("post", "luuuyi"), ("luuuyi", "post"), ("moskomule-se", "timm-se"), ("official-cbam", "timm-cbam")]
WRONG += [("timm-se", "official-cbam"), ("timm-cbam", "torchvision-se"), ("torchvision-se", "moskomule-se")]


@pytest.mark.parametrize("state, layout", WRONG)
def test_wrong_layout_names_what_fits(state: str, layout: str) -> None:
    with pytest.raises(LayoutError, match=f"not of the layout '{layout}'; they fit .*'{state}'"):
        module_from(STATES[state]().state_dict(), layout=layout)


def test_unknown_layout_suggests() -> None:
    with pytest.raises(UnknownName, match=r"no layout is called 'tim-se'\. Did you mean 'timm-se'\?"):
        module_from(TheirSE(8, 2).state_dict(), layout="tim-se")


@pytest.mark.parametrize("theirs", [SEModule(8), SqueezeExcitation(8, 2), ChannelAttn(8, mlp_bias=True)], ids=repr)
@pytest.mark.parametrize("overrides", [{}, {"hidden": 16}, {"start": "identity"}], ids=str)
def test_ambiguous_state_names_the_candidates(theirs: nn.Module, overrides: dict[str, Any]) -> None:
    with pytest.raises(LayoutError) as caught:
        module_from(theirs.state_dict(), **overrides)
    for said in ("'timm-se'", "'torchvision-se'", "'timm-cbam'", "layout=", "activation=", "gate_activation="):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "theirs", [FaceSE(8, 2), TheirChannelNamed(8, 2), ChannelAttn(8), SEModule(8, bias=False)], ids=repr
)
@pytest.mark.parametrize("overrides", [{}, {"hidden": 16}, {"start": "identity"}, {"activation": "silu"}], ids=str)
def test_same_keys_without_biases_are_not_decided(theirs: nn.Module, overrides: dict[str, Any]) -> None:
    with pytest.raises(LayoutError) as caught:
        module_from(theirs.state_dict(), **overrides)
    assert str(caught.value) == (
        "module_from: the keys and shapes fit 'post' and 'luuuyi' and 'timm-cbam' (channel attention, of mean and "
        "maximum) or 'insightface-se' and 'timm-se' (squeeze-and-excitation, of the mean alone), which compute "
        "differently. Say which with layout=..., or give pools=... or gate_activation=...."
    )


def test_the_layout_decides_for_convolutions_without_biases() -> None:
    face, post = randomized(FaceSE(8, 8)), randomized(TheirChannelNamed(8, 8))
    post.load_state_dict(face.state_dict())
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert not is_close(x * post(x), face(x))
    for layout in ("insightface-se", "timm-se"):
        assert_close(module_from(face.state_dict(), layout=layout)(x), face(x))
    for layout in ("post", "luuuyi", "timm-cbam"):
        assert_close(module_from(face.state_dict(), layout=layout).gate(x), post(x))


def test_an_option_of_one_candidate_decides() -> None:
    theirs = randomized(FaceSE(8, 2))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(module_from(theirs.state_dict(), gate_activation="sigmoid")(x), theirs(x))
    pooled = module_from(theirs.state_dict(), pools=("mean",))
    assert type(pooled) is ChannelAttention
    # channel attention of the mean alone is the same as squeeze-and-excitation
    assert_close(pooled(x), theirs(x))
    with pytest.raises(LayoutError, match="compute differently"):
        module_from(theirs.state_dict(), pools=("mean",), gate_activation="sigmoid")


def test_pools_decide_for_channel_attention() -> None:
    theirs = randomized(ChannelAttn(8, mlp_bias=True))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(module_from(theirs.state_dict(), pools=("mean", "max"))(x), theirs(x))
    assert module_from(theirs.state_dict(), pools=("max",)).pools == ("max",)


@pytest.mark.parametrize("prefix", ["se.", "layer1.0.se.", "module.", "module.features.3.", "fc.", "conv.", "bn."])
@pytest.mark.parametrize("layout", ["moskomule-se", "official-cbam", "timm-cbam", "post"])
def test_prefix_is_taken_off(prefix: str, layout: str) -> None:
    state = STATES[layout]().state_dict()
    module = module_from({prefix + key: value for key, value in state.items()})
    plain = module_from(state)
    assert type(module) is type(plain)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())


def test_state_dict_wrapper_is_taken_off() -> None:
    state = TheirSE(8, 2).state_dict()
    module = module_from({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}})
    assert torch.equal(module.fc1.weight, state["fc.0.weight"])


# what the caller may say


def test_identity_start_blends_to_theirs() -> None:
    theirs = randomized(OfficialCBAM(8, 2, 3)).eval()
    module = module_from(theirs.state_dict(), start="identity").eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert torch.equal(module(x), x)
    nn.init.ones_(module.strength)
    assert_close(module(x), theirs(x))


def test_block_with_identity_start() -> None:
    theirs = randomized(TheirBlock(16, TheirChannel(16, 1), 7)).eval()
    block = module_from(theirs.state_dict(), start="identity").eval()
    assert isinstance(block.bn2, Attached)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    assert not is_close(block(x), theirs(x))
    nn.init.ones_(block.bn2.attention.strength)
    assert_close(block(x), theirs(x))


@pytest.mark.parametrize("layout, asked", [("moskomule-se", {}), ("timm-se", {"layout": "timm-se"}), ("timm-cbam", {})])
def test_wider_hidden_computes_the_same(layout: str, asked: dict[str, Any]) -> None:
    theirs = randomized(STATES[layout]()).eval()
    module = module_from(theirs.state_dict(), hidden=13, **asked).eval()
    narrow = module_from(theirs.state_dict(), **asked)
    assert sum(p.numel() for p in module.parameters()) > sum(p.numel() for p in narrow.parameters())
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(module(x), theirs(x))


@pytest.mark.parametrize("hidden, message", [(2, "hidden width of 4, hidden=2 is less"), (0, "at least 1, got 0")])
def test_narrower_hidden_is_refused(hidden: int, message: str) -> None:
    with pytest.raises((LayoutError, InvalidOption), match=message):
        module_from(TheirSE(16, 4).state_dict(), hidden=hidden)


def test_hidden_width_of_zero() -> None:
    # the post's layer with fewer channels than the reduction: it can be built, and halves everything
    state = {"fc.0.weight": torch.empty(0, 8), "fc.2.weight": torch.empty(8, 0)}
    with pytest.raises(LayoutError, match=r"hidden width is 0 .*one half; hidden=1"):
        module_from(state)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(module_from(state, hidden=1)(x), 0.5 * x)


def test_dropout_of_the_head() -> None:
    state = TheirHead(4, 100, 3).state_dict()
    module = module_from(state)
    assert module.dropout.p == 0.5
    x = torch.randn(2, 4, 3, 3)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    without = module_from(state, dropout=0.0)
    assert torch.equal(without(x), module(x))


def test_momentum_is_theirs() -> None:
    assert module_from(OfficialCBAM(8, 2, 3).state_dict()).spatial.norm.momentum == 0.01
    assert module_from(CbamModule(8).state_dict()).spatial.norm.momentum == 0.1
    assert module_from(CbamModule(8).state_dict(), norm_momentum=0.5).spatial.norm.momentum == 0.5


@pytest.mark.parametrize(
    "option, value",
    [("pools", ("max",)), ("reduction", 4), ("channels", 8), ("bias", True), ("kernel_size", 3), ("activaton", "relu")],
)
def test_unknown_override(option: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"{option} cannot be set for this SqueezeExcite; what can be: activation"):
        module_from(TheirSE(8, 2).state_dict(), **{option: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["official-cbam", "moskomule-se", "post"])
def test_dtype_is_kept(layout: str, dtype: torch.dtype) -> None:
    module = module_from(STATES[layout]().to(dtype).state_dict())
    assert {value.dtype for value in module.state_dict().values() if value.is_floating_point()} == {dtype}


def test_the_given_tensors_are_left_alone() -> None:
    state = OfficialCBAM(8, 2, 3).state_dict()
    before = copy.deepcopy(state)
    randomized(module_from(state))
    assert list(state) == list(before) and all(torch.equal(state[key], before[key]) for key in state)


# what is refused


def test_light_cbam_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"shape \(1, 1, 7, 7\), expected \(1, 2, k, ...\).*light CBAM"):
        module_from(LightCbamModule(16).state_dict())


def test_block_with_downsample_is_refused() -> None:
    theirs = TheirBlock(8, TheirChannel(8, 1), 3)
    theirs.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(LayoutError, match="residual block without downsample"):
        module_from(theirs.state_dict())


def test_block_of_another_shape_is_refused() -> None:
    theirs = TheirBlock(8, TheirChannel(8, 1), 3)
    theirs.conv1 = nn.Conv2d(4, 8, 3, bias=False)
    with pytest.raises(LayoutError, match=re.escape("conv1.weight has the shape (8, 4, 3, 3), expected (8, 8, 3, 3)")):
        module_from(theirs.state_dict())


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "expected tensors by name"),
        ({"fc.0.weight": [1.0]}, "expected tensors by name"),
        ({"weight": torch.ones(3)}, "belong to no known layout .*: 'weight'\\."),
        (
            {"a.fc.0.weight": torch.ones(2, 8), "b.fc.2.weight": torch.ones(8, 2)},
            "belong to no known layout .*official-cbam",
        ),
        ({"fc.0.weight": torch.ones(2, 8)}, "belong to no known layout"),
        (
            {"fc.0.weight": torch.ones(2, 8), "fc.2.weight": torch.ones(6, 2)},
            r"'post' and 'moskomule-se', but fc\.2\.weight has the shape \(6, 2\), expected \(8, 2\)\.",
        ),
        (
            {"fc1.weight": torch.ones(2, 8, 3, 3), "fc2.weight": torch.ones(8, 2, 1, 1)},
            r"The nearest is 'post' .*: fc1\.weight has the shape \(2, 8, 3, 3\), expected that of a 1x1 convolution",
        ),
        ({"conv1.weight": torch.ones(64, 3, 7, 7)}, r"shape \(64, 3, 7, 7\), expected \(1, 2, k, ...\)"),
        (
            {"conv1.weight": torch.ones(1, 2, 3, 5)},
            r"conv1\.weight has the shape \(1, 2, 3, 5\), expected \(1, 2, k, ...\)",
        ),
    ],
    ids=["empty", "lists", "other", "two", "half", "shapes", "3x3", "stem", "oblong"],
)
def test_no_such_module(state: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message) as caught:
        module_from(state)
    assert "\n" not in str(caught.value)


NEAREST: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {key: value for key, value in CbamModule(8).state_dict().items() if key != "spatial.conv.bn.weight"},
        {},
        "The nearest is 'timm-cbam': 'spatial.conv.bn.weight' is missing.",
    ),
    (
        {**SEModule(8).state_dict(), "fc3.weight": torch.ones(3)},
        {},
        "The nearest is 'timm-se' and 'torchvision-se': 'fc3.weight' is not of it.",
    ),
    (
        {f"block.se.{key}": value[..., 0, 0] for key, value in FaceSE(8, 2).state_dict().items()},
        {},
        "The nearest is 'post' and 'luuuyi' and 'timm-cbam': fc1.weight has the shape (2, 8), expected that of a 1x1 "
        "convolution.",
    ),
    (
        {f"layer.{key}": value for key, value in FaceSE(8, 2).state_dict().items()},
        {"layout": "torchvision-se"},
        "they fit 'post' and 'luuuyi' and 'timm-cbam' and 'insightface-se'",
    ),
    (FaceSE(8, 2).state_dict(), {"layout": "torchvision-se"}, "'torchvision-se': 'fc1.bias' is missing."),
    (SEModule(8).state_dict(), {"layout": "insightface-se"}, "and 'timm-se': 'fc1.bias' is not of it."),
    (
        {"fc1.weight": torch.ones(2, 8, 1, 1), "fc2.weight": torch.ones(6, 2, 1, 1)},
        {},
        "but fc2.weight has the shape (6, 2, 1, 1), expected (8, 2, 1, 1).",
    ),
    (
        {**OfficialCBAM(8, 2, 3).state_dict(), "SpatialGate.spatial.bn.running_var": torch.ones(4)},
        {},
        "is 'official-cbam', but SpatialGate.spatial.bn.running_var has the shape (4,), expected (1,).",
    ),
    (
        {**TheirBlock(8, TheirChannel(8, 1), 3).state_dict(), **TheirBlock(8, TheirChannel(4, 1), 3).state_dict()},
        {},
        "ca.fc.0.weight has the shape (1, 4, 1, 1), expected a two-dimensional convolution in a block of 8 channels.",
    ),
    # with none of their keys
    (
        {
            **{"se.conv_reduce.weight": torch.ones(2, 8, 1, 1), "se.conv_reduce.bias": torch.ones(2)},
            **{"se.conv_expand.weight": torch.ones(8, 2, 1, 1), "se.conv_expand.bias": torch.ones(8)},
        },
        {},
        "The nearest is 'timm-se' and 'torchvision-se': 'fc1.weight' is missing.",
    ),
    ({"conv.weight": torch.ones(1, 2, 7, 7)}, {}, "The nearest is 'post' and 'luuuyi': 'conv1.weight' is missing."),
    (
        {"mlp.0.weight": torch.ones(2, 8), "mlp.2.weight": torch.ones(8, 2)},
        {},
        "The nearest is 'post' and 'moskomule-se': 'fc.0.weight' is missing.",
    ),
]


@pytest.mark.parametrize("state, asked, message", NEAREST, ids=range(len(NEAREST)))
def test_refusals_name_the_nearest_layout(state: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        module_from(state, **asked)
    assert message in str(caught.value)


class Subclass(torch.Tensor):
    """A tensor of another class, as of libraries that quantize or shard."""


def without_memory() -> torch.Tensor:
    tensor = torch.ones(2, 8, 1, 1)
    tensor.untyped_storage().resize_(0)
    return tensor


SE, OTHER = (2, 8, 1, 1), torch.ones(8, 2, 1, 1)
HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "integers": (lambda: torch.ones(SE, dtype=torch.int64), "'fc1.weight' is torch.int64, not one of torch.float16"),
    "booleans": (lambda: torch.ones(SE, dtype=torch.bool), "'fc1.weight' is torch.bool"),
    "complex": (lambda: torch.ones(SE, dtype=torch.complex64), "'fc1.weight' is torch.complex64"),
    "conjugated": (lambda: torch.ones(SE, dtype=torch.complex64).conj(), "'fc1.weight' is torch.complex64"),
    "float8": (lambda: torch.ones(SE).to(torch.float8_e4m3fn), "'fc1.weight' is torch.float8_e4m3fn"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(SE), 0.1, 0, torch.qint8),
        "not a plain dense tensor (quantized)",
    ),
    "sparse": (lambda: torch.ones(SE).to_sparse(), "not a plain dense tensor (torch.sparse_coo)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 8)]), "not a plain dense tensor (nested)"),
    "meta": (lambda: torch.ones(SE, device="meta"), "has no values (device meta)"),
    "freed": (without_memory, "has no values (device cpu)"),
    "subclass": (lambda: torch.ones(SE).as_subclass(Subclass), "is of type Subclass"),
    "lazy": (lambda: nn.UninitializedParameter(), "is of type UninitializedParameter"),
    "number": (lambda: 1.0, "'fc1.weight' is of type float"),
    "none": (lambda: None, "'fc1.weight' is of type NoneType"),
    "0-d": (lambda: torch.tensor(1.0), "fc1.weight has the shape ()"),
    "1-d": (lambda: torch.ones(8), "fc1.weight has the shape (8,)"),
    "6-d": (lambda: torch.ones(2, 8, 1, 1, 1, 1), "fc1.weight has the shape (2, 8, 1, 1, 1, 1)"),
    "no elements": (lambda: torch.ones(2, 0, 1, 1), "fc1.weight has the shape (2, 0, 1, 1)"),
    "no kernel": (lambda: torch.ones(2, 8, 0, 0), "fc1.weight has the shape (2, 8, 0, 0)"),
    "other width": (lambda: torch.ones(3, 8, 1, 1), "fc2.weight has the shape (8, 2, 1, 1), expected (8, 3, 1, 1)"),
    "other dimensions": (lambda: torch.ones(2, 8, 1), "fc2.weight has the shape (8, 2, 1, 1), expected (8, 2, 1)"),
    "other dtype": (lambda: torch.ones(SE).double(), "'fc1.weight' is torch.float64 and 'fc2.weight' is torch.float32"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("layout", [None, "post", "insightface-se", "official-cbam"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_tensors_get_one_line(hostile: str, layout: str | None) -> None:
    value, message = HOSTILE[hostile]
    with pytest.raises(LayoutError) as caught:
        module_from({"fc1.weight": value(), "fc2.weight": OTHER}, layout=layout)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value) or layout == "official-cbam"


HOSTILE_KEYS: list[tuple[dict[Any, Any], str]] = [
    ({3: OTHER}, "a key is of type int"),
    ({None: OTHER}, "a key is of type NoneType"),
    ({("fc1", "weight"): OTHER}, "a key is of type tuple"),
    ({b"fc1.weight": OTHER, "fc2.weight": OTHER}, "a key is of type bytes"),
    ({"fc1.weight\n": OTHER, "fc2.weight": OTHER}, "'fc1.weight\\n'"),
    ({"a\r\nb\u2028.fc1.weight": OTHER, "fc2.weight": OTHER}, "'a\\r\\nb\\u2028.fc1.weight'"),
    ({"": OTHER}, "belong to no known layout"),
    ({".": OTHER, "..": OTHER}, "belong to no known layout"),
    ({"x" * 100_000: OTHER}, "'" + "x" * 80 + "'..."),
    ({"x." * 100_000 + "fc1.weight": OTHER}, "'fc2.weight' is missing"),
    ({f"layer{index}.weight": OTHER for index in range(100_000)}, "100000 tensors are more than any layout has"),
    (resnet20().state_dict(), "not of a network"),
    ({"state_dict": {3: OTHER}}, "a key is of type int"),
    ({"state_dict": {}}, "expected tensors by name"),
    ({"num_batches_tracked": torch.tensor(1)}, "belong to no known layout"),
]


@pytest.mark.parametrize("state, message", HOSTILE_KEYS, ids=range(len(HOSTILE_KEYS)))
def test_hostile_keys_get_one_line(state: dict[Any, Any], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        module_from(state)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1500


def test_newlines_in_a_shared_prefix_are_a_prefix() -> None:
    state = TheirSE(8, 2).state_dict()
    module = module_from({f"a\nb.{key}": value for key, value in state.items()})
    assert torch.equal(module.fc1.weight, state["fc.0.weight"])


def test_shared_and_strange_memory_is_copied() -> None:
    both = torch.randn(64)
    state = {"fc.0.weight": both.view(8, 8), "fc.2.weight": both.view(8, 8).t()}
    module = module_from(state)
    assert torch.equal(module.fc1.weight, both.view(8, 8)) and torch.equal(module.fc2.weight, both.view(8, 8).t())
    wide = module_from({"fc.0.weight": torch.ones(1, 1).expand(8, 8), "fc.2.weight": nn.Parameter(both.view(8, 8))})
    with torch.no_grad():
        wide.fc1.weight[0, 0] = 5.0
    assert wide.fc1.weight.sum() == 68
    negative = torch._neg_view(torch.ones(8, 8))
    assert torch.equal(module_from({**state, "fc.0.weight": negative}).fc1.weight, -torch.ones(8, 8))


def damaged(state: dict[Any, Any], draw: random.Random) -> dict[Any, Any]:
    """A state dict with a random fault: another key, shape, dtype or kind of tensor, one too many or too few."""
    plain = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
    plain = [key for key in plain if state[key].layout == torch.strided]
    if not plain:
        return state
    key = draw.choice(plain)
    value = state[key]
    shapes = [(), (0,), (1,), (2, 8), (8, 2, 1), (1, 2, 3), (1, 2, 4, 4), (2, 2, 2, 2, 2), tuple(value.shape[:-1])]
    kinds = [torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2]
    faults: list[Callable[[], dict[Any, Any]]] = [
        lambda: {other: state[other] for other in state if other != key},
        lambda: {**state, f"{key}{draw.choice(['2', '.weight', ''])}": value},
        lambda: {**state, draw.choice(["strength", "fc1.bias", "x", "spatial.bn.weight", 7]): value},
        lambda: {(f"a.{other}" if draw.random() < 0.9 else other): state[other] for other in state},
        lambda: {**state, key: torch.ones(draw.choice(shapes))},
        lambda: {**state, key: value.to(draw.choice(kinds))},
        lambda: {**state, key: draw.choice([value.to("meta"), value.tolist(), value.float().to_sparse(), None])},
        lambda: {**state, key: state[draw.choice(list(state))]},
        lambda: {**state, key: value[..., None]},
    ]
    return draw.choice(faults)()


def numbers_in(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights, sorted, apart from what a state dict has beside them."""
    kept = [v.flatten().double() for k, v in state.items() if not k.endswith(("tracked", "strength"))]
    return torch.cat(kept).sort().values


def test_damaged_state_dicts_are_read_whole_or_refused_in_one_line() -> None:
    draw, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(800):
        layout = draw.choice([*STATES, "post-block"])
        theirs = TheirBlock(8, TheirChannelNamed(8, 2), 3) if layout == "post-block" else STATES[layout]()
        state: dict[Any, Any] = theirs.state_dict()
        for _ in range(draw.randint(1, 2)):
            state = damaged(state, draw)
        try:
            module = module_from(state, layout=draw.choice([None, layout if layout in LAYOUTS else "post"]))
        except LayoutError as error:
            assert len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
        except InvalidOption as error:
            assert "kernel_size must be odd" in str(error)
        else:
            assert torch.equal(numbers_in(module.state_dict()), numbers_in(state))
            outcomes["read"] += 1
    assert outcomes["read"] > 50 and outcomes["refused"] > 500


def test_even_kernel_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"'post' and 'luuuyi', but conv1.weight has the shape .* the same odd k"):
        module_from({"conv1.weight": torch.ones(1, 2, 4, 4)})
