"""Gates that vary over other axes than channels or positions, and modules that add: their rows, numbers and figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_show_figures import panels, plots, seen, strength, words
from torch import nn
from trusting import show

from convattn import networks
from convattn.attachment import attach, attached
from convattn.nn import CBAM, Gate
from convattn.showing import figures, table
from convattn.showing.summary import summarise
from convattn.showing.watching import axes_of, by_axes
from convattn.train import checkpoint
from own_modules import Elementwise, GlobalContext, Means
from tolerances import assert_close

GENERATOR = np.random.default_rng(0)
MAP = (2, 8, 4, 6)


def random(*shape: int) -> np.ndarray:
    return GENERATOR.uniform(-1, 1, shape).astype(np.float32)


class Both(Gate):
    """Two gates: of rows and of columns, as in coordinate attention."""

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": torch.sigmoid(x.mean(3, keepdim=True)), "b": torch.sigmoid(x.mean(2, keepdim=True))}

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.gates(x).values()
        return first * second


class Forward(Gate):
    """Has a forward, and no gate to show."""

    def __init__(self, channels: int, *, dimensions: int = 2, start: str = "paper") -> None:
        super().__init__(channels=channels, dimensions=dimensions, start=start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


class Doubled(nn.Module):
    """A module that knows nothing of convattn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.scale)


@pytest.mark.parametrize(
    ("shape", "of_map", "said"),
    [
        ((2, 8, 1, 1), MAP, "channel"),
        ((2, 1, 4, 6), MAP, "spatial"),
        ((2, 8, 4, 6), MAP, "channel and spatial"),
        ((2, 1, 4, 1), MAP, "height"),
        ((2, 1, 1, 6), MAP, "width"),
        ((2, 8, 4, 1), MAP, "channel and height"),
        ((2, 8, 1, 6), MAP, "channel and width"),
        ((2, 4, 1, 1), MAP, "group"),
        ((2, 4, 4, 6), MAP, "group and spatial"),
        ((2, 1, 1, 1), MAP, ""),
        ((2, 8, 5), (2, 8, 5), "channel and spatial"),
        ((2, 1, 5), (2, 8, 5), "spatial"),
        ((2, 1, 2, 1, 4), (2, 8, 2, 3, 4), "depth and width"),
        ((2, 8, 2, 3, 4), (2, 8, 2, 3, 4), "channel and spatial"),
        # a row has no height
        ((2, 1, 1, 6), (2, 8, 1, 6), "spatial"),
    ],
)
def test_axes_are_told_by_the_shape(shape: tuple[int, ...], of_map: tuple[int, ...], said: str) -> None:
    assert axes_of(shape, of_map) == said


def test_gates_of_a_map_of_one_position() -> None:
    x = torch.randn(2, 8, 1, 1)
    assert [*by_axes(CBAM(8).eval().gates(x), x)] == ["channel", "spatial"]
    assert [*by_axes({"mine": torch.ones(2, 1, 1, 1)}, x)] == ["whole map"]


def test_gates_that_vary_over_the_same_are_numbered() -> None:
    x = torch.randn(*MAP)
    same = {name: torch.ones(2, 8, 1, 1) for name in ("a", "b", "c")}
    assert [*by_axes(same, x)] == ["channel", "channel #2", "channel #3"]


