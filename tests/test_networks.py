"""Names in, networks out; and checkpoint files that fit them or are refused."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from convattn import errors, networks
from convattn.networks import create, weights
from convattn.networks.cifar_resnet import CifarResNet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def described(network: nn.Module) -> tuple[Any, Any, Any]:
    return network.input_mean, network.input_std, network.input_size


def outputs(network: nn.Module, side: int = 32) -> int:
    return network.eval()(torch.randn(1, 3, side, side)).shape[1]


# the networks of CIFAR


@pytest.mark.parametrize("name, blocks", [("resnet20", 9), ("resnet32", 15), ("resnet44", 21), ("resnet56", 27)])
def test_cifar_resnets(name: str, blocks: int) -> None:
    network = create(name)
    assert isinstance(network, CifarResNet)
    assert sum(isinstance(module, networks.BasicBlock) for module in network.modules()) == blocks
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert described(network) == (*IMAGENET, 32)
    assert outputs(network) == 10


def test_resnet110() -> None:
    with torch.device("meta"):
        network = networks.resnet110()
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == 110


def test_keys_of_the_published_checkpoint() -> None:
    state = networks.resnet20().state_dict()
    listed = {
        "conv1.weight": (16, 3, 3, 3),
        "bn1.weight": (16,),
        "bn1.bias": (16,),
        "bn1.running_mean": (16,),
        "bn1.running_var": (16,),
        "layer1.0.conv1.weight": (16, 16, 3, 3),
        "layer2.0.conv1.weight": (32, 16, 3, 3),
        "layer2.0.bn2.running_var": (32,),
        "layer3.2.conv2.weight": (64, 64, 3, 3),
        "linear.weight": (10, 64),
        "linear.bias": (10,),
    }
    assert {key: tuple(state[key].shape) for key in listed} == listed
    assert {key.partition(".")[0] for key in state} == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}
    # parameter-free shortcuts
    assert not any("shortcut" in key for key in state)


@pytest.mark.parametrize("shortcut, parameters", [("A", 269_722), ("B", 272_474)])
def test_parameters_of_resnet20(shortcut: str, parameters: int) -> None:
    network = networks.resnet20(shortcut=shortcut)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert outputs(network) == 10


def test_shortcut_without_parameters() -> None:
    block = networks.BasicBlock(4, 10, stride=2)
    x = torch.randn(2, 4, 8, 8)
    y = block.shortcut(x)
    assert y.shape == (2, 10, 4, 4)
    assert torch.equal(y[:, 3:7], x[:, :, ::2, ::2])
    assert not y[:, :3].any() and not y[:, 7:].any()


def test_shortcut_is_added_after_the_norm() -> None:
    block = networks.BasicBlock(4, 8, stride=2, shortcut="B").eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), block.shortcut(x).relu())
    assert block.shortcut(x).abs().max() > 0


@pytest.mark.parametrize(
    "options, match", [({"shortcut": "C"}, "shortcut must be one of 'A', 'B'"), ({"classes": 0}, "at least 1")]
)
def test_wrong_options_of_resnet20(options: dict[str, Any], match: str) -> None:
    with pytest.raises(errors.InvalidOption, match=match):
        networks.resnet20(**options)


# names of others


@pytest.mark.parametrize("name", ["timm:resnet18", "resnet18", "resnet18.a1_in1k"])
def test_timm(name: str) -> None:
    network = create(name, classes=7)
    assert type(network) is timm.models.resnet.ResNet
    assert outputs(network) == 7
    assert described(network) == (*IMAGENET, 224)


def test_timm_brings_its_own_normalization() -> None:
    network = create("timm:mobilevit_xxs")
    assert described(network) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 256)
    assert network.num_classes == 1000


@pytest.mark.slow_unless(name=["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121"])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "convnext_tiny"]
)
def test_torchvision(name: str) -> None:
    network = create(f"torchvision:{name}", classes=5)
    assert network.__class__.__module__.startswith("torchvision.")
    assert outputs(network, 64) == 5
    assert described(network) == (*IMAGENET, 224)


def test_torchvision_keeps_its_classes() -> None:
    with torch.device("meta"):
        assert create("torchvision:resnet18").fc.out_features == 1000
        assert create("torchvision:resnet18", classes=1000).fc.out_features == 1000


@pytest.mark.parametrize(
    "name, match",
    [
        ("raft_small", "torchvision:raft_small has no classifier whose number of classes could be set"),
        ("retinanet_resnet50_fpn", "torchvision:retinanet_resnet50_fpn is a detector: build it with its own"),
    ],
)
def test_torchvision_without_classifier(name: str, match: str) -> None:
    with pytest.raises(errors.InvalidOption, match=match):
        create(f"torchvision:{name}", classes=5)


# a new classifier


def first_loss(network: nn.Module, seed: int = 0) -> float:
    """The loss in training mode on random images with random labels of two classes, before any step."""
    generator = torch.Generator().manual_seed(seed)
    side = network.input_size if network.__class__.__name__.startswith("Levit") else 64
    images = torch.randn(16, 3, side, side, generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)
    return nn.functional.cross_entropy(network.train()(images), labels).item()


@pytest.mark.slow_unless(
    name=[
        "timm:mobilenetv3_small_100",
        "timm:convnext_atto",
        "torchvision:mnasnet0_5",
        "torchvision:shufflenet_v2_x0_5",
    ]
)
@pytest.mark.parametrize(
    "name",
    [
        "timm:tf_efficientnet_lite0",
        "timm:mobilenetv3_small_100",
        "timm:convnext_atto",
        "timm:resnet18",
        "timm:ghostnet_050",
        "timm:levit_128s",
        "torchvision:mobilenet_v3_small",
        "torchvision:efficientnet_b0",
        "torchvision:mnasnet0_5",
        "torchvision:squeezenet1_1",
        "torchvision:shufflenet_v2_x0_5",
    ],
)
def test_training_starts_at_the_loss_of_a_guess(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, classes=2)
    # of a guess it is 0.69; with the classifier that timm's constructor draws for tf_efficientnet_lite0 it is 7
    assert first_loss(network) < 1.2


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.slow_unless(name="ghostnet_050")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "ghostnet_050", "levit_128s"])
def test_classifier_is_that_of_timms_own_call(name: str) -> None:
    torch.manual_seed(3)
    theirs = timm.create_model(name)
    theirs.reset_classifier(7)
    torch.manual_seed(3)
    ours = create(f"timm:{name}", classes=7)
    assert ours.num_classes == 7
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


@pytest.mark.slow_unless(name=["torchvision:efficientnet_b0", "resnet20"])
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "torchvision:efficientnet_b0", "resnet20"])
def test_own_number_of_classes_keeps_the_classifier(name: str) -> None:
    states = []
    for classes in (None, 10 if name == "resnet20" else 1000):
        torch.manual_seed(5)
        states.append(state_of(create(name, classes=classes)))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_100", "torchvision:squeezenet1_1"])
def test_same_seed_gives_the_same_network(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(state_of(create(name, classes=3)))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    torch.manual_seed(5)
    own = create(name).state_dict()
    # what is not of the classifier is what the seed gives without it
    assert all(torch.equal(value, own[key]) for key, value in states[0].items() if value.shape == own[key].shape)


def test_global_pool_is_kept() -> None:
    assert create("timm:resnest14d", classes=3).global_pool.pool_type == "avg"

    class Older(nn.Module):
        """As networks of older versions of timm: what is left out means average pooling."""

        global_pool = "catavgmax"

        def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
            self.num_classes, self.global_pool = num_classes, global_pool

    older = Older()
    networks._reset_classifier(older, "older", 4)
    assert (older.num_classes, older.global_pool) == (4, "catavgmax")


def test_distilled_heads_are_kept() -> None:
    with torch.device("meta"):
        repvit, levit = create("timm:repvit_m1", classes=3), create("timm:levit_128s", classes=3)
    assert [layer.out_features for layer in repvit.modules() if isinstance(layer, nn.Linear)] == [3, 3]
    assert levit.head.linear.out_features == levit.head_dist.linear.out_features == 3


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_auxiliary_heads_have_as_many_classes() -> None:
    network = create("torchvision:googlenet", classes=3)
    widths = [network.fc.out_features, network.aux1.fc2.out_features, network.aux2.fc2.out_features]
    assert widths == [3, 3, 3]


@pytest.mark.parametrize(
    "name, classifier", [("timm:tf_efficientnet_lite0", "classifier"), ("torchvision:resnet18", "fc")]
)
def test_new_classifier_beside_pretrained_weights(name: str, classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    theirs = create(name)
    for module, function in ((timm, "create_model"), (torchvision.models, "get_model")):
        monkeypatch.setattr(module, function, lambda *_, **__: theirs)
    before = state_of(theirs)
    network = create(name, classes=2, weights="pretrained")
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) is not key.startswith(classifier), key
    assert network.get_submodule(classifier).weight.abs().max() < 0.05


@pytest.mark.parametrize("weights", [None, "none"])
def test_random_weights(weights: str | None) -> None:
    torch.manual_seed(1)
    first = create("resnet20", weights=weights)
    second = create("resnet20", weights=weights)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    torch.manual_seed(1)
    assert torch.equal(create("resnet20", weights=weights).conv1.weight, first.conv1.weight)


def test_random_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # networks with a backbone would otherwise fetch the backbone's weights
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("weights were fetched"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    create("torchvision:lraspp_mobilenet_v3_large")


@pytest.mark.parametrize(
    "name, match",
    [
        ("resnet21", "No network is called 'resnet21'. Did you mean .*'resnet20'"),
        ("Resnet20", "Did you mean .*'resnet20'"),
        ("timm:resnet19", "No network is called 'resnet19'. Did you mean .*'resnet18'"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19'. Did you mean .*'resnet18'"),
        ("timm:resnet18.no_such_tag", "resnet18.no_such_tag"),
        ("keras:resnet18", "No source of networks is called 'keras': use timm:NAME, torchvision:NAME or FILE.py:NAME"),
        ("", "No network is called ''"),
        ("missing.py:make", "No file missing.py"),
    ],
)
def test_unknown_name(name: str, match: str) -> None:
    with pytest.raises(errors.UnknownName, match=match) as caught:
        create(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet20", "timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("classes", [0, -1, 2.0, "3", True])
def test_wrong_number_of_classes(name: str, classes: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="classes must be a whole number of at least 1"):
        create(name, classes=classes)


def test_pretrained_weights_of_ours() -> None:
    with pytest.raises(errors.WeightsError, match="resnet20 brings no pretrained weights: give a file"):
        create("resnet20", weights="pretrained")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_pretrained_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(errors.WeightsError, match=r"could not be fetched \(no route to host\): give a file") as caught:
        create(name, weights="pretrained")
    assert "\n" not in str(caught.value)


# one's own file


def own(folder: Path, code: str) -> str:
    (folder / "mine.py").write_text(f"from torch import nn\n{code}\n")
    return f"{folder / 'mine.py'}:make"


@pytest.mark.parametrize("argument", ["classes", "num_classes"])
def test_own_function(tmp_path: Path, argument: str) -> None:
    name = own(tmp_path, f"def make({argument}=4): return nn.Sequential(nn.Flatten(), nn.Linear(12, {argument}))")
    assert create(name)[1].out_features == 4
    network = create(name, classes=3)
    assert network[1].out_features == 3
    assert described(network) == (*IMAGENET, None)


def test_own_function_describes_its_input(tmp_path: Path) -> None:
    code = """
