"""Attention put into existing networks: exact at the start, transparent in every name, and gone without a trace."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

import convattn
from convattn import attach, detach, errors, networks, plan
from convattn.attachment import Attached, AttachedHead, attached
from convattn.networks.cifar_resnet import BasicBlock, CifarResNet
from convattn.nn import DualPool
from convattn.nn.squeeze_excite import SqueezeExcite
from tolerances import assert_close, is_close

GATES = convattn.names("gate")
HEADS = convattn.names("head")
# networks that take long
LARGE = ("timm:resnet50", "torchvision:resnet50")
NETWORKS = (
    "resnet20",
    "timm:resnet18",
    "timm:seresnet18",
    "torchvision:resnet18",
    *(pytest.param(one, marks=pytest.mark.slow) for one in LARGE),
)
BLOCKS = {"resnet20": 9, "timm:resnet18": 8, "timm:seresnet18": 8, "torchvision:resnet18": 8}
SMALL = ("small", "timm:seresnet18", "torchvision:resnet18")

each_network = pytest.mark.parametrize("network", NETWORKS)
each_attention = pytest.mark.parametrize("attention", ["se", "cbam", "dual", "cbam+dual"])
each_small = pytest.mark.parametrize("network", SMALL)


@functools.cache
def _created(name: str) -> nn.Module:
    # whether a test is the first or not, its own random numbers are the same
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = CifarResNet(1) if name == "small" else networks.create(name)
        for module in model.modules():
            # timm's branches start at 0, where a gate can change nothing
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def plain(name: str) -> nn.Module:
    """A fresh network with random weights and random batch-norm statistics, in eval mode."""
    return copy.deepcopy(_created(name))


def images(network: str = "", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # bfloat16 is slow on many processors
    side = 16 if network == "small" else 32 if network == "resnet20" or dtype == torch.bfloat16 else 64
    return torch.randn(2, 3, side, side).to(dtype)


def strengths(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".strength")]


def moved(network: str, attention: str, strength: float = 0.7, **options: Any) -> nn.Module:
    """A network whose attention does something."""
    model = attach(plain(network), attention, **options)
    for parameter in strengths(model):
        nn.init.constant_(parameter, strength)
    return model


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that asserts that the model is what it was: layers, names, values, modes and hooks."""
    layers = [(name, module, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    names = [name for name, _ in model.named_parameters()]
    state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}

    def check() -> None:
        now = [(name, module, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
        assert now == layers
        assert [name for name, _ in model.named_parameters()] == names
        current = model.state_dict(keep_vars=True)
        assert list(current) == list(state)
        for key, (tensor, value) in state.items():
            assert current[key] is tensor and torch.equal(tensor, value)

    return check


def is_added(key: str) -> bool:
    return ".attention." in key


# the start


@dataclass(frozen=True)
class Run:
    """What a plain network gives for some images, in one dtype and mode."""

    dtype: torch.dtype
    training: bool
    x: torch.Tensor
    y: torch.Tensor


@functools.cache
def plain_runs(network: str) -> tuple[list[Run], dict[str, torch.Tensor]]:
    """Runs in all dtypes and modes, one after the other, and the state dict after them."""
    model, runs = plain(network), []
    with torch.random.fork_rng(), torch.no_grad():
        # from wide to narrow, since one network is converted
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for training in (False, True):
                x = images(network, dtype)
                runs.append(Run(dtype, training, x, model.to(dtype).train(training)(x)))
    return runs, model.state_dict()


@pytest.mark.slow_unless(network="resnet20", attention=["cbam", "spatial", "se", "dual", "concat", "cbam+dual"])
@pytest.mark.slow_unless(id=["timm:seresnet18-cbam", "torchvision:resnet18-dual"])
@pytest.mark.parametrize(
    "network, attention",
    [(name, one) for name in ("resnet20", "timm:resnet18") for one in (*GATES, *HEADS, "cbam+dual")]
    + [
        (name, one)
        for name in ("timm:seresnet18", "torchvision:resnet18")
        for one in ("se", "cbam", "dual", "cbam+dual")
    ]
    + [pytest.param(name, one, marks=pytest.mark.slow) for name in LARGE for one in ("se", "cbam+dual")],
)
def test_start_is_exact(network: str, attention: str) -> None:
    runs, state = plain_runs(network)
    model = attach(plain(network), attention)
    assert strengths(model)
    for run in runs:
        with torch.no_grad():
            y = model.to(run.dtype).train(run.training)(run.x)
        assert y.dtype == run.dtype and y.isfinite().all()
        assert torch.equal(y, run.y), (run.dtype, run.training)
    # the statistics of all layers, after having trained
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    # pooling by mean beside pooling by mean changes nothing at any strength
    if attention != "avg":
        for parameter in strengths(model):
            nn.init.constant_(parameter, 0.7)
        model.load_state_dict(plain(network).state_dict(), strict=False)
        run = runs[2]
        assert (run.dtype, run.training) == (torch.float32, False)
        assert not is_close(model.float().eval()(run.x), plain(network)(run.x))


@pytest.mark.slow_unless(training=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_takes_dtype_and_mode_of_the_network(dtype: torch.dtype, training: bool) -> None:
    original = plain("small").to(dtype).train(training)
    model = attach(copy.deepcopy(original), "cbam+dual")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(module.training == training for module in model.modules())
    x = images("small", dtype)
    assert torch.equal(model(x), original(x))
    # and follows it
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.slow_unless(network=["small", "timm:seresnet18"])
@each_small
def test_start_is_exact_under_autocast(network: str) -> None:
    original, model = plain(network), attach(plain(network), "cbam+dual")
    x = images(network, torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), original(x))
        for parameter in strengths(model):
            nn.init.ones_(parameter)
        assert not is_close(model(x), original(x))


@pytest.mark.slow_unless(network=["resnet20", "torchvision:resnet18"])
@each_network
def test_gradients_reach_strength_first_and_then_the_gates(network: str) -> None:
    model = attach(plain(network), "cbam+dual").train()
    optimizer = torch.optim.SGD(strengths(model), lr=1e-3)
    added = {name: parameter for name, parameter in model.named_parameters() if is_added(name)}
    x, target = images(network), torch.tensor([0, 1])
    nn.functional.cross_entropy(model(x), target).backward()
    for name, parameter in added.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) == name.endswith(".strength"), name
    optimizer.step()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    # a hidden unit of 16 // 16 = 1 may be dead, so sites and not parameters
    for name, wrapper in attached(model):
        assert wrapper.attention.strength.item() != 0, name
        others = [p for key, p in wrapper.attention.named_parameters() if key != "strength"]
        assert any(parameter.grad.any() for parameter in others), name


def test_paper_start_has_no_strength() -> None:
    torch.manual_seed(1)
    paper = attach(plain("small"), "cbam+dual", start="paper")
    torch.manual_seed(1)
    identity = moved("small", "cbam+dual", strength=1.0)
    assert not strengths(paper)
    x = images("small")
    assert_close(identity(x), paper(x))
    assert not is_close(paper(x), plain("small")(x))


@pytest.mark.parametrize("attention", GATES)
def test_gate_stands_before_the_sum(attention: str) -> None:
    block = copy.deepcopy(plain("torchvision:resnet18").layer2[0])
    original = copy.deepcopy(block)
    attach(block, attention, start="paper")
    x = torch.randn(2, 64, 8, 8)
    branch = original.bn2(original.conv2(original.relu(original.bn1(original.conv1(x)))))
    gated = branch * block.bn2.attention.gate(branch)
    assert_close(block(x), torch.relu(gated + original.downsample(x)))


@pytest.mark.slow_unless(network="resnet20")
@pytest.mark.slow_unless(head="dual")
@pytest.mark.parametrize("network", ["resnet20", "timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("head", HEADS)
def test_head_stands_beside_the_pooling(network: str, head: str) -> None:
    model = moved(network, head, strength=0.25)
    x = images(network)
    seen = {}
    wrapper = attached(model)[0][1]
    wrapper.register_forward_pre_hook(lambda _, args: seen.update(map=args[0]))
    y = model(x)
    pooled, classifier = seen["map"].mean((2, 3)), [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    vector = wrapper.attention.head(seen["map"])
    # a head of another width than the classifier's input is mapped to it
    if head == "concat":
        project = wrapper.attention.project
        vector = vector @ project.weight.T + project.bias
    blended = pooled + 0.25 * (vector - pooled)
    assert isinstance(wrapper, AttachedHead) and len(attached(model)) == 1
    assert_close(y, classifier(blended))


def test_network_with_another_pooling_keeps_it() -> None:
    torch.manual_seed(0)
    original = timm.create_model("resnet18", global_pool="avgmax", num_classes=5).eval()
    model = attach(copy.deepcopy(original), "dual")
    x = images()
    assert torch.equal(model(x), original(x))


# back


@pytest.mark.slow_unless(network="resnet20")
@pytest.mark.slow_unless(id="cbam+dual-timm:resnet18")
@each_network
@each_attention
def test_detach_leaves_no_trace(network: str, attention: str) -> None:
    model = plain(network)
    check = snapshot(model)
    assert attach(model, attention) is model
    assert attached(model)
    for parameter in strengths(model):
        nn.init.ones_(parameter)
    assert detach(model) is model
    check()
    assert not attached(model)
    x = images(network)
    with torch.no_grad():
        assert torch.equal(model(x), plain(network)(x))


def test_detach_of_a_plain_network_does_nothing() -> None:
    model = plain("small")
    check = snapshot(model)
    detach(model)
    check()


def test_attach_again_after_detach() -> None:
    model = detach(attach(plain("small"), "cbam"))
    assert [wrapper.attention for _, wrapper in attached(attach(model, "se"))]
    assert all(isinstance(wrapper.attention, SqueezeExcite) for _, wrapper in attached(model))


# names


@pytest.mark.slow_unless(network="resnet20")
@pytest.mark.slow_unless(id="se-timm:seresnet18")
@each_network
@each_attention
def test_names_of_the_network_stay(network: str, attention: str) -> None:
    original, model = plain(network), plain(network)
    chosen = plan(model, attention)
    attach(model, chosen)

    def listings(of: nn.Module) -> dict[str, list[str]]:
        return {
            "state": list(of.state_dict()),
            "parameters": [name for name, _ in of.named_parameters()],
            "duplicates": [name for name, _ in of.named_parameters(remove_duplicate=False)],
            "buffers": [name for name, _ in of.named_buffers()],
        }

    sites = [site.name for site in chosen]
    before, after = listings(original), listings(model)
    for kind, names in after.items():
        assert [name for name in names if not is_added(name)] == before[kind], kind
        for name in names:
            assert not is_added(name) or any(name.startswith(f"{site}.attention.") for site in sites), name
        assert len(set(names)) == len(names)
    # the names that a network has for its layers are names of theirs still
    assert {name for name, _ in original.named_modules()} <= {name for name, _ in model.named_modules()}
    # and each leads where it led
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    added = {name: p.numel() for name, p in model.named_parameters() if is_added(name)}
    for site in chosen:
        of_site = [count for name, count in added.items() if name.startswith(f"{site.name}.")]
        assert sum(of_site) == site.parameters > 0
    assert sum(added.values()) == sum(site.parameters for site in chosen)


@pytest.mark.slow_unless(network=["resnet20", "torchvision:resnet18"])
@each_network
def test_checkpoints_go_both_ways(network: str) -> None:
    first, second = plain(network), attach(plain(network), "cbam+dual")
    with torch.no_grad():
        for value in first.state_dict().values():
            value.mul_(1.01) if value.is_floating_point() else value.add_(1)
    added = [key for key in second.state_dict() if is_added(key)]
    # the plain checkpoint into the attached network
    result = second.load_state_dict(first.state_dict(), strict=False)
    # torch adds counts of batches that an old checkpoint, or one of other layers, does not have
    assert sorted(result.missing_keys) == sorted(key for key in added if not key.endswith("num_batches_tracked"))
    assert result.unexpected_keys == []
    x = images(network)
    with torch.no_grad():
        assert torch.equal(second(x), first(x))
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        second.load_state_dict(first.state_dict())
    assert "Unexpected" not in str(caught.value) and "convattn_inner" not in str(caught.value)
    # and the other way round
    third = plain(network)
    result = third.load_state_dict(second.state_dict(), strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == sorted(added)
    with torch.no_grad():
        assert torch.equal(third(x), first(x))


@pytest.mark.slow_unless(network="small")
@each_small
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoint_of_an_attached_network(network: str, assign: bool) -> None:
    first, second = moved(network, "cbam+dual"), attach(plain(network), "cbam+dual")
    state = {key: value.clone() for key, value in first.state_dict().items()}
    result = second.load_state_dict(state, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    x = images(network)
    assert torch.equal(second(x), first(x))
    for name, wrapper in attached(second):
        for key, parameter in wrapper.inner.named_parameters():
            assert second.get_parameter(f"{name}.{key}") is parameter
    if assign:
        assert second.get_parameter("conv1.weight").data_ptr() == state["conv1.weight"].data_ptr()


def test_unknown_and_missing_keys_are_told_by_their_plain_names() -> None:
    model = attach(plain("timm:seresnet18"), "se")
    state = model.state_dict()
    del state["layer1.0.se.fc1.weight"]
    state["layer1.0.se.fc3.weight"] = torch.ones(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["layer1.0.se.fc1.weight"]
    assert result.unexpected_keys == ["layer1.0.se.fc3.weight"]


def test_container_as_inner_layer() -> None:
    original, model = plain("timm:seresnet18"), attach(plain("timm:seresnet18"), "se")
    assert next(iter(plan(original, "se"))).name == "layer1.0.se"
    # reached as before, by attribute and by name
    assert model.layer1[0].se.fc1.weight.shape == original.layer1[0].se.fc1.weight.shape
    assert model.get_submodule("layer1.0.se.fc1") is model.layer1[0].se.inner.fc1
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_layer_is_read_through() -> None:
    model = attach(plain("small"), "se")
    layer = model.layer1[0].bn2
    assert layer.num_features == 16 and layer.weight is layer.inner.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


# sizes


def published(network: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return networks.resnet20(**options) if network == "resnet20" else networks.create(network)


@pytest.mark.slow_unless(expected=[11776552, 11779392, 28073544, 274490])
@pytest.mark.parametrize(
    "network, attention, options, expected",
    [
        ("torchvision:resnet18", "se", {}, 11_776_552),
        ("torchvision:resnet18", "cbam", {}, 11_779_392),
        ("torchvision:resnet18", "cbam", {"bias": False, "norm": None}, 11_777_336),
        ("torchvision:resnet50", "se", {}, 28_071_976),
        ("torchvision:resnet50", "se", {"bias": True}, 28_088_024),
        ("torchvision:resnet50", "cbam", {}, 28_089_624),
        ("torchvision:resnet50", "cbam", {"bias": False, "norm": None}, 28_073_544),
        ("timm:resnet18", "se", {}, 11_776_552),
        ("timm:resnet50", "cbam", {}, 28_089_624),
        ("resnet20", "se", {"reduction": 16}, 274_490),
        ("resnet20", "se", {"reduction": 8}, 276_506),
        ("resnet20", "se", {"reduction": 4}, 280_538),
    ],
)
def test_parameter_counts_of_the_papers_code(
    network: str, attention: str, options: dict[str, Any], expected: int
) -> None:
    own = {"shortcut": "B"} if network == "resnet20" else {}
    model = published(network, **own)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert before == {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet20": 272_474}[network.split(":")[-1]]
    sites = plan(model, attention, start="paper", **options)
    assert before + sum(site.parameters for site in sites) == expected
    attach(model, sites)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    # the identity start adds one number for each site
    model = attach(published(network, **own), attention, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + len(sites)


@pytest.mark.slow_unless(network=["resnet20", "timm:seresnet18"])
@pytest.mark.parametrize("network, count", [*BLOCKS.items(), ("timm:resnet50", 16), ("torchvision:resnet50", 16)])
def test_sites(network: str, count: int) -> None:
    sites = plan(plain(network), "cbam+dual")
    assert [site.place for site in sites] == ["residual"] * count + ["pool"]
    assert [site.attention for site in sites] == ["cbam"] * count + ["dual"]
    assert len(sites) == count + 1 and {site.dimensions for site in sites} == {2}
    channels = [site.channels for site in sites]
    assert channels == sorted(channels)
    last = "3" if "50" in network else "2"
    end = "se" if "se" in network.split(":")[-1][:2] else f"bn{last}"
    assert all(site.name.endswith(f".{end}") for site in list(sites)[:-1])


def test_plan_prints_as_a_table() -> None:
    lines = str(plan(plain("small"), "se+dual", reduction=4)).splitlines()
    assert lines[0].split() == [
        *("site", "place", "stage", "attention", "channels", "map", "parameters", "multiply-adds")
    ]
    # two linear layers of 16 x 4 weights without biases, and the strength; the head's layer has 128 x 64 weights
    assert [line.split() for line in lines[1:]] == [
        ["layer1.0.bn2", "residual", "1", "se", "16", "64", "x", "64", "129", "128"],
        ["layer2.0.bn2", "residual", "2", "se", "32", "32", "x", "32", "513", "512"],
        ["layer3.0.bn2", "residual", "3", "se", "64", "16", "x", "16", "2,049", "2,048"],
        ["avgpool", "pool", "3", "dual", "64", "16", "x", "16", "8,257", "8,192"],
        ["total", "added", "10,948", "10,880"],
    ]
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.slow_unless(network=["resnet20", "timm:seresnet18"])
@each_network
def test_plan_is_pure(network: str) -> None:
    model = plain(network).train()
    check, state = snapshot(model), torch.get_rng_state()
    plan(model, "cbam+dual")
    check()
    assert torch.equal(torch.get_rng_state(), state)


# what is refused, with the model as it was


def refused(model: nn.Module, error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    check = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        attach(model, *args, **options)
    check()
    assert isinstance(caught.value, errors.ConvattnError)
    assert "\n" not in str(caught.value)


@pytest.mark.slow_unless(id=["se-se", "cbam+dual-cbam", "cbam+dual-cbam+dual", "max-dual"])
@pytest.mark.parametrize("first", ["se", "cbam", "dual", "cbam+dual"])
@pytest.mark.parametrize("second", ["se", "cbam+dual", "max"])
def test_second_attention_at_a_site_is_refused(first: str, second: str) -> None:
    model = attach(plain("small"), first)
    sites = [{site.name for site in plan(plain("small"), name)} for name in (first, second)]
    if sites[0].isdisjoint(sites[1]):
        count = len(attached(model))
        attach(model, second)
        assert len(attached(model)) > count
        x = images("small")
        assert torch.equal(model(x), plain("small")(x))
    else:
        refused(model, errors.AttachError, "has attention already; detach .* The model was not changed", second)


@pytest.mark.parametrize(
    "attention, match",
    [
        ("cbma", r"'cbma'\. Did you mean 'cbam'\?"),
        ("SE", r"'SE'\. Did you mean 'se'\?"),
        ("cbam+daul", r"'daul'\. Did you mean 'dual'\?"),
        ("", "called ''. Known: .*cbam"),
        ("cbam+", "called ''"),
        ("se,cbam", "called 'se,cbam'"),
    ],
)
def test_unknown_name_suggests(attention: str, match: str) -> None:
    refused(plain("small"), errors.UnknownName, match, attention)


@pytest.mark.parametrize("attention", ["se+cbam", "cbam+cbam", "dual+max", "cbam+dual+avg"])
def test_two_modules_for_the_same_sites(attention: str) -> None:
    refused(plain("small"), errors.AttachError, "two modules for the same sites", attention)


@pytest.mark.slow_unless(network=["resnet20", "torchvision:resnet18"])
@each_network
def test_concat_is_mapped_to_the_width_of_the_classifier(network: str) -> None:
    original, model = plain(network), plain(network)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    width = classifier.in_features
    (site,) = plan(model, "concat")
    attach(model, "cbam+concat")
    head = attached(model)[-1][1].attention
    assert site.channels == width == head.project.out_features and head.project.in_features == 2 * width
    assert site.parameters == 2 * width * width + width + 1
    # which stays the layer that it was
    assert any(module is classifier for module in model.modules()) and classifier.in_features == width
    x = images(network)
    with torch.no_grad():
        assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(
    "attention, options, match",
    [
        ("se", {"reductoin": 8}, r"se takes no option 'reductoin'\. Did you mean 'reduction'\?"),
        ("se", {"kernel_size": 3}, "se takes no option 'kernel_size'"),
        ("cbam+dual", {"gate_activation": "sigmoid"}, r"cbam\+dual takes no option 'gate_activation'"),
        ("cbam", {"channels": 3}, "takes no option 'channels'"),
        ("cbam", {"dimensions": 1}, "takes no option 'dimensions'"),
        ("dual", {"classes": 3}, "dual takes no option 'classes'"),
        ("dual", {"dropout": 0.5}, "dual takes no option 'dropout'"),
        ("dual", {"features": 3}, "dual takes no option 'features'"),
        ("cbam", {"reduction": 0}, "reduction must be a whole number of at least 1, got 0"),
        ("cbam", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ("cbam+dual", {"pools": ("mean", "median")}, "pools must be one of .*'median'"),
        ("se", {"start": "zero"}, "start must be one of 'paper', 'identity', got 'zero'"),
    ],
    ids=str,
)
def test_wrong_option(attention: str, options: dict[str, Any], match: str) -> None:
    refused(plain("small"), errors.InvalidOption, match, attention, **options)


def test_options_go_to_the_module_that_takes_them() -> None:
    options = {"reduction": 4, "kernel_size": 3, "norm": None, "pools": ("max",), "order": "parallel"}
    model = attach(plain("small"), "cbam+dual", **options)
    *gates, head = [wrapper.attention for _, wrapper in attached(model)]
    for gate, channels in zip(gates, (16, 32, 64), strict=True):
        assert gate.channel.fc1.out_features == channels // 4 and gate.channel.pools == ("max",)
        assert gate.spatial.conv.kernel_size == (3, 3) and gate.spatial.norm is None and gate.order == "parallel"
    assert isinstance(head.head, DualPool) and head.head.features == 64
    spatial = attach(plain("small"), "spatial", kernel_size=5)
    assert spatial.layer1[0].bn2.attention.conv.kernel_size == (5, 5)


@pytest.mark.slow_unless(network="vgg11_bn")
@pytest.mark.parametrize("network", ["vgg11_bn", "densenet121"])
def test_network_without_residual_blocks(network: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(network)
    others = {
        "vgg11_bn": r"'block' \(8\), 'stage' \(5\), 'final' \(1\)",
        "densenet121": r"'block' \(58\), 'stage' \(4\), 'final' \(1\), 'pool' \(1\)",
    }
    match = rf"no place at 'residual'\. It has these.*: {others[network]}\. The model was not changed"
    with pytest.raises(errors.AttachError, match=match):
        attach(model, "se")
    assert not attached(model)


def test_network_without_a_pooling_layer() -> None:
    match = r"no place at 'pool'.* It has these.*'residual' \(\d\).* The model was not changed"
    x = torch.randn(2, 16, 4, 4)
    none = nn.Sequential(BasicBlock(16, 16), nn.Flatten(), nn.Linear(256, 2))
    refused(none, errors.AttachError, match, "dual", example=x)
    # a pooling layer that leaves more than one position is none
    larger = nn.Sequential(BasicBlock(16, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2))
    refused(larger, errors.AttachError, match, "dual", example=x)
    refused(timm.create_model("resnet18", global_pool="", num_classes=0), errors.AttachError, match, "cbam+dual")


def test_pooling_that_concatenates_takes_a_head_of_its_width() -> None:
    torch.manual_seed(0)
    original = timm.create_model("resnet18", global_pool="catavgmax", num_classes=5).eval()
    model = attach(copy.deepcopy(original), "dual")
    x = images()
    assert torch.equal(model(x), original(x))
    seen = {}
    ((_, wrapper),) = attached(model)
    wrapper.register_forward_pre_hook(lambda _, args: seen.update(map=args[0]))
    nn.init.constant_(wrapper.attention.strength, 0.25)
    y, both = model(x), torch.cat([seen["map"].mean((2, 3)), seen["map"].amax((2, 3))], 1)
    head = wrapper.attention
    blended = both + 0.25 * (head.project(head.head(seen["map"])) - both)
    assert head.project.out_features == 2 * head.project.in_features == 1024
    assert_close(y, original.fc(blended))


def test_plan_has_its_options() -> None:
    model = plain("small")
    chosen = plan(model, "se", start="paper", reduction=4)
    refused(model, errors.InvalidOption, "plan has its sites, example, start and options", chosen, start="identity")
    refused(model, errors.InvalidOption, "plan has its sites, example, start and options", chosen, reduction=2)
    attach(model, chosen)
    assert not strengths(model) and model.layer3[0].bn2.attention.fc1.out_features == 16


@pytest.mark.parametrize("second", ["cbam", "cbam+dual"])
def test_plans_made_first_are_attached_one_after_the_other(second: str) -> None:
    model = plain("small")
    early, late = plan(model, "se", stages=(1, 2)), plan(model, second, stages=3)
    attach(attach(model, early), late)
    assert [site for site, _ in attached(model)] == [site.name for site in (*early, *late)]
    # what was planned with attention on stands for the plain network, and what is occupied is refused
    anew = plan(model, "se", stages=1)
    refused(model, errors.AttachError, "has attention already", anew)
    assert len(attached(attach(detach(model), anew))) == 1


@pytest.mark.slow_unless(planned="small")
@pytest.mark.parametrize(
    "planned, network",
    [("torchvision:resnet50", "small"), ("small", "torchvision:resnet18"), ("timm:resnet18", "timm:resnet50")],
)
def test_plan_of_another_network_is_refused(planned: str, network: str) -> None:
    refused(plain(network), errors.AttachError, "The model was not changed", plan(plain(planned), "se"))


@pytest.mark.slow_unless(failing=5)
@pytest.mark.parametrize("failing", [1, 3, 4, 5, 7, 12])
def test_failure_in_the_middle_changes_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # one module for each of the four sizes of maps is built to be counted, and eight to be attached
    built = 0
    build = SqueezeExcite.__init__

    def breaking(self: SqueezeExcite, *args: Any, **options: Any) -> None:
        nonlocal built
        built += 1
        if built == failing:
            raise MemoryError
        build(self, *args, **options)

    model = plain("torchvision:resnet18")
    check = snapshot(model)
    monkeypatch.setattr(SqueezeExcite, "__init__", breaking)
    with pytest.raises(MemoryError):
        attach(model, "se")
    assert built == failing
    check()
    monkeypatch.undo()
    x = images()
    assert torch.equal(attach(model, "se")(x), plain("torchvision:resnet18")(x))


# what others do with networks


@pytest.mark.slow_unless(network="small")
@each_small
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: torch_saved(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(network: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = moved(network, "cbam+dual")
    other = copied(model)
    x = images(network)
    assert torch.equal(other(x), model(x))
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    before = model(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any() and torch.equal(model(x), before)
    # a copy is as good as the original: it can be converted, loaded and detached
    other.double().load_state_dict(model.state_dict())
    assert_close(other(x.double()), before, torch.float32)
    assert list(detach(other).state_dict()) == list(plain(network).state_dict())


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_compiled(network: str, attention: str) -> None:
    torch._dynamo.reset()
    model = moved(network, attention).train()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = images(network)
    y, expected = compiled(x), model(x)
    assert_close(y, expected)
    for value in (y, expected):
        value.square().sum().backward()
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or is_close(one.grad, other.grad)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile() -> None:
    check_compiled("small", "cbam+dual")


@pytest.mark.slow
@each_attention
@pytest.mark.parametrize("network", ["timm:resnet18", "timm:seresnet18", "torchvision:resnet18"])
def test_compile_of_large_networks(network: str, attention: str) -> None:
    check_compiled(network, attention)


@pytest.mark.slow_unless(network="small")
@pytest.mark.parametrize("network, attention", [("small", "cbam+dual"), ("timm:resnet18", "se")])
def test_export(network: str, attention: str) -> None:
    model = moved(network, attention)
    x = images(network)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert set(exported.state_dict) == set(model.state_dict())
    for batch in (x, torch.cat([x, x, x])):
        assert_close(exported.module()(batch), model(batch))


@pytest.mark.slow_unless(attention="cbam+dual")
@pytest.mark.parametrize("attention", ["se", "cbam", "cbam+dual"])
def test_symbolic_trace_and_fusion(attention: str) -> None:
    model = moved("torchvision:resnet18", attention)
    x = images()
    expected = model(x)
    assert_close(torch.fx.symbolic_trace(model)(x), expected)
    fused = fuse(copy.deepcopy(model))
    convolutions = [module for module in fused.modules() if isinstance(module, nn.Conv2d) and module.in_channels > 2]
    assert all(convolution.bias is not None for convolution in convolutions), "nothing was fused"
    assert_close(fused(x), expected)
    assert not is_close(plain("torchvision:resnet18")(x), expected)


@pytest.mark.slow_unless(network=["small", "torchvision:resnet18"])
@each_small
def test_conversion_to_sync_batch_norm_keeps_the_attention(network: str) -> None:
    model = moved(network, "cbam+dual")
    x, names = images(network), [name for name, _ in model.named_parameters()]
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert [name for name, _ in converted.named_parameters()] == names
    assert torch.equal(converted(x), expected)
    # the wrapper follows its new layer
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert not converted(x).any()
    assert not any(isinstance(module, Attached) for module in detach(converted).modules())


@pytest.mark.slow_unless(network="small")
@each_small
def test_functional_call(network: str) -> None:
    model = moved(network, "cbam+dual")
    x = images(network)
    expected = model(x)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, values, (x,)), expected)
    for name in (attached(model)[0][0] + ".attention.strength", "layer1.0.bn2.weight"):
        changed = {**values, name: 3 * values[name]}
        assert not is_close(torch.func.functional_call(model, changed, (x,)), expected), name
    assert torch.equal(model(x), expected)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    gradients = torch.func.grad(loss)(values)
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(
            gradients[name] / gradients[name].abs().max().clamp(min=1),
            parameter.grad / parameter.grad.abs().max().clamp(min=1),
        )


@pytest.mark.slow_unless(network="small")
@each_small
def test_moves_and_conversions(network: str) -> None:
    model = moved(network, "cbam+dual")
    x = images(network)
    expected = model(x)
    assert_close(model.double()(x.double()), expected, torch.float32)
    assert torch.equal(model.float()(x), expected)
    assert {value.device.type for value in copy.deepcopy(model).to("meta").state_dict().values()} == {"meta"}
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x), expected)


def test_attach_without_memory() -> None:
    with torch.device("meta"):
        model = attach(CifarResNet(1), "cbam+dual").eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    other = moved("small", "cbam+dual")
    model.load_state_dict(other.state_dict(), assign=True)
    x = images("small")
    assert torch.equal(model(x), other(x))


@pytest.mark.slow_unless(network=["small", "torchvision:resnet18"])
@each_small
def test_channels_last(network: str) -> None:
    original = plain(network).to(memory_format=torch.channels_last)
    model = attach(copy.deepcopy(original), "cbam+dual")
    x = images(network).to(memory_format=torch.channels_last)
    expected = original(x)
    assert torch.equal(model(x), expected)
    seen = []
    for _, wrapper in attached(model)[:-1]:
        nn.init.constant_(wrapper.attention.strength, 0.7)
        wrapper.register_forward_hook(
            lambda _, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    y = model.to(memory_format=torch.channels_last)(x)
    assert seen and all(seen)
    assert_close(y, model.to(memory_format=torch.contiguous_format)(x.contiguous()))
    assert not is_close(y, expected)


def test_hooks_of_the_layer_stay() -> None:
    model, calls = plain("small"), []
    layer = model.layer1[0].bn2
    layer.register_forward_hook(lambda *_: calls.append(1))
    attach(model, "se")
    # planning runs the network once
    calls.clear()
    model(images("small"))
    assert calls == [1]
    detach(model)(images("small"))
    assert calls == [1, 1]


# layers that a network has under several names


class Aliased(nn.Module):
    """A network that keeps one of its blocks, and a layer of another, under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain("small")
        self.last_block = self.body.layer3[0]
        self.norm = self.body.layer1[0].bn2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Tied(nn.Module):
    """Two blocks that end in one and the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = copy.deepcopy(plain("small").layer1[0]), copy.deepcopy(plain("small").layer1[0])
        self.second.bn2 = self.first.bn2
        with torch.no_grad():
            self.second.conv1.weight.mul_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def check_aliases(model: nn.Module, x: torch.Tensor) -> None:
    original = copy.deepcopy(model)
    check = snapshot(model)
    attach(model, "cbam")
    assert torch.equal(model(x), original(x))
    for kind in ("state_dict", "named_parameters", "named_buffers"):
        before, after = getattr(original, kind)(), getattr(model, kind)()
        names = [[name if kind == "state_dict" else name[0] for name in listed] for listed in (before, after)]
        assert [name for name in names[1] if not is_added(name)] == names[0], kind
    # one wrapper for each layer, and none inside another: the state dict tells all weights
    assert all(not isinstance(wrapper.inner, Attached) for _, wrapper in attached(model))
    # each stands where the network computes
    for name, wrapper in attached(model):
        before = model(x)
        nn.init.constant_(wrapper.attention.strength, 0.7)
        assert not is_close(model(x), before), name
    other = attach(copy.deepcopy(original), "cbam")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    detach(model)
    check()


def test_layer_under_two_names() -> None:
    check_aliases(Aliased().eval(), images("small"))
    model = attach(Aliased(), "cbam")
    assert isinstance(model.norm, Attached) and model.norm is model.body.layer1[0].bn2


def test_layer_shared_by_two_blocks() -> None:
    check_aliases(Tied().eval(), torch.randn(2, 16, 8, 8))