@pytest.fixture
def kept(tmp_path: Path, own: str) -> Callable[..., Path]:
    """Write a checkpoint of a module of one's own, with random weights."""

    def write(name: str, cls: Any, *, start: str = "identity") -> tuple[Path, nn.Module]:
        about = {"backbone": f"{own}:small", "variant": name, "start": start, "classes": ["a", "b", "c"]}
        about |= {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
        torch.manual_seed(0)
        network = attach(networks.create(about["backbone"], classes=3), cls, start=start).eval()
        # so that no mean of a map is 0
        nn.init.normal_(network.block.bn2.bias)
        for name_of, parameter in attached(network)[0][1].attention.named_parameters():
            nn.init.normal_(parameter, 0.1, 0.5)
            if name_of.endswith("weight") and parameter.shape == (1,):
                nn.init.constant_(parameter, 4.0)
        if start == "identity":
            nn.init.constant_(attached(network)[0][1].attention.strength, 0.5)
        checkpoint.save(tmp_path / "weights.safetensors", network, about)
        return tmp_path / "weights.safetensors", network

    return write


OVER = {
    "channel": (2, 3),
    "spatial": (1,),
    "channel and spatial": (),
    "channel and height": (3,),
    "height": (1, 3),
    "width": (1, 2),
    "whole map": (1, 2, 3),
}


@pytest.mark.slow_unless(blended=False, start="identity", axes=["channel", "spatial", "width", "whole map"])
@pytest.mark.slow_unless(blended=True, start="paper", axes="channel and spatial")
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("axes", OVER)
def test_every_gate_is_shown_by_what_it_varies_over(
    axes: str, blended: bool, start: str, kept: Callable[..., Any], images: list[Path], tmp_path: Path
) -> None:
    def made(channels: int, **options: Any) -> nn.Module:
        return Means(channels, over=OVER[axes], **options)

    factory = (lambda channels: made(channels)) if blended else made
    path, network = kept("mine", factory, start=start)
    inputs: list[torch.Tensor] = []
    attention = attached(network)[0][1].attention
    folder = show(path, images, tmp_path / "out", factories={"mine": factory})
    (row,) = table(folder)
    # random images may have nearly the same means
    assert (row.site, row.kind) == ("block.bn2", axes) and row.word in ("active", "constant")
    assert "No gates" not in str(table(folder)) and axes in str(table(folder))
    drawn = {one.name for one in folder.iterdir()}
    assert ("channel.png" in drawn) == ("channel" in axes)
    assert ("spatial-two.png" in drawn) == any(word in axes for word in ("spatial", "height", "width"))
    # the numbers are those by which the map is multiplied
    attention.register_forward_hook(lambda module, args, y: inputs.extend((args[0], y)))
    with np.load(folder / "gates.npz") as arrays:
        gate = torch.tensor(arrays[f"block.bn2/{axes}"])
        x = torch.tensor(pixels(images))
        with torch.no_grad():
            network(x)
        assert gate.dim() == 4 and gate.numel() <= inputs[0].numel()
        assert_close(inputs[0] * gate, inputs[1])
        assert gate.std() > 0


def pixels(paths: list[Path]) -> np.ndarray:
    raw = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]) / 255
    return ((raw - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]).astype(np.float32).transpose(0, 3, 1, 2)


def test_a_gate_of_groups(kept: Callable[..., Any], images: list[Path], tmp_path: Path) -> None:
    def grouped(channels: int) -> nn.Module:
        return Means(channels, over=(2, 3), groups=2)

    path, _ = kept("mine", grouped, start="paper")
    folder = show(path, images, tmp_path / "out", factories={"mine": grouped})
    (row,) = table(folder)
    assert row.kind == "group" and (folder / "channel.png").exists()


def test_a_gate_of_two_factors(kept: Callable[..., Any], images: list[Path], tmp_path: Path) -> None:
    path, _ = kept("mine", Both, start="paper")
    folder = show(path, images, tmp_path / "out", factories={"mine": Both})
    assert [row.kind for row in table(folder)] == ["channel and height", "channel and width"]


# what is added


