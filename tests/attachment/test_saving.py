"""What was attached, written to files and read back: nothing else is written, and no other network takes it."""

import copy
import dataclasses
import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import convattn
from convattn import attach, detach, errors, freeze_base, load, parameter_groups, save, unfreeze_base
from convattn.attachment import attached, descriptions
from tolerances import is_close

ABOUT, WEIGHTS = "attention.json", "attention.safetensors"
GATES, HEADS = convattn.names("gate"), convattn.names("head")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Block(nn.Module):
    """A residual block whose shortcut is a layer, or the block's input itself."""

    def __init__(self, channels_in: int, channels: int, *, dimensions: int = 2, bare: bool = False) -> None:
        super().__init__()
        convolution, norm = CONVOLUTIONS[dimensions], NORMS[dimensions]
        stride = 1 if channels == channels_in else 2
        self.conv1 = convolution(channels_in, channels, 3, stride, padding=1)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU()
        self.conv2 = convolution(channels, channels, 3, padding=1)
        self.bn2 = norm(channels)
        self.shortcut = nn.Identity() if stride == 1 else convolution(channels_in, channels, 1, stride)
        self.bare = bare and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.bare else self.shortcut(x)))


class Network(nn.Module):
    """Two stages of two blocks, pooled by a layer, by a function of a layer's map, or after another function."""

    def __init__(self, pooling: str = "layer", *, dimensions: int = 2, bare: bool = False) -> None:
        super().__init__()
        shape = {"dimensions": dimensions, "bare": bare}
        self.stem = CONVOLUTIONS[dimensions](3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8, 8, **shape), Block(8, 8, **shape))
        self.layer2 = nn.Sequential(Block(8, 16, **shape), Block(16, 16, **shape))
        self.norm = NORMS[dimensions](16)
        self.pool = POOLS[dimensions](1)
        self.head = nn.Linear(16, 5)
        self.pooling = pooling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layer2(self.layer1(self.stem(x))))
        if self.pooling == "layer":
            return self.head(self.pool(x).flatten(1))
        if self.pooling == "function":
            return self.head(x.mean(tuple(range(2, x.dim()))))
        return self.head(F.adaptive_avg_pool2d(F.leaky_relu(x, 0.3), 1).flatten(1))


class LastBlock(nn.Module):
    """A residual block on maps whose channels are the last dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mix(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.fc2(self.act(self.fc1(y)))


class Last(nn.Module):
    """A network whose maps have their channels in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(LastBlock(8), LastBlock(8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).permute(0, 2, 3, 1))).mean((1, 2)))


class Shared(nn.Module):
    """Two blocks with one layer in common, which has three names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 8))
        self.blocks[1].bn2 = self.blocks[0].bn2
        self.also = self.blocks[0].bn2
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Around(nn.Module):
    """A network that has another one inside."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def randomised(model: nn.Module) -> nn.Module:
    """With random batch-norm statistics, so that no gate stands on a fresh norm."""
    for module in model.modules():
        if isinstance(module, tuple(NORMS.values())):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(dimensions: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, *[8 if dimensions == 3 else 16] * dimensions, dtype=dtype)


def moved(model: nn.Module) -> nn.Module:
    """The same model, every parameter and buffer of its attention another one than at first."""
    with torch.no_grad():
        for _, wrapper in attached(model):
            for key, value in wrapper.attention.state_dict().items():
                if value.is_floating_point():
                    # neither saturated nor, as a variance, negative
                    value.copy_(torch.rand(value.shape) + 0.5 if "var" in key else 0.2 * torch.randn(value.shape) + 0.1)
                else:
                    value.add_(3)
    return model


