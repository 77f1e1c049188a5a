"""Fine-tuning: every parameter in the group where it belongs, and the base network held still."""

import copy
import io
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import convattn
from convattn import attach, detach, errors, freeze_base, parameter_groups, unfreeze_base
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


@pytest.mark.slow_unless(start="paper")
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
        side = "attention" if ".attention." in name else "classifier" if name.startswith("linear.") else "base"
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
    assert {"conv1.weight", "layer2.0.conv2.weight"} <= set(groups["base"])
    assert {"bn1.weight", "layer2.0.bn2.weight", "layer2.0.bn2.bias"} <= set(groups["base without decay"])
    assert groups["classifier"] == ["linear.weight"] and groups["classifier without decay"] == ["linear.bias"]


@pytest.mark.parametrize("name", ["bias", "norm.weight", "norm.bias"])
def test_biases_and_norms_of_several_dimensions_do_not_decay(name: str) -> None:
    model = attach(CifarResNet(1), Own)
    groups = by_group(model)
    for site, wrapper in attached(model):
        key = f"{site}.attention.module.{name}"
        assert wrapper.attention.module.get_parameter(name).dim() > 1
        assert key in groups["attention without decay"]
        assert f"{site}.attention.module.conv.weight" in groups["attention"]


@pytest.mark.slow_unless(classifier_lr=0.2)
@pytest.mark.parametrize("gate_lr", [None, 0.5, 0, 0.01])
@pytest.mark.parametrize("classifier_lr, weight_decay", [(None, 0.0), (0.2, 0.03), (0, 0.03)])
def test_rates_and_decay(gate_lr: float | None, weight_decay: float, classifier_lr: float | None) -> None:
    groups = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network(), 0.1, gate_lr, weight_decay, classifier_lr)
    }
    rate = 0.1 if gate_lr is None else gate_lr
    # without a rate of its own it learns at that of the network, as it does without groups
    classifier_rate = 0.1 if classifier_lr is None else classifier_lr
    assert groups == {
        "base": (0.1, weight_decay),
        "base without decay": (0.1, 0.0),
        "attention": (rate, weight_decay),
        "attention without decay": (rate, 0.0),
        "classifier": (classifier_rate, weight_decay),
        "classifier without decay": (classifier_rate, 0.0),
    }


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model.layer1.requires_grad_(False)
    model.layer2[0].bn2.attention.strength.requires_grad_(False)
    names = [name for group in by_group(model).values() for name in group]
    expected = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(expected) and len(names) < len(list(model.parameters()))
    assert "layer2.0.bn2.attention.strength" not in names and "layer2.0.bn2.attention.channel.fc1.weight" in names
    kinds = [f"{part}{decay}" for part in ("attention", "classifier") for decay in ("", " without decay")]
    assert list(by_group(freeze_base(model))) == kinds
    assert list(by_group(freeze_base(model, keep=None))) == kinds[:2]
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
    rest = [name for side, names in groups.items() if not side.startswith("attention") for name in names]
    assert rest and not any(".attention." in name for name in rest)


def test_modules_of_the_base_network_that_are_called_attention() -> None:
    # timm's own attention belongs to the network
    model = timm.create_model("seresnet18", num_classes=3)
    own = [name for name, _ in model.named_parameters() if ".se." in name]
    groups = by_group(attach(model, "se"))
    sides = [name for side in ("base", "base without decay") for name in groups[side]]
    assert own and set(own) <= set(sides)


@pytest.mark.parametrize("name", ["lr", "gate_lr", "weight_decay", "classifier_lr"])
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


# the classifier


class Written(nn.Module):
    """A network whose last layer was registered first, under a name of its own."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.unused = nn.Linear(4, 4)
        self.after = nn.BatchNorm1d(3) if norm else nn.Softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.out(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


class Unet(nn.Module):
    """A decoder that ends in a convolution to one map for each class, which is enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.final = nn.Conv2d(16, 2, 1)
        self.up = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return nn.functional.interpolate(self.final(torch.cat([x, self.up(x)], 1)), scale_factor=2.0)


