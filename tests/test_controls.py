"""Controls: of the variant's size, identities at the start, and without the variant's idea."""

from typing import Any

import pytest
import torch
from torch import nn

from convattn import attach, cost, networks
from convattn.attachment import attached
from convattn.errors import ConvattnError, InvalidOption
from convattn.train import checkpoint, controls
from convattn.train.gates import departures
from small_runs import write_network

VARIANTS = ("se", "channel", "spatial", "cbam", "dual", "concat", "cbam+dual", "se+max")


def built(variant: str, *, start: str = "paper", backbone: str = "resnet20", seed: int = 0) -> nn.Module:
    about = {"backbone": backbone, "variant": variant, "start": start, "classes": list("abcde"), "image_size": 32}
    torch.manual_seed(seed)
    return checkpoint.build(about).eval()


def random_images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def randomised(network: nn.Module) -> nn.Module:
    """With weights, statistics and strengths as after a long training."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point() and ".attention." in name:
                noise = torch.randn(value.shape, generator=draw)
                value.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return network


@pytest.mark.parametrize(
    "name, expected",
    [
        ("placebo:cbam+dual", ("placebo", "cbam+dual")),
        ("noise", ("noise", "")),
        ("cbam+dual", (None, "cbam+dual")),
        ("baseline", (None, "baseline")),
        # not of ours
        ("mine:cbam", (None, "mine:cbam")),
        ("adapter:", (None, "adapter:")),
    ],
)
def test_parts(name: str, expected: tuple[str | None, str]) -> None:
    assert controls.parts(name) == expected


# size


@pytest.mark.slow_unless(variant=["se", "spatial", "dual", "cbam+dual"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_placebo_has_the_parameters_of_its_variant(variant: str) -> None:
    own, placebo = built(variant), built(f"placebo:{variant}")
    assert [one.shape for one in own.parameters()] == [one.shape for one in placebo.parameters()]
    # and their values
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), placebo.parameters(), strict=True))


@pytest.mark.slow_unless(start="paper", variant=["spatial", "dual"])
@pytest.mark.slow_unless(start="identity", variant="cbam")
@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_has_about_the_parameters_of_its_variant(variant: str, start: str) -> None:
    base = cost.parameters(built("baseline"))
    own, adapter = (cost.parameters(built(name, start=start)) - base for name in (variant, f"adapter:{variant}"))
    assert adapter == pytest.approx(own, rel=0.1)
    sites = [dict(attached(built(name, start=start))) for name in (variant, f"adapter:{variant}")]
    assert list(sites[0]) == list(sites[1])
    for name, wrapper in sites[1].items():
        # a step of the hidden width is two numbers for each channel; half of that is as near as it gets
        wanted = controls.size(sites[0][name].attention)
        found = controls.size(wrapper.attention)
        assert abs(found - wanted) <= wrapper.convattn_site.channels
        assert (type(wrapper.attention) is type(sites[0][name].attention)) == (wrapper.convattn_site.place == "pool")


def test_the_nearest_bottleneck() -> None:
    for channels in (1, 2, 3, 16, 24):
        every = {
            hidden * (2 * channels + inner) + outer * channels
            for hidden in range(1, 60)
            for inner in (0, 1)
            for outer in (0, 1)
        }
        for parameters in range(1, 50 * channels, 7):
            hidden, inner, outer = controls.bottleneck(channels, parameters)
            found = hidden * (2 * channels + inner) + outer * channels
            assert abs(found - parameters) == min(abs(one - parameters) for one in every)
            made = controls.Adapter(channels, parameters, dimensions=2, zero=False)
            assert cost.parameters(made) == found


@pytest.mark.slow_unless(variant="dual")
@pytest.mark.parametrize("variant", ["cbam", "dual", "cbam+dual"])
def test_a_wider_network_is_the_nearest_one(variant: str) -> None:
    base, own = cost.parameters(built("baseline")), cost.parameters(built(variant))
    wider = built(f"wider:{variant}")
    assert cost.parameters(wider) > base and not attached(wider)
    assert wider(random_images()).shape == (4, 5)
    # among all networks of 16 to 18, 32 to 36 and 64 to 72 channels in proportion
    widths = [networks.resnet20(classes=5, width=1 + step / 512) for step in range(64)]
    sizes = {cost.parameters(network) for network in widths} - {base}
    assert abs(cost.parameters(wider) - own) == min(abs(size - own) for size in sizes)


# at the start


@pytest.mark.slow_unless(variant=["se", "dual", "cbam+dual"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["placebo", "adapter"])
def test_the_start_is_the_baseline_to_the_bit(kind: str, variant: str) -> None:
    baseline, control = built("baseline"), built(f"{kind}:{variant}", start="identity")
    x = random_images()
    assert torch.equal(control(x), baseline(x))
    assert torch.equal(control.train()(x), baseline.train()(x))


@pytest.mark.parametrize("kind", ["baseline", "noise", "placebo:cbam", "adapter:cbam"])
def test_the_weights_of_a_seed_are_the_baselines(kind: str) -> None:
    baseline, control = built("baseline", seed=5).state_dict(), built(kind, seed=5).state_dict()
    assert all(torch.equal(value, control[key]) for key, value in baseline.items())
    assert (len(control) > len(baseline)) == (":" in kind)


def test_the_weights_of_a_wider_network_depend_on_the_seed_alone() -> None:
    one, again, other = (built("wider:dual", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.slow_unless(kind="placebo", start="paper", variant="se")
@pytest.mark.slow_unless(kind="adapter", start="identity", variant="cbam+dual")
@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("variant", ["se", "cbam", "cbam+dual"])
@pytest.mark.parametrize("kind", ["placebo", "adapter"])
def test_everything_learns(kind: str, variant: str, start: str) -> None:
    network = built(f"{kind}:{variant}", start=start).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    added = {name: value.clone() for name, value in network.named_parameters() if ".attention." in name}
    # what stands behind a strength of 0, or before zeros, moves from the second step on
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(random_images()), torch.arange(4)).backward()
        optimizer.step()
    now = dict(network.named_parameters())
    moved = {name.partition(".attention.")[0] for name, value in added.items() if not torch.equal(value, now[name])}
    sites = {name for name, _ in attached(network)}
    # a single hidden unit without bias either answers to ones or never will
    silent = kind == "placebo" and variant == "se"
    assert moved < sites and "layer3.1.bn2" in moved if silent and start == "paper" else moved == sites
    assert departures(network.eval(), random_images())[0]["departure"] > 0


def test_an_adapter_from_the_papers_start_is_the_baseline_too() -> None:
    x = random_images()
    assert torch.equal(built("adapter:cbam")(x), built("baseline")(x))


# the idea is left out


@pytest.mark.parametrize("variant", ["se", "channel", "spatial", "cbam"])
def test_a_placebos_gate_does_not_depend_on_the_map(variant: str) -> None:
    own, placebo = (randomised(built(name, start="identity")) for name in (variant, f"placebo:{variant}"))
    # of the last stage, where the bottleneck has several units
    map_ = torch.randn(2, 64, 1, 1) + 0.1 * torch.randn(2, 64, 9, 9)
    factors = []
    for network in (own, placebo):
        attention = network.layer3[0].bn2.attention
        factors.append([attention(x) / x for x in (map_, map_.flip(0, 1) * 2)])
    assert not torch.allclose(*factors[0], rtol=1e-3)
    torch.testing.assert_close(*factors[1])
    # the same for both images, and not the same as none
    torch.testing.assert_close(factors[1][0][0], factors[1][0][1])
    assert (factors[1][0] - 1).abs().max() > 0.05


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_a_placebo_of_a_head_adds_a_constant(start: str) -> None:
    placebo = randomised(built("placebo:dual", start=start))
    attention = dict(attached(placebo))["avgpool"].attention
    changes = [attention(x, x.mean((2, 3))) - x.mean((2, 3)) for x in torch.rand(2, 3, 64, 8, 8)]
    torch.testing.assert_close(*changes)
    torch.testing.assert_close(changes[0][0], changes[0][1])
    assert changes[0].abs().max() > 0.05


def test_an_adapter_has_no_gate() -> None:
    network = randomised(built("adapter:cbam+dual", start="identity"))
    wrapper = dict(attached(network))["layer2.0.bn2"].attention
    x = torch.randn(2, 32, 5, 5)
    down, up, strength = wrapper.module.down, wrapper.module.up, wrapper.strength
    hidden = torch.einsum("bchw,kc->bkhw", x, down.weight[:, :, 0, 0])
    hidden = (hidden + (0 if down.bias is None else down.bias[:, None, None])).clamp(min=0)
    added = torch.einsum("bkhw,ck->bchw", hidden, up.weight[:, :, 0, 0])
    added = added + (0 if up.bias is None else up.bias[:, None, None])
    torch.testing.assert_close(wrapper(x), x + strength * added, rtol=1e-4, atol=1e-4)


def test_where_nothing_learns_nothing_is_exchanged() -> None:
    x = random_images()
    own, placebo = (attach(networks.resnet20(classes=5), "max", start="paper") for _ in range(2))
    with pytest.raises(InvalidOption, match="'max' has no parameters"):
        controls.exchange(placebo, "placebo", "max")
    placebo.load_state_dict(own.state_dict())
    assert torch.equal(own.eval()(x), placebo.eval()(x))
    joined = dict(attached(built("adapter:se+max")))
    assert isinstance(joined["layer1.0.bn2"].attention.module, controls.Adapter)
    assert not isinstance(joined["avgpool"].attention.head, controls.Adapter)


# as files, and refused


@pytest.mark.parametrize("name", ["placebo:cbam+dual", "adapter:cbam+dual", "wider:dual", "noise"])
def test_a_control_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    network = randomised(built(name, start="identity"))
    about = {"backbone": "resnet20", "variant": name, "start": "identity", "classes": list("abcde"), "image_size": 32}
    checkpoint.save(tmp_path / "weights.safetensors", network, {**about, "mean": [0.5] * 3, "std": [0.5] * 3})
    again, found = checkpoint.load(tmp_path / "weights.safetensors")
    assert found["variant"] == name
    assert torch.equal(again(random_images()), network(random_images()))


@pytest.mark.parametrize("kind", ["placebo", "adapter", "wider"])
@pytest.mark.parametrize("variant", ["avg", "max", "avgmax"])
def test_no_control_for_what_does_not_learn(kind: str, variant: str) -> None:
    with pytest.raises(InvalidOption, match="parameters"):
        built(f"{kind}:{variant}", start="paper")


def test_no_wider_network_with_loaded_weights() -> None:
    about = {"backbone": "resnet20", "start": "paper", "classes": range(5), "image_size": 32}
    with pytest.raises(InvalidOption, match="wider is a control for random weights"):
        controls.wider(about, "cbam", weights="weights.pt")


def test_no_wider_network_without_an_option_for_its_width(tmp_path: Any) -> None:
    file = write_network(tmp_path)
    with pytest.raises(
        InvalidOption, match=r"no option for its width \(tried: width\)\. The control adapter"
    ) as raised:
        built("wider:se", backbone=f"{file}:network")
    assert "\n" not in str(raised.value)


# width


OWN = """
from torch import nn