class Net(nn.Identity):
    input_mean, input_std, input_size = [0.5], [0.25], 28
make = Net
"""
    assert described(create(own(tmp_path, code))) == ((0.5,), (0.25,), 28)


def test_own_class(tmp_path: Path) -> None:
    code = "class make(nn.Linear):\n    def __init__(self, classes=2):\n        super().__init__(3, classes)"
    assert create(own(tmp_path, code), classes=6).out_features == 6


def test_own_file_may_hold_dataclasses(tmp_path: Path) -> None:
    code = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Options:
    width: int = 3

def make(): return nn.Linear(Options().width, 1)
"""
    (tmp_path / "mine.py").write_text(code)
    assert create(f"{tmp_path / 'mine.py'}:make").in_features == 3


def test_own_function_without_classes(tmp_path: Path) -> None:
    name = own(tmp_path, "def make(): return nn.Linear(3, 4)")
    assert create(name, classes=4).out_features == 4
    # it would be trained on another number of classes than was asked for
    with pytest.raises(errors.InvalidOption, match="classes"):
        create(name, classes=3)


@pytest.mark.parametrize(
    "code, error, match",
    [
        ("def maek(): pass", errors.UnknownName, r"has no function 'make'\. Did you mean 'maek'\?"),
        ("make = 3", errors.UnknownName, "has no function 'make'"),
        ("def make(: pass", errors.UnknownName, "cannot be imported: SyntaxError"),
        ("import no_such_package", errors.UnknownName, "cannot be imported: ModuleNotFoundError"),
        ("def make(): return 3", errors.UnknownName, "returned int, expected a torch.nn.Module"),
    ],
)
def test_own_file_with_a_fault(tmp_path: Path, code: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        create(own(tmp_path, code))
    assert "\n" not in str(caught.value)


def test_own_function_and_pretrained(tmp_path: Path) -> None:
    with pytest.raises(errors.WeightsError, match="takes no argument `pretrained`"):
        create(own(tmp_path, "def make(): return nn.Identity()"), weights="pretrained")
    code = "def make(pretrained=False): return nn.Linear(1 + pretrained, 1)"
    assert create(own(tmp_path, code), weights="pretrained").in_features == 2


# weights from files


def pretrained() -> CifarResNet:
    """A network with weights of its own, as if trained."""
    torch.manual_seed(7)
    network = networks.resnet20()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def written(folder: Path, content: Any, name: str = "weights.th") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "name, wrapped",
    [
        ("w.safetensors", lambda state: state),
        ("w.safetensors", lambda state: under("module.", state)),
        ("w.pth", lambda state: state),
        ("w.th", lambda state: {"state_dict": under("module.", state), "best_prec1": 91.7}),
        ("w.tar", lambda state: {"epoch": 3, "state_dict": under("module.", state)}),
        ("w.pt", lambda state: {"model": state, "optimizer": {"lr": [0.1]}}),
        ("w.bin", lambda state: under("module.module.", state)),
    ],
    ids=["safetensors", "safetensors-module", "pickle", "published", "tar", "model", "twice"],
)
def test_weights_from_a_file(tmp_path: Path, name: str, wrapped: Any) -> None:
    original = pretrained()
    path = written(tmp_path, wrapped(original.state_dict()), name)
    for given in (path, str(path)):
        network = create("resnet20", weights=given).eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(network(x), original(x))


