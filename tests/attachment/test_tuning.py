"""Fine-tuning: every parameter in the group where it belongs, and the base network held still."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import convattn
from convattn import attach, detach, errors, freeze_base, parameter_groups
from convattn.attachment import attached
from convattn.networks.cifar_resnet import CifarResNet

GATES, HEADS = convattn.names("gate"), convattn.names("head")
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


class Own(nn.Module):
    """A gate with a bias and a norm of more than one dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.norm = nn.LayerNorm([channels, 64 * 16 // channels, 64 * 16 // channels])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.norm(self.conv(x)) + self.bias)


def network(attention: str | None = "cbam+dual", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(1, classes=3)
    return model if attention is None else attach(model, attention, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, labels = batch()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def listed(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def by_group(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """The names of the parameters in each group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, **{"lr": 0.1, "weight_decay": 0.01, **options})
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# groups


@pytest.mark.parametrize("attention", [*GATES, *HEADS, "cbam+dual", None])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_every_parameter_is_in_one_group(attention: str | None, start: str) -> None:
    model = network(attention, **({} if attention is None else {"start": start}))
    groups = parameter_groups(model, lr=0.1)
    assert sorted(map(id, listed(groups))) == sorted(map(id, model.parameters()))
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("attention", [*GATES, *HEADS])
def test_what_decays(attention: str) -> None:
    model = network(attention)
    groups = by_group(model)
    for name, parameter in model.named_parameters():
        side = "attention" if ".attention." in name else "base"
        # all norms of this network are called so
        of_norm = name.split(".")[-2].startswith(("bn", "norm"))
        plain = of_norm or name.endswith((".bias", ".strength"))
        assert name in groups[f"{side} without decay" if plain else side], name
        assert plain == (parameter.dim() == 1), name
    assert sum(name.endswith(".strength") for name in groups["attention without decay"]) == len(attached(model))


def test_groups_by_name() -> None:
    groups = by_group(attach(network(None), "cbam", where="layer2*", reduction=4))
    site = "layer2.0.bn2.attention"
    assert groups["attention"] == [
        f"{site}.channel.fc1.weight",
        f"{site}.channel.fc2.weight",
        f"{site}.spatial.conv.weight",
    ]
    assert groups["attention without decay"] == [
        f"{site}.{name}"
        for name in ("strength", "channel.fc1.bias", "channel.fc2.bias", "spatial.norm.weight", "spatial.norm.bias")
    ]
    assert {"conv1.weight", "layer2.0.conv2.weight", "linear.weight"} <= set(groups["base"])
    assert {"bn1.weight", "layer2.0.bn2.weight", "layer2.0.bn2.bias", "linear.bias"} <= set(
        groups["base without decay"]
    )


@pytest.mark.parametrize("name", ["bias", "norm.weight", "norm.bias"])
def test_biases_and_norms_of_several_dimensions_do_not_decay(name: str) -> None:
    model = attach(CifarResNet(1), Own)
    groups = by_group(model)
    for site, wrapper in attached(model):
        key = f"{site}.attention.module.{name}"
        assert wrapper.attention.module.get_parameter(name).dim() > 1
        assert key in groups["attention without decay"]
        assert f"{site}.attention.module.conv.weight" in groups["attention"]


@pytest.mark.parametrize("gate_lr", [None, 0.5, 0, 0.01])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_rates_and_decay(gate_lr: float | None, weight_decay: float) -> None:
    groups = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network(), 0.1, gate_lr, weight_decay)
    }
    rate = 0.1 if gate_lr is None else gate_lr
    assert groups == {
        "base": (0.1, weight_decay),
        "base without decay": (0.1, 0.0),
        "attention": (rate, weight_decay),
        "attention without decay": (rate, 0.0),
    }


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model.layer1.requires_grad_(False)
    model.layer2[0].bn2.attention.strength.requires_grad_(False)
    names = [name for group in by_group(model).values() for name in group]
    expected = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(expected) and len(names) < len(list(model.parameters()))
    assert "layer2.0.bn2.attention.strength" not in names and "layer2.0.bn2.attention.channel.fc1.weight" in names
    assert list(by_group(freeze_base(model))) == ["attention", "attention without decay"]
    assert parameter_groups(model.requires_grad_(False), 0.1) == []


def test_a_layer_with_several_names_is_in_one_group() -> None:
    model = CifarResNet(2)
    # one layer under two names, and one weight in two layers
    model.layer1[1].bn2 = model.layer1[0].bn2
    model.layer1[1].conv2.weight = model.layer1[0].conv2.weight
    attach(model, "cbam")
    parameters = listed(parameter_groups(model, 0.1))
    assert len(set(parameters)) == len(parameters) == len(list(model.parameters()))
    assert sum(parameter is model.layer1[0].conv2.weight for parameter in parameters) == 1
    assert sum(parameter is model.layer1[1].bn2.attention.strength for parameter in parameters) == 1


def test_gates_within_gates() -> None:
    model = attach(attach(network(None), "se", at="block"), "cbam", at="residual")
    groups = by_group(model)
    for side in ("attention", "attention without decay"):
        assert all(".attention." in name for name in groups[side])
        # of both
        assert any(".bn2.attention." in name for name in groups[side])
        assert any(name.startswith("layer1.0.attention.") for name in groups[side])
    assert not any(".attention." in name for side in ("base", "base without decay") for name in groups[side])


def test_modules_of_the_base_network_that_are_called_attention() -> None:
    # timm's own attention belongs to the network
    model = timm.create_model("seresnet18", num_classes=3)
    own = [name for name, _ in model.named_parameters() if ".se." in name]
    groups = by_group(attach(model, "se"))
    sides = [name for side in ("base", "base without decay") for name in groups[side]]
    assert own and set(own) <= set(sides)


@pytest.mark.parametrize("name", ["lr", "gate_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.1", True])
def test_wrong_numbers(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=f"{name} must be a number from 0 to inf, got"):
        parameter_groups(network(), **{"lr": 0.1, name: value})


# steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("attention", ["se", "cbam", "cbam+dual"])
def test_strength_moves_first_and_the_gates_follow(optimizer: str, attention: str) -> None:
    # without hidden units that may be dead, and with more than one
    model = network(attention, activation="gelu", reduction=4).train()
    # no weight decay: what moves is moved by its gradient
    stepping = OPTIMIZERS[optimizer](parameter_groups(model, lr=0.01, gate_lr=0.1))
    for number in (1, 2):
        before = values(model)
        step(model, stepping)
        for name, parameter in model.named_parameters():
            has_moved = not torch.equal(parameter, before[name])
            if name.endswith(".strength"):
                assert has_moved, (number, name)
            elif ".attention." in name:
                assert has_moved == (number == 2), (number, name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_weights_decay(optimizer: str) -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    stepping = OPTIMIZERS[optimizer](parameter_groups(model, lr=0.1, gate_lr=0.01, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepping.step()
    for name, parameter in model.named_parameters():
        rate = 0.01 if ".attention." in name else 0.1
        expected = 0.5 if parameter.dim() == 1 else 0.5 * (1 - rate * 0.1)
        assert torch.allclose(parameter, torch.tensor(expected), rtol=1e-6, atol=0), name


def test_rates_tell_how_far_the_sides_move() -> None:
    model = network()
    before = values(model)
    step(model, torch.optim.SGD(parameter_groups(model, lr=0, gate_lr=0.1)))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.endswith(".strength")}


# the base network


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_base_is_held_still(optimizer: str) -> None:
    plain = network(None)
    model = attach(copy.deepcopy(plain), "cbam+dual", activation="gelu", reduction=4)
    assert freeze_base(model) is model
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name, _ in model.named_parameters() if ".attention." in name
    }
    stepping = OPTIMIZERS[optimizer](parameter_groups(model, lr=0.1, weight_decay=0.1))
    # statistics move in train mode, so in eval mode the whole base stays
    model.eval()
    start = values(model)
    for _ in range(3):
        step(model, stepping)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != (".attention." in name), name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".attention." not in name)
    state = detach(model).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


def test_statistics_move_in_train_mode() -> None:
    model = freeze_base(network("se")).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, torch.optim.SGD(parameter_groups(model, lr=0.1)))
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert {key.rpartition(".")[2] for key in changed} == {
        *("running_mean", "running_var", "num_batches_tracked", "strength")
    }


def test_the_base_is_freed_again() -> None:
    model = freeze_base(network())
    model.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert by_group(model) == by_group(network())
    # the layers themselves, not only what stands around them
    assert all(parameter.requires_grad for parameter in detach(freeze_base(model).requires_grad_(True)).parameters())


def test_freezing_after_other_freezing() -> None:
    model = network().requires_grad_(False)
    freeze_base(model)
    freeze_base(model)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name, _ in model.named_parameters() if ".attention." in name
    }


def test_freezing_gates_within_gates_and_shared_layers() -> None:
    model = CifarResNet(2)
    model.layer1[1].bn2 = model.layer1[0].bn2
    attach(attach(model, "se", at="block"), "cbam", at="residual")
    freeze_base(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == (".attention." in name), name