def added(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".attention." in key}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same attention at the same sites, with equal parameters."""
    # JSON has lists for tuples
    sites = [
        [
            (name, type(wrapper).__name__, json.dumps(dataclasses.asdict(wrapper.site)))
            for name, wrapper in attached(model)
        ]
        for model in (one, other)
    ]
    # a layer may keep more than tensors
    first, second = (
        {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        for model in (one, other)
    )
    equal = list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    return sites[0] == sites[1] and equal


def check_round_trip(plain: nn.Module, folder: Path, *args: Any, x: torch.Tensor | None = None, **options: Any) -> None:
    """Attach, move, save, load into a copy of the plain network: the same network, which is not the plain one."""
    x = images() if x is None else x
    model = moved(attach(copy.deepcopy(plain), *args, **options))
    fresh = copy.deepcopy(plain)
    assert load(fresh, save(model, folder)) is fresh
    assert same(fresh, model)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(fresh(x), y)
        # a mean beside a mean changes nothing
        assert args[0] == "avg" or not is_close(y, plain(x))
        # in train mode as well, statistics included
        assert torch.equal(fresh.train()(x), model.train()(x)) and same(fresh, model)


def state(model: nn.Module) -> list[Any]:
    """What a failure must leave as it is: layers by identity, modes, hooks, and parameters by value."""
    layers = [(name, id(one), one.training, len(one._forward_hooks)) for name, one in model.named_modules()]
    return layers + [(key, value.clone()) for key, value in model.state_dict().items()]


def check_unchanged(before: list[Any], model: nn.Module) -> None:
    after = state(model)
    assert len(after) == len(before)
    for one, other in zip(before, after, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]) if isinstance(one[1], torch.Tensor) else one == other


def check_refused(model: nn.Module, error: type[Exception], match: str, folder: Path, **options: Any) -> str:
    """The message of a refusal, of one line, that left the model as it was."""
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        load(model, folder, **options)
    check_unchanged(before, model)
    message = str(caught.value)
    assert isinstance(caught.value, errors.ConvattnError) and "\n" not in message
    assert message.endswith("The model was not changed.")
    return message


# what is written


@pytest.mark.slow_unless(start="paper")
@pytest.mark.parametrize("attention", [*GATES, *HEADS, "cbam+dual"])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_only_what_was_added_is_written(attention: str, start: str, tmp_path: Path) -> None:
    model = moved(attach(randomised(Network()), attention, start=start))
    assert save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [ABOUT, WEIGHTS]
    written = safetensors.torch.load_file(tmp_path / "new" / "folder" / WEIGHTS)
    expected = added(model)
    assert sorted(written) == sorted(expected)
    assert expected or (start == "paper" and attention in ("avg", "max", "avgmax"))
    assert all(
        torch.equal(written[key], value) and written[key].dtype == value.dtype for key, value in expected.items()
    )


def test_description(tmp_path: Path) -> None:
    model = attach(Network(), "cbam+dual", reduction=4, kernel_size=3)
    about = json.loads((save(model, tmp_path) / ABOUT).read_text())
    assert about["convattn"] == convattn.__version__ and about["torch"] == torch.__version__
    assert about["base"]["network"].endswith("Network")
    # of the plain network, and of nothing that was added
    kept = [key for key in Network().state_dict() if not key.endswith("num_batches_tracked")]
    assert sorted(about["base"]["tensors"]) == sorted(kept)
    described = [(site["name"], site["attention"], site["options"], site["start"]) for site in about["sites"]]
    gate = {"reduction": 4, "kernel_size": 3}
    names = [f"layer{stage}.{block}.bn2" for stage in (1, 2) for block in (0, 1)]
    assert described == [(name, "cbam", gate, "identity") for name in names] + [("pool", "dual", {}, "identity")]


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = attach(Network().train(), "cbam+dual")
    before = state(model)
    save(model, tmp_path)
    check_unchanged(before, model)


def test_a_network_without_attention_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(errors.AttachError, match="Network has no attention to save"):
        save(Network(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_with_other_content(tmp_path: Path) -> None:
    others = {"notes.txt": b"mine", "model.safetensors": b"\0\1", "below/attention.json": b"{}", "attention": b"?"}
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    model = moved(attach(randomised(Network()), "se"))
    fresh = detach(copy.deepcopy(model))
    save(attach(Network(), "cbam"), tmp_path)
    save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ABOUT, WEIGHTS, "below", *others} - {"below/attention.json"}
    assert all((tmp_path / name).read_bytes() == content for name, content in others.items())
    # the first was replaced, of another attention as it was
    assert same(load(fresh, tmp_path), model)


def test_an_option_that_cannot_be_written(tmp_path: Path) -> None:
    def factory(channels: int, activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 1), activation)

    model = attach(Network(), factory, activation=nn.Sigmoid())
    with pytest.raises(errors.InvalidOption, match="cannot be written to JSON"):
        save(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_failure_while_saving_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomised(Network())
    model = moved(attach(copy.deepcopy(plain), "se"))
    save(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(moved(model), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# round trips


@pytest.mark.slow_unless(start="paper", attention=["cbam", "spatial", "dual", "spatial+concat"])
@pytest.mark.parametrize("attention", [*GATES, *HEADS, "cbam+dual", "spatial+concat"])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_every_module(attention: str, start: str, tmp_path: Path) -> None:
    check_round_trip(randomised(Network()), tmp_path, attention, start=start)


@pytest.mark.slow_unless(attention="cbam", at=["residual", "shortcut", "stage", "layer"])
@pytest.mark.parametrize(
    "at", ["residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final", "layer"]
)
@pytest.mark.parametrize("attention", ["se", "cbam"])
def test_every_place(at: str, attention: str, tmp_path: Path) -> None:
    where = {"where": ["stem", "layer2.0.conv1"]} if at == "layer" else {}
    check_round_trip(randomised(Network()), tmp_path, attention, at=at, **where)
    sites = [(site["place"], site["found"]["side"]) for site in json.loads((tmp_path / ABOUT).read_text())["sites"]]
    assert set(sites) == {(at, "before" if at == "residual-pre" else "after")}


@pytest.mark.parametrize("attention", ["se", "cbam"])
def test_shortcuts_without_a_layer(attention: str, tmp_path: Path) -> None:
    check_round_trip(randomised(Network(bare=True)), tmp_path, attention, at="shortcut")
    sides = [site["found"]["side"] for site in json.loads((tmp_path / ABOUT).read_text())["sites"]]
    assert sides == ["shortcut", "shortcut", "after", "shortcut"]


@pytest.mark.slow_unless(attention="dual")
@pytest.mark.slow_unless(id="cbam+dual-layer-pool")
@pytest.mark.parametrize("pooling, side", [("layer", "pool"), ("function", "map"), ("functions", "vector")])
@pytest.mark.parametrize("attention", [*HEADS, "cbam+dual"])
def test_every_pooling(pooling: str, side: str, attention: str, tmp_path: Path) -> None:
    check_round_trip(randomised(Network(pooling)), tmp_path, attention)
    site = json.loads((tmp_path / ABOUT).read_text())["sites"][-1]
    assert site["found"]["side"] == side


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("attention", ["cbam", "dual"])
def test_other_dimensions(dimensions: int, attention: str, tmp_path: Path) -> None:
    plain = randomised(Network(dimensions=dimensions))
    x = images(dimensions)
    check_round_trip(plain, tmp_path, attention, x=x, example=x)


@pytest.mark.parametrize("at", ["residual", "residual-pre", "block", "stage", "final", "pool"])
def test_channels_in_the_last_dimension(at: str, tmp_path: Path) -> None:
    check_round_trip(Last(), tmp_path, "dual" if at == "pool" else "cbam", at=at)
    assert all(site["channels_last"] for site in json.loads((tmp_path / ABOUT).read_text())["sites"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    check_round_trip(randomised(Network()).to(dtype), tmp_path, "cbam+dual", x=images(dtype=dtype))
    written = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert {value.dtype for value in written.values() if value.is_floating_point()} == {dtype}


def test_options_of_the_modules(tmp_path: Path) -> None:
    options = {"reduction": 4, "pools": ("max", "l2"), "norm": None, "kernel_size": 3, "order": "parallel"}
    check_round_trip(randomised(Network()), tmp_path, "cbam+dual", **options)


def test_several_calls(tmp_path: Path) -> None:
    plain = randomised(Network("functions"))
    model = attach(copy.deepcopy(plain), "se", stages=1, reduction=2)
    attach(model, "cbam", stages=2, start="paper", kernel_size=3)
    attach(model, "spatial", at="residual-pre", where="layer1.1")
    attach(model, "dual")
    fresh = load(copy.deepcopy(plain), save(moved(model), tmp_path))
    x = images()
    assert [type(wrapper.attention).__name__ for _, wrapper in attached(fresh)] == [
        *("SqueezeExcite", "SpatialAttention", "SqueezeExcite", "CBAM", "CBAM", "BlendedHead")
    ]
    assert same(fresh, model) and torch.equal(fresh(x), model(x)) and not is_close(model(x), plain(x))


def test_gates_within_gates(tmp_path: Path) -> None:
    plain = randomised(Network())
    model = attach(attach(copy.deepcopy(plain), "se", at="block"), "cbam", at="residual")
    attach(model, "spatial", at="residual-pre")
    assert len(attached(moved(model))) == 12
    fresh = load(copy.deepcopy(plain), save(model, tmp_path))
    x = images()
    assert same(fresh, model) and torch.equal(fresh(x), model(x))
    # the fingerprint is that of the plain network, whatever is attached within what
    assert not any(".attention." in key for key in json.loads((tmp_path / ABOUT).read_text())["base"]["tensors"])


def test_a_layer_with_several_names(tmp_path: Path) -> None:
    plain = randomised(Shared())
    model = moved(attach(copy.deepcopy(plain), "cbam"))
    assert len(attached(model)) == 1
    written = safetensors.torch.load_file(save(model, tmp_path) / WEIGHTS)
    assert {key.split(".attention.")[0] for key in written} == {"blocks.0.bn2"}
    fresh, x = load(copy.deepcopy(plain), tmp_path), images()
    assert fresh.blocks[0].bn2 is fresh.blocks[1].bn2 is fresh.also
    assert same(fresh, model) and torch.equal(fresh(x), model(x)) and not is_close(model(x), plain(x))


def test_a_layer_with_several_arguments(tmp_path: Path) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x + self.conv2(torch.relu(self.conv1(x)) * scale)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.blocks = nn.ModuleList([Conditioned(), Conditioned()])

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, scale)
            return x.mean((2, 3))

    plain, inputs = Two(), (images(), torch.tensor(0.5))
    model = moved(attach(copy.deepcopy(plain), "se", at="block", example=inputs))
    fresh = load(copy.deepcopy(plain), save(model, tmp_path))
    assert len(attached(fresh)) == 2 and torch.equal(fresh(*inputs), model(*inputs))
    assert not is_close(model(*inputs), plain(*inputs))


def test_a_loaded_network_is_trained_and_saved_on(tmp_path: Path) -> None:
    plain = randomised(Network())
    model = attach(copy.deepcopy(plain), "se+dual")
    fresh = load(copy.deepcopy(plain).train(), save(model, tmp_path / "first"))
    assert all(module.training for module in fresh.modules())
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    fresh(images()).square().sum().backward()
    for name, wrapper in attached(fresh):
        assert wrapper.attention.strength.grad.any(), name
    again = load(copy.deepcopy(plain), save(moved(fresh.eval()), tmp_path / "second"), weights="any")
    assert list(added(again)) == list(added(fresh))
    assert all(torch.equal(value, added(fresh)[key]) for key, value in added(again).items())
    # and taken out again
    assert not attached(detach(fresh)) and list(fresh.state_dict()) == list(plain.state_dict())


def test_beside_other_attention(tmp_path: Path) -> None:
    plain = randomised(Network())
    one, other = (moved(attach(copy.deepcopy(plain), "se", stages=stage)) for stage in (1, 2))
    load(other, save(one, tmp_path))
    assert len(attached(other)) == 4
    with torch.no_grad():
        x = plain.stem(images())
        assert torch.equal(other.layer1(x), one.layer1(x)) and not is_close(one.layer1(x), plain.layer1(x))


def test_where_there_is_attention_already(tmp_path: Path) -> None:
    model = attach(randomised(Network()), "se")
    save(model, tmp_path)
    check_refused(model, errors.AttachError, "'layer1.0.bn2' has attention already", tmp_path)


@pytest.mark.slow_unless(pooling="layer")
@pytest.mark.parametrize("pooling", ["layer", "function", "functions"])
@pytest.mark.parametrize("at", ["residual", "shortcut"])
def test_a_part_of_a_network(at: str, pooling: str, tmp_path: Path) -> None:
    # attached as a whole, saved as a part, as an encoder is, and the other way round
    plain, x = randomised(Network(pooling, bare=True)), images()
    whole = moved(attach(Around(copy.deepcopy(plain)), "cbam+dual", at=at))
    part = load(copy.deepcopy(plain), save(whole.body, tmp_path / "part"))
    assert torch.equal(part(x), whole(x))
    again = load(Around(copy.deepcopy(plain)), save(Around(part), tmp_path / "whole"))
    assert torch.equal(again(x), whole(x)) and not is_close(whole(x), plain(x))


def test_a_network_with_state_beside_its_tensors(tmp_path: Path) -> None:
    class Counting(nn.Conv2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    plain = randomised(Network())
    plain.stem = Counting(3, 8, 3, padding=1)
    check_round_trip(plain, tmp_path, "se")


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    plain = randomised(Network())
    kinds = (torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float16, torch.complex64)
    for dtype in kinds:
        plain.register_buffer(f"some_{str(dtype)[6:]}", torch.ones(3, 2).to(dtype).t())
    plain.register_buffer("empty", torch.zeros(0, 4))
    plain.register_buffer("scalar", torch.tensor(3.0))
    plain.register_buffer("expanded", torch.ones(1).expand(5))
    check_round_trip(plain, tmp_path, "se")
    # another order in memory is no difference, another value is one
    load(copy.deepcopy(plain).to(memory_format=torch.channels_last), tmp_path)
    for name in ("some_bool", "some_bfloat16", "some_complex64", "scalar"):
        other = copy.deepcopy(plain)
        other.get_buffer(name).zero_()
        check_refused(other, errors.WeightsError, rf"1 tensor \({name}\)", tmp_path)
    # and so is another dtype of the same bytes
    other = copy.deepcopy(plain)
    other.empty = other.empty.int()
    check_refused(other, errors.WeightsError, r"1 tensor \(empty\) of \d+ \(float32 there, int32 here\)", tmp_path)


# factories


def squeezed(channels: int, width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))


def vector(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, 7))


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("factory, at", [(squeezed, "residual"), (squeezed, "block"), (vector, "pool")])
def test_factories(factory: Callable[..., nn.Module], at: str, start: str, tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    options = {"width": 3} if factory is squeezed else {}
    model = moved(attach(copy.deepcopy(plain), factory, at=at, start=start, **options))
    save(model, tmp_path)
    assert sorted(safetensors.torch.load_file(tmp_path / WEIGHTS)) == sorted(added(model))
    fresh = load(copy.deepcopy(plain), tmp_path, factories={factory.__name__: factory, "other": vector})
    assert same(fresh, model) and torch.equal(fresh(x), model(x)) and not is_close(model(x), plain(x))


def test_a_factory_that_is_not_given(tmp_path: Path) -> None:
    plain = randomised(Network())
    save(attach(copy.deepcopy(plain), squeezed), tmp_path)
    for factories in (None, {}, {"se": squeezed}):
        match = r"'layer1.0.bn2' was made by a factory called 'squeezed': give it with factories=\{'squeezed'"
        check_refused(plain, errors.WeightsError, match, tmp_path, factories=factories)


def test_a_factory_with_the_name_of_a_registered_module(tmp_path: Path) -> None:
    def se(channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1)

    plain, x = randomised(Network()), images()
    model = moved(attach(copy.deepcopy(plain), se))
    save(model, tmp_path)
    check_refused(plain, errors.WeightsError, "made by a factory called 'se'", tmp_path)
    assert torch.equal(load(plain, tmp_path, factories={"se": se})(x), model(x))


def test_another_factory_of_that_name(tmp_path: Path) -> None:
    plain = randomised(Network())
    save(attach(copy.deepcopy(plain), squeezed), tmp_path)
    check_refused(plain, errors.WeightsError, "'layer1.0.bn2' do not fit", tmp_path, factories={"squeezed": vector})


def test_a_factory_that_fails_at_the_third_site(tmp_path: Path) -> None:
    plain = randomised(Network())
    save(attach(copy.deepcopy(plain), squeezed), tmp_path)
    built = []

    def breaking(channels: int) -> nn.Module:
        built.append(channels)
        if len(built) == 3:
            raise MemoryError
        return squeezed(channels)

    before = state(plain)
    with pytest.raises(MemoryError):
        load(plain, tmp_path, factories={"squeezed": breaking})
    assert len(built) == 3
    check_unchanged(before, plain)


# another network


def widened(model: Network) -> None:
    model.head = nn.Linear(16, 7)


def without_norm(model: Network) -> None:
    model.norm = nn.Identity()


def with_more(model: Network) -> None:
    model.layer1[0].extra = nn.Linear(3, 3)


def scaled(model: Network) -> None:
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1e-6


def with_statistics(model: Network) -> None:
    model.layer2[0].bn1.running_mean += 1


def doubled(model: Network) -> None:
    model.double()


def partly_doubled(model: Network) -> None:
    model.head.double()


@pytest.mark.parametrize(
    "change, match",
    [
        (widened, r"2 tensors \(head.weight, ...\) of another shape \(\[5, 16\] there, \[7, 16\] here\)"),
        (without_norm, r"4 tensors \(norm.weight, ...\) only there"),
        (with_more, r"2 tensors \(layer1.0.extra.weight, ...\) only here"),
    ],
)
@pytest.mark.parametrize("weights", ["same", "any"])
def test_a_network_of_another_structure(
    change: Callable[[Network], None], match: str, weights: str, tmp_path: Path
) -> None:
    plain = randomised(Network())
    save(attach(copy.deepcopy(plain), "cbam"), tmp_path)
    change(plain)
    message = check_refused(plain, errors.WeightsError, match, tmp_path, weights=weights)
    assert "test_saving.Network, and this is another network, " in message and str(tmp_path) in message


def test_every_difference_is_named(tmp_path: Path) -> None:
    save(attach(Network(), "se"), tmp_path)
    other = Network()
    for change in (widened, without_norm, with_more):
        change(other)
    message = check_refused(other, errors.WeightsError, "only there", tmp_path)
    assert "only here" in message and "of another shape" in message


def test_a_network_of_another_class_is_named(tmp_path: Path) -> None:
    save(attach(Network(), "se"), tmp_path)
    message = check_refused(Last(), errors.WeightsError, "another network", tmp_path)
    assert "test_saving.Network" in message and "test_saving.Last" in message


@pytest.mark.parametrize(
    "change, match",
    [
        (scaled, r"1 tensor \(stem.weight\) of \d+\. "),
        (with_statistics, r"1 tensor \(layer2.0.bn1.running_mean\) of \d+\. "),
        (doubled, r"\d+ tensors \(stem.weight, ...\) of \d+ \(float32 there, float64 here\)"),
        (partly_doubled, r"2 tensors \(head.weight, ...\) of \d+ \(float32 there, float64 here\)"),
    ],
)
def test_other_weights(change: Callable[[Network], None], match: str, tmp_path: Path) -> None:
    plain = randomised(Network())
    model = moved(attach(copy.deepcopy(plain), "cbam+dual"))
    save(model, tmp_path)
    change(plain)
    message = check_refused(plain, errors.WeightsError, match, tmp_path)
    assert "with other weights than this network has" in message and "weights='any'" in message
    load(plain, tmp_path, weights="any")
    assert len(attached(plain)) == 5
    dtypes = {value.dtype for value in added(plain).values() if value.is_floating_point()}
    assert dtypes == {torch.float64 if change is doubled else torch.float32}
    for key, value in added(plain).items():
        assert is_close(value.double(), added(model)[key].double()), key


def test_counts_of_steps_are_no_weights(tmp_path: Path) -> None:
    plain = randomised(Network())
    save(attach(copy.deepcopy(plain), "se"), tmp_path)
    plain.norm.num_batches_tracked += 5
    assert len(attached(load(plain, tmp_path))) == 4


def test_a_choice_of_weights(tmp_path: Path) -> None:
    save(attach(Network(), "se"), tmp_path)
    with pytest.raises(errors.InvalidOption, match="weights must be one of 'same', 'any', got 'none'"):
        load(Network(), tmp_path, weights="none")


# what was trained beside attention


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return images(), torch.tensor([0, 3])


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """After some steps in train mode, of everything that can be trained."""
    x, labels = batch()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, gate_lr=0.5), momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
    return model.eval()


def with_fresh_classifier(model: nn.Module) -> nn.Module:
    """A copy whose classifier has other random numbers."""
    fresh = copy.deepcopy(model)
    fresh.head.reset_parameters()
    return fresh


@pytest.mark.slow_unless(attention="se+dual")
@pytest.mark.parametrize("attention", ["cbam", "se+dual"])
@pytest.mark.parametrize("pooling", ["layer", "function", "functions"])
def test_what_freezing_kept_comes_back(attention: str, pooling: str, tmp_path: Path) -> None:
    plain, x = randomised(Network(pooling)), images()
    model = trained(freeze_base(attach(with_fresh_classifier(plain), attention, activation="gelu", reduction=2)))
    written = safetensors.torch.load_file(save(model, tmp_path) / WEIGHTS)
    assert sorted(written) == sorted([*added(model), "head.weight", "head.bias"])
    fresh = load(plain, tmp_path)
    assert same(fresh, model) and torch.equal(fresh(x), model(x))
    moving = [wrapper.attention.strength.item() for _, wrapper in attached(fresh)]
    assert all(moving) and not is_close(detach(copy.deepcopy(fresh))(x), fresh(x))


def test_weights_of_the_base_are_still_compared(tmp_path: Path) -> None:
    plain = randomised(Network())
    model = trained(freeze_base(attach(copy.deepcopy(plain), "se")))
    save(model, tmp_path)
    for change, match in ((scaled, "stem.weight"), (with_statistics, "layer2.0.bn1.running_mean")):
        other = with_fresh_classifier(plain)
        change(other)
        message = check_refused(other, errors.WeightsError, rf"1 tensor \({match}\) of", tmp_path)
        assert "whole=True" in message and "weights='any', which gives another output" in message
        # what was saved comes back all the same
        assert torch.equal(load(other, tmp_path, weights="any").head.weight, model.head.weight)
    wide = copy.deepcopy(plain)
    widened(wide)
    check_refused(wide, errors.WeightsError, r"2 tensors \(head.weight, ...\) of another shape", tmp_path)


@pytest.mark.parametrize(
    "keep, expected",
    [
        (None, set()),
        (["head.bias"], {"head.bias"}),
        (["layer2.1.bn1"], {f"layer2.1.bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}),
    ],
)
def test_what_is_kept_is_saved(keep: list[str] | None, expected: set[str], tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(freeze_base(attach(copy.deepcopy(plain), "cbam"), keep=keep))
    written = safetensors.torch.load_file(save(model, tmp_path) / WEIGHTS)
    assert {key for key in written if ".attention." not in key and "num_batches" not in key} == expected
    assert torch.equal(load(plain, tmp_path)(x), model(x))


def with_averages(model: nn.Module) -> nn.Module:
    # as moving averages of weights are made
    return copy.deepcopy(model).requires_grad_(False)


def with_other_classifier(model: nn.Module) -> nn.Module:
    model.head = nn.Linear(16, 5)
    return trained(model)


@pytest.mark.slow_unless(id=["with_averages", "with_other_classifier", "DataParallel", "<lambda>"])
@pytest.mark.parametrize(
    "change", [with_averages, with_other_classifier, torch.compile, nn.DataParallel, lambda model: pickled(model)]
)
def test_what_is_kept_is_saved_after_other_changes(change: Callable[..., nn.Module], tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(freeze_base(attach(copy.deepcopy(plain), "se")))
    changed = change(model)
    y = (changed if change in (with_averages, with_other_classifier) else model)(x)
    fresh = load(with_fresh_classifier(plain), save(changed, tmp_path))
    assert torch.equal(fresh(x), y) and not torch.equal(fresh.head.weight, plain.head.weight)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def test_a_network_whose_base_was_trained(tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(attach(copy.deepcopy(plain), "cbam+dual", activation="gelu", reduction=2))
    # attention alone does not compute the same on the network before
    message = check_refused(plain, errors.WeightsError, "with other weights", save(model, tmp_path / "alone"))
    assert "where the base was trained too, save it with whole=True" in message
    save(model, tmp_path / "whole", whole=True)
    written = safetensors.torch.load_file(tmp_path / "whole" / WEIGHTS)
    assert sorted(written) == sorted(model.state_dict())
    # into any network of that architecture, statistics and counts of steps included
    fresh = load(Network().eval(), tmp_path / "whole")
    assert same(fresh, model) and torch.equal(fresh(x), model(x))
    assert torch.equal(fresh.norm.num_batches_tracked, torch.tensor(3))
    # in train mode as well
    assert torch.equal(fresh.train()(x), model.train()(x)) and same(fresh, model)


def test_the_usual_stages_are_saved(tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(unfreeze_base(trained(freeze_base(attach(copy.deepcopy(plain), "cbam")))))
    assert not torch.equal(model.stem.weight, plain.stem.weight)
    # it is known that the base was trained
    fresh = load(Network().eval(), save(model, tmp_path / "first"))
    assert same(fresh, model) and torch.equal(fresh(x), model(x))
    # and that it came from a folder
    assert same(load(Network().eval(), save(fresh, tmp_path / "second")), model)
    # frozen again, the base is what the second folder has of it
    again = trained(freeze_base(load(copy.deepcopy(plain), tmp_path / "first")))
    base = load(Network().eval(), tmp_path / "first")
    assert len(safetensors.torch.load_file(save(again, tmp_path / "third") / WEIGHTS)) == 2 + len(added(again))
    assert torch.equal(load(detach(base), tmp_path / "third")(x), again(x))


def test_a_base_that_was_made_trainable_by_hand_is_saved(tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(freeze_base(attach(copy.deepcopy(plain), "se")).requires_grad_(True))
    assert torch.equal(load(with_fresh_classifier(plain), save(model, tmp_path))(x), model(x))


def test_a_loaded_network_can_be_saved_again(tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    model = trained(freeze_base(attach(copy.deepcopy(plain), "se")))
    first = load(copy.deepcopy(plain), save(model, tmp_path / "first"))
    assert torch.equal(load(copy.deepcopy(plain), save(first, tmp_path / "second"))(x), model(x))
    # of attention alone nothing else
    alone = load(copy.deepcopy(plain), save(attach(copy.deepcopy(plain), "se"), tmp_path / "alone"))
    assert sorted(safetensors.torch.load_file(save(alone, tmp_path / "again") / WEIGHTS)) == sorted(added(alone))


def test_tensors_of_every_kind_in_a_whole_network(tmp_path: Path) -> None:
    plain, x = randomised(Network()), images()
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.complex64):
        plain.register_buffer(f"some_{str(dtype)[6:]}", torch.ones(3, 2).to(dtype).t())
    plain.register_buffer("expanded", torch.ones(1).expand(5))
    # tied, and with a sign that zero has
    plain.again = plain.head
    with torch.no_grad():
        plain.head.bias[0] = -0.0
    model = trained(attach(copy.deepcopy(plain), "se"), steps=0)
    save(model, tmp_path, whole=True)
    fresh = copy.deepcopy(plain)
    with torch.no_grad():
        for one in (fresh.head.bias, fresh.some_bool, fresh.some_complex64):
            one.zero_()
    assert same(load(fresh, tmp_path), model) and torch.equal(fresh(x), model(x))
    assert torch.signbit(fresh.head.bias[0]) and fresh.again.weight is fresh.head.weight
    # what cannot be written to is no reason to stop half way
    other = copy.deepcopy(plain)
    other.expanded = torch.zeros(1).expand(5)
    check_refused(other, errors.WeightsError, "'expanded' of the network cannot be written to", tmp_path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Counting(nn.Conv2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Network()
    model.stem = Counting(3, 8, 3, padding=1)
    with pytest.warns(UserWarning, match="only tensors are saved, and not stem._extra_state"):
        save(attach(model, "se"), tmp_path / "state", whole=True)
    model = attach(Network(), "se")
    model.register_buffer("large", torch.ones(1, dtype=torch.complex128))
    with pytest.raises(errors.InvalidOption, match=r"a tensor cannot be written to safetensors .*complex128"):
        save(model, tmp_path / "complex", whole=True)
    assert not (tmp_path / "complex").exists()
    layer = attach(Network(), "se").layer1[0].bn2
    with pytest.raises(errors.AttachError, match="BatchNorm2d has attention on itself: save the network"):
        save(layer, tmp_path / "layer")


def test_a_failure_while_weights_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomised(Network())
    save(trained(attach(copy.deepcopy(plain), "se")), tmp_path, whole=True)

    def failing(*args: Any) -> None:
        raise MemoryError

    before = state(plain)
    monkeypatch.setattr("convattn.attachment.saving.exchange", failing)
    with pytest.raises(MemoryError):
        load(plain, tmp_path)
    check_unchanged(before, plain)


def test_a_network_without_memory(tmp_path: Path) -> None:
    save(attach(randomised(Network()), "se"), tmp_path, whole=True)
    with torch.device("meta"):
        model = Network()
    with pytest.raises(errors.WeightsError, match="Network is on the device meta, which holds no weights"):
        load(model, tmp_path)
    assert not attached(model)


def as_format_1(folder: Path) -> Path:
    """As it was written before tensors of the network could be."""

    def older(about: dict[str, Any]) -> None:
        for name in ("tensors", "digest"):
            del about[name]
        assert about["base"].pop("trained") == []
        about["format"] = 1

    described(folder, older)
    return folder


@pytest.mark.parametrize("attention", ["cbam+dual", "se"])
def test_folders_of_format_1(attention: str, tmp_path: Path) -> None:
    plain = randomised(Network())
    model = moved(attach(copy.deepcopy(plain), attention))
    as_format_1(save(model, tmp_path))
    assert sorted(json.loads((tmp_path / ABOUT).read_text())) == ["base", "convattn", "format", "sites", "torch"]
    fresh, x = load(plain, tmp_path), images()
    assert same(fresh, model) and torch.equal(fresh(x), model(x))


# damage


def saved(folder: Path) -> Network:
    """A plain network whose attention lies in a folder."""
    plain = randomised(Network())
    save(moved(attach(copy.deepcopy(plain), "cbam+dual")), folder)
    return plain


def described(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description."""
    about = json.loads((folder / ABOUT).read_text())
    change(about)
    (folder / ABOUT).write_text(json.dumps(about))


def weighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", [ABOUT, WEIGHTS])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    plain = saved(tmp_path)
    (tmp_path / name).unlink()
    message = check_refused(plain, errors.WeightsError, f"No {name} in", tmp_path)
    assert str(tmp_path) in message


def test_a_missing_folder(tmp_path: Path) -> None:
    check_refused(saved(tmp_path), errors.WeightsError, f"No {ABOUT} in", tmp_path / "nowhere")
    # a file is no folder
    check_refused(Network(), errors.WeightsError, f"No {ABOUT} in", tmp_path / WEIGHTS)


@pytest.mark.parametrize("name", [ABOUT, WEIGHTS])
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "bytes"])
def test_a_damaged_file(name: str, damage: str, tmp_path: Path) -> None:
    plain = saved(tmp_path)
    content = (tmp_path / name).read_bytes()
    damaged = {"empty": b"", "cut": content[:-40], "other": b"no such thing", "bytes": bytes(range(200, 256)) * 20}
    (tmp_path / name).write_bytes(damaged[damage])
    check_refused(plain, errors.WeightsError, "cannot be read", tmp_path)


@pytest.mark.parametrize("number", [0, 3, "1", None])
def test_another_format(number: Any, tmp_path: Path) -> None:
    plain = saved(tmp_path)
    described(tmp_path, lambda about: about.update(format=number))
    message = check_refused(plain, errors.WeightsError, f"has the format {number}, written by convattn", tmp_path)
    assert f"convattn {convattn.__version__}; this version reads formats 1 and 2" in message


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "null", "{}", '{"format": 1}'])
def test_a_description_of_something_else(content: str, tmp_path: Path) -> None:
    plain = saved(tmp_path)
    (tmp_path / ABOUT).write_text(content)
    check_refused(plain, errors.WeightsError, "does not describe attention", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(base=None),
        lambda about: about.update(base={}),
        lambda about: about["base"]["tensors"].update({"stem.weight": None}),
        lambda about: about.update(sites=None),
        lambda about: about.update(sites=["layer1.0.bn2"]),
        lambda about: about["sites"][2].pop("start"),
        lambda about: about["sites"][2].pop("found"),
        lambda about: about["sites"][2].update(found={}),
        lambda about: about["sites"][2].update(size=16),
        lambda about: about["sites"][2].update(start="fresh"),
        lambda about: about["sites"][2].update(options=[1]),
        lambda about: about["sites"][2].update(options={"depth": 3}),
        lambda about: about["sites"][2].update(unknown=3),
        lambda about: about["sites"][2]["found"].update(channels="16"),
    ],
    ids=range(14),
)
def test_a_damaged_description(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    plain = saved(tmp_path)
    described(tmp_path, change)
    check_refused(plain, errors.WeightsError, ABOUT, tmp_path)


def test_a_site_that_the_network_does_not_have(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    described(tmp_path, lambda about: about["sites"][2].update(name="layer9.0.bn2"))
    check_refused(plain, errors.AttachError, "no layer 'layer9.0.bn2'", tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda tensors: tensors.pop("layer2.0.bn2.attention.strength"), "'layer2.0.bn2' do not fit .*strength"),
        (lambda tensors: tensors.pop("pool.attention.head.reduce.bias"), "'pool' do not fit .*reduce.bias"),
        (lambda tensors: tensors.clear(), "'layer1.0.bn2' do not fit"),
        (
            lambda tensors: tensors.update({"layer2.1.bn2.attention.strength": torch.ones(2)}),
            r"'layer2.1.bn2' do not fit .*\[2\].*\[1\]",
        ),
        (
            lambda tensors: tensors.update({"layer2.1.bn2.attention.more": torch.ones(2)}),
            "'layer2.1.bn2' do not fit .*more",
        ),
    ],
    ids=["missing", "missing head", "empty", "shape", "unexpected"],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, torch.Tensor]], Any], match: str, tmp_path: Path) -> None:
    plain = saved(tmp_path)
    weighted(tmp_path, change)
    check_refused(plain, errors.WeightsError, match, tmp_path)
    # nothing is left of the failure: the next one loads
    save(attach(copy.deepcopy(plain), "se"), tmp_path)
    assert len(attached(load(plain, tmp_path))) == 4


