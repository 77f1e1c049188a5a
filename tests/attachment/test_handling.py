"""What code made for other networks does to one with attention: merging by duck typing, networks inside of others."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from convattn import attach, networks, plan
from convattn.attachment import attached
from convattn.errors import AttachError
from tolerances import assert_close


class Unit(nn.Module):
    """A convolution, a norm and an activation, as detection code has them: merged by whoever walks over modules."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]

    def fuseforward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = Unit(channels, channels)
        self.cv2 = Unit(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cv2(self.cv1(x))  # type: ignore[no-any-return]


class CSP(nn.Module):
    """Two branches, concatenated; its last activation is written over the map before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Unit(inputs, half)
        self.cv2 = Unit(inputs, half)
        self.cv3 = Unit(2 * half, outputs)
        self.m = nn.Sequential(Bottleneck(half), Bottleneck(half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))  # type: ignore[no-any-return]


def detector() -> nn.Module:
    torch.manual_seed(0)
    layers = [Unit(3, 8, 3, 2), CSP(8, 8), Unit(8, 16, 3, 2), CSP(16, 16), nn.Conv2d(16, 6, 1)]
    return randomised(nn.Sequential(*layers))


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                tensor.normal_(std=0.3)
    return model.eval()


def moved(model: nn.Module) -> nn.Module:
    """A network whose gates have an effect."""
    with torch.no_grad():
        for _, wrapper in attached(model):
            wrapper.attention.strength.fill_(0.7)
    return model


def merge_where_there_is_a_norm(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "bn") and hasattr(module, "conv"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            del module.bn
            module.forward = module.fuseforward


def merge_by_class(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is Unit and hasattr(module, "bn"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            delattr(module, "bn")
            module.forward = module.fuseforward  # type: ignore[method-assign]


@pytest.mark.parametrize("merge", [merge_where_there_is_a_norm, merge_by_class])
@pytest.mark.parametrize("at", ["residual", "residual-pre", "residual-post", "shortcut", "block", "stage"])
def test_units_that_are_merged_from_outside_keep_their_gates(at: str, merge: Callable[[nn.Module], None]) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = moved(attach(detector(), "se", at=at, example=x))
    sites = [name for name, _ in attached(model)]
    expected = model(x)
    assert (expected - detector()(x)).abs().max() > 1e-3
    merge(model)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in model.modules())
    assert [name for name, _ in attached(model)] == sites
    assert_close(model(x), expected)


def test_a_stage_ends_with_a_unit_and_not_inside_of_it() -> None:
    sites = plan(detector(), "se", at="stage", example=torch.randn(2, 3, 32, 32))
    assert [(site.name, site.stage) for site in sites] == [("1", 1), ("3", 2)]


class Whole(nn.Module):
    """A residual block that is merged from outside: a gate on its norm would go with the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn(self.conv(x))  # type: ignore[no-any-return]

    def forward_fuse(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)  # type: ignore[no-any-return]


def test_no_gate_stands_inside_of_a_unit_that_is_merged_from_outside() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Whole(8), Whole(8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttachError, match=r"1 \(Whole\), whose layers can be merged.*The model was not changed"):
        attach(model, "se", example=torch.randn(2, 3, 16, 16))
    assert list(model.state_dict()) == list(before)
    assert len(attached(attach(model, "se", at="residual-post", example=torch.randn(2, 3, 16, 16)))) == 2


class Branches(nn.Module):
    """Two parallel convolutions that become one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow: nn.Conv2d | None = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) if self.narrow is None else self.wide(x) + self.narrow(x)  # type: ignore[no-any-return]

    def switch_to_deploy(self) -> None:
        if self.narrow is not None:
            with torch.no_grad():
                self.wide.weight += nn.functional.pad(self.narrow.weight, [1] * 4)
                self.wide.bias += self.narrow.bias  # type: ignore[operator]
            self.narrow = None


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Branches(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def deploy_all(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, Branches):
            module.switch_to_deploy()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(8), Block(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x))  # type: ignore[no-any-return]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def convert_to_deploy(self) -> None:
        deploy_all(self)


class Around(nn.Module):
    """A network that calls another one by a method of its own, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Backbone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.features(x)


def test_a_network_inside_of_another_one_is_no_unit() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = moved(attach(randomised(Around()), "se", example=x))
    assert [name for name, _ in attached(model)] == ["model.blocks.0.norm", "model.blocks.1.norm"]
    expected = model(x)
    model.model.convert_to_deploy()  # type: ignore[operator,union-attr]
    assert len(attached(model)) == 2
    assert_close(model(x), expected)


def test_fuse_modules_merges_inside_of_a_block_and_refuses_a_layer_with_a_gate() -> None:
    x = torch.randn(2, 3, 16, 16)
    pair = ["blocks.0.first.wide", "blocks.0.norm"]
    model = moved(attach(randomised(Backbone()), "se", example=x))
    expected, before = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(AttachError, match=r"fuse_modules cannot merge 'blocks\.0\.norm'.*Nothing was merged there"):
        fuse_modules(model, pair, inplace=True)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), expected)


