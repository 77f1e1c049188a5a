"""Attached attention goes through all that is done to networks: copies, checkpoints, compilers, sharding, averages."""

import copy
import functools
import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.fx.experimental.optimization import fuse
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs, make_layers

from convattn import attach, detach, plan
from convattn.attachment import attached
from convattn.attachment.wrapper import Passing
from convattn.errors import AttachError
from tolerances import assert_close, is_close

# each network with the place where its gates stand: before the residual sums, or behind the blocks where there are none
NETWORKS = {
    "timm:resnet18": "residual",
    "torchvision:resnet18": "residual",
    "timm:mobilenetv3_small_100": "residual",
    "torchvision:mobilenet_v3_small": "residual",
    "timm:efficientnet_b0": "residual",
    "timm:convnext_atto": "residual",
    "torchvision:densenet121": "block",
    "timm:regnetx_002": "residual",
    "timm:regnety_002": "residual",
    "torchvision:vgg11_bn": "block",
}
# what the plain networks allow: all of them can be compiled as one graph, exported, scripted and traced, and these ...
# ... have norms of PyTorch's own type; timm's BatchNormAct2d holds the activation, which PyTorch's conversion to
# SyncBatchNorm loses and its fusion leaves alone, and ConvNeXt has no batch norm
PLAIN_NORMS = (
    "timm:resnet18",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:densenet121",
    "torchvision:vgg11_bn",
)
TIMM = tuple(name for name in NETWORKS if name.startswith("timm:"))
# ... have stages that are children of the network, of which a FeatureListNet can be made from outside
WITH_STAGES = ("timm:resnet18", "timm:regnetx_002", "timm:regnety_002")
# ... tell by names and in one shape where their features are
WITH_NAMED_FEATURES = (*WITH_STAGES, "timm:mobilenetv3_small_100", "timm:efficientnet_b0")
ATTENTION = ("se", "cbam")

Pair = tuple[str, str]
# of every family one
FAMILIES: tuple[Pair, ...] = (
    ("torchvision:resnet18", "cbam"),
    ("timm:mobilenetv3_small_100", "se"),
    ("timm:efficientnet_b0", "cbam"),
    ("timm:convnext_atto", "cbam"),
    ("torchvision:densenet121", "se"),
    ("timm:regnetx_002", "se"),
    ("torchvision:vgg11_bn", "cbam"),
)
# the smaller ones are fast tests
FAST = tuple(pair for pair in FAMILIES if pair[0] not in ("timm:efficientnet_b0", "torchvision:densenet121"))
FASTEST = tuple(pair for pair in FAST if pair[0] not in ("timm:regnetx_002", "torchvision:vgg11_bn"))


def pairs(fast: Iterable[Pair] = FAST, networks: Iterable[str] = tuple(NETWORKS)) -> pytest.MarkDecorator:
    """Networks, each with each attention; all but `fast` are slow tests."""
    fast, every = set(fast), tuple(itertools.product(networks, ATTENTION))
    assert len(fast & set(every)) >= 3
    return pytest.mark.parametrize(
        "network, attention", [pytest.param(*one, marks=() if one in fast else pytest.mark.slow) for one in every]
    )


each = pairs([*FASTEST, ("torchvision:vgg11_bn", "cbam")])
each_timm = pairs(networks=TIMM)
scripting = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")


def created(network: str, **options: Any) -> nn.Module:
    library, _, name = network.partition(":")
    if library == "timm":
        return timm.create_model(name, **{"num_classes": 10, **options})
    if name != "vgg11_bn":
        return torchvision.models.get_model(name, num_classes=10)
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn()
    model.features = make_layers(cfgs["A"], batch_norm=True)
    # the network's own has 120 million weights, at which nothing is attached
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 16), nn.ReLU(), nn.Linear(16, 10))
    return model