def added(network: nn.Module, images: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the module at the one site, and its output minus that."""
    found: list[torch.Tensor] = []
    attention = attached(network)[0][1].attention
    attention.register_forward_hook(lambda module, args, y: found.extend((args[0], y - args[0])))
    with torch.no_grad():
        network(torch.tensor(pixels(images)))
    return found[0], found[1]


@pytest.mark.slow_unless(start="identity", axes="channel")
@pytest.mark.slow_unless(id="Doubled-channel and spatial-identity")
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize(
    ("cls", "axes"),
    [
        (GlobalContext, "channel"),
        (lambda channels: GlobalContext(channels), "channel"),
        (Doubled, "channel and spatial"),
        (Forward, "channel and spatial"),
    ],
)
def test_what_is_added_is_shown_in_units_of_the_map(
    cls: Any, axes: str, start: str, kept: Callable[..., Any], images: list[Path], tmp_path: Path
) -> None:
    path, network = kept("mine", cls, start=start)
    folder = show(path, images, tmp_path / "out", factories={"mine": cls})
    (row,) = table(folder)
    assert (row.site, row.kind, row.word) == ("block.bn2", f"update ({axes})", "active")
    x, y = added(network, images)
    ratio = y.square().mean((1, 2, 3)).sqrt() / x.square().mean((1, 2, 3)).sqrt()
    assert row.mean == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert row.strength == (0.5 if start == "identity" else None)
    with np.load(folder / "gates.npz") as arrays:
        update = torch.tensor(arrays["block.bn2/update"])
    assert_close((update * x.square().mean((1, 2, 3), keepdim=True).sqrt()).expand_as(x), y)
    drawn = {one.name for one in folder.iterdir()}
    assert "update.png" in drawn and ("update-two.png" in drawn) == ("spatial" in axes)
    assert "update: root mean square of what is added over that of the map" in str(table(folder))


@pytest.mark.parametrize(("size", "word"), [(0.0099, "does nothing"), (0.0101, "active"), (np.nan, "not finite")])
def test_an_update_below_a_hundredth_of_the_map_does_nothing(size: float, word: str) -> None:
    # of any sign: it is the root mean square that counts, and not the largest element
    update = np.full((2, 3, 4, 4), size, dtype=np.float32) * np.where(random(2, 3, 4, 4) > 0, 1, -1)
    (row,) = summarise({"site": {"update": update.astype(np.float32)}}, 2)
    assert row.word == word
    if word != "not finite":
        assert (row.mean, row.low, row.high) == pytest.approx((size, size, size), rel=1e-5)
        spread = np.zeros((2, 3, 4, 4), dtype=np.float32)
        spread[:, 0, 0, 0] = size * 48**0.5
        assert summarise({"site": {"update": spread}}, 2).rows[0].word == word


# figures


def test_an_elementwise_gate_is_drawn_over_the_image_and_as_bars() -> None:
    gate = 1 + 0.3 * random(2, 5, 4, 4)
    one = seen({"layer1.bn2": {"channel and spatial": gate, "strength": strength(0.5)}})
    one.images[:] = 255
    colours = figures.spatial_scale(one)
    assert colours is not None
    sheet = figures.spatial(one, 0, colours)
    drawn = panels(sheet)[1]
    expected = colours.mappable.to_rgba(gate[0].mean(axis=0))[..., :3]
    np.testing.assert_allclose(drawn[::3, ::3], expected)
    assert "layer1.bn…d spatial  (4 × 4)" in words(sheet)
    bars = figures.channel(one)
    assert bars is not None
    heights = [bar.get_y() + bar.get_height() for bar in plots(bars)[0].patches]
    assert heights == pytest.approx(gate.mean(axis=(0, 2, 3)))
    assert figures.update(one) is None and figures.update_scale(one) is None


def test_a_gate_of_rows_lies_in_rows() -> None:
    gate = np.linspace(0.2, 1.0, 4, dtype=np.float32).reshape(1, 1, 4, 1).repeat(2, axis=0)
    one = seen({"site": {"height": gate}})
    one.images[:] = 255
    colours = figures.spatial_scale(one)
    assert colours is not None
    drawn = panels(figures.spatial(one, 0, colours))[1]
    assert (drawn == drawn[:, :1]).all() and len(np.unique(drawn[:, 0], axis=0)) == 4
    assert figures.channel(one) is None


def test_an_update_is_drawn_as_a_map_and_as_bars() -> None:
    update = 0.2 * random(2, 5, 4, 4)
    one = seen({"site": {"update": update}, "wide": {"update": random(2, 5, 1, 1)}})
    one.images[:] = 255
    colours = figures.update_scale(one)
    assert colours is not None
    sheet = figures.update_map(one, 1, colours)
    _, drawn = panels(sheet)
    expected = colours.mappable.to_rgba(np.sqrt((update[1] ** 2).mean(axis=0)))[..., :3]
    np.testing.assert_allclose(drawn[::3, ::3], expected)
    bars = figures.update(one)
    assert bars is not None
    first, second = plots(bars)
    assert [bar.get_height() for bar in first.patches] == pytest.approx(update.mean(axis=(0, 2, 3)), abs=1e-6)
    assert all(bar.get_y() == 0 for bar in second.patches)
    assert figures.channel(one) is None and figures.spatial_scale(one) is None


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 3, 4, 4)])
def test_maps_of_one_and_three_dimensions_are_drawn(shape: tuple[int, ...]) -> None:
    one = seen({"site": {"channel and spatial": 1 + random(*shape), "update": random(*shape)}})
    scales = figures.spatial_scale(one), figures.update_scale(one)
    assert scales[0] is not None and scales[1] is not None
    assert len(panels(figures.spatial(one, 0, scales[0]))) == len(panels(figures.update_map(one, 0, scales[1]))) == 2
    assert figures.channel(one) is not None and figures.update(one) is not None


def test_elementwise_by_name_is_shown(kept: Callable[..., Any], images: list[Path], tmp_path: Path) -> None:
    path, _ = kept("mine", Elementwise)
    folder = show(path, images, tmp_path / "out", factories={"mine": Elementwise})
    assert [row.kind for row in table(folder)] == ["channel and spatial"]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 5, 1, 1), "channel"),
        ((2, 5, 4, 1), "channel and height"),
        ((2, 5, 1, 3), "channel and width"),
        ((2, 1, 4, 1), "height"),
        ((2, 1, 4, 3), "spatial"),
        ((2, 5, 4, 3), "channel and spatial"),
    ],
)
def test_what_is_added_is_named_by_the_axes_over_which_it_varies(shape: tuple[int, ...], axes: str) -> None:
    (row,) = summarise({"site": {"update": random(*shape), "map": np.array([5, 4, 3], dtype=np.float32)}}, 2)
    assert row.kind == f"update ({axes})"
