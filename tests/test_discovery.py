"""Residual sums found by watching one forward pass, in networks written for the check and in those of timm."""

import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import nn

from convattn import attach, detach, plan
from convattn.attachment import attached
from convattn.attachment.sums import sums
from convattn.errors import AttachError
from convattn.networks.watching import watch


def layers(channels: int, dimensions: int = 2) -> nn.Sequential:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return nn.Sequential(convolution(channels, channels, 3, padding=1), nn.ReLU(), convolution(channels, channels, 1))


class Written(nn.Module):
    """A network with one way of adding."""

    def __init__(self, way: str, dimensions: int = 2) -> None:
        super().__init__()
        self.way = way
        self.f, self.g = layers(8, dimensions), layers(8, dimensions)
        self.blocks = nn.ModuleDict({"one": layers(8, dimensions), "two": layers(8, dimensions)})
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "in place":
            out = self.f(x)
            out += x
            return self.relu(out)
        if self.way == "torch.add":
            return torch.add(x, self.f(x))
        if self.way == "three":
            return x + self.f(x) + self.g(x)
        if self.way == "called three times":
            for _ in range(3):
                x = x + self.f(x)
            return x
        if self.way == "checkpoint":
            return torch.utils.checkpoint.checkpoint(lambda y: y + self.f(y), x, use_reentrant=False)
        if self.way == "module dict":
            for block in self.blocks.values():
                x = self.relu(x + block(x))
            return x
        if self.way == "control flow":
            return x + self.f(x) if x.mean() < 1e9 else self.g(x)
        if self.way == "function":
            return x + torch.sigmoid(self.f(x))
        if self.way == "used elsewhere":
            return x + self.f(x) * 0 + self.f(x + 1).mean()
        return self.g(self.f(x))


WAYS = {
    "in place": ["f.2"],
    "torch.add": ["f.2"],
    "three": ["f.2", "g.2"],
    "called three times": ["f.2"],
    "checkpoint": ["f.2"],
    "module dict": ["blocks.one.2", "blocks.two.2"],
    "control flow": ["f.2"],
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_written(way: str, dimensions: int) -> None:
    network = Written(way, dimensions)
    x = torch.randn(2, 8, *[6] * dimensions)
    expected = network(x)
    found = plan(network, "cbam", example=x)
    assert [site.name for site in found] == WAYS[way]
    assert all(site.dimensions == dimensions and site.channels == 8 for site in found)
    attach(network, found)
    assert torch.equal(network(x), expected)
    for _, wrapper in attached(network):
        nn.init.constant_(wrapper.attention.strength, 0.5)
    assert not torch.equal(network(x), expected)
    assert torch.equal(detach(network)(x), expected)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("none", r"no place at 'residual'\. It has these.*'block' \(\d\), 'stage' \(1\), 'final' \(1\)"),
        ("function", r"ends in a function \(sigmoid\)"),
        ("used elsewhere", "in a function"),
    ],
)
def test_no_place(way: str, reason: str) -> None:
    network = Written(way)
    with pytest.raises(AttachError, match=reason):
        plan(network, "se", example=torch.randn(1, 8, 6, 6))


