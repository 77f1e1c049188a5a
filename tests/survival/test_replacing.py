"""Layers with attention replaced, removed, moved: the attention stays, or somebody is told."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable

import networks
import pytest
import timm
import torch
import torchvision
from networks import distance, images, sites, stronger
from torch import nn

from convattn import attach, detach
from convattn.attachment import attached
from convattn.errors import AttachError


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10).eval()


def works(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the attention of every site changes the output."""
    y = model(x)
    for _, wrapper in attached(model):
        with torch.no_grad():
            kept = wrapper.attention.strength.clone()
            wrapper.attention.strength.zero_()
            if torch.equal(model(x), y):
                return False
            wrapper.attention.strength.copy_(kept)
    return True


SWAPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "classifier": (densenet, lambda model: setattr(model, "classifier", nn.Linear(model.classifier.in_features, 7))),
    "item of a classifier": (
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
        lambda model: model.classifier.__setitem__(1, nn.Linear(1280, 7)),
    ),
    "whole classifier": (
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
        lambda model: setattr(model, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1280, 7))),
    ),
    "timm, a pooling layer": (lambda: timm.create_model("resnet10t"), lambda model: model.reset_classifier(7)),
    "timm, a head": (lambda: timm.create_model("convnext_atto"), lambda model: model.reset_classifier(7)),
    "timm, another pooling": (lambda: timm.create_model("resnet10t"), lambda model: model.reset_classifier(7, "max")),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_head_serves_the_new_classifier(swap: str) -> None:
    build, change = SWAPS[swap]
    model, x = build().eval(), torch.randn(2, 3, 64, 64)
    attach(model, "dual", example=x)
    keys = [key for key in model.state_dict() if ".attention." in key]
    names = sites(model)
    change(stronger(model))
    assert [key for key in model.state_dict() if ".attention." in key] == keys and sites(model) == names
    assert model(x).shape == (2, 7) and works(model, x)
    detach(model)
    assert model(x).shape == (2, 7) and not any(".attention." in key for key in model.state_dict())


def test_a_pooling_that_is_gone_is_told() -> None:
    model, x = timm.create_model("resnet10t").eval(), torch.randn(2, 3, 64, 64)
    attach(model, "dual", example=x)
    model.reset_classifier(0, "")
    with pytest.raises(AttachError, match=r"own pooling now gives \(2, 512, 2, 2\).*replaced.*detach"):
        model(x)
    assert detach(model)(x).dim() == 4


def test_a_part_that_is_replaced_with_its_attention_is_told_once() -> None:
    model, x = attach(networks.plain("resnet20"), "se", example=images()), images()
    names = sites(model)
    model.layer2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1))
    assert sites(model) == [name for name in names if not name.startswith("layer2")]
    with pytest.warns(UserWarning, match=r"attention at layer2\.0\.bn2, .* is gone.*Attach it again"):
        y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), y)