def randomised(model: nn.Module) -> nn.Module:
    """Random weights that keep the size of maps: fresh branches are 0 or next to nothing in many of these networks."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            gamma = module._parameters.get("gamma")
            if gamma is not None:
                gamma.uniform_(0.5, 1.5)
        for norm in norms:
            norm.weight.uniform_(0.5, 1.2)
            norm.bias.normal_(std=0.2)
        # statistics near those of the maps: far from them a training of a few steps ends in nan
        update_bn([images(8)], model)
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            # a channel that is next to constant would be blown up, and with it the rounding
            norm.running_var *= 0.9 + 0.4 * torch.rand_like(norm.running_var)
            norm.running_var.clamp_(min=float(norm.running_var.mean()) / 4)
    return model.eval()


def with_attention(model: nn.Module, attention: str, **options: Any) -> nn.Module:
    """A network with attention at random strengths."""
    attach(model, attention, **options)
    with torch.no_grad():
        for _, wrapper in attached(model):
            for norm in (module for module in wrapper.attention.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.running_mean.normal_(std=0.2)
                norm.running_var.uniform_(0.5, 1.5)
    return move(model)


def move(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in strengths(model):
            parameter.uniform_(0.5, 1.0)
    return model


def strengths(model: nn.Module) -> list[nn.Parameter]:
    return [wrapper.attention.strength for _, wrapper in attached(model)]


@functools.cache
def _plain(network: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(created(network))


@functools.cache
def _moved(network: str, attention: str) -> nn.Module:
    # whether a test is the first or not, its own random numbers are the same
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_attention(plain(network), attention, at=NETWORKS[network], example=images())


def plain(network: str) -> nn.Module:
    """A fresh network with random weights and random norms, in eval mode."""
    return copy.deepcopy(_plain(network))


def fresh(network: str, attention: str) -> nn.Module:
    """The same network with attention as it is at the start."""
    return attach(plain(network), attention, at=NETWORKS[network], example=images())


def moved(network: str, attention: str) -> nn.Module:
    """The same network with attention that does something."""
    return copy.deepcopy(_moved(network, attention))


def images(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side)


def scaled(y: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # these networks have outputs of very different sizes
    scale = expected.detach().abs().max()
    return y.detach() / scale, expected.detach() / scale


def assert_same(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(*scaled(y, expected))


def differs(y: torch.Tensor, other: torch.Tensor) -> bool:
    return not is_close(*scaled(y, other))


def is_added(name: str) -> bool:
    return ".attention." in name


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def loss(y: torch.Tensor) -> torch.Tensor:
    # the mean over images of each by itself, whichever of them a process has
    return -y.float().log_softmax(1)[:, 0].mean()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of all parameters, of which none may be unused."""
    model.zero_grad()
    loss(model(x)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        # a gradient that is 0 in theory is the rounding of its neighbours, as that of a bias before a norm
        size = max(float(gradient.abs().max()), 1e-3)
        assert is_close(found[name] / size, gradient / size), name


# what all tests below rest on: an output would tell if the gate of any site were lost


@pytest.mark.slow_unless(network=["timm:mobilenetv3_small_100", "timm:convnext_atto"])
@each
def test_every_gate_matters(network: str, attention: str) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        y = model(x)
        assert differs(plain(network)(x), y)
        for (name, _), strength in zip(attached(model), strengths(model), strict=True):
            kept = strength.clone()
            strength.zero_()
            assert differs(model(x), y), name
            strength.copy_(kept)
        assert torch.equal(model(x), y)


# copies


@pytest.mark.slow_unless(network=["timm:mobilenetv3_small_100", "timm:convnext_atto"])
@each
def test_deepcopy(network: str, attention: str) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        y = model(x)
        other = copy.deepcopy(model)
        assert torch.equal(other(x), y)
        tensors = [{value.data_ptr() for value in one.state_dict().values() if value.dim()} for one in (model, other)]
        assert tensors[0].isdisjoint(tensors[1])
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(x).any()
        # and is restored by itself
        assert list(detach(other).state_dict()) == list(plain(network).state_dict())
        assert torch.equal(model(x), y)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@pairs(FASTEST)
@pytest.mark.parametrize("through", [pickled, saved])
def test_pickle(network: str, attention: str, through: Callable[[nn.Module], nn.Module]) -> None:
    model, x = moved(network, attention), images()
    other = through(model)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert parameter_names(other) == parameter_names(model)
        # what is set on a layer is seen by the network, and what was restored is the plain network
        site, wrapper = attached(other)[0]
        wrapper.attention.strength.zero_()
        assert differs(other(x), model(x)), site
        assert torch.equal(detach(other)(x), plain(network)(x))


# names and checkpoints


@each
def test_names_stay(network: str, attention: str) -> None:
    original, model = plain(network), moved(network, attention)
    sites = [name for name, _ in attached(model)]

    def listings(of: nn.Module) -> dict[str, list[str]]:
        return {
            "state": list(of.state_dict()),
            "parameters": parameter_names(of),
            "duplicates": [name for name, _ in of.named_parameters(remove_duplicate=False)],
            "buffers": [name for name, _ in of.named_buffers()],
        }

    before, after = listings(original), listings(model)
    for kind, names in after.items():
        assert [name for name in names if not is_added(name)] == before[kind], kind
        added = {name.partition(".attention.")[0] for name in names if is_added(name)}
        assert added <= set(sites), kind
        assert kind == "buffers" or added == set(sites), kind
    assert {name for name, _ in original.named_modules()} <= {name for name, _ in model.named_modules()}
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.slow_unless(network=["timm:mobilenetv3_small_100", "timm:convnext_atto"])
@each
def test_checkpoints_go_both_ways(network: str, attention: str) -> None:
    original, model, x = plain(network), moved(network, attention), images()
    with torch.no_grad():
        for value in original.state_dict().values():
            value.mul_(1.01) if value.is_floating_point() else value.add_(1)
    added = {key for key in model.state_dict() if is_added(key)}
    # the plain checkpoint into the attached network
    result = model.load_state_dict(original.state_dict(), strict=False)
    # PyTorch adds counts of batches that an old checkpoint does not have
    assert {key for key in added if not key.endswith("num_batches_tracked")} <= set(result.missing_keys) <= added
    assert result.unexpected_keys == []
    state = model.state_dict()
    for key, value in original.state_dict().items():
        assert torch.equal(state[key], value), key
    # the attached checkpoint into the plain network
    other = plain(network)
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == [] and set(result.unexpected_keys) == added
    with torch.no_grad():
        assert torch.equal(other(x), original(x))
        # and into an attached one
        another = fresh(network, attention)
        another.load_state_dict(model.state_dict())
        assert torch.equal(another(x), model(x)) and differs(another(x), original(x))


# compilers


def check_compiled(network: str, attention: str, **options: Any) -> None:
    torch._dynamo.reset()
    model, x = moved(network, attention), images()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, **options)
        assert_same(compiled(x), expected)
        # gates are not compiled in
        for parameter in strengths(compiled):
            parameter.fill_(0.1)
        changed = compiled(x)
        assert_same(changed, model(x))
        assert differs(changed, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@pairs([("torchvision:resnet18", "se"), ("timm:convnext_atto", "se"), ("torchvision:vgg11_bn", "cbam")])
def test_compile(network: str, attention: str) -> None:
    check_compiled(network, attention, backend="aot_eager")


@pytest.mark.slow
def test_compile_to_machine_code() -> None:
    check_compiled("torchvision:vgg11_bn", "cbam")


@pytest.mark.slow
@pytest.mark.parametrize("network, attention", FAMILIES)
def test_compile_for_training(network: str, attention: str) -> None:
    torch._dynamo.reset()
    model, x = moved(network, attention), images()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): one for name, one in gradients(compiled, x).items()}
    assert_same_gradients(found, gradients(model, x))
    torch._dynamo.reset()