class Two(nn.Module):
    """A network that is all another module holds, beside what has no weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def trainable(model: nn.Module) -> set[str]:
    """The modules that have trainable parameters which are no attention."""
    names = [name for name, one in model.named_parameters() if one.requires_grad and ".attention." not in name]
    return {name.rpartition(".")[0] for name in names}


def timm_network(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=options.pop("num_classes", 3), **options)


def torchvision_network(name: str, **options: Any) -> nn.Module:
    # what the weights are does not matter, and they take long
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize(
    "build, expected",
    [
        (lambda: CifarResNet(1), {"linear"}),
        (lambda: timm_network("resnet10t"), {"fc"}),
        (lambda: timm_network("convnext_atto"), {"head.fc"}),
        (lambda: timm_network("mobilenetv3_small_050"), {"classifier"}),
        (lambda: timm_network("deit_tiny_distilled_patch16_224"), {"head", "head_dist"}),
        (lambda: timm_network("resnet10t", num_classes=0), set()),
        (lambda: torchvision_network("squeezenet1_1"), {"classifier.1"}),
        (lambda: torchvision_network("mobilenet_v3_small"), {"classifier.0", "classifier.3"}),
        (lambda: torchvision_network("densenet121"), {"classifier"}),
        (lambda: torchvision_network("swin_t"), {"head"}),
        (lambda: torchvision_network("vit_b_32"), {"heads.head"}),
        (lambda: Two(timm_network("resnet10t")), {"network.fc"}),
        (Written, {"out"}),
        (lambda: Two(Written()), {"network.out"}),
        (lambda: nn.Sequential(timm_network("resnet10t", num_classes=0), nn.Linear(512, 3)), {"1"}),
        (Unet, {"final"}),
        # what has a norm behind it is an encoder
        (lambda: Written(norm=True), set()),
        (lambda: timm_network("resnet10t", features_only=True), set()),
    ],
)
def test_what_the_classifier_is(build: Callable[[], nn.Module], expected: set[str]) -> None:
    model = freeze_base(build())
    assert trainable(model) == expected
    names = [name for side, names in by_group(model).items() if side.startswith("classifier") for name in names]
    assert {name.rpartition(".")[0] for name in names} == expected


def test_the_classifier_of_a_network_that_does_not_run_on_images() -> None:
    class Pair(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    # the last one, where it is linear; else nothing is guessed
    assert trainable(freeze_base(Pair(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 3)))) == {"layers.2"}
    model = Pair(nn.Linear(3, 3), nn.Conv2d(3, 8, 3))
    message = "which layers of Pair are its classifier cannot be told, .*: name them with keep=.* was not changed"
    with pytest.raises(errors.InvalidOption, match=message):
        freeze_base(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(by_group(model)) == ["base", "base without decay"]
    assert trainable(freeze_base(model, keep=["layers.0"])) == {"layers.0"}


def test_a_head_on_the_classifier_is_attention() -> None:
    # the pooled vector goes into the classifier itself, where the head stands
    model = attach(Written(), "dual")
    assert [name for name, _ in attached(model)] == ["out"]
    groups = by_group(freeze_base(model))
    assert groups["classifier"] == ["out.weight"] and groups["classifier without decay"] == ["out.bias"]
    assert groups["attention"] == ["out.attention.head.reduce.weight"]
    assert list(groups) == ["attention", "attention without decay", "classifier", "classifier without decay"]


# the base network


NORMS = (nn.modules.batchnorm._BatchNorm,)


def base_norms(model: nn.Module) -> list[nn.Module]:
    """Each batch norm that is no part of attention, by itself and as it is seen from outside."""
    names = [name for name, one in model.named_modules() if isinstance(one, NORMS) and ".attention." not in name]
    assert names
    return [model.get_submodule(name) for name in names]


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.named_buffers() if ".attention." not in key}


def train_and_step(model: nn.Module, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05), momentum=0.9)
    for _ in range(steps):
        step(model, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", ["classifier", None])
def test_the_base_is_held_still(optimizer: str, keep: str | None) -> None:
    plain = network(None)
    model = attach(copy.deepcopy(plain), "cbam+dual", activation="gelu", reduction=4)
    assert freeze_base(model, keep=keep) is model
    kept = {name for name in values(model) if ".attention." in name or (keep and name.startswith("linear."))}
    assert {name for name, one in model.named_parameters() if one.requires_grad} == kept
    stepping = OPTIMIZERS[optimizer](parameter_groups(model, lr=0.1, weight_decay=0.1))
    # of the attention's norms, the statistics follow
    model.train()
    start, moments = values(model), {key: value.clone() for key, value in model.named_buffers()}
    for _ in range(3):
        step(model, stepping)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != (name in kept), name
        assert (parameter.grad is not None) == (name in kept)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, moments[name]) != (".attention." in name), name
    state = detach(model).state_dict()
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == ({"linear.weight", "linear.bias"} if keep else set())


def test_frozen_norms_stay_in_eval_mode() -> None:
    model = freeze_base(network("cbam").train())
    parent = nn.Sequential(model)
    for change in (model.train, model.eval, parent.train, model.layer1.train, model.bn1.train):
        change()
        assert not any(norm.training for norm in base_norms(model))
    # what has no statistics follows the mode, and what was attached
    parent.train()
    assert model.training and model.layer1.training and model.conv1.training
    assert all(wrapper.attention.spatial.norm.training for _, wrapper in attached(model))
    parent.eval()
    assert not model.training and not any(wrapper.attention.training for _, wrapper in attached(model))


def test_frozen_norms_compute_and_give_gradients_as_in_eval_mode() -> None:
    model = network("cbam", activation="gelu", reduction=4)
    with torch.no_grad():
        for norm in base_norms(model):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        for _, wrapper in attached(model):
            wrapper.attention.strength.fill_(0.7)
    other = copy.deepcopy(model).train()
    for name, one in other.named_modules():
        if isinstance(one, NORMS) and ".attention." not in name:
            # the usual way, by hand after every train()
            one.eval()
    x, labels = batch()
    for each in (freeze_base(model).train(), other):
        nn.functional.cross_entropy(each(x), labels).backward()
    assert torch.equal(model(x), other(x))
    gradients = {name: one.grad for name, one in other.named_parameters()}
    kept = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    assert len(kept) == 2 + sum(".attention." in name for name in gradients)
    for name, parameter in kept:
        assert gradients[name].any() and torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def saved_and_read(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "changed",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_read],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_frozen(changed: Callable[[nn.Module], nn.Module]) -> None:
    model = freeze_base(network())
    other = changed(model)
    before = buffers(other)
    train_and_step(other)
    assert all(torch.equal(value, before[key]) for key, value in buffers(other).items())
    # a copy is freed by itself
    unfreeze_base(other)
    assert all(norm.training for norm in base_norms(other)) and all(one.requires_grad for one in other.parameters())
    assert not any(norm.training for norm in base_norms(model.train()))
    train_and_step(other)
    assert not any(torch.equal(value, before[key]) for key, value in buffers(other).items())


def test_compiled() -> None:
    model = freeze_base(attach(Written(), "se", at="final").train())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = buffers(model)
    train_and_step(compiled)
    assert model.out.weight.grad.any() and model.conv.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())


def test_data_parallel_training(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(freeze_base(network()))
        before = buffers(model)
        train_and_step(model)
        assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
        assert list(by_group(model))[2:] == ["classifier", "classifier without decay"]
    finally:
        torch.distributed.destroy_process_group()


def test_statistics_of_averaged_weights_are_not_counted_anew() -> None:
    model = freeze_base(network("se"))
    train_and_step(model)
    before = buffers(model)
    torch.optim.swa_utils.update_bn([batch()[0]], model)
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())


class Odd(nn.Module):
    """Statistics of every kind: norms of weights, norms without parameters, a buffer of the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, track_running_stats=True))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x - self.mean))
        return self.fc(self.drop(x + self.block(x)).mean((2, 3)))