REMOVALS: dict[str, Callable[[nn.Module], object]] = {
    "del": lambda model: delattr(model.layer1[0], "bn2"),
    "None": lambda model: setattr(model.layer1[0], "bn2", None),
    "the block": lambda model: model.layer1.__delitem__(0),
    "pop": lambda model: model.layer1.pop(0),
    "the stage": lambda model: delattr(model, "layer1"),
    "_modules": lambda model: model._modules.pop("layer1"),
    "clear": lambda model: model._modules.clear(),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_removing_attention_with_its_layer_is_refused(removal: str) -> None:
    model, x = stronger(attach(networks.plain("resnet20"), "se", example=images())), images()
    y, names = model(x), sites(model)
    with pytest.raises(AttachError, match=r"has attention.*detach.*not changed"):
        REMOVALS[removal](model)
    assert sites(model) == names and torch.equal(model(x), y)
    # without attention it is a network as any other
    REMOVALS[removal](detach(model))


def test_a_layer_that_is_replaced_keeps_its_attention() -> None:
    model, x = stronger(attach(networks.plain("resnet20"), "cbam", example=images())), images()
    names = sites(model)
    old = model.layer1[0].bn2
    new = nn.BatchNorm2d(16).eval()
    model.layer1[0].bn2 = new
    assert model.layer1[0].bn2 is old and old.inner is new and sites(model) == names
    assert works(model, x) and detach(model).layer1[0].bn2 is new


def test_what_is_put_around_a_layer_is_put_there() -> None:
    class Around(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    model, x = stronger(attach(networks.plain("resnet20"), "se", example=images())), images()
    y = model(x)
    # around the wrapper, and around the layer
    model.layer1[0].bn2 = Around(model.layer1[0].bn2)
    model.layer1[1].bn2 = Around(model.layer1[1].bn2.inner)
    assert isinstance(model.layer1[0].bn2, Around) and len(sites(model)) == 9
    assert distance(model(x), y) < 1e-5 and works(model, x)


def test_layers_that_move_keep_their_attention() -> None:
    model, x = networks.plain("resnet20"), images()
    stronger(attach(model, "se", at="block", example=x))
    y, gates = model(x), [wrapper.attention for _, wrapper in attached(model)]
    model.layer1.insert(1, nn.Identity())
    assert [wrapper.attention for _, wrapper in attached(model)] == gates
    assert torch.equal(model(x), y)


def test_detach_gives_plain_dictionaries_back() -> None:
    model = networks.plain("resnet20")
    before = [type(module._modules) for module in model.modules()]
    attach(model, "cbam", example=images())
    assert [type(module._modules) for module in detach(model).modules()] == before


@pytest.mark.parametrize("attention", ["cbam", "cbam+dual"])
def test_every_walk_meets_each_layer_and_each_tensor_once(attention: str) -> None:
    model = attach(networks.plain("resnet20"), attention, example=images())

    def descend(module: nn.Module) -> list[nn.Module]:
        return [module] + [one for child in module.children() for one in descend(child)]

    applied: list[nn.Module] = []
    model.apply(applied.append)
    walks = {
        "modules": list(model.modules()),
        "named_modules": [module for _, module in model.named_modules()],
        "children": descend(model),
        "apply": applied,
    }
    for name, modules in walks.items():
        assert max(Counter(map(id, modules)).values()) == 1, name
        assert set(modules) == set(walks["modules"]), name
        for tensors in (
            [one for module in modules for one in module.parameters(recurse=False)],
            [one for module in modules for one in module._parameters.values() if one is not None],
        ):
            assert Counter(map(id, tensors)) == Counter(map(id, model.parameters())), name
        buffers = [one for module in modules for one in module._buffers.values() if one is not None]
        assert Counter(map(id, buffers)) == Counter(map(id, model.buffers())), name
    # names lead to what they name
    assert all(model.get_submodule(name) is module for name, module in model.named_modules())
    assert all(model.get_parameter(name) is one for name, one in model.named_parameters())
    assert list(dict(model.named_parameters())) == [
        key for key in model.state_dict() if key in dict(model.named_parameters())
    ]


def test_names_that_scripts_put_together_are_those_of_the_tensors() -> None:
    for at in ("residual", "block", "stage"):
        model = attach(networks.plain("resnet20"), "cbam", at=at, example=images())
        own = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            for key, _ in module.named_parameters(recurse=False)
        ]
        assert own == [name for name, _ in model.named_parameters()]
        older = [
            "%s.%s" % (name, key)  # noqa: UP031
            for name, one in model.named_modules()
            for key in dict(one.named_parameters(recurse=False))
        ]
        assert older == own
        every = {
            f"{name}.{key}" if name else key for name, one in model.named_modules() for key, _ in one.named_parameters()
        }
        assert every == {name for name, _ in model.named_parameters()}


def test_a_layer_that_is_looked_for_by_name_has_its_tensors() -> None:
    model = attach(networks.plain("resnet20"), "se", example=images())
    for name, module in model.named_modules():
        if name == "layer1.0.bn2":
            assert module.weight is module.inner.weight and module.running_mean is module.inner.running_mean
            # whoever collects what has a weight comes to the layer next
            assert not hasattr(module, "weight") and getattr(module, "weight", None) is None
    assert hasattr(model.get_submodule("layer1.0.bn2"), "weight")


def test_a_counter_in_buffers_counts_each_layer_once() -> None:
    """As profilers do it that register a number at every module and add them up by children."""
    model, x = networks.plain("resnet20"), images(1)

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        module.operations += y.numel() * module.weight[0].numel()

    def total(module: nn.Module) -> int:
        return int(module.operations) + sum(total(child) for child in module.children())

    totals = []
    for network in (model, attach(model, "se", at="layer", where="*conv*", example=x)):
        for module in network.modules():
            module.register_buffer("operations", torch.zeros(()))
        handles = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d)]
        network(x)
        totals.append(total(network))
        for handle in handles:
            handle.remove()
        for module in network.modules():
            module._buffers.pop("operations")
    assert totals[0] == totals[1] > 0


def test_parameters_grouped_by_the_class_of_their_module() -> None:
    model = attach(networks.plain("resnet20"), "cbam", example=images())
    groups: dict[type, list[nn.Parameter]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            groups.setdefault(type(module), []).append(parameter)
    # refused by PyTorch where one stands in two groups
    optimizer = torch.optim.SGD([{"params": group} for group in groups.values()], lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    plain = [one for one in networks.plain("resnet20").modules() if isinstance(one, nn.BatchNorm2d)]
    # that of each spatial gate too
    assert len(groups[nn.BatchNorm2d]) == 2 * len(plain) + 2 * 9


@pytest.mark.parametrize("attention", ["se", "cbam+dual"])
def test_one_thread_of_several_attaches(attention: str) -> None:
    model, x = networks.plain("resnet20"), images()
    y, told = model(x), []
    barrier = threading.Barrier(4)

    def go() -> None:
        barrier.wait()
        try:
            attach(model, attention, example=images())
        except AttachError as error:
            told.append(str(error))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3 and all("has attention already" in one for one in told)
    assert len(sites(model)) == 9 + attention.count("+") and torch.equal(model(x), y)
    assert distance(stronger(model)(x), y) > 1e-3
