"""A network cut by the name of a layer computes what the layer sees in the whole network, or is refused."""

import functools

import pytest
import torch
from torch import nn

from convattn import attach, errors, features, networks
from convattn.networks.cut import example_for
from tolerances import assert_close


@functools.cache
def network(name: str) -> nn.Module:
    # whether a test is the first or not, its own random numbers are the same
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.create(name).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def seen(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What the layer gives in the whole network; a copy, since a layer behind may work in place."""
    values: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, y: torch.Tensor) -> None:
        values.append(y.clone())

    handle = model.get_submodule(layer).register_forward_hook(keep)
    with torch.no_grad():
        model(x)
    handle.remove()
    (value,) = values
    return value


def check(model: nn.Module, layer: str, x: torch.Tensor) -> nn.Sequential:
    cut = features(model, layer, example=torch.randn_like(x))
    with torch.no_grad():
        assert torch.equal(cut(x), seen(model, layer, x)), layer
    return cut


@pytest.mark.slow_unless(name="torchvision:resnet18")
@pytest.mark.slow_unless(name="timm:resnet18", layer="layer4")
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "torchvision:resnet50", "timm:resnet50"])
@pytest.mark.parametrize("layer", ["conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"])
def test_stages_of_resnets(name: str, layer: str) -> None:
    cut = check(network(name), layer, images())
    assert next(reversed(cut._modules)) == layer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_every_layer_is_right_or_refused(name: str) -> None:
    model, x = network(name), images(32)
    right = refused = 0
    for layer, _ in model.named_modules():
        try:
            if layer:
                check(model, layer, x)
                right += 1
        except errors.AttachError:
            refused += 1
    assert right > 50 and refused >= 5


@pytest.mark.parametrize("layer", ["features.0", "features.2", "features.3.block", "features.4.block.2.fc1", "avgpool"])
def test_other_networks(layer: str) -> None:
    check(network("torchvision:mobilenet_v3_small"), layer, images())


def test_layers_within_blocks() -> None:
    model, x = network("torchvision:resnet18"), images()
    names = list(check(model, "layer2.0.bn1", x)._modules)
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2_0_conv1", "layer2_0_bn1"]
    names = list(check(model, "layer2.0.downsample.1", x)._modules)
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2_0_downsample_0", "layer2_0_downsample_1"]


def test_layer3_is_not_what_children_give() -> None:
    # the trap: the last three children are not the classifier alone
    model, x = network("torchvision:resnet18"), images()
    trap = nn.Sequential(*list(model.children())[:-3])
    assert trap(x).shape[1] == 256
    assert features(model, "layer4")(x).shape == (2, 512, 2, 2)
    assert features(model, "avgpool")(x).shape == (2, 512, 1, 1)


def test_layers_are_shared_and_modes_stay() -> None:
    model = networks.create("torchvision:resnet18").train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    cut = features(model, "layer2")
    assert cut.layer1 is model.layer1 and cut.layer2 is model.layer2
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    features(network("torchvision:resnet18"), "layer1")
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_stay_after_a_failure() -> None:
    model = networks.create("torchvision:resnet18").train()
    with pytest.raises(errors.AttachError, match="does not run on the example"):
        features(model, "layer1", example=torch.randn(1, 5, 64, 64))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow_unless(attention="se+dual")
@pytest.mark.parametrize("attention", ["cbam", "se+dual"])
def test_attached_networks(attention: str) -> None:
    model = attach(networks.create("torchvision:resnet18").eval(), attention)
    x = images()
    for name, parameter in model.named_parameters():
        if name.endswith("strength"):
            nn.init.constant_(parameter, 0.5)
    for layer in ("layer1.0.bn2", "layer1", "layer4", "avgpool"):
        check(model, layer, x)


# example


def test_example_has_the_size_channels_and_dtype_of_the_network() -> None:
    assert example_for(networks.resnet20()).shape == (2, 3, 64, 64)
    assert example_for(networks.create("resnet20")).shape == (2, 3, 32, 32)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU()).double()
    example = example_for(model)
    assert example.shape == (2, 1, 64, 64, 64) and example.dtype == torch.float64
    assert torch.equal(example, example_for(model))


def test_example_is_not_changed_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)).eval()
    x = images(8)
    assert [type(layer).__name__ for layer in features(model, "1", example=x.clone())] == ["ReLU", "Conv2d"]
    assert_close(features(model, "1", example=x.clone())(x.clone()), model[1](x.relu()))


# order of execution, and what a chain of layers cannot say


class Net(nn.Module):
    """Layers in another order of definition than of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(8, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.act(self.second(self.act(self.first(x)))))


def test_order_of_execution() -> None:
    names = list(check(Net(), "third", images(8))._modules)
    assert names == ["first", "act", "second", "act_3", "third"]


class FunctionBetween(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.relu(self.first(x))))