def test_statistics_of_every_kind() -> None:
    model = freeze_base(attach(Odd(), "se"))
    before = buffers(model)
    train_and_step(model)
    after = buffers(model)
    # of what is kept, the statistics move
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        f"fc.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert model.training and model.drop.training and model.fc[1].training
    assert not model.norm.training and not model.block[1].training


@pytest.mark.parametrize(
    "keep, expected",
    [
        (["layer2"], r"layer2\..*"),
        (["layer2.0.bn1.weight", "conv1"], r"layer2\.0\.bn1\.weight|conv1\.weight"),
        (("classifier", "layer1.0.bn2"), r"linear\..*|layer1\.0\.bn2\.(weight|bias)"),
        ([], "none"),
    ],
)
def test_names_of_what_is_kept(keep: Sequence[str], expected: str) -> None:
    model = freeze_base(network("cbam", activation="gelu", reduction=4), keep=keep)
    before, start = buffers(model), values(model)
    train_and_step(model)
    for name, parameter in model.named_parameters():
        kept = ".attention." in name or re.fullmatch(expected, name) is not None
        assert parameter.requires_grad == kept and not (kept and torch.equal(parameter, start[name])), name
    # a module is kept with its statistics, a parameter alone
    modules = {name for name in keep if name not in start and name != "classifier"}
    for key, value in buffers(model).items():
        assert torch.equal(value, before[key]) != any(key.startswith(f"{name}.") for name in modules), key