@pytest.mark.slow_unless(at="block")
@pytest.mark.parametrize("at", ["residual", "block"])
def test_compile_block_by_block(at: str) -> None:
    # with at="block" what stands at the name of a block is the wrapper, and it compiles itself
    torch._dynamo.reset()
    model, x = with_attention(plain("torchvision:resnet18"), "se", at=at, example=images()), images()
    with torch.no_grad():
        expected = model(x)
        for block in model.layer1:
            block.compile(backend="aot_eager", fullgraph=True)
        assert_same(model(x), expected)
    torch._dynamo.reset()


@pytest.mark.slow_unless(network="torchvision:vgg11_bn")
@pairs([("torchvision:resnet18", "cbam"), ("timm:convnext_atto", "se"), ("torchvision:vgg11_bn", "se")])
def test_export(network: str, attention: str) -> None:
    model, x = moved(network, attention), images()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    assert set(exported.state_dict) == set(model.state_dict())
    with torch.no_grad():
        for batch in (x, images(3)):
            assert_same(exported.module()(batch), model(batch))


@pytest.mark.slow_unless(network="timm:convnext_atto")
@scripting
@pairs([("timm:resnet18", "cbam"), ("torchvision:mobilenet_v3_small", "se"), ("timm:convnext_atto", "se")])
def test_script(network: str, attention: str) -> None:
    model, x, file = moved(network, attention), images(), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    assert len(list(scripted.parameters())) == len(list(model.parameters()))
    with torch.no_grad():
        for batch in (x, images(3, 96)):
            assert_same(scripted(batch), model(batch))