class ChannelsLast(nn.Module):
    """A block whose maps are (B, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm(x))


def test_channels_last_map() -> None:
    network, x = ChannelsLast(), torch.randn(2, 3, 10, 14)
    (site,) = plan(network, "cbam", example=x)
    assert (site.name, site.channels, site.size, site.channels_last) == ("mlp.2", 6, (5, 7), True)
    expected = network(x)
    attach(network, "cbam", example=x)
    assert torch.equal(network(x), expected)
    # a gate of one constant scales the branch
    attention = network.mlp[2].attention
    nn.init.constant_(attention.strength, 1.0)
    y = network.stem(x).permute(0, 2, 3, 1)
    branch = network.mlp[2].inner(network.mlp[:2](network.norm(y)))
    assert torch.allclose(network(x), y + attention(branch.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_arguments_by_name_and_by_place() -> None:
    class Two(Written):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x * scale + self.f(x * scale)

    x, scale = torch.randn(1, 8, 5, 5), torch.ones(1)
    for example in ((x, scale), {"x": x, "scale": scale}):
        assert [site.name for site in plan(Two(""), "se", example=example)] == ["f.2"]


def test_watching_leaves_the_network_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    watch(network, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(AttachError, match="does not run on the example"):
        plan(Written("torch.add"), "se", example=torch.randn(1, 3, 6, 6))


# sites, sums that are none and why; counted by hand from the published block counts
NETWORKS = {
    "resnet18": (8, set()),
    "resnet50": (16, set()),
    "mobilenetv3_small_100": (6, set()),
    "efficientnet_b0": (9, set()),
    "convnext_atto": (12, set()),
    "regnety_002": (13, set()),
    "res2net50_14w_8s": (16, {"inside the branch of another sum"}),
    "darknet53": (23, set()),
    # three of its blocks end token branches and map branches in one and the same layer, after a scale by a function
    "edgenext_xx_small": (12, None),
}


@pytest.mark.slow_unless(name=["resnet18", "efficientnet_b0", "convnext_atto", "regnety_002", "edgenext_xx_small"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm(name: str) -> None:
    count, reasons = NETWORKS[name]
    network, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        found = plan(network, "se", example=x)
        assert len(found) == count
        assert reasons is None or {one.reason for one in found.skipped} == reasons
        assert torch.equal(attach(network, found)(x), expected)


@pytest.mark.slow_unless(name=["mobilenetv2_050", "convnext_atto"])
@pytest.mark.parametrize("name", ["resnet18", "resnet26", "mobilenetv2_050", "efficientnet_b0", "convnext_atto"])
def test_blocks_on_maps_of_one_position(name: str) -> None:
    network = timm.create_model(name).eval()
    large, small = (plan(network, "se", at="block", example=torch.randn(2, 3, side, side)) for side in (96, 32))
    assert [site.name for site in small] == [site.name for site in large]
    assert small.sites[-1].size == (1, 1) and not small.skipped
    large, small = (plan(network, "se", at="stage", example=torch.randn(2, 3, side, side)) for side in (96, 32))
    assert [site.name for site in small][-1] == [site.name for site in large][-1]


class TokenBlock(nn.Module):
    """A block as in a transformer, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Tokens(nn.Module):
    """Two blocks of maps, or none, before two of tokens."""

    def __init__(self, *maps: nn.Module) -> None:
        super().__init__()
        self.stem, self.maps = nn.Conv2d(3, 8, 2, 2), nn.ModuleList(maps)
        self.blocks = nn.ModuleList([TokenBlock(), TokenBlock()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.maps:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_blocks_of_tokens_are_listed() -> None:
    x = torch.randn(2, 3, 16, 16)
    for at in ("block", "stage"):
        found = plan(Tokens(Written("torch.add"), Written("torch.add")), "se", at=at, example=x)
        assert [site.name for site in found] == ["maps.0", "maps.1"][at == "stage" :]
        reason = "a block of tokens, not of maps"
        assert [(one.name, one.reason) for one in found.skipped] == [("blocks.0", reason), ("blocks.1", reason)]


# residual sites, and sums of parallel convolutions
FAMILIES = {
    "repvit_m1": (26, 23),
    "fastvit_t8": (10, 30),
    "poolformer_s12": (24, 0),
    "ghostnet_050": (16, 0),
    # its branches are scaled by functions
    "test_nfnet": (4, 0),
}


@pytest.mark.slow_unless(name=["repvit_m1", "poolformer_s12", "ghostnet_050", "test_nfnet"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_linear_sums(name: str) -> None:
    found = plan(timm.create_model(name).eval(), "se", example=torch.randn(1, 3, 64, 64))
    linear = [one for one in found.skipped if one.reason.startswith("parallel convolutions")]
    assert (len(found), len(linear)) == FAMILIES[name]


def test_parallel_convolutions_are_no_residual_sums() -> None:
    network = timm.create_model("repvgg_a0").eval()
    found = sums(watch(network, torch.randn(1, 3, 64, 64)))
    assert {one.reason for one in found} == {"parallel convolutions"}
    with pytest.raises(AttachError, match="parallel convolutions"):
        plan(network, "se", example=torch.randn(1, 3, 64, 64))
