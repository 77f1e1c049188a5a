"""A symbolic trace of attention is the paper's mathematics on tensors, whatever counts as a leaf of it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from networks import distance, images, with_attention
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from convattn import attach
from convattn.nn import CBAM, ChannelAttention, ConcatPool, DualPool, SpatialAttention, SqueezeExcite

PLACES = ("residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final", "layer")


class Watching(fx.Interpreter):
    """Runs a trace and keeps what each of its steps gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n.name] = super().run_node(n)
        return self.results[n.name]


def check(traced: fx.GraphModule, x: torch.Tensor, expected: torch.Tensor) -> None:
    dead = [node for node in traced.graph.nodes if not node.users and node.op != "output"]
    assert dead == []
    watching = Watching(traced)
    y = watching.run(x)
    assert distance(y, expected) < 1e-5
    assert all(isinstance(one, torch.Tensor) for one in watching.results.values())
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    # operators of PyTorch and of Python, and nothing that is known to this package alone
    assert not any(str(getattr(one, "__module__", "")).startswith("convattn") for one in functions)


BY_HAND: dict[str, Callable[[int], nn.Module]] = {
    "se": lambda dimensions: SqueezeExcite(16, dimensions=dimensions),
    "channel": lambda dimensions: ChannelAttention(16, dimensions=dimensions),
    "all pools": lambda dimensions: ChannelAttention(
        16, pools=("mean", "max", "l2", "logsumexp"), dimensions=dimensions
    ),
    "spatial": lambda dimensions: SpatialAttention(dimensions=dimensions),
    "spatial, identity": lambda dimensions: SpatialAttention(dimensions=dimensions, start="identity"),
    "cbam": lambda dimensions: CBAM(16, dimensions=dimensions),
    "spatial first": lambda dimensions: CBAM(16, order="spatial-channel", dimensions=dimensions),
    "parallel": lambda dimensions: CBAM(16, order="parallel", norm=None, dimensions=dimensions, start="identity"),
    "dual": lambda dimensions: DualPool(16, dimensions=dimensions),
    "concat": lambda dimensions: ConcatPool(16, dimensions=dimensions),
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", BY_HAND)
def test_modules_by_hand(name: str, dimensions: int) -> None:
    module, x = BY_HAND[name](dimensions).eval(), torch.randn(2, 16, *[5] * dimensions)
    if isinstance(strength := getattr(module, "strength", None), nn.Parameter):
        nn.init.constant_(strength, 0.7)
    check(fx.symbolic_trace(module), x, module(x))


@pytest.mark.parametrize("training", [False, True])
def test_mode_of_the_network(training: bool) -> None:
    model, x = with_attention(networks.plain("resnet20"), "cbam", "residual"), images()
    model.train(training)
    traced = fx.symbolic_trace(model)
    check(traced, x, model(x))


@pytest.mark.slow_unless(network=["densenet", "detector"])
@pytest.mark.slow_unless(network="resnet20", at=["residual", "shortcut", "pool"])
@pytest.mark.slow_unless(network="mobilenet_v2", at="final")
@pytest.mark.parametrize("at", [*PLACES, "pool"])
@pytest.mark.parametrize("network", ["resnet20", "mobilenet_v2", "densenet", "detector"])
def test_every_place(network: str, at: str) -> None:
    attention = "dual" if at == "pool" else "cbam"
    model, x = networks.plain(network), images()
    try:
        with_attention(model, attention, at)
    except ValueError as error:
        assert "has no place" in str(error) and network in ("densenet", "detector")
        return
    with torch.no_grad():
        check(fx.symbolic_trace(model), x, model(x))


class LeavesByClass(fx.Tracer):
    """Takes for a leaf what is of one of these classes."""

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.kinds) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.slow_unless(network="resnet20", at="shortcut")
@pytest.mark.slow_unless(network="densenet", at=["block", "pool"])
@pytest.mark.parametrize("at", [*PLACES, "pool"])
@pytest.mark.parametrize("network", ["resnet20", "mobilenet_v2", "densenet"])
def test_leaves_of_any_kind(network: str, at: str) -> None:
    model, x = networks.plain(network), images()
    kinds = {type(one) for one in model.modules() if one is not model}
    try:
        with_attention(model, "dual" if at == "pool" else "se", at)
    except ValueError:
        return
    with torch.no_grad():
        y = model(x)
        for kind in kinds:
            graph = LeavesByClass((kind,)).trace(model)
            assert distance(fx.GraphModule(model, graph)(x), y) < 1e-5, kind


@pytest.mark.slow_unless(at=["residual", "final", "pool"])
@pytest.mark.parametrize("at", [*PLACES, "pool"])
def test_feature_extractor_gives_maps(at: str) -> None:
    model, x = networks.plain("resnet20"), images()
    attach(model, "dual" if at == "pool" else "cbam", at=at, example=x, **({"where": "*"} if at == "layer" else {}))
    networks.stronger(model)
    names, _ = get_graph_node_names(model)
    assert names
    features = create_feature_extractor(model, {f"layer{number}": str(number) for number in (1, 2, 3)})(x)
    maps: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3):
        model.get_submodule(f"layer{number}").register_forward_hook(
            lambda module, args, y, number=number: maps.update({str(number): y})
        )
    model(x)
    assert all(distance(features[key], one) < 1e-5 for key, one in maps.items()) and len(maps) == 3


class Scaled(nn.Module):
    """A layer that takes numbers beside its map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, factor: float = 2.0, shift: int = 3) -> torch.Tensor:
        return self.conv(x) * factor + shift


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), Scaled(), Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.one(torch.relu(x), 0.5)
        return x + self.two(torch.relu(x), shift=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_script_of_a_layer_that_takes_more_than_a_map() -> None:
    model, x = Scaling().eval(), images()
    networks.stronger(attach(model, "se", example=x))
    y = model(x)
    assert len(networks.sites(model)) == 2
    assert distance(torch.jit.script(model)(x), y) < 1e-5
    # the network is as it was, and can be copied
    assert torch.equal(model(x), y) and len(networks.sites(model)) == 2
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy.deepcopy(other)(x), y) and len(networks.sites(other)) == 2