class Small(nn.Module):
    """One block, pooled by a function after another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.leaky_relu(self.block(self.stem(x)), 0.3).mean((2, 3)))


NOTHING = object()
DEEP = "nested deeply"
WRONG = (
    NOTHING,
    None,
    True,
    False,
    -1,
    0,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    "unknown",
    "two\nlines",
    [],
    {},
    [[1]],
    DEEP,
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every field of a description is, but of the tensors by name only the first and the last."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
        for key, value in items[:: max(1, len(items) - 1)] if path[-1:] == ("tensors",) else items:
            yield from paths(value, (*path, key))


def mutated(about: dict[str, Any], path: tuple[Any, ...], value: Any) -> str:
    """A description with another value at one place, as text."""
    about = copy.deepcopy(about)
    *way, last = path
    place: Any = about
    for key in way:
        place = place[key]
    if value is NOTHING:
        del place[last]
    else:
        place[last] = value
    if "digest" in about and value is not DEEP:
        # so that it looks as if it had been written so
        about["digest"] = descriptions._digest(about)
    return json.dumps(about).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def check_harmless_or_refused(plain: nn.Module, folder: Path, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether it loads, and then computes the same; else one line says why not, and the network is as it was."""
    before, model = state(plain), plain
    try:
        model = load(copy.deepcopy(plain), folder)
    except errors.ConvattnError:
        with pytest.raises(errors.ConvattnError) as caught:
            load(plain, folder)
        message = str(caught.value)
        # the folder of a test has a long name
        assert len(message.splitlines()) == 1 and len(message) < 900
        assert message.endswith("The model was not changed.")
        check_unchanged(before, plain)
        return False
    assert torch.equal(model(x), y)
    return True