PASSAGES = {"head": ("torchvision:densenet121", "dual", None), "shortcut": ("torchvision:resnet18", "se", "shortcut")}


@pytest.mark.slow_unless(kind="shortcut")
@scripting
@pytest.mark.parametrize("kind", PASSAGES)
def test_what_takes_the_map_of_another_layer_is_exported_and_traced_but_not_scripted(kind: str) -> None:
    network, attention, at = PASSAGES[kind]
    model = with_attention(plain(network), attention, at=at, example=images())
    assert any(isinstance(wrapper, Passing) for _, wrapper in attached(model))
    x = images(3)
    with torch.no_grad():
        expected = model(x)
        # tracing warns of nothing that the plain network does not warn of
        assert_same(torch.jit.trace(model, images(3))(x), expected)
        assert_same(torch.export.export(model, (x,)).module()(x), expected)
        with pytest.raises(AttachError, match="takes the map of another layer"):
            torch.jit.script(model)
        assert torch.equal(model(x), expected)


@pytest.mark.slow_unless(training=True, network="torchvision:resnet18")
@pytest.mark.slow_unless(training=False, network=["timm:mobilenetv3_small_100", "torchvision:vgg11_bn"])
@each
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_symbolic_trace(network: str, attention: str, training: bool) -> None:
    model, x = moved(network, attention).train(training), images()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    # the wrapper of a layer leaves no call behind: what is called are its parts
    names = {str(node.target) for node in traced.graph.nodes}
    for site, _ in attached(model):
        assert site not in names and any(name.startswith(f"{site}.attention.") for name in names), site
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert_same(traced(x), expected)


@pytest.mark.slow_unless(network="torchvision:vgg11_bn")
@pairs([(name, "cbam") for name in PLAIN_NORMS if name != "torchvision:densenet121"], networks=PLAIN_NORMS)
def test_fusion_of_convolutions_and_norms(network: str, attention: str) -> None:
    def norms(of: nn.Module) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in of.modules())

    original, model, x = plain(network), moved(network, attention), images()
    before = norms(model)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(model)
        assert_same(fused(x), expected)
        # as many are left as the plain network keeps
        assert norms(fused) == norms(fuse(original)) < norms(original)
        assert norms(model) == before and torch.equal(model(x), expected)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_gate_between_convolution_and_norm_prevents_their_fusion(attention: str) -> None:
    model = plain("torchvision:resnet18")
    with_attention(model, attention, at="layer", where="layer1.0.conv1", example=images())
    x = images()
    with torch.no_grad():
        fused = fuse(model)
        assert_same(fused(x), model(x))
        assert isinstance(fused.get_submodule("layer1.0.bn1"), nn.BatchNorm2d)


# norms


def check_synchronised(network: str, attention: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        expected, names = model(x), parameter_names(model)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        # a ConvNeXt has only those of CBAM
        assert bool(norms) == ((network, attention) != ("timm:convnext_atto", "se"))
        converted = convert(model)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms
        assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
        assert parameter_names(converted) == names
        assert torch.equal(converted(x), expected)
        # a wrapper follows its new layer
        tensors = itertools.chain(*(f() for f in (converted.double().parameters, converted.buffers)))
        assert {one.dtype for one in tensors if one.is_floating_point()} == {torch.float64}
        converted.float()
        # what is restored is the plain network with its new norms
        restored = detach(converted)
        assert list(restored.state_dict()) == list(plain(network).state_dict())
        assert torch.equal(restored(x), plain(network)(x))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in restored.modules())