@pytest.mark.parametrize(
    "keep, error, match",
    [
        ("layer2", errors.InvalidOption, "keep must be 'classifier', None, or a list of names .*, got 'layer2'"),
        (True, errors.InvalidOption, "got True"),
        ([3], errors.InvalidOption, r"got \[3\]"),
        (
            ["linear", "layr2"],
            errors.UnknownName,
            "CifarResNet has no module or parameter 'layr2'. Did you mean .*layer2",
        ),
        ([""], errors.UnknownName, "no module or parameter ''"),
        (["layer2.0.bn1.wieght"], errors.UnknownName, "'layer2.0.bn1.weight'"),
    ],
)
def test_wrong_names(keep: Any, error: type[Exception], match: str) -> None:
    model = network().train()
    with pytest.raises(error, match=match) as caught:
        freeze_base(model, keep=keep)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("The model was not changed.")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(norm.training for norm in base_norms(model))


def undone(model: nn.Module) -> nn.Module:
    """Nothing that freezing leaves behind."""
    assert all(one.requires_grad for one in model.parameters())
    for one in model.modules():
        assert one.training == model.training and not {"train", "reset_running_stats"} & set(vars(one))
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_the_base_is_freed_again(mode: bool) -> None:
    model = freeze_base(network())
    assert unfreeze_base(model.train(mode)) is model
    assert by_group(undone(model)) == by_group(network())


def test_detaching_frees_the_base() -> None:
    plain = network(None)
    layers = {name: (one, set(vars(one))) for name, one in plain.named_modules()}
    plain.layer1[0].conv1.weight.requires_grad_(False)
    model = detach(freeze_base(attach(plain, "cbam+dual")))
    # the very same layers, with what they had, as trainable as before
    assert {name: (one, set(vars(one))) for name, one in model.named_modules()} == layers
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert frozen == ["layer1.0.conv1.weight"]
    undone(model.requires_grad_(True))


def test_nothing_is_added_to_the_state_dict_and_no_layer_is_replaced() -> None:
    model = network()
    before = [(name, type(one), id(one)) for name, one in model.named_modules()], list(model.state_dict())
    freeze_base(model)
    assert ([(name, type(one), id(one)) for name, one in model.named_modules()], list(model.state_dict())) == before


def test_freezing_after_other_freezing() -> None:
    model = network().requires_grad_(False)
    for keep in (["layer1"], "classifier", None, "classifier", None):
        freeze_base(model, keep=keep)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name, _ in model.named_parameters() if ".attention." in name
    }
    assert not any(norm.training for norm in base_norms(model.train()))
    # what was kept once is no longer, and the other way round
    freeze_base(model, keep=["layer1"])
    assert model.train().layer1[0].bn1.training and not model.layer2[0].bn1.training


def test_freezing_gates_within_gates_and_shared_layers() -> None:
    model = CifarResNet(2)
    model.layer1[1].bn2 = model.layer1[0].bn2
    attach(attach(model, "se", at="block"), "cbam", at="residual")
    freeze_base(model, keep=None)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == (".attention." in name), name
    assert not any(norm.training for norm in base_norms(model.train()))