def small(folder: Path, keep: str | None = "classifier") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A plain network, of which attention and a trained classifier lie in a folder, and what these compute."""
    plain, x = randomised(Small()), images()
    model = freeze_base(attach(copy.deepcopy(plain), "cbam+dual", reduction=8, kernel_size=3), keep=keep)
    with torch.no_grad():
        for name, parameter in moved(model).named_parameters():
            if name.startswith("head.") and parameter.requires_grad:
                parameter.normal_()
    save(model, folder)
    return plain, x, model(x)


# all of them in `make test-all`
@pytest.mark.slow_unless(number=2)
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [1, 2])
def test_every_field_of_a_description_may_be_wrong(number: int, step: int, tmp_path: Path) -> None:
    plain, x, y = small(tmp_path, None if number == 1 else "classifier")
    if number == 1:
        as_format_1(tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    # after a block that ends in ReLU, any slope of the leaky one gives the same
    assert [site["side"] for site in about["sites"]] == ["after", "vector"]
    assert about["sites"][1]["found"]["functions"] == [["leaky_relu", [0.3], []]]
    mutations = [(path, value) for path in paths(about) for value in WRONG if path != ("digest",)][::step]
    loaded = 0
    for path, value in mutations:
        # with `alone` false the same is computed, with other rounding
        if path[-1] != "alone" or value is not False:
            (tmp_path / ABOUT).write_text(mutated(about, path, value))
            loaded += check_harmless_or_refused(plain, tmp_path, x, y)
    # some fields are there to be read by people
    assert len(mutations) * step > 1500 and 0 < loaded < 0.1 * len(mutations)


def test_a_description_that_was_changed_after_it_was_written(tmp_path: Path) -> None:
    plain, _, _ = small(tmp_path)
    described(tmp_path, lambda about: about["sites"][0].update(parameters=3))
    check_refused(plain, errors.WeightsError, f"{ABOUT} was changed after", tmp_path)
    described(tmp_path, lambda about: about.pop("digest"))
    check_refused(plain, errors.WeightsError, f"{ABOUT} was changed after", tmp_path)


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    one, other = "block.bn2.attention.strength", "head.attention.strength"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()})


SURPLUS = {"block.bn1.attention.strength": torch.ones(1)}


@pytest.mark.parametrize(
    "change, match",
    [
        (swapped, r"2 tensors .* changed"),
        (lambda tensors: tensors["head.bias"].add_(1), r"1 tensor \(head.bias\) changed"),
        (
            lambda tensors: tensors["head.attention.head.reduce.bias"].fill_(float("nan")),
            r"1 tensor \(.*bias\) changed",
        ),
        (lambda tensors: tensors.update(SURPLUS), r"1 tensor \(block.bn1.attention.strength\) of no site"),
        (lambda tensors: tensors.update({"stem.bias": torch.ones(8)}), r"1 tensor \(stem.bias\) of no site"),
        (lambda tensors: tensors.pop("head.weight"), "of the network do not fit .'head.weight' is missing"),
        (lambda tensors: tensors.update({"head.weight": torch.ones(5)}), r"has the shape \[5\], where \[5, 8\]"),
        (cast(torch.int64), "do not fit .'head.bias' is int64, where float32 is expected"),
        (cast(torch.float64), "do not fit .'head.bias' is float64, where float32 is expected"),
    ],
)
def test_other_tensors_than_were_saved(
    change: Callable[[dict[str, torch.Tensor]], Any], match: str, tmp_path: Path
) -> None:
    plain, _, _ = small(tmp_path)
    weighted(tmp_path, change)
    check_refused(plain, errors.WeightsError, match, tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda tensors: tensors.update(SURPLUS), r"1 tensor \(block.bn1.attention.strength\) of no site"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(5)}), r"1 tensor \(head.bias\) of no site"),
        (cast(torch.int64), "at 'block.bn2' do not fit .'strength' is int64, where float32 is expected"),
        (cast(torch.bool), "is bool, where float32 is expected"),
    ],
)
@pytest.mark.parametrize("weights", ["same", "any"])
def test_other_tensors_in_folders_of_format_1(
    change: Callable[[dict[str, torch.Tensor]], Any], match: str, weights: str, tmp_path: Path
) -> None:
    plain, _, _ = small(tmp_path, None)
    as_format_1(tmp_path)
    weighted(tmp_path, change)
    check_refused(plain, errors.WeightsError, match, tmp_path, weights=weights)


def test_every_part_of_the_weights_may_be_damaged(tmp_path: Path) -> None:
    plain, x, y = small(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    generator = torch.Generator().manual_seed(0)
    spots = torch.randperm(len(content), generator=generator)[:60].tolist()
    damaged = [content[:spot] + bytes([content[spot] ^ 16]) + content[spot + 1 :] for spot in spots]
    damaged += [content[:spot] for spot in spots[:20]] + [content + b"more", content[8:], content[::-1]]
    loaded = 0
    for one in damaged:
        (tmp_path / WEIGHTS).write_bytes(one)
        loaded += check_harmless_or_refused(plain, tmp_path, x, y)
    assert loaded < 3


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda site: site.update(side="above") or site["found"].update(side="above"), "side must be one of after, "),
        (lambda site: site.update(name="") or site["found"].update(name=""), "name is no name of a layer"),
        (lambda site: site.update(attention="sse"), "No attention or pooling head is called 'sse'. Did you mean"),
        (lambda site: site.update(attention="dual"), "no head can stand at 'block.bn2'"),
        (lambda site: site["options"].update(kernel_size=10**9 + 1), "'spatial.conv.weight' has the shape"),
        (lambda site: site["options"].update(reduction="2"), "no module can be made for 'block.bn2' .InvalidOption"),
        (lambda site: site["found"].update(dtype="int32"), "found.dtype is no dtype of floating-point numbers"),
        (lambda site: site.update(more=1), "unknown field"),
    ],
)
def test_sites_that_no_network_has(change: Callable[[dict[str, Any]], Any], match: str, tmp_path: Path) -> None:
    plain, _, _ = small(tmp_path)
    described(tmp_path, lambda about: change(about["sites"][0]))
    message = check_refused(plain, errors.WeightsError, match, tmp_path)
    assert "attention.json" in message or "spatial.conv.weight" in message


def test_a_site_that_is_described_twice(tmp_path: Path) -> None:
    plain, _, _ = small(tmp_path)
    described(tmp_path, lambda about: about["sites"].append(about["sites"][0]))
    check_refused(plain, errors.WeightsError, "describes a layer twice", tmp_path)
    # a layer that gives the map of one site cannot be another
    described(tmp_path, lambda about: about["sites"].pop())
    described(tmp_path, lambda about: about["sites"][1]["found"].update(source="block.bn2"))
    check_refused(plain, errors.WeightsError, "describes a layer twice", tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        ["set_", [3], []],
        ["native_dropout", [0.5, True], []],
        ["zero_", [], []],
        ["from_file", ["name"], []],
        ["leaky_relu", ["x"], []],
        ["leaky_relu", [0.1, 0.2, 0.3], []],
        ["relu", [], [["out", 1]]],
        ["__class__", [], []],
    ],
)
def test_only_activations_are_run_by_name(call: list[Any], tmp_path: Path) -> None:
    plain, _, _ = small(tmp_path)
    described(tmp_path, lambda about: about["sites"][1]["found"].update(functions=[call]))
    check_refused(plain, errors.WeightsError, "found.functions has ", tmp_path)