@pytest.mark.slow_unless(network=["torchvision:resnet18", "torchvision:mobilenet_v3_small"])
@pairs([(name, "cbam") for name in PLAIN_NORMS if name != "torchvision:densenet121"], networks=PLAIN_NORMS)
def test_conversion_to_sync_batch_norm(network: str, attention: str) -> None:
    check_synchronised(network, attention, nn.SyncBatchNorm.convert_sync_batchnorm)


@pytest.mark.slow_unless(network=["timm:mobilenetv3_small_100", "timm:convnext_atto"])
@each
def test_conversion_to_sync_batch_norm_by_timm(network: str, attention: str) -> None:
    check_synchronised(network, attention, convert_sync_batchnorm)


# many processes


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    use_loopback(monkeypatch.setenv)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def use_loopback(setenv: Callable[[str, str], None]) -> None:
    # the name of a machine without network may have no address
    if sys.platform == "linux":
        setenv("GLOO_SOCKET_IFNAME", "lo")


# of the depthwise convolutions of a plain ConvNeXt as well
strides = pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
# on one process there is nothing to shard
unsharded = pytest.mark.filterwarnings("ignore:.*NO_SHARD")
# FSDP asks whether autograd needs a view in a way that it deprecates
deprecated = pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
# of the stem of a plain ConvNeXt as well
views = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


def trained(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs while a network is trained, and its output then."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    outputs = []
    for x in batches:
        y = model(x)
        outputs.append(y.detach())
        optimizer.zero_grad()
        loss(y).backward()
        optimizer.step()
    return [*outputs, model(batches[0]).detach()]


def check_training(
    network: str, attention: str, wrap: Callable[[nn.Module], nn.Module], *, started: bool = True
) -> nn.Module:
    """A wrapped network is trained as the network is; returns it as it was wrapped."""
    model = moved(network, attention) if started else fresh(network, attention)
    batches = [images() for _ in range(3)]
    wrapped = wrap(copy.deepcopy(model))
    outputs, expected = trained(wrapped, batches), trained(model, batches)
    for y, one in zip(outputs, expected, strict=True):
        assert_same(y, one)
    # which has changed something
    assert differs(expected[-1], expected[0])
    return wrapped


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@strides
@pairs(FASTEST)
def test_data_parallel(network: str, attention: str, one_process: None) -> None:
    # from the start, where every gate but its strength has a gradient of 0, which is not none: a parameter without
    # a gradient is an error in the second step
    wrapped = check_training(network, attention, DistributedDataParallel, started=False)
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    assert all(bool(parameter) for parameter in strengths(wrapped.module))


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@unsharded
@deprecated
@pairs(FASTEST)
@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
def test_sharded_wrapper(network: str, attention: str, original: bool, one_process: None) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)

    wrapped = check_training(network, attention, wrap)
    assert set(wrapped.state_dict()) == set(moved(network, attention).state_dict())
    # layers are wrapped in place
    if original:
        names = [name.removeprefix("_fsdp_wrapped_module.") for name in parameter_names(wrapped)]
        assert names == parameter_names(moved(network, attention))


@pytest.mark.slow_unless(id=["blocks-residual-original", "norms-block-original"])
@unsharded
@deprecated
@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
@pytest.mark.parametrize("at", ["residual", "block"])
@pytest.mark.parametrize("kind", [BasicBlock, nn.BatchNorm2d], ids=["blocks", "norms"])
def test_sharded_wrapper_by_layers(kind: type[nn.Module], at: str, original: bool, one_process: None) -> None:
    # among them the layers inside of the wrappers
    model, x = with_attention(plain("torchvision:resnet18"), "se", at=at, example=images()), images()
    expected, names = model(x), set(model.state_dict())
    wrapped = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy({kind}),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
    )
    for _ in range(2):
        y = wrapped(x)
        loss(y).backward()
    assert_same(y, expected)
    assert set(wrapped.state_dict()) == names


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@views
@pairs(FASTEST)
def test_fully_shard(network: str, attention: str, one_process: None) -> None:
    wrapped = check_training(network, attention, fully_sharded)
    assert parameter_names(wrapped) == parameter_names(moved(network, attention))