def test_fuse_modules_keeps_the_gate_of_the_block() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = moved(attach(detector(), "se", at="block", example=x))
    expected = model(x)
    merged = fuse_modules(model, [[f"1.m.0.{unit}.conv", f"1.m.0.{unit}.bn"] for unit in ("cv1", "cv2")])
    assert len(attached(merged)) == len(attached(model)) == 4
    assert isinstance(merged.get_submodule("1.m.0.cv1.bn"), nn.Identity)
    assert_close(merged(x), expected)


# a place at which norms are wrapped, and one at which convolutions are
PLACES = ("residual", "residual-pre")


def weights_and_biases(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups for an optimizer as many training scripts make them: by what a module has, and not by its class alone."""
    norms, weights, biases = groups = [], [], []  # type: tuple[list[nn.Parameter], ...]
    for module in model.modules():
        if hasattr(module, "bias") and isinstance(module.bias, nn.Parameter):
            biases.append(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module.weight)
        elif hasattr(module, "weight") and isinstance(module.weight, nn.Parameter):
            weights.append(module.weight)
    return list(groups)


@pytest.mark.parametrize("at", PLACES)
def test_each_tensor_is_found_once_by_who_asks_modules_for_it(at: str) -> None:
    model = attach(networks.resnet20(), "se", at=at)
    groups = weights_and_biases(model)
    strengths = [one for name, one in model.named_parameters() if name.endswith("strength")]
    assert {id(one) for group in groups for one in group} | set(map(id, strengths)) == set(map(id, model.parameters()))
    assert sum(map(len, groups)) + len(strengths) == len(list(model.parameters()))
    # torch warns of what is twice in one group, and raises where it is in two
    torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
    name, wrapper = attached(model)[0]
    assert wrapper.weight is wrapper.inner.weight
    assert model.get_submodule(name).weight is wrapper.inner.weight


@pytest.mark.parametrize("at", PLACES)
def test_a_walk_that_was_left_early_leaves_no_trace(at: str) -> None:
    model = attach(networks.resnet20(), "se", at=at)
    for _, module in model.named_modules():
        if module is attached(model)[0][1]:
            assert not hasattr(module, "weight")
            break
    assert hasattr(module, "weight")


@pytest.mark.parametrize("at", PLACES)
def test_pruning_what_has_a_weight_prunes_it_once(at: str) -> None:
    model = attach(networks.resnet20(), "se", at=at)
    for module in model.modules():
        if hasattr(module, "weight") and isinstance(module.weight, nn.Parameter) and module.weight.dim() == 4:
            prune.l1_unstructured(module, "weight", amount=0.5)
    convolutions = [one for one in model.modules() if isinstance(one, nn.Conv2d)]
    assert len(convolutions) >= 19
    for one in convolutions:
        assert one.weight_mask.mean().item() == 0.5


@pytest.mark.parametrize("at", PLACES)
def test_parametrizations_are_removed_wherever_there_are_some(at: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = moved(attach(networks.resnet20().eval(), "se", at=at))
    expected = model(x)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert not any(parametrize.is_parametrized(one) for one in model.modules())
    assert_close(model(x), expected)


class Shared(nn.Module):
    """One residual block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = Block(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


def test_features_of_a_layer_that_is_called_three_times() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = moved(attach(randomised(Shared()), "se", example=x))
    assert [name for name, _ in attached(model)] == ["block.norm"]
    _, nodes = get_graph_node_names(model)
    assert len(set(nodes)) == len(nodes)
    features = create_feature_extractor(model, [nodes[-1]])(x)
    assert_close(features[nodes[-1]], model(x))
