"""Every place at which attention can stand: which sites there are, what is computed there, and how sites are chosen."""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import convattn
from convattn import attach, detach, plan
from convattn.attachment import AttachedHead, Blended, attached
from convattn.attachment.sites import PLACES, Survey
from convattn.attachment.wrapper import AttachedShortcut, AttachedSource
from convattn.errors import AttachError, ConvattnError, InvalidOption
from convattn.networks.cifar_resnet import CifarResNet
from convattn.nn import CBAM, SqueezeExcite
from convattn.registry import entry
from tolerances import assert_close, is_close

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
HEADS = ("avg", "max", "avgmax", "concat", "dual")


def names(model: nn.Module, at: str, **options: Any) -> list[str]:
    """The names of the sites at a place."""
    return [site.name for site in plan(model, "dual" if at == "pool" else "se", at=at, **options)]


def randomise(model: nn.Module) -> nn.Module:
    """Random weights and statistics for all norms: those that start at 0 or 1 hide what stands beside them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model


def move(model: nn.Module) -> None:
    """Give each site a strength of its own."""
    for number, (_, wrapper) in enumerate(attached(model)):
        nn.init.constant_(wrapper.attention.strength, 0.9 - 0.07 * (number % 9))


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that asserts that a model is what it was: modules, hooks, modes, values, and the random state."""

    def listed() -> list[Any]:
        return [
            (name, id(module), module.training, sorted(module._modules), sorted(vars(module)), hooks(module))
            for name, module in model.named_modules(remove_duplicate=False)
        ]

    def hooks(module: nn.Module) -> list[int]:
        return [len(getattr(module, key)) for key in vars(module) if key.endswith("_hooks")]

    modules, state = listed(), model.state_dict(keep_vars=True)
    values = {key: value.clone() for key, value in state.items()}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()

    def check(*, same_random_state: bool = True) -> None:
        assert listed() == modules
        current = model.state_dict(keep_vars=True)
        assert list(current) == list(state)
        for key, tensor in state.items():
            assert current[key] is tensor and torch.equal(tensor, values[key]), key
        assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == flags
        if same_random_state:
            assert torch.equal(torch.get_rng_state(), random)

    return check


def refused(model: nn.Module, error: type[Exception], match: str, *args: Any, **options: Any) -> str:
    """Attaching fails with a message of one line, and the model is what it was."""
    check = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        attach(model, *args, **options)
    check()
    assert isinstance(caught.value, ConvattnError) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("The model was not changed.")
    return str(caught.value)


# the sites of published networks, from the tables in their papers and the names in their libraries


@functools.cache
def created(name: str) -> nn.Module:
    library, _, network = name.partition(":")
    if library == "timm":
        return timm.create_model(network).eval()
    # both would take long to initialise
    options = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(network, **options).eval()


def example(name: str) -> torch.Tensor:
    # inception halves 5 times without padding
    return torch.randn(1, 3, *[160 if "inception" in name else 64] * 2)


def grid(template: str, counts: Sequence[int], first: int = 0) -> list[str]:
    """`template` with the number of each stage and of each block in it."""
    return [template.format(stage, block) for stage, count in enumerate(counts, first) for block in range(count)]


def ends(template: str, counts: Sequence[int], first: int = 0) -> list[str]:
    """The last block of each stage."""
    return [template.format(stage, count - 1) for stage, count in enumerate(counts, first)]


def resnet(counts: Sequence[int], last_norm: str, pool: str) -> dict[str, list[str]]:
    blocks = grid("layer{}.{}", counts, 1)
    # a projection where the size or the number of channels changes: bottlenecks widen the map in the first stage too
    projected = [f"layer{stage}.0" for stage in range(1, 5) if stage > 1 or last_norm == "bn3"]
    # where the shortcut is the block's input, it is gated with the last layer of the branch
    return {
        "residual": [f"{block}.{last_norm}" for block in blocks],
        "residual-pre": [f"{block}.conv1" for block in blocks],
        "residual-post": blocks,
        "shortcut": [f"{block}.{'downsample.1' if block in projected else last_norm}" for block in blocks],
        "block": blocks,
        "stage": ends("layer{}.{}", counts, 1),
        "final": [blocks[-1]],
        "pool": [pool],
    }


def mobile_torchvision(
    blocks: list[str], residual: list[str], stages: list[str], first: str, last: Callable[[str], str], pool: str
) -> dict[str, list[str]]:
    number = 1 + max(int(block.split(".")[1]) for block in blocks)
    return {
        "residual": [last(block) for block in residual],
        "residual-pre": [f"{block}.{first}" for block in residual],
        "residual-post": residual,
        # the layer that is the whole branch
        "shortcut": [f"{block}.{first.partition('.')[0]}" for block in residual],
        "block": blocks,
        "stage": stages,
        # a convolution, its norm and its activation
        "final": [f"features.{number}.2"],
        "pool": [pool],
    }


def mobile_timm(residual: list[str], final: str) -> dict[str, list[str]]:
    return {
        "residual": [f"{block}.bn3" for block in residual],
        "residual-pre": [f"{block}.conv_pw" for block in residual],
        "residual-post": residual,
        # behind the layer that drops whole branches
        "shortcut": [f"{block}.drop_path" for block in residual],
        "final": [final],
        "pool": ["global_pool"],
    }


def features(*numbers: int) -> list[str]:
    return [f"features.{number}" for number in numbers]


def dense(pool: str) -> dict[str, list[str]]:
    layers = [
        f"features.denseblock{block}.denselayer{layer}.conv2"
        for block, count in enumerate((6, 12, 24, 16), 1)
        for layer in range(1, count + 1)
    ]
    ends = [f"features.denseblock{block}" for block in range(1, 5)]
    return {**NO_SUMS, "block": layers, "stage": ends, "final": ["features.norm5"], "pool": [pool]}