@pytest.mark.slow_unless(name="timm:resnet18")
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_from_a_file_for_others(tmp_path: Path, name: str) -> None:
    original = create(name, classes=3)
    path = written(tmp_path, original.state_dict(), "w.safetensors")
    network = create(name, classes=3, weights=path)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in original.state_dict().items())


def test_weights_without_counts_of_batches(tmp_path: Path) -> None:
    original = pretrained()
    state = {key: value for key, value in original.state_dict().items() if "num_batches" not in key}
    network = create("resnet20", weights=written(tmp_path, state)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), original(x))


def test_weights_in_half_precision(tmp_path: Path) -> None:
    network = create("resnet20", weights=written(tmp_path, pretrained().half().state_dict()))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.conv1.weight, pretrained().conv1.weight.half().float())


def test_other_number_of_classes_keeps_the_classifier_fresh(tmp_path: Path) -> None:
    original = pretrained()
    path = written(tmp_path, original.state_dict())
    torch.manual_seed(3)
    fresh = create("resnet20", classes=4)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="classifies 10 classes, not 4: the classifier 'linear' starts from random"):
        network = create("resnet20", classes=4, weights=path)
    for key, value in network.state_dict().items():
        assert torch.equal(value, (fresh if key.startswith("linear") else original).state_dict()[key]), key