def wide(classes=3, width=1.0):
    hidden = round(10 * width)
    return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, classes))

def misled(classes=3, width=10):
    return nn.Sequential(nn.Linear(4, 10 * width), nn.Linear(10 * width, classes))
"""


def test_a_width_of_ones_own(tmp_path: Any) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    # 5 for each hidden one, and 5 for each of 3 classes
    network = networks.wider(f"{file}:wide", classes=3, parameters=13 * 8 + 3)
    assert cost.parameters(network) == 13 * 8 + 3
    # 1.0 is not the width that it has
    with pytest.raises(InvalidOption, match="no option for its width"):
        networks.wider(f"{file}:misled", classes=3, parameters=10_000)
    with pytest.raises(InvalidOption, match="has 83 parameters already: 83 are not more"):
        networks.wider(f"{file}:wide", classes=3, parameters=83)
    with pytest.raises(InvalidOption, match="by width, not 1,000,000"):
        networks.wider(f"{file}:wide", classes=3, parameters=1_000_000)


def test_the_search_leaves_random_numbers_alone() -> None:
    torch.manual_seed(1)
    wider = networks.wider("resnet20", classes=5, parameters=290_000)
    torch.manual_seed(1)
    channels = wider.conv1.out_channels, wider.layer2[0].conv1.out_channels, wider.linear.in_features
    assert channels[0] >= 16 and channels == (channels[0], round(channels[2] / 2), channels[2])
    first = torch.nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
    assert wider.conv1.weight.shape == first.weight.shape
    torch.manual_seed(1)
    again = networks.wider("resnet20", classes=5, parameters=290_000)
    assert torch.equal(wider.conv1.weight, again.conv1.weight)


@pytest.mark.slow_unless(name="torchvision:mobilenet_v3_small")
@pytest.mark.parametrize(
    "name, within", [("timm:resnet18", 0.01), ("torchvision:mobilenet_v3_small", 0.02), ("torchvision:resnet50", 0.02)]
)
def test_widths_of_published_networks(name: str, within: float) -> None:
    plain = cost.parameters(networks.create(name, classes=5))
    wider = networks.wider(name, classes=5, parameters=round(1.05 * plain)).eval()
    assert cost.parameters(wider) / plain == pytest.approx(1.05, abs=within)
    with torch.no_grad():
        assert wider(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_unknown_networks_stay_unknown() -> None:
    with pytest.raises(ConvattnError, match="resnet2O"):
        networks.wider("resnet2O", parameters=10)
    with pytest.raises(InvalidOption, match="width must be a number"):
        networks.resnet20(width=0.0)