NO_SUMS: dict[str, list[str]] = {"residual": [], "residual-pre": [], "residual-post": [], "shortcut": []}
CONVNEXT = grid("stages.{}.blocks.{}", (2, 2, 6, 2))
PREACTIVATION = grid("stages.{}.blocks.{}", (3, 4, 6, 3))
REPVGG = grid("stages.{}.{}", (2, 4, 14, 1))
EFFICIENT = grid("features.{}.{}", (1, 2, 2, 3, 3, 4, 1), 1)
# those that change neither size nor channels: all but the first of each group
EFFICIENT_RESIDUAL = [block for block in EFFICIENT if not block.endswith(".0")]
FIRE, VGG = features(3, 4, 6, 7, 9, 10, 11, 12), features(2, 6, 10, 13, 17, 20, 24, 27)
INCEPTION = [f"inception{one}" for one in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
MIXED = [f"Mixed_{one}" for one in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")]
V2_RESIDUAL = features(3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
V3_RESIDUAL = features(3, 5, 6, 8, 10, 11)

# an empty list: there is no such place
NETWORKS: dict[str, dict[str, list[str]]] = {
    "torchvision:resnet18": resnet((2, 2, 2, 2), "bn2", "avgpool"),
    "timm:resnet18": resnet((2, 2, 2, 2), "bn2", "global_pool"),
    "torchvision:resnet50": resnet((3, 4, 6, 3), "bn3", "avgpool"),
    "timm:resnet50": resnet((3, 4, 6, 3), "bn3", "global_pool"),
    "torchvision:mobilenet_v2": mobile_torchvision(
        features(*range(1, 18)),
        V2_RESIDUAL,
        features(1, 3, 6, 13, 17),
        "conv.0.0",
        lambda block: f"{block}.conv.3",
        # pooled by a function
        "features.18.2",
    ),
    "torchvision:mobilenet_v3_small": mobile_torchvision(
        features(*range(1, 12)),
        V3_RESIDUAL,
        features(1, 3, 8, 11),
        "block.0.0",
        # the third block has no squeeze-and-excitation, which stands before the last convolution
        lambda block: f"{block}.block.{2 if block == 'features.3' else 3}.1",
        "avgpool",
    ),
    "torchvision:efficientnet_b0": {
        **mobile_torchvision(
            EFFICIENT,
            EFFICIENT_RESIDUAL,
            ["features.1.0", "features.2.1", "features.3.1", "features.5.2", "features.7.0"],
            "block.0.0",
            lambda block: f"{block}.block.3.1",
            "avgpool",
        ),
        "shortcut": [f"{block}.stochastic_depth" for block in EFFICIENT_RESIDUAL],
    },
    "timm:mobilenetv2_100": mobile_timm(
        [block for block in grid("blocks.{}.{}", (1, 2, 3, 4, 3, 3, 1)) if not block.endswith(".0")], "bn2"
    ),
    # it pools before its last convolution
    "timm:mobilenetv3_small_100": mobile_timm(
        [block for block in grid("blocks.{}.{}", (1, 2, 3, 2, 3)) if not block.endswith(".0")], "blocks.5.0"
    ),
    "timm:efficientnet_b0": mobile_timm(
        [block for block in grid("blocks.{}.{}", (1, 2, 2, 3, 3, 4, 1)) if not block.endswith(".0")], "bn2"
    ),
    "timm:convnext_atto": {
        # the branch is scaled by a function; what drops whole branches passes it on
        "residual": [f"{block}.drop_path" for block in CONVNEXT],
        "residual-pre": [f"{block}.conv_dw" for block in CONVNEXT],
        "shortcut": [f"{block}.shortcut" for block in CONVNEXT],
        "stage": [f"stages.{stage}" for stage in range(4)],
        "final": ["stages.3"],
        "pool": ["head.global_pool"],
    },
    "timm:resnetv2_50": {
        "residual": [f"{block}.conv3" for block in PREACTIVATION],
        # the projection takes the map after the first norm as well, so that the branch begins behind that
        "residual-pre": [f"{block}.{'conv1' if block.endswith('.0') else 'norm1'}" for block in PREACTIVATION],
        "shortcut": [f"{block}.{'downsample' if block.endswith('.0') else 'drop_path'}" for block in PREACTIVATION],
        "stage": [f"stages.{stage}" for stage in range(4)],
        "final": ["norm"],
        "pool": ["head.global_pool"],
    },
    "timm:ese_vovnet39b": {
        # only the second blocks of the last two stages add their input
        "residual": ["stages.2.blocks.1.attn", "stages.3.blocks.1.attn"],
        # their branches begin in two places: the input is a part of what is concatenated
        "residual-pre": [],
        "shortcut": [],
        "stage": [f"stages.{stage}" for stage in range(4)],
        "final": ["stages.3"],
        "pool": ["head.global_pool"],
    },
    "timm:repvgg_a0": {
        **NO_SUMS,
        # the stem is of the same class, and a stage of its own in the paper
        "block": ["stem", *REPVGG],
        "stage": ["stem", *ends("stages.{}.{}", (2, 4, 14, 1))],
        "final": ["stages.3.0"],
        "pool": ["head.global_pool"],
    },
    # the classifier takes the vector that a function pools, behind a function
    "torchvision:densenet121": dense("classifier"),
    "timm:densenet121": dense("global_pool"),
    # its pooling leaves 7 x 7 positions
    "torchvision:vgg11_bn": {
        **NO_SUMS,
        "block": VGG,
        "stage": features(2, 6, 13, 20, 27),
        "final": ["features.27"],
        "pool": [],
    },
    # the logits are maps, and are pooled
    "torchvision:squeezenet1_1": {
        **NO_SUMS,
        "block": FIRE,
        "stage": features(4, 7, 12),
        "final": ["classifier.2"],
        "pool": ["classifier.3"],
    },
    "torchvision:googlenet": {
        **NO_SUMS,
        "block": INCEPTION,
        "stage": ["inception3b", "inception4e", "inception5b"],
        "final": ["inception5b"],
        "pool": ["avgpool"],
    },
    # blocks that reduce the size come once each, and are none that is repeated
    "torchvision:inception_v3": {
        **NO_SUMS,
        "block": MIXED,
        "stage": ["Mixed_5d", "Mixed_6e", "Mixed_7c"],
        "final": ["Mixed_7c"],
        "pool": ["avgpool"],
    },
}
# networks whose stages are modules of their own, which give the map of their last block
BLOCKS = {
    "timm:convnext_atto": CONVNEXT,
    "timm:resnetv2_50": PREACTIVATION,
    "timm:ese_vovnet39b": grid("stages.{}.blocks.{}", (1, 1, 2, 2)),
    "timm:vovnet39a": grid("stages.{}.blocks.{}", (1, 1, 2, 2)),
    "timm:ese_vovnet19b_dw": grid("stages.{}.blocks.{}", (1, 1, 1, 1)),
}
SUMMING = {
    "timm:convnext_atto": CONVNEXT,
    "timm:resnetv2_50": PREACTIVATION,
    "timm:ese_vovnet39b": ["stages.2.blocks.1", "stages.3.blocks.1"],
}


@pytest.mark.slow_unless(
    network=[
        "torchvision:resnet18",
        "torchvision:mobilenet_v2",
        "timm:mobilenetv3_small_100",
        "timm:convnext_atto",
        "torchvision:densenet121",
        "torchvision:squeezenet1_1",
        "torchvision:googlenet",
    ]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_sites_of_published_networks(network: str) -> None:
    survey = Survey(created(network), example(network))
    for at, expected in NETWORKS[network].items():
        assert [place.name for place in survey.find(at)[0]] == expected, at


@pytest.mark.slow_unless(network=["timm:convnext_atto", "timm:ese_vovnet19b_dw"])
@pytest.mark.parametrize("network", BLOCKS)
def test_blocks_bear_their_own_names(network: str) -> None:
    assert names(created(network), "block", example=example(network)) == BLOCKS[network]
    # by the name of all blocks, and not all but the last of each stage
    assert names(created(network), "block", example=example(network), where="stages.*.blocks.*") == BLOCKS[network]


@pytest.mark.parametrize("network", SUMMING)
def test_sums_bear_the_names_of_their_blocks(network: str) -> None:
    assert names(created(network), "residual-post", example=example(network)) == SUMMING[network]


def test_stages_of_blocks_of_separable_convolutions() -> None:
    # the blocks concatenate and reduce what their separable convolutions give
    found = names(timm.create_model("ese_vovnet19b_dw"), "stage", example=torch.randn(1, 3, 64, 64))
    # the stem may count as a stage
    assert found[-4:] == [f"stages.{stage}" for stage in range(4)]


@pytest.mark.slow_unless(id="mobilenet_v3_small-mobilenetv3_small_100")
@pytest.mark.parametrize(
    "one, other",
    [("mobilenet_v2", "mobilenetv2_100"), ("mobilenet_v3_small", "mobilenetv3_small_100"), ("efficientnet_b0",) * 2],
)
def test_both_libraries_have_the_same_stages(one: str, other: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    found = [plan(created(name), "se", at="stage", example=x) for name in (f"torchvision:{one}", f"timm:{other}")]
    assert [site.size for site in found[0]] == [site.size for site in found[1]]


@pytest.mark.parametrize(
    "network, per_stage, side",
    [
        ("torchvision:resnet18", (2, 2, 2, 2), 16),
        ("timm:resnet50", (3, 4, 6, 3), 16),
        ("timm:convnext_atto", (2, 2, 6, 2), 16),
        ("torchvision:mobilenet_v2", (0, 1, 2, 5, 2), 32),
        ("torchvision:efficientnet_b0", (0, 1, 1, 4, 3), 32),
    ],
)
def test_stage_channels_and_size_of_each_site(network: str, per_stage: tuple[int, ...], side: int) -> None:
    found = plan(created(network), "se", example=torch.randn(1, 3, 64, 64))
    assert [site.stage for site in found] == [stage for stage, n in enumerate(per_stage, 1) for _ in range(n)]
    # each stage halves the map
    assert [site.size for site in found] == [(2 * side // 2**site.stage,) * 2 for site in found]
    widths = {
        "torchvision:resnet18": (64, 128, 256, 512),
        "timm:resnet50": (256, 512, 1024, 2048),
        "timm:convnext_atto": (40, 80, 160, 320),
    }
    if network in widths:
        assert [site.channels for site in found] == [widths[network][site.stage - 1] for site in found]
    assert all(not site.channels_last and site.dimensions == 2 for site in found)


def test_sums_that_are_not_residual_are_listed_with_the_reason() -> None:
    with pytest.raises(AttachError, match="parallel convolutions"):
        plan(created("timm:repvgg_a0"), "se", example=example("timm:repvgg_a0"))
    found = plan(Fusion(), "se", example=torch.randn(1, 8, 8, 8))
    assert [site.name for site in found] == ["block.2"]
    assert [(one.name, one.reason) for one in found.skipped] == [
        ("", "a fusion of several scales"),
        ("parallel", "parallel convolutions"),
    ]
    lines = str(found).splitlines()
    assert lines[-2:] == [
        "no site in the network: a fusion of several scales",
        "no site in parallel: parallel convolutions",
    ]


class Fusion(nn.Module):
    """A residual sum, a sum of two scales, and parallel convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.down, self.up = nn.Conv2d(8, 8, 2, stride=2), nn.Upsample(scale_factor=2)
        self.parallel = Parallel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.block(x)
        x = torch.relu(x) + self.up(self.down(x))
        return self.parallel(torch.relu(x))


class Parallel(nn.Module):
    """Two convolutions of one map, added."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) + self.small(x)


def test_shortcuts_without_a_place_are_listed() -> None:
    class Concatenating(nn.Module):
        """A block whose input enters its branch in two places, behind one with a layer on its shortcut."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.pass_on = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()
            self.two, self.three = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x) + self.pass_on(x)
            return self.three(torch.cat([x, self.two(x)], 1)) + x

    found = plan(Concatenating(), "se", at="shortcut", example=torch.randn(1, 4, 6, 6))
    assert [(site.name, site.side) for site in found] == [("pass_on", "after")]
    assert [one.reason.split(",")[0] for one in found.skipped] == ["the shortcut is the block's input"]


# own networks: what is computed at each place, against the formula


def layer(kind: str, dimensions: int, *args: Any, **options: Any) -> nn.Module:
    return getattr(nn, f"{kind}{dimensions}d")(*args, **options)


class Block(nn.Module):
    """y = relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""

    def __init__(self, channels_in: int, channels: int, stride: int, dimensions: int) -> None:
        super().__init__()
        self.conv1 = layer("Conv", dimensions, channels_in, channels, 3, stride=stride, padding=1)
        self.norm1, self.norm2 = (layer("BatchNorm", dimensions, channels) for _ in range(2))
        self.conv2 = layer("Conv", dimensions, channels, channels, 3, padding=1)
        self.act = nn.ReLU()
        self.projection = None
        if stride > 1 or channels_in != channels:
            self.projection = layer("Conv", dimensions, channels_in, channels, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(branch + (x if self.projection is None else self.projection(x)))


class Residual(nn.Module):
    """Three stages of residual blocks."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        self.stem = layer("Conv", dimensions, 3, 6, 3, padding=1)
        shapes = [(6, 6, 1), (6, 6, 1), (6, 8, 2), (8, 8, 1), (8, 10, 2)]
        self.blocks = nn.ModuleList(Block(*shape, dimensions) for shape in shapes)
        self.pool = layer("AdaptiveAvgPool", dimensions, 1)
        self.classifier = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.pool(x).flatten(1))


Gate = Callable[[str, torch.Tensor], torch.Tensor]


def residual_by_hand(model: Residual, x: torch.Tensor, at: str, gate: Gate) -> torch.Tensor:
    """The network's formula with a gate at each site of one place."""
    x = model.stem(x)
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        start = gate(f"{name}.conv1", x) if at == "residual-pre" else x
        branch = block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(start)))))
        if at == "residual":
            branch = gate(f"{name}.norm2", branch)
        shortcut = x if block.projection is None else block.projection(x)
        if at == "shortcut":
            shortcut = gate(f"{name}.norm2" if block.projection is None else f"{name}.projection", shortcut)
        x = torch.relu(branch + shortcut)
        if (
            at in ("block", "residual-post")
            or (at == "stage" and number in (1, 3, 4))
            or (at == "final" and number == 4)
        ):
            x = gate(name, x)
    pooled = x.mean(tuple(range(2, x.dim())))
    return model.classifier(pooled)


RESIDUAL_SITES = {
    "residual": [f"blocks.{number}.norm2" for number in range(5)],
    "residual-pre": [f"blocks.{number}.conv1" for number in range(5)],
    "residual-post": [f"blocks.{number}" for number in range(5)],
    # with the last layer of the branch, where the shortcut is the input itself
    "shortcut": ["blocks.0.norm2", "blocks.1.norm2", "blocks.2.projection", "blocks.3.norm2", "blocks.4.projection"],
    "block": [f"blocks.{number}" for number in range(5)],
    "stage": ["blocks.1", "blocks.3", "blocks.4"],
    "final": ["blocks.4"],
}
places_by_hand = pytest.mark.parametrize("at", RESIDUAL_SITES)


@dataclass
class Gates:
    """The attention of a network's sites, called by name; it remembers who was called, with what."""

    modules: dict[str, nn.Module]
    used: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> "Gates":
        return cls({name: wrapper.attention for name, wrapper in attached(model)}, [])

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.used.append(name)
        return self.modules[name](x)


@pytest.mark.slow_unless(dimensions=2)
@pytest.mark.slow_unless(id=["residual-cbam-1", "residual-cbam-3"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("attention", ["se", "cbam"])
@places_by_hand
def test_gates_stand_where_the_formula_has_them(at: str, attention: str, dimensions: int) -> None:
    original = randomise(Residual(dimensions)).double().eval()
    x = torch.randn(2, 3, *[8] * dimensions, dtype=torch.float64)
    model = attach(copy.deepcopy(original), attention, at=at, example=x, reduction=2)
    assert [name for name, _ in attached(model)] == RESIDUAL_SITES[at]
    expected = original(x)
    assert torch.equal(model(x), expected)
    randomise(model)
    original.load_state_dict(model.state_dict(), strict=False)
    move(model)
    gates = Gates.of(model)
    by_hand = residual_by_hand(original, x, at, gates)
    # each once, and in the order of the network
    assert gates.used == RESIDUAL_SITES[at]
    assert_close(model(x), by_hand)
    assert not is_close(by_hand, original(x))


@pytest.mark.slow_unless(at=["residual-pre", "shortcut", "final", "pool"])
@pytest.mark.parametrize("at", [*RESIDUAL_SITES, "pool"])
def test_start_is_exact_at_each_place(at: str) -> None:
    for dtype in DTYPES:
        original = randomise(Residual()).to(dtype)
        x = torch.randn(2, 3, 8, 8).to(dtype)
        model = attach(copy.deepcopy(original), "dual" if at == "pool" else "cbam", at=at, example=x)
        for training in (True, False):
            assert torch.equal(model.train(training)(x), original.train(training)(x)), (dtype, training)


@places_by_hand
def test_every_gate_gets_a_gradient_and_changes_the_output(at: str) -> None:
    original = randomise(Residual()).eval()
    x = torch.randn(4, 3, 8, 8)
    model = attach(copy.deepcopy(original), "se", at=at, example=x)
    model(x).square().sum().backward()
    for name, wrapper in attached(model):
        strength = wrapper.attention.strength
        assert strength.grad is not None and strength.grad.item() != 0, name
        nn.init.constant_(strength, 0.7)
        assert not is_close(model(x), original(x)), name
        nn.init.zeros_(strength)
    assert torch.equal(detach(model)(x), original(x))


class Preactivated(nn.Module):
    """y = conv2(relu(norm2(conv1(p)))) + shortcut, with p = relu(norm1(x)); the projection takes p, the identity x."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.projection = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = torch.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(p)
        out = self.conv2(torch.relu(self.norm2(self.conv1(p))))
        out += shortcut
        return out


@pytest.mark.parametrize("at", ["residual", "residual-pre", "residual-post", "shortcut"])
def test_preactivated_blocks(at: str) -> None:
    original = randomise(nn.Sequential(Preactivated(4, 6), Preactivated(6, 6))).double().eval()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    model = attach(copy.deepcopy(original), "cbam", at=at, example=x, reduction=2)
    move(model)
    gates = Gates.of(model)
    first, second = original
    p = torch.relu(first.norm1(x))
    shortcut = first.projection(p)
    shortcut = gates("0.projection", shortcut) if at == "shortcut" else shortcut
    branch = first.conv1(gates("0.conv1", p) if at == "residual-pre" else p)
    branch = first.conv2(torch.relu(first.norm2(branch)))
    y = (gates("0.conv2", branch) if at == "residual" else branch) + shortcut
    y = gates("0", y) if at == "residual-post" else y
    branch = second.conv1(torch.relu(second.norm1(gates("1.norm1", y) if at == "residual-pre" else y)))
    branch = second.conv2(torch.relu(second.norm2(branch)))
    y = gates("1.conv2", y) if at == "shortcut" else y
    z = (gates("1.conv2", branch) if at == "residual" else branch) + y
    z = gates("1", z) if at == "residual-post" else z
    assert sorted(gates.used) == sorted(gates.modules)
    assert_close(model(x), z)
    assert not is_close(z, original(x))


class Tokens(nn.Module):
    """Two blocks on maps (B, H, W, C), each with a branch of its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.mlp1, self.mlp2 = (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(6))
        self.drop_path = nn.Identity()
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.mlp1(self.norm1(x))
        x = x + self.drop_path(self.mlp2(self.norm2(x)) * self.scale)
        return self.classifier(self.norm(x).mean([1, 2]))


TOKEN_SITES = {
    "residual": ["mlp1.2", "drop_path"],
    "residual-pre": ["norm1", "norm2"],
    "final": ["norm"],
}


@pytest.mark.parametrize("at", TOKEN_SITES)
def test_maps_with_channels_last(at: str) -> None:
    original = randomise(Tokens()).double().eval()
    x = torch.randn(2, 3, 10, 14, dtype=torch.float64)
    found = plan(original, "cbam", at=at, example=x, reduction=2)
    assert [site.name for site in found] == TOKEN_SITES[at]
    assert {(site.channels, site.size, site.channels_last) for site in found} == {(6, (5, 7), True)}
    model = attach(copy.deepcopy(original), found)
    assert torch.equal(model(x), original(x))
    move(model)
    gates = Gates.of(model)

    def gate(name: str, y: torch.Tensor) -> torch.Tensor:
        return gates(name, y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if name in TOKEN_SITES[at] else y

    y = original.stem(x).permute(0, 2, 3, 1)
    y = y + gate("mlp1.2", original.mlp1(original.norm1(gate("norm1", y))))
    y = y + gate("drop_path", original.mlp2(original.norm2(gate("norm2", y))) * original.scale)
    expected = original.classifier(gate("norm", original.norm(y)).mean([1, 2]))
    assert sorted(gates.used) == sorted(TOKEN_SITES[at])
    assert_close(model(x), expected)
    assert not is_close(expected, original(x))


def test_a_layer_that_begins_two_branches_is_listed_where_it_is_used_elsewhere() -> None:
    class Shared(nn.Module):
        def __init__(self, elsewhere: bool) -> None:
            super().__init__()
            self.first, self.f, self.g = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.elsewhere = elsewhere

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.f(torch.relu(self.first(x)))
            x = x + self.g(torch.relu(self.first(x)))
            return self.first(x) if self.elsewhere else x

    x = torch.randn(1, 4, 6, 6)
    assert names(Shared(False), "residual-pre", example=x) == ["first"]
    with pytest.raises(AttachError, match=r"no place at 'residual-pre' \(it is used elsewhere as well\)"):
        plan(Shared(True), "se", at="residual-pre", example=x)


class Identical(nn.Module):
    """y = drop_path(two(relu(one(x)))) + x."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.two(torch.relu(self.one(x)))) + x


class Dropped(nn.Module):
    """All of a branch dropped in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_the_gate_of_a_shortcut_stays_where_its_branch_is_dropped(training: bool) -> None:
    original = Identical(Dropped()).train(training)
    x = torch.randn(2, 4, 6, 6)
    model = attach(copy.deepcopy(original), "se", at="shortcut", example=x)
    assert torch.equal(model(x), original(x))
    ((_, wrapper),) = attached(model)
    nn.init.ones_(wrapper.attention.strength)
    branch = 0 if training else original.two(torch.relu(original.one(x)))
    assert_close(model(x), branch + wrapper.attention(x))


@pytest.mark.parametrize("shared", [(), ("one",), ("two",), ("one", "two")])
@pytest.mark.parametrize("at", ["residual", "residual-pre", "shortcut"])
def test_blocks_that_share_layers(at: str, shared: tuple[str, ...]) -> None:
    original = nn.Sequential(Identical(nn.Identity()), Identical(nn.Identity()))
    for name in shared:
        setattr(original[1], name, getattr(original[0], name))
    x = torch.randn(2, 4, 6, 6)
    model = copy.deepcopy(original)
    try:
        attach(model, "cbam", at=at, example=x)
    except AttachError:
        # one gate cannot stand on the shortcuts of two blocks whose branches share an end but not the other
        assert at == "shortcut" and shared
    assert torch.equal(model(x), original(x))
    for name, wrapper in attached(model):
        nn.init.ones_(wrapper.attention.strength)
        assert not is_close(model(x), original(x)), name
        nn.init.zeros_(wrapper.attention.strength)
    # twice, as nothing may be left from the first time
    assert torch.equal(model(x), original(x))
    assert torch.equal(detach(model)(x), original(x))


class Plain(nn.Module):
    """Blocks without sums, called once each from a list, and an end without a class that is repeated."""

    class Pair(nn.Module):
        def __init__(self, channels_in: int, channels: int) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.two(torch.relu(self.one(x))))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"a": self.Pair(3, 4), "b": self.Pair(4, 4), "c": self.Pair(4, 6)})
        self.down = nn.MaxPool2d(2)
        self.last = nn.Conv2d(6, 8, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks["b"](self.blocks["a"](x))
        x = self.last(self.blocks["c"](self.down(x)))
        return self.classifier(x.mean([2, 3]))


def test_network_without_sums() -> None:
    original = Plain().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = {
        "block": ["blocks.a", "blocks.b", "blocks.c"],
        "stage": ["blocks.b", "blocks.c"],
        "final": ["last"],
        "pool": ["last"],
    }
    for at, sites in expected.items():
        assert names(original, at, example=x) == sites
    model = attach(copy.deepcopy(original), "cbam", at="block", example=x, reduction=2)
    move(model)
    a, b, c = (wrapper.attention for _, wrapper in attached(model))
    blocks = original.blocks
    y = c(blocks["c"](original.down(b(blocks["b"](a(blocks["a"](x)))))))
    assert_close(model(x), original.classifier(original.last(y).mean([2, 3])))
    assert not is_close(model(x), original(x))


def test_each_convolution_is_a_block_where_no_class_is_repeated() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    x = torch.randn(2, 3, 8, 8)
    assert names(model, "block", example=x) == ["2", "5", "6"]
    assert names(model, "stage", example=x) == ["2", "6"]
    assert names(model, "final", example=x) == ["6"]
    assert names(model, "pool", example=x) == ["7"]


def test_layers_that_are_named() -> None:
    original = randomise(Residual()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    chosen = plan(original, "cbam", at="layer", where=["stem", "blocks.*.conv2"], example=x, reduction=2)
    assert [site.name for site in chosen] == ["stem", *(f"blocks.{number}.conv2" for number in range(5))]
    assert {site.place for site in chosen} == {"layer"}
    (site,) = plan(original, "se", at="layer", where=lambda name, one: name == "blocks.0.norm1", example=x)
    assert site.name == "blocks.0.norm1"
    model = attach(copy.deepcopy(original), chosen)
    assert torch.equal(model(x), original(x))
    move(model)
    gates = Gates.of(model)
    y = gates("stem", original.stem(x))
    for number, block in enumerate(original.blocks):
        branch = block.norm2(gates(f"blocks.{number}.conv2", block.conv2(torch.relu(block.norm1(block.conv1(y))))))
        y = torch.relu(branch + (y if block.projection is None else block.projection(y)))
    assert_close(model(x), original.classifier(y.mean((2, 3))))
    assert not is_close(model(x), original(x))
    with pytest.raises(InvalidOption, match="name those you want with where="):
        plan(original, "se", at="layer", example=x)


def test_a_layer_that_is_named_in_full_stands_for_itself() -> None:
    # and not for all the layers inside
    x = torch.randn(1, 3, 8, 8)
    assert names(Residual(), "layer", where="blocks.0", example=x) == ["blocks.0"]


# where and stages


def cifar() -> CifarResNet:
    return randomise(CifarResNet(2, shortcut="B")).eval()


CIFAR = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALL = grid("layer{}.{}.bn2", (2, 2, 2), 1)


@pytest.mark.parametrize(
    "where, expected",
    [
        ("*", ALL),
        ("layer3*", ALL[4:]),
        ("layer[13].*", [*ALL[:2], *ALL[4:]]),
        ("*.0.bn?", ALL[::2]),
        # a name of a site, and of a module around some
        ("layer2.1.bn2", [ALL[3]]),
        ("layer2.1", [ALL[3]]),
        ("layer2", ALL[2:4]),
        (["layer3.1.bn2", "layer1"], [*ALL[:2], ALL[5]]),
        (("layer1.0", "*3.0*"), [ALL[0], ALL[4]]),
        # each once
        (["layer1", "layer1.0", "*"], ALL),
        (lambda name, layer: name.startswith("layer2"), ALL[2:4]),
        (lambda name, layer: layer.num_features == 64, ALL[4:]),
        (lambda name, layer: isinstance(layer, nn.BatchNorm2d), ALL),
    ],
    ids=lambda value: "predicate" if callable(value) else None,
)
def test_where(where: Any, expected: list[str]) -> None:
    model = cifar()
    assert names(model, "residual", where=where, example=CIFAR) == expected
    assert [name for name, _ in attached(attach(model, "se", where=where, example=CIFAR))] == expected


@pytest.mark.parametrize(
    "where",
    [
        "layer4*",
        "bn2",
        "layer1.0.bn",
        "Layer1*",
        "",
        [],
        # one of the names is a mistake, whatever the other finds
        ["layer1.0.bn2", "layer1.2.bn2"],
        ["layer1", "nothing"],
        lambda name, layer: False,
    ],
    ids=lambda where: "predicate" if callable(where) else repr(where),
)
def test_where_matches_nothing(where: Any) -> None:
    message = refused(cifar(), AttachError, "CifarResNet has at 'residual'", "cbam", where=where, example=CIFAR)
    for site in ALL:
        assert site in message
    message = refused(cifar(), AttachError, "CifarResNet has at 'stage'", "se", at="stage", where=where, example=CIFAR)
    for stage in (1, 2, 3):
        assert f"layer{stage}.1 (stage {stage})" in message
    assert "bn2 (" not in message


def test_where_names_the_pattern_that_matches_nothing() -> None:
    # and does not say that the other one left nothing
    message = refused(cifar(), AttachError, "'layer7'", "se", where=["layer1", "layer7"], example=CIFAR)
    assert "'layer1'" not in message


@pytest.mark.parametrize(
    "stages, expected",
    [
        (1, ALL[:2]),
        (3, ALL[4:]),
        ((3,), ALL[4:]),
        ([2, 3], ALL[2:]),
        ((3, 1), [*ALL[:2], *ALL[4:]]),
        ({2}, ALL[2:4]),
        (range(1, 4), ALL),
        (None, ALL),
    ],
    ids=str,
)
def test_stages(stages: Any, expected: list[str]) -> None:
    assert names(cifar(), "residual", stages=stages, example=CIFAR) == expected
    found = names(cifar(), "block", stages=stages, example=CIFAR)
    assert found == [site.removesuffix(".bn2") for site in expected]
    assert len(names(cifar(), "stage", stages=stages, example=CIFAR)) == len(expected) // 2


@pytest.mark.parametrize(
    "stages", [0, 4, -1, (1, 4), (1, 0), "3", ("3",), True, (1, True), (None,), 1.5, 2.0, (1.5,)], ids=repr
)
def test_stages_that_are_none(stages: Any) -> None:
    refused(cifar(), InvalidOption, "stages must be numbers from 1 to 3", "se", stages=stages, example=CIFAR)


@pytest.mark.parametrize("where", [5, True, 2.5, [None], [1], b"layer1"], ids=repr)
def test_where_of_a_wrong_type(where: Any) -> None:
    refused(cifar(), InvalidOption, "where must be", "se", where=where, example=CIFAR)


@pytest.mark.parametrize(
    "where, stages, expected",
    [
        ("*.1.bn2", (1, 3), [ALL[1], ALL[5]]),
        (lambda name, layer: ".0." in name, 2, [ALL[2]]),
        (["layer1", "layer2.0"], (1, 2), ALL[:3]),
    ],
    ids=["glob", "predicate", "names"],
)
def test_where_and_stages(where: Any, stages: Any, expected: list[str]) -> None:
    assert names(cifar(), "residual", where=where, stages=stages, example=CIFAR) == expected


def test_where_and_stages_that_exclude_each_other() -> None:
    message = refused(cifar(), AttachError, r"stages=\(2, 3\)", "se", where="layer1*", stages=(2, 3), example=CIFAR)
    assert "where='layer1*'" in message and all(site in message for site in ALL)
    refused(cifar(), AttachError, "stages=\\(\\)", "se", stages=(), example=CIFAR)


def test_a_filter_of_gates_leaves_the_head_that_is_joined_to_them() -> None:
    found = plan(cifar(), "se+dual", where="layer1", example=CIFAR)
    assert [(site.name, site.attention) for site in found] == [(ALL[0], "se"), (ALL[1], "se"), ("avgpool", "dual")]
    # a head alone is filtered
    assert names(cifar(), "pool", stages=3, example=CIFAR) == ["avgpool"]
    refused(cifar(), AttachError, r"at 'pool': avgpool \(stage 3\)", "dual", where="layer1", example=CIFAR)
    refused(cifar(), AttachError, r"at 'pool': avgpool \(stage 3\)", "dual", stages=1, example=CIFAR)


@pytest.mark.slow_unless(at=["residual", "block", "final"])
@pytest.mark.parametrize("at", RESIDUAL_SITES)
def test_different_options_on_disjoint_sites(at: str) -> None:
    original = randomise(Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    sites = {site.name: (site.stage, site.channels, site.size) for site in plan(original, "se", at=at, example=x)}
    model = copy.deepcopy(original)
    parts = {"final": ["blocks.4"], "shortcut": ["blocks.4.*"]}.get(at, ["blocks.3*", "blocks.4*"])
    attach(model, "se", at=at, where=parts, example=x, hidden=3)
    rest = [name for name in sites if name not in dict(attached(model))]
    # attention that is attached changes nothing of what there is
    again = plan(model, "cbam", at=at, example=x)
    assert {site.name: (site.stage, site.channels, site.size) for site in again} == sites
    if rest:
        attach(model, "cbam", at=at, where=rest, example=x, hidden=2, kernel_size=3)
    for name, wrapper in attached(model):
        if name in rest:
            assert isinstance(wrapper.attention, CBAM) and wrapper.attention.channel.fc1.out_features == 2
            assert wrapper.attention.spatial.conv.kernel_size == (3, 3)
        else:
            assert isinstance(wrapper.attention, SqueezeExcite) and wrapper.attention.fc1.out_features == 3
    assert sorted(dict(attached(model))) == sorted(sites)
    assert torch.equal(model(x), original(x))
    move(model)
    # by the formula, each with its own module
    assert_close(model(x), residual_by_hand(original, x, at, Gates.of(model)))


def test_stages_in_two_calls() -> None:
    original = cifar()
    model = copy.deepcopy(original)
    attach(model, "se", stages=(1, 2), example=CIFAR, reduction=4)
    attach(model, "se", stages=3, example=CIFAR, reduction=16)
    widths = {name: wrapper.attention.fc1.out_features for name, wrapper in attached(model)}
    assert widths == dict(zip(ALL, (4, 4, 8, 8, 4, 4), strict=True))
    assert torch.equal(model(CIFAR), original(CIFAR))
    # a site that has attention is refused, and with it the whole call
    with_attention = copy.deepcopy(model)
    refused(with_attention, AttachError, "has attention already", "cbam", stages=(2, 3), example=CIFAR)
    # places that share no layer go together
    attach(model, "cbam", at="stage", example=CIFAR)
    attach(model, "dual", example=CIFAR)
    assert len(attached(model)) == 6 + 3 + 1
    assert torch.equal(model(CIFAR), original(CIFAR))
    assert torch.equal(detach(model)(CIFAR), original(CIFAR))


def test_the_last_map_is_found_beside_a_head_on_the_vector() -> None:
    # the order of the two calls makes no difference
    assert names(created("torchvision:densenet121"), "final") == ["features.norm5"]
    model = attach(copy.deepcopy(created("torchvision:densenet121")), "dual")
    assert names(model, "final") == ["features.norm5"]


def test_a_head_on_a_map_of_one_position_is_no_sum() -> None:
    model, x = copy.deepcopy(created("torchvision:mobilenet_v2")), torch.randn(2, 3, 32, 32)
    before = {at: names(model, at, example=x) for at in ("residual", "stage", "block")}
    attach(model, "max", example=x)
    found = plan(model, "se", example=x)
    assert not found.skipped
    assert {at: names(model, at, example=x) for at in before} == before


# nothing there


def test_networks_with_no_place_at_all() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(2, 3, 2, 2)
    for at in (one for one in PLACES if one != "layer"):
        refused(model, AttachError, f"no place at '{at}'", "dual" if at == "pool" else "se", at=at, example=x)


@pytest.mark.slow_unless(training=True)
@pytest.mark.parametrize("training", [True, False])
def test_planning_and_refusal_leave_the_network_alone(training: bool) -> None:
    model = Residual().train(training)
    model.blocks[1].eval()
    model.blocks[0].conv1.weight.requires_grad_(False)
    # it draws random numbers in every mode
    model.blocks[2].register_forward_hook(lambda module, args, y: F.dropout(y, 0.1, training=True))
    model.stem.register_forward_pre_hook(lambda *_: None)
    x = torch.randn(2, 3, 8, 8)
    check = snapshot(model)
    for at in PLACES:
        plan(model, "dual" if at == "pool" else "cbam", at=at, where="*", example=x)
        check()
        refused(model, AttachError, "leaves none of", "dual" if at == "pool" else "cbam", at=at, where="q*", example=x)


@pytest.mark.parametrize("at", ["residuals", "Residual", "", None, 3, "head"])
def test_places_that_are_none(at: Any) -> None:
    with pytest.raises(InvalidOption, match="at must be one of 'residual', 'residual-pre'"):
        plan(cifar(), "se", at=at, example=CIFAR)


def test_a_gate_is_not_a_head() -> None:
    refused(cifar(), InvalidOption, "takes a pooling head.*'final'.*dual", "cbam", at="pool", example=CIFAR)
    refused(cifar(), InvalidOption, "takes a pooling head", "cbam+dual", at="pool", example=CIFAR)


# replacing


def test_replace() -> None:
    original, model = cifar(), cifar()
    model.load_state_dict(original.state_dict())
    check = snapshot(model)
    plain = {name: model.get_submodule(name) for name in ALL}
    attach(model, "se", example=CIFAR)
    old = {name: wrapper.attention for name, wrapper in attached(model)}
    with pytest.raises(AttachError, match=r"'layer1.0.bn2' has attention already; .* replace=True.* was not changed"):
        attach(model, "cbam", example=CIFAR)
    assert {name: wrapper.attention for name, wrapper in attached(model)} == old
    # only some
    attach(model, "cbam", where="layer2", replace=True, example=CIFAR, reduction=4)
    for name, wrapper in attached(model):
        assert isinstance(wrapper.attention, CBAM if name.startswith("layer2") else SqueezeExcite)
        assert wrapper.attention is old[name] or name.startswith("layer2")
        assert wrapper.inner is plain[name]
    assert torch.equal(model(CIFAR), original(CIFAR))
    move(model)
    assert not is_close(model(CIFAR), original(CIFAR))
    detach(model)
    check(same_random_state=False)


@pytest.mark.parametrize("form", ["module", "mean", "relu and pool"])
def test_replace_a_head(form: str) -> None:
    original = Pooled(FORMS[form]).eval()
    x = images(FORMS[form])
    model = copy.deepcopy(original)
    check = snapshot(model)
    attach(model, "dual", example=x)
    move(model)
    kept = [wrapper.attention for _, wrapper in attached(model)]
    with pytest.raises(AttachError, match="has attention already"):
        attach(model, "max", example=x)
    assert [wrapper.attention for _, wrapper in attached(model)] == kept
    attach(model, "max", replace=True, example=x)
    assert len(attached(model)) == 1
    assert torch.equal(model(x), original(x))
    nn.init.constant_(attached(model)[0][1].attention.strength, 1.0)
    assert_close(model(x), original.classifier(map_by_hand(original, x).flatten(2).amax(-1)))
    detach(model)
    check(same_random_state=False)


@pytest.mark.slow_unless(id=["residual-residual-pre", "residual-pre-residual-pre", "shortcut-residual"])
@pytest.mark.parametrize("second", ["residual", "residual-pre", "shortcut"])
@pytest.mark.parametrize("first", ["residual", "residual-pre", "shortcut"])
def test_replace_what_stands_at_the_same_layers_for_another_place(first: str, second: str) -> None:
    original = randomise(Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    model = copy.deepcopy(original)
    check = snapshot(model)
    attach(model, "se", at=first, example=x)
    attach(model, "cbam", at=second, example=x, replace=True)
    assert torch.equal(model(x), original(x))
    for name, wrapper in attached(model):
        nn.init.ones_(wrapper.attention.strength)
        assert not is_close(model(x), original(x)), name
        nn.init.zeros_(wrapper.attention.strength)
    # no layer leaves its map for attention that is gone
    needing = [wrapper for _, wrapper in attached(model) if isinstance(wrapper, AttachedShortcut)]
    leaving = [module for module in model.modules() if isinstance(module, AttachedSource)]
    assert {id(one.convattn_passage) for one in leaving} == {id(one.convattn_passage) for one in needing}
    detach(model)
    check(same_random_state=False)


def test_a_head_keeps_the_map_of_the_layer_that_leaves_it() -> None:
    original = Pooled(FORMS["relu and pool"]).eval()
    x = images(FORMS["relu and pool"])
    model = attach(copy.deepcopy(original), "dual", example=x)
    # a gate there, or a refusal
    with suppress(AttachError):
        attach(model, "se", at="layer", where="act", replace=True, example=x)
    assert torch.equal(model(x), original(x))


def test_replace_where_there_is_nothing_yet() -> None:
    model = attach(cifar(), "se", replace=True, example=CIFAR)
    assert [name for name, _ in attached(model)] == ALL


# factories


class Scale(nn.Module):
    """A gate for each channel, from nothing."""

    def __init__(self, channels: int, *, value: float = 0.25) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((channels, 1, 1), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


def scaled(channels: int, value: float) -> nn.Module:
    return Scale(channels, value=value)


@pytest.mark.slow_unless(at="residual")
@pytest.mark.slow_unless(id="stage-function")
@pytest.mark.parametrize(
    "factory, options, value, name",
    [
        (Scale, {}, 0.25, "Scale"),
        (Scale, {"value": 0.5}, 0.5, "Scale"),
        (lambda channels: Scale(channels), {}, 0.25, "<lambda>"),
        (scaled, {"value": 0.75}, 0.75, "scaled"),
        (functools.partial(Scale, value=3.0), {}, 3.0, "partial"),
    ],
    ids=["class", "class with options", "lambda", "function", "partial"],
)
@pytest.mark.parametrize("at", ["residual", "residual-pre", "shortcut", "stage"])
def test_factories(
    at: str, factory: Callable[[int], nn.Module], options: dict[str, Any], value: float, name: str
) -> None:
    original = randomise(Residual()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    chosen = plan(original, factory, at=at, example=x, **options)
    assert [site.name for site in chosen] == RESIDUAL_SITES[at]
    assert {site.attention for site in chosen} == {name}
    # a number for each channel and the strength; products with a gate are not counted
    assert [(site.parameters, site.multiply_adds) for site in chosen] == [(site.channels + 1, 0) for site in chosen]
    model = attach(copy.deepcopy(original), chosen)
    assert torch.equal(model(x), original(x))
    assert all(isinstance(wrapper.attention, Blended) for _, wrapper in attached(model))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for _, wrapper in attached(model):
        nn.init.constant_(wrapper.attention.strength, 0.5)
    # halfway from the map to what the module gives
    expected = residual_by_hand(original, x, at, lambda _, y: (1 + value) / 2 * y)
    assert_close(model(x), expected)
    assert not is_close(expected, original(x))
    paper = attach(copy.deepcopy(original), factory, at=at, example=x, start="paper", **options)
    assert_close(paper(x), residual_by_hand(original, x, at, lambda _, y: value * y))


class Exponential(nn.Module):
    """A head with a weight for each channel: the logarithm of the mean of exponentials."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x.flatten(2).exp().mean(-1).log()


@pytest.mark.parametrize("form", ["module", "mean", "relu and pool", "both"])
def test_factory_of_a_head(form: str) -> None:
    original = Pooled(FORMS[form]).double().eval()
    x = images(FORMS[form]).double()
    (site,) = plan(original, Exponential, at="pool", example=x)
    model = attach(copy.deepcopy(original), Exponential, at="pool", example=x)
    assert site.attention == "Exponential" and torch.equal(model(x), original(x))
    ((_, wrapper),) = attached(model)
    y = map_by_hand(original, x)
    pooled = FORMS[form].by_hand(y)
    vector = wrapper.attention.head.weight * y.flatten(2).exp().mean(-1).log()
    if form == "both":
        # as wide as the classifier's input
        project = wrapper.attention.project
        vector = vector @ project.weight.T + project.bias
    nn.init.constant_(wrapper.attention.strength, 0.5)
    assert_close(model(x), original.classifier(pooled + 0.5 * (vector - pooled)))
    assert not is_close(model(x), original(x))


def test_head_of_a_factory_arrives_as_it_was_made() -> None:
    # its statistics, after the run that tells how wide it is
    def head(channels: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels))

    model = attach(cifar(), head, at="pool", example=CIFAR)
    norm = model.avgpool.attention.head[2]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_var, torch.ones(64))


@pytest.mark.parametrize(
    "factory",
    [
        lambda channels: nn.Conv2d(channels, channels + 1, 1),
        lambda channels: nn.MaxPool2d(2),
        # a gate alone, which would be broadcast
        lambda channels: nn.AdaptiveAvgPool2d(1),
        lambda channels: nn.Flatten(),
        lambda channels: nn.Conv2d(4, 4, 1),
        lambda channels: None,
        lambda: nn.Identity(),
    ],
    ids=["channels", "size", "gate alone", "flat", "other channels", "none", "no argument"],
)
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_factory_of_something_else(factory: Callable[..., Any], start: str) -> None:
    match = "'<lambda>' makes no module for the 16 channels of 'layer1.0.bn2'"
    refused(cifar(), AttachError, match, factory, start=start, example=CIFAR)


def test_factory_of_a_head_that_gives_a_map() -> None:
    refused(cifar(), AttachError, "'Scale' makes no module for the 64 channels of 'avgpool'.*shape", Scale, at="pool")


@pytest.mark.parametrize("failing", range(1, 10))
def test_factory_that_raises_in_the_middle(failing: int) -> None:
    # one module for each of three sizes is built to be counted, six to be attached
    made: list[int] = []

    def factory(channels: int) -> nn.Module:
        made.append(channels)
        if len(made) == failing:
            raise RuntimeError("out of luck")
        return Scale(channels)

    model = cifar().train()
    check = snapshot(model)
    with pytest.raises(Exception, match="out of luck"):
        attach(model, factory, example=CIFAR)
    assert made == [16, 32, 64, 16, 16, 32, 32, 64, 64][:failing]
    check()
    assert not attached(model)
    if failing <= 3:
        made.clear()
        refused(model, AttachError, "makes no module for .*out of luck", factory, example=CIFAR)


def test_replacement_that_fails_in_the_middle_keeps_what_was_there() -> None:
    model = attach(cifar(), "cbam", example=CIFAR)
    check = snapshot(model)
    made: list[int] = []

    def factory(channels: int) -> nn.Module:
        made.append(channels)
        if len(made) == 6:
            raise KeyError("out of luck")
        return Scale(channels)

    with pytest.raises(Exception, match="out of luck"):
        attach(model, factory, replace=True, example=CIFAR)
    check()


# pooling heads, beside every form of global pooling


class GeM(nn.Module):
    """Generalised mean: the p-th root of the mean of p-th powers, p learned."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x.clamp(min=1e-3).pow(self.p), x.shape[2:]).pow(1 / self.p).flatten(1)


class Written(nn.Module):
    """A layer that computes a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).mean(-1)


def maximum(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).amax(-1)


@dataclass(frozen=True)
class Form:
    """A way of global pooling, a layer or a function; by hand, from a map with its channels in the second dimension."""

    pool: Callable[[torch.Tensor], torch.Tensor]
    site: str = "act"
    layer: bool = False
    by_hand: Callable[[torch.Tensor], torch.Tensor] = mean
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    dimensions: int = 2
    width: int = 6
    last: bool = False


def pooling_layer(pool: Any, **options: Any) -> Form:
    return Form(pool, site="pool", layer=True, **options)


def both(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([maximum(x), mean(x)], 1)


def generalised(x: torch.Tensor) -> torch.Tensor:
    return mean(x.clamp(min=1e-3) ** 3) ** (1 / 3)


FORMS: dict[str, Form] = {
    "module": pooling_layer(nn.AdaptiveAvgPool2d(1)),
    "module of maxima": pooling_layer(nn.AdaptiveMaxPool2d(1), by_hand=maximum),
    "window of the map's size": pooling_layer(nn.AvgPool2d(8)),
    "module that flattens": pooling_layer(nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())),
    "custom module": pooling_layer(Written(lambda x: x.sum((2, 3), keepdim=True).flatten(1) / x[0, 0].numel())),
    "gem": pooling_layer(GeM(), by_hand=generalised),
    "both": pooling_layer(Written(lambda x: torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)), by_hand=both, width=12),
    "norm": pooling_layer(
        Written(lambda x: torch.linalg.vector_norm(x, dim=(2, 3))), by_hand=lambda x: x.flatten(2).norm(dim=-1)
    ),
    "module in 1-D": pooling_layer(nn.AdaptiveAvgPool1d(1), dimensions=1),
    "module in 3-D": pooling_layer(nn.AdaptiveAvgPool3d(1), dimensions=3),
    "module on maps with channels last": pooling_layer(Written(lambda x: x.mean((1, 2))), last=True),
    "mean": Form(lambda x: x.mean([2, 3])),
    "mean over the last two": Form(lambda x: x.mean((-2, -1))),
    "mean that keeps the dimensions": Form(lambda x: x.mean((2, 3), keepdim=True).flatten(1)),
    "flat mean": Form(lambda x: x.flatten(2).mean(-1)),
    "mean of a view": Form(lambda x: x.view(x.shape[0], x.shape[1], -1).mean(dim=2)),
    "function": Form(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "function with a window": Form(lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1)),
    "amax": Form(lambda x: x.amax((2, 3)), by_hand=maximum),
    "flat maximum": Form(lambda x: x.flatten(2).max(-1).values, by_hand=maximum),
    "function of maxima": Form(lambda x: F.adaptive_max_pool2d(x, 1).flatten(1), by_hand=maximum),
    "mean in 1-D": Form(lambda x: x.mean(-1), dimensions=1),
    "function in 1-D": Form(lambda x: F.adaptive_avg_pool1d(x, 1).flatten(1), dimensions=1),
    "mean in 3-D": Form(lambda x: x.mean([2, 3, 4]), dimensions=3),
    "function in 3-D": Form(lambda x: F.adaptive_avg_pool3d(x, 1).flatten(1), dimensions=3),
    "mean with channels last": Form(lambda x: x.mean([1, 2]), site="last", last=True),
    # a function between the last layer and the pooling
    "relu and pool": Form(
        lambda x: F.adaptive_avg_pool2d(F.relu(x), (1, 1)).flatten(1), site="dropout", activation=torch.relu
    ),
    "relu in place and pool": Form(
        lambda x: torch.flatten(F.adaptive_avg_pool2d(F.relu(x, inplace=True), (1, 1)), 1),
        site="dropout",
        activation=torch.relu,
    ),
    "hardswish and mean": Form(lambda x: F.hardswish(x).mean([2, 3]), site="dropout", activation=F.hardswish),
    "leaky relu and amax": Form(
        lambda x: F.leaky_relu(x, 0.3).amax((2, 3)),
        site="dropout",
        activation=lambda x: F.leaky_relu(x, 0.3),
        by_hand=maximum,
    ),
    "relu and mean with channels last": Form(
        lambda x: F.relu(x).mean([1, 2]), site="dropout", activation=torch.relu, last=True
    ),
}


class Pooled(nn.Module):
    """A residual block, and a global pooling of some form before dropout and the classifier."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.stem = layer("Conv", form.dimensions, 3, 6, 3, padding=1)
        self.conv = layer("Conv", form.dimensions, 6, 6, 3, padding=1)
        self.norm = layer("BatchNorm", form.dimensions, 6)
        self.act = nn.PReLU() if form.activation else nn.ReLU()
        if form.last:
            self.last = nn.Linear(6, 6)
        if form.layer:
            self.pool = copy.deepcopy(form.pool)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(form.width, 5)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.act(x + self.norm(self.conv(x)))
        return self.last(x.movedim(1, -1)) if self.form.last else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        pooled = self.pool(x).flatten(1) if self.form.layer else self.form.pool(x)
        return self.classifier(self.dropout(pooled))


def images(form: Form) -> torch.Tensor:
    return torch.randn(3, 3, *[8] * form.dimensions)


def map_by_hand(model: Pooled, x: torch.Tensor) -> torch.Tensor:
    """The map that the network pools, with its channels in the second dimension."""
    y = model.body(x)
    y = y if model.form.activation is None else model.form.activation(y)
    return y.movedim(-1, 1) if model.form.last else y


def vector_by_hand(head: str, attention: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What a head makes of a map."""
    sides = torch.cat([mean(y), maximum(y)], 1)
    vector = {"avg": mean(y), "max": maximum(y), "avgmax": (mean(y) + maximum(y)) / 2}.get(head, sides)
    if head == "dual":
        vector = sides @ attention.head.reduce.weight.T + attention.head.reduce.bias
    if attention.project is not None:
        vector = vector @ attention.project.weight.T + attention.project.bias
    return vector


each_form = pytest.mark.parametrize("form", FORMS)
each_head = pytest.mark.parametrize("head", [*HEADS, "cbam+dual"])


@pytest.mark.slow_unless(head="dual")
@each_head
@each_form
def test_logits_are_the_same_at_the_start(form: str, head: str) -> None:
    for dtype in DTYPES:
        original = randomise(Pooled(FORMS[form])).to(dtype)
        x = images(FORMS[form]).to(dtype)
        model = attach(copy.deepcopy(original), head, example=x)
        assert len(attached(model)) == (2 if "+" in head else 1)
        for training in (True, False):
            results = []
            for one in (original, model):
                # the same neurons are dropped
                torch.manual_seed(1)
                results.append(one.train(training)(x))
            assert results[0].dtype == dtype and results[0].isfinite().all()
            assert torch.equal(*results), (dtype, training)
        found = model.state_dict()
        for key, value in original.state_dict().items():
            assert torch.equal(found[key], value), key


@pytest.mark.slow_unless(head="dual")
@pytest.mark.slow_unless(form="module")
@each_head
@each_form
def test_a_head_blends_with_the_pooling_of_the_network(form: str, head: str) -> None:
    one = FORMS[form]
    original = randomise(Pooled(one)).double().eval()
    x = images(one).double()
    model = attach(copy.deepcopy(original), head, example=x, **({"reduction": 2} if "+" in head else {}))
    *gates, (name, wrapper) = attached(model)
    assert name == one.site
    attention, kind = wrapper.attention, head.removeprefix("cbam+")
    width = {"concat": 12}.get(kind, 6)
    # the classifier keeps its width, whatever that of the head
    assert (attention.project is None) == (width == one.width)
    y = map_by_hand(original, x)
    if gates:
        # the gate stands on the branch of the only block
        ((_, gate),) = gates
        nn.init.constant_(gate.attention.strength, 0.8)
        stem = original.stem(x)
        act = original.act(stem + gate.attention(original.norm(original.conv(stem))))
        y = original.last(act.movedim(1, -1)) if one.last else act
        y = y if one.activation is None else one.activation(y)
        y = y.movedim(-1, 1) if one.last else y
    for strength in (0.25, -0.5, 1.0):
        nn.init.constant_(attention.strength, strength)
        pooled = one.by_hand(y)
        blended = pooled + strength * (vector_by_hand(kind, attention, y) - pooled)
        assert_close(model(x), original.classifier(blended))
        same = (kind, one.by_hand) in (("avg", mean), ("max", maximum))
        assert same or not is_close(model(x), original.classifier(pooled))
    # what is trained reaches the head's own weights and the strength
    model(x).square().sum().backward()
    for key, parameter in attention.named_parameters():
        assert parameter.grad is not None and (same or parameter.grad.any()), key
    detach(model)
    assert torch.equal(model(x), original(x))


@each_form
def test_the_plan_of_a_head(form: str) -> None:
    one = FORMS[form]
    (site,) = plan(Pooled(one), "dual", example=images(one))
    side = "pool" if one.layer else "vector" if one.activation else "map"
    assert (site.name, site.place, site.side) == (one.site, "pool", side)
    assert (site.channels, site.size, site.channels_last) == (6, (8,) * one.dimensions, one.last)
    # two vectors of 6 to 6 and their biases, 6 to 12 where the pooled vector is wider, and the strength
    wider = (6 + 1) * one.width if one.width > 6 else 0
    assert site.parameters == (12 + 1) * 6 + wider + 1
    assert site.multiply_adds == 12 * 6 + 6 * (one.width if one.width > 6 else 0)


@pytest.mark.parametrize("form", ["mean", "module", "relu and pool", "mean with channels last"])
def test_a_head_at_other_sizes(form: str) -> None:
    one = FORMS[form]
    original = Pooled(one).eval()
    model = attach(copy.deepcopy(original), "max", example=images(one))
    for shape in ((1, 3, 8, 8), (2, 3, 5, 9), (4, 3, 1, 1)):
        x = torch.randn(shape)
        nn.init.zeros_(attached(model)[0][1].attention.strength)
        assert torch.equal(model(x), original(x))
        nn.init.ones_(attached(model)[0][1].attention.strength)
        assert_close(model(x), original.classifier(maximum(map_by_hand(original, x))))


class Squeezed(nn.Module):
    """Blocks with squeeze-and-excitation of their own, by the very module that pools in the end, or by functions."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.fc = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(6, 5)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3]) if self.way == "function" else self.pool(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for conv, fc in zip(self.conv, self.fc, strict=True):
            y = conv(x)
            squeezed = y.mean([2, 3]) if self.way == "layer" else self.pooled(y)
            x = self.act(x + y * torch.sigmoid(fc(squeezed))[..., None, None])
        # a layer of its own before the pooling
        x = F.relu(self.last(x)) if hasattr(self, "last") else x
        return self.classifier(self.pooled(x))


@pytest.mark.parametrize("way, site", [("layer", "pool"), ("shared layer", "classifier"), ("function", "classifier")])
def test_squeeze_and_excitation_is_not_the_pooling_of_the_network(way: str, site: str) -> None:
    original = Squeezed(way)
    # the shared activation gives other maps as well, so that no head can stand behind it
    original.last = nn.Conv2d(6, 6, 1)
    original.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert names(original, "pool", example=x) == [site]
    model = attach(copy.deepcopy(original), "max", example=x)
    assert torch.equal(model(x), original(x))
    seen: list[torch.Tensor] = []
    original.last.register_forward_hook(lambda _, args, y: seen.append(torch.relu(y)))
    original(x)
    nn.init.ones_(attached(model)[0][1].attention.strength)
    assert_close(model(x), original.classifier(seen[0].amax((2, 3))))


@pytest.mark.slow_unless(network="torchvision:mobilenet_v3_small")
@pytest.mark.parametrize("network", ["timm:seresnet18", "timm:efficientnet_b0", "torchvision:mobilenet_v3_small"])
def test_networks_with_squeeze_and_excitation_have_one_pooling(network: str) -> None:
    pool = "avgpool" if network.startswith("torchvision") else "global_pool"
    assert names(created(network), "pool", example=example(network)) == [pool]
    model = attach(copy.deepcopy(created(network)), "concat", example=example(network))
    ((name, wrapper),) = attached(model)
    assert name == pool and isinstance(wrapper, AttachedHead)


def test_a_map_that_is_returned_as_well_stays() -> None:
    class Returning(Pooled):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            y = self.body(x)
            return {"logits": self.classifier(self.dropout(y.mean([2, 3]))), "map": y}

    original = Returning(FORMS["mean"]).double().eval()
    x = images(FORMS["mean"]).double()
    model = attach(copy.deepcopy(original), "max", example=x)
    nn.init.ones_(attached(model)[0][1].attention.strength)
    y, expected = model(x), original(x)
    assert_close(y["logits"], original.classifier(maximum(expected["map"])))
    assert torch.equal(y["map"], expected["map"])


@pytest.mark.parametrize("at", ["final", "residual-post", "block"])
@pytest.mark.parametrize("form", ["module", "mean", "relu and pool"])
def test_a_gate_and_a_head_on_one_map(form: str, at: str) -> None:
    class Ended(nn.Module):
        """A network whose last block gives the map that is pooled."""

        def __init__(self) -> None:
            super().__init__()
            self.form = FORMS[form]
            self.blocks = nn.Sequential(Block(3, 6, 1, 2), Block(6, 6, 1, 2))
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks(x)
            return self.classifier(self.pool(x).flatten(1) if form == "module" else self.form.pool(x))

    original = randomise(Ended()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = attach(copy.deepcopy(original), "cbam+max", at=at, example=x, reduction=2)
    assert torch.equal(model(x), original(x))
    gates = {name: wrapper.attention for name, wrapper in attached(model) if isinstance(wrapper.attention, CBAM)}
    assert list(gates) == (["blocks.1"] if at == "final" else ["blocks.0", "blocks.1"])
    for parameter in (one for name, one in model.named_parameters() if name.endswith(".strength")):
        nn.init.ones_(parameter)
    y = x
    for number, block in enumerate(original.blocks):
        y = block(y)
        y = gates[f"blocks.{number}"](y) if f"blocks.{number}" in gates else y
    assert_close(model(x), original.classifier(y.amax((2, 3))))
    assert torch.equal(detach(model)(x), original(x))


# cost and the table


@pytest.mark.slow_unless(dimensions=2)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("attention", [*convattn.names("gate"), *convattn.names("head")])
def test_multiply_adds_are_those_of_the_counter_of_pytorch(attention: str, dimensions: int) -> None:
    x = torch.randn(2, 3, *[8] * dimensions)
    sites = plan(Residual(dimensions), attention, example=x)
    is_head = attention in convattn.names("head")
    assert len(sites) == (1 if is_head else 5)
    for site in sites:
        module = entry(attention).build(site.channels, dimensions=dimensions)
        image = torch.randn(1, site.channels, *site.size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vector = module.eval()(image)
            if attention == "concat":
                nn.Linear(20, 10)(vector)
        assert site.multiply_adds == counter.get_total_flops() // 2
        own = sum(parameter.numel() for parameter in module.parameters())
        # the strength, and the map to the classifier's width
        assert site.parameters == own + 1 + (21 * 10 if attention == "concat" else 0)


def test_multiply_adds_by_hand() -> None:
    x = torch.randn(2, 3, 8, 8)
    shapes = [(6, 64), (6, 64), (8, 16), (8, 16), (10, 4)]
    found = plan(Residual(), "se", example=x, reduction=2)
    assert [site.multiply_adds for site in found] == [2 * c * (c // 2) for c, _ in shapes]
    # the mean and the maximum through the first layer, their sum through the second; a 7 x 7 window over two maps
    found = plan(Residual(), "cbam", example=x, reduction=2)
    assert [site.multiply_adds for site in found] == [3 * c * (c // 2) + 2 * 49 * positions for c, positions in shapes]
    (head,) = plan(Residual(), "dual", example=x)
    assert head.multiply_adds == 20 * 10 and head.parameters == 20 * 10 + 10 + 1


def test_the_table() -> None:
    found = plan(Residual(), "se+dual", example=torch.randn(2, 3, 8, 8), where="blocks.[34]*", reduction=2)
    assert str(found) == "\n".join(
        [
            "site            place     stage  attention  channels    map  parameters  multiply-adds",
            "blocks.3.norm2  residual      2  se                8  4 x 4          65             64",
            "blocks.4.norm2  residual      3  se               10  2 x 2         101            100",
            "pool            pool          3  dual             10  2 x 2         211            200",
            "total added                                                         377            364",
        ]
    )


def test_the_table_counts_what_is_added() -> None:
    original = cifar()
    chosen = plan(original, "cbam+concat", example=CIFAR)
    before = sum(parameter.numel() for parameter in original.parameters())
    attach(original, chosen)
    added = sum(parameter.numel() for parameter in original.parameters()) - before
    total = next(line for line in str(chosen).splitlines() if line.startswith("total added"))
    assert re.sub(r"total added\s+", "", total).split() == [
        f"{added:,}",
        f"{sum(site.multiply_adds for site in chosen):,}",
    ]
    assert len(list(chosen)) == len(chosen) == 7


@pytest.mark.parametrize("pixels", [64, 32, 16, 8])
@pytest.mark.parametrize("at", ["block", "stage", "residual", "final"])
def test_sites_are_the_same_at_every_size_of_images(at: str, pixels: int) -> None:
    """Maps of one position are maps too, and stages end among them where a convolution has a stride."""
    model = torchvision.models.resnet18()
    expected = [(site.name, site.stage) for site in plan(model, "se", at=at, example=torch.zeros(1, 3, 128, 128))]
    found = plan(model, "se", at=at, example=torch.zeros(1, 3, pixels, pixels))
    assert [(site.name, site.stage) for site in found] == expected
    assert len(found) == {"block": 8, "stage": 4, "residual": 8, "final": 1}[at]