@pytest.mark.slow_unless(name=["timm:tf_efficientnet_lite0", "timm:levit_128s", "torchvision:squeezenet1_1"])
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize(
    "name, classifiers",
    [
        ("timm:tf_efficientnet_lite0", "classifier"),
        ("timm:levit_128s", "head.linear' and 'head_dist.linear"),
        ("torchvision:squeezenet1_1", "classifier.1"),
        ("torchvision:googlenet", "aux1.fc2' and 'aux2.fc2' and 'fc"),
    ],
)
def test_other_number_of_classes_for_others(tmp_path: Path, name: str, classifiers: str) -> None:
    theirs = create(name).state_dict()
    path = written(tmp_path, theirs, "w.safetensors")
    torch.manual_seed(3)
    fresh = create(name, classes=2).state_dict()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=f"classifies 1000 classes, not 2: the classifier '{re.escape(classifiers)}'"):
        network = create(name, classes=2, weights=path)
    for key, value in network.state_dict().items():
        assert torch.equal(value, (fresh if value.shape != theirs[key].shape else theirs)[key]), key


class Unsafe:
    """What a pickle may hold that is no tensor."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unsafe-was-run"),))


@pytest.mark.parametrize(
    "content", [{"state_dict": Unsafe()}, {"args": argparse.Namespace(lr=1)}], ids=["code", "args"]
)
def test_pickles_of_objects_are_refused(tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, content)
    with pytest.raises(errors.WeightsError, match=f"{re.escape(str(path))} .*") as caught:
        create("resnet20", weights=path)
    assert not (tmp_path / "unsafe-was-run").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, match",
    [
        ([1, 2], "holds no state dict: expected tensors by name, at the top or under 'state_dict'"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        (torch.ones(3), "holds no state dict"),
        ({}, "of another network than resnet20: .* are missing"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(errors.WeightsError, match=match):
        create("resnet20", weights=written(tmp_path, content))


@pytest.mark.parametrize("name", ["w.th", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello\nworld", b"PK\x03\x04broken"], ids=["empty", "text", "zip"])
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(errors.WeightsError, match=re.escape(str(path))) as caught:
        create("resnet20", weights=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.th", "w.safetensors"])
def test_truncated_checkpoint(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, pretrained().state_dict(), name)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(errors.WeightsError, match=re.escape(str(path))):
        create("resnet20", weights=path)


def test_missing_file() -> None:
    with pytest.raises(errors.WeightsError, match=r"No file of weights at nothing\.th"):
        create("resnet20", weights="nothing.th")


@pytest.mark.parametrize(
    "theirs, match",
    [
        (lambda: networks.resnet32(), r"are unknown \(first layer1\.3\."),
        (lambda: networks.resnet20(shortcut="B"), r"12 are unknown \(first layer2\.0\.shortcut\.0\.weight\)"),
        (lambda: CifarResNet(1), r"are missing \(first layer1\.1\.conv1\.weight\)"),
        (lambda: nn.Linear(3, 4), "tensors are missing .* 2 are unknown"),
    ],
)
def test_checkpoint_of_another_network(tmp_path: Path, theirs: Any, match: str) -> None:
    path = written(tmp_path, theirs().state_dict())
    with pytest.raises(errors.WeightsError, match=f"holds weights of another network than resnet20: .*{match}"):
        create("resnet20", weights=path)


@pytest.mark.parametrize(
    "key, shape", [("conv1.weight", (16, 1, 3, 3)), ("linear.weight", (10, 32)), ("bn1.bias", (8,))]
)
def test_checkpoint_of_other_shapes_changes_nothing(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    network, state = networks.resnet20(), pretrained().state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = written(tmp_path, {**state, key: torch.ones(shape)})
    with pytest.raises(errors.WeightsError, match=re.escape(f"(first {key}: {shape}, expected ")):
        weights.load(network, path, name="resnet20")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