@pytest.mark.slow_unless(at="block")
@pytest.mark.parametrize("at", ["residual", "block"])
def test_fully_shard_block_by_block(at: str, one_process: None) -> None:
    # with at="block" what stands at the name of a block is the wrapper
    model, x = with_attention(plain("torchvision:resnet18"), "cbam", at=at, example=images()), images()
    expected, names = gradients(model, x), parameter_names(model)
    y = model(x)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert parameter_names(model) == names
    assert_same(model(x), y)
    loss(model(x)).backward()
    assert_same_gradients({name: one.grad.full_tensor() for name, one in model.named_parameters()}, expected)


def work(rank: int, folder: str, batches: list[torch.Tensor], wraps: str, pair: Pair) -> None:
    """What each of two processes does: steps on its own half of the images, the results to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = WRAPS[wraps](moved(*pair))
    outputs = trained(model, [x.chunk(2)[rank] for x in batches])
    found = {}
    if wraps == "data parallel":
        found = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    torch.save((outputs, found), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": DistributedDataParallel,
    "sharded, original": functools.partial(
        FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "sharded, flat": functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
    "fully sharded": fully_sharded,
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("torchvision:resnet18", "cbam"), ("timm:convnext_atto", "se")], ids="-".join)
@pytest.mark.parametrize("wraps", WRAPS)
def test_two_processes(wraps: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_loopback(monkeypatch.setenv)
    batches = [images(4) for _ in range(3)]
    torch.multiprocessing.spawn(work, (str(tmp_path), batches, wraps, pair), nprocs=2)
    (outputs, found), (others, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # in eval mode the mean over two halves is that over the whole
    expected = trained(moved(*pair), batches)
    for one, other, y in zip(outputs, others, expected, strict=True):
        assert_same(torch.cat([one, other]), y)
    assert differs(expected[-1], expected[0])
    assert bool(found) == (wraps == "data parallel")
    for name, gradient in found.items():
        assert gradient is not None and torch.equal(gradient, same[name]), name


# averages


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@pairs(FASTEST)
@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_average_of_the_weights(network: str, attention: str, kind: str) -> None:
    model, x = moved(network, attention), images()
    if kind == "timm":
        average = timm.utils.ModelEmaV3(model, decay=0.75)
        update = average.update
    else:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
        # the first is a copy
        average.update_parameters(model)
        update = average.update_parameters
    with torch.no_grad():
        y = model(x)
        assert torch.equal(average(x), y)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.mul_(1.2)
        update(model)
        assert parameter_names(average.module) == list(before)
        for name, parameter in average.module.named_parameters():
            assert is_close(parameter, 1.05 * before[name]), name
        # what computes is what was averaged, and the model is apart from it
        other = copy.deepcopy(model)
        other.load_state_dict(average.module.state_dict())
        assert torch.equal(average(x), other(x)) and differs(average(x), y)
        assert differs(average(x), model(x))


@pytest.mark.slow_unless(network="torchvision:resnet18")
@pairs([*FAST, ("timm:resnet18", "se")], networks=[name for name in NETWORKS if name != "timm:convnext_atto"])
def test_statistics_after_averaging(network: str, attention: str) -> None:
    # of the start: those of the plain network
    original, model = plain(network), fresh(network, attention)
    batches = [images(4) for _ in range(2)]
    for one in (original, model):
        torch.manual_seed(0)
        update_bn(batches, one)
    state = model.state_dict()
    before = plain(network).state_dict()
    for key, value in original.state_dict().items():
        assert torch.equal(state[key], value), key
        assert "running" not in key or not torch.equal(value, before[key]), key


# memory and numbers


@pytest.mark.slow_unless(network=["timm:mobilenetv3_small_100", "timm:convnext_atto"])
@each
def test_channels_last(network: str, attention: str) -> None:
    x = images()
    last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        original = plain(network).to(memory_format=torch.channels_last)
        started = attach(copy.deepcopy(original), attention, at=NETWORKS[network], example=last)
        assert torch.equal(started(last), original(last))
        model = moved(network, attention)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        seen = []
        for name, wrapper in attached(model):
            wrapper.register_forward_hook(lambda _, __, y, name=name: seen.append((name, y)))
        assert_same(model(last), expected)
        assert [name for name, _ in seen] == [name for name, _ in attached(model)]
        for name, y in seen:
            assert y.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@pairs(FASTEST)
def test_autocast(network: str, attention: str) -> None:
    # bfloat16 is slow on many processors
    original, model, x = plain(network), fresh(network, attention), images(side=32)
    for training in (False, True):
        outputs = []
        for one in (original.train(training), model.train(training)):
            torch.manual_seed(0)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                outputs.append(one(x))
        assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
        assert torch.equal(*outputs), training
    move(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert not is_close(y, original.eval()(x))
    loss(y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.any() for parameter in strengths(model))


# training of some


@pytest.mark.slow_unless(network=["torchvision:resnet18", "timm:convnext_atto"])
@each
def test_frozen_network(network: str, attention: str) -> None:
    x = images()
    model = moved(network, attention).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(x).requires_grad
    names = {name for name in parameter_names(model) if name.endswith(".strength")}
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    loss(model(x)).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names
    # frozen before: what is attached then is to be trained
    model = attach(plain(network).requires_grad_(False), attention, at=NETWORKS[network], example=x)
    assert all(parameter.requires_grad == is_added(name) for name, parameter in model.named_parameters())


@each
def test_weight_decay_by_shape(network: str, attention: str) -> None:
    original, model = plain(network), moved(network, attention)

    def decayed(of: nn.Module, *without: str) -> dict[str, bool]:
        names = {id(parameter): name for name, parameter in of.named_parameters()}
        groups = timm.optim.param_groups_weight_decay(of, weight_decay=0.1, no_weight_decay_list=without)
        found = [(names[id(one)], group["weight_decay"] > 0) for group in groups for one in group["params"]]
        assert len(found) == len(names) == len(dict(found))
        return dict(found)

    found, before = decayed(model), decayed(original)
    assert {name: value for name, value in found.items() if not is_added(name)} == before
    added = {name for name in found if is_added(name)}
    for name in added:
        assert found[name] == (model.get_parameter(name).dim() > 1 and not name.endswith(".bias")), name
        assert not (name.endswith((".strength", ".bias")) and found[name]), name
    assert any(found[name] for name in added) and any(name.endswith(".strength") for name in added)
    # and by name
    found = decayed(model, "*.attention.*")
    assert {name for name, value in found.items() if value} == {name for name, value in before.items() if value}


@each_timm
def test_learning_rates_by_depth(network: str, attention: str) -> None:
    def scales(of: nn.Module) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in of.named_parameters()}
        groups = timm.optim.param_groups_layer_decay(of, weight_decay=0.1, layer_decay=0.5)
        return {names[id(one)]: group["lr_scale"] for group in groups for one in group["params"]}

    model = moved(network, attention)
    found, before = scales(model), scales(plain(network))
    assert {name: value for name, value in found.items() if not is_added(name)} == before
    assert set(found) == set(parameter_names(model)) and len(set(before.values())) > 4
    for site, _ in attached(model):
        # a gate learns as fast as the block that it is in
        block = site.rpartition(".")[0]
        inside = {value for name, value in before.items() if name.startswith(f"{block}.")}
        added = {value for name, value in found.items() if name.startswith(f"{site}.attention.")}
        assert len(added) == 1 and added <= inside, site


# features


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@pairs(networks=TIMM)
def test_features_only(network: str, attention: str) -> None:
    torch.manual_seed(0)
    original = randomised(timm.create_model(network.removeprefix("timm:"), features_only=True))
    model, x = copy.deepcopy(original), images()
    with torch.no_grad():
        attach(model, attention, at="residual", example=x)
        # of these features no layer is left out
        assert len(attached(model)) >= len(attached(moved(network, attention))) - 1
        expected = original(x)
        for y, one in zip(model(x), expected, strict=True):
            assert torch.equal(y, one)
        move(model)
        assert differs(model(x)[-1], expected[-1])
        assert [name for name in parameter_names(model) if not is_added(name)] == parameter_names(original)
        assert model.feature_info.channels() == original.feature_info.channels()
        for other in (copy.deepcopy(model), pickled(model)):
            for y, one in zip(other(x), model(x), strict=True):
                assert torch.equal(y, one)
        for y, one in zip(detach(model)(x), expected, strict=True):
            assert torch.equal(y, one)


@pytest.mark.slow_unless(network="timm:mobilenetv3_small_100")
@each_timm
def test_intermediates_of_an_attached_network(network: str, attention: str) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        y, maps = model.forward_intermediates(x)
        assert_same(model.forward_head(y), model(x))
        before = plain(network).forward_intermediates(x, intermediates_only=True)
        assert [one.shape for one in maps] == [one.shape for one in before]
        assert differs(maps[-1], before[-1])
        found = FeatureGetterNet(copy.deepcopy(model), out_indices=(-2, -1))(x)
        assert all(torch.equal(one, other) for one, other in zip(found, maps[-2:], strict=True))


def check_features(network: str, attention: str, kind: type[nn.Module]) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        found = kind(model)(x)
        found = list(found.values()) if isinstance(found, dict) else found
        assert len(found) == len(maps)
        assert all(torch.equal(one, other) for one, other in zip(found, maps, strict=True))


@pairs([*FAST, ("timm:resnet18", "cbam")], networks=WITH_NAMED_FEATURES)
def test_hooked_features_of_an_attached_network(network: str, attention: str) -> None:
    check_features(network, attention, FeatureHookNet)


@pytest.mark.slow_unless(network="timm:resnet18")
@pytest.mark.parametrize("kind", [FeatureListNet, FeatureDictNet])
@pairs([(name, "se") for name in WITH_STAGES], networks=WITH_STAGES)
def test_staged_features_of_an_attached_network(network: str, attention: str, kind: type[nn.Module]) -> None:
    check_features(network, attention, kind)


@pytest.mark.slow_unless(network="torchvision:resnet18", attention="se")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "network, layer",
    [
        ("torchvision:resnet18", "layer3"),
        ("torchvision:vgg11_bn", "features.20"),
        pytest.param("torchvision:densenet121", "features.transition2", marks=pytest.mark.slow),
    ],
)
def test_extracted_features(network: str, attention: str, layer: str) -> None:
    # it traces the network in eval mode and in train mode
    model, x, seen = moved(network, attention), images(), []
    model.get_submodule(layer).register_forward_hook(lambda _, __, y: seen.append(y.clone()))
    with torch.no_grad():
        model(x)
        assert_same(create_feature_extractor(model, [layer])(x)[layer], seen[0])
        assert differs(create_feature_extractor(plain(network), [layer])(x)[layer], seen[0])


# without memory


@pytest.mark.slow_unless(network=["torchvision:resnet18", "torchvision:vgg11_bn"])
@each
def test_without_memory(network: str, attention: str) -> None:
    model, x = moved(network, attention), images()
    with torch.no_grad():
        expected = model(x)
        other = copy.deepcopy(model).to("meta")
        assert {value.device.type for value in other.state_dict().values()} == {"meta"}
        assert all(parameter.is_meta for parameter in other.parameters())
        assert other(x.to("meta")).shape == expected.shape
        other.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.slow_unless(network=["torchvision:resnet18", "torchvision:vgg11_bn"])
@each
def test_plan_without_memory(network: str, attention: str) -> None:
    model, x = plain(network), images()
    places = [NETWORKS[network], "stage", "final"]
    expected = [str(plan(model, attention, at=at, example=x)) for at in places]
    model.to("meta")
    for at, table in zip(places, expected, strict=True):
        assert str(plan(model, attention, at=at, example=x.to("meta"))) == table, at


@pytest.mark.slow_unless(network=["torchvision:resnet18", "torchvision:vgg11_bn"])
@each
def test_attach_without_memory(network: str, attention: str) -> None:
    trained_elsewhere, x = moved(network, attention), images()
    with torch.device("meta"):
        # as one does to load a large checkpoint: no memory for weights that are replaced
        model = attach(created_without_memory(network), attention, at=NETWORKS[network], example=x.to("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(trained_elsewhere.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), trained_elsewhere(x))


def created_without_memory(network: str) -> nn.Module:
    return plain(network).to("meta") if network.endswith("vgg11_bn") else created(network)