class SumBetween(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.third(self.act(y) + y)


class InPlaceBetween(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += 1
        return self.third(self.second(y))


class PartInPlaceBetween(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y[:, 0] = 0
        return self.third(self.second(y))


class FunctionFirst(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x - 0.5)))


class InPlaceFirst(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize(
    "model", [FunctionBetween, SumBetween, InPlaceBetween, PartInPlaceBetween, FunctionFirst, InPlaceFirst]
)
def test_functions_between_layers_are_refused(model: type[Net]) -> None:
    with pytest.raises(errors.AttachError, match=r"computed outside any layer .*up to 'third'"):
        features(model(), "third", example=images(8))


@pytest.mark.parametrize("model", [FunctionBetween, SumBetween, InPlaceBetween, PartInPlaceBetween])
def test_layers_before_a_function_can_be_cut(model: type[Net]) -> None:
    check(model(), "first", images(8))


def test_unused_layer_is_refused() -> None:
    with pytest.raises(errors.AttachError, match="'unused' is not called"):
        features(Net(), "unused", example=images(8))


def test_layer_called_twice_is_refused() -> None:
    with pytest.raises(errors.AttachError, match="'act' is called 2 times"):
        features(Net(), "act", example=images(8))
    with pytest.raises(errors.AttachError, match=r"'layer1\.0\.relu' is called 2 times"):
        features(network("torchvision:resnet18"), "layer1.0.relu", example=images())


class Scaled(nn.Module):
    """A layer with a second argument."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


class WithArgument(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.scaled(self.first(x), 3.0)))


class WithKeyword(WithArgument):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.scaled(self.first(x), scale=3.0)))


@pytest.mark.parametrize("model", [WithArgument, WithKeyword])
@pytest.mark.parametrize("layer", ["scaled", "third"])
def test_layers_with_more_arguments_are_refused(model: type[WithArgument], layer: str) -> None:
    # the chain would call them with the map alone
    with pytest.raises(errors.AttachError):
        features(model(), layer, example=images(8))


class Branches(Net):
    """The layer asked for stands on one of two branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.third(y) + self.unused(self.third(y * 2))


def test_branch() -> None:
    check(Branches(), "first", images(8))
    with pytest.raises(errors.AttachError, match="'third' is called 2 times"):
        features(Branches(), "third", example=images(8))


# names


def test_unknown_layer_suggests() -> None:
    with pytest.raises(errors.UnknownName, match=r"No layer is called 'layer5'\. Did you mean .*'layer4'"):
        features(network("torchvision:resnet18"), "layer5")
    with pytest.raises(errors.UnknownName, match=r"'layer1\.0\.conv3'\. Did you mean .*'layer1\.0\.conv2'"):
        features(network("torchvision:resnet18"), "layer1.0.conv3")
    with pytest.raises(errors.UnknownName, match="No layer is called ''"):
        features(network("torchvision:resnet18"), "")
