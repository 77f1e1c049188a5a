"""What the figures draw and say, read from their parts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from convattn.showing import canvas, figures
from convattn.showing.canvas import Sheet, scale, shortened
from convattn.showing.watching import Seen

GENERATOR = np.random.default_rng(0)


def random(low: float, high: float, *shape: int) -> np.ndarray:
    return GENERATOR.uniform(low, high, shape).astype(np.float32)


def seen(sites: dict[str, dict[str, np.ndarray]], maps: np.ndarray | None = None) -> Seen:
    about = {"variant": "cbam", "backbone": "resnet20", "classes": ["cat", "dog"]}
    return Seen(
        checkpoint=Path("runs/cbam/weights.safetensors"),
        about=about,
        paths=[Path("a/one.png"), Path("b/two.png")],
        names=["one", "two"],
        images=GENERATOR.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8),
        predictions=np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float32),
        sites=sites,
        layer=None if maps is None else "layer2",
        maps=maps,
    )


def words(sheet: Sheet) -> str:
    return "\n".join(text.get_text() for text in sheet.figure.texts)


def panels(sheet: Sheet) -> list[np.ndarray]:
    """The pictures of a sheet, in their order."""
    return [image.get_array() for image in sheet.pictures.images]


def plots(sheet: Sheet) -> list[Any]:
    """The axes with bars, in their order."""
    return [axes for axes in sheet.figure.axes if axes is not sheet.pictures]


def strength(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def spatial(sites: dict[str, np.ndarray], **more: Any) -> Sheet:
    one = seen({site: {"spatial": gate, **more} for site, gate in sites.items()})
    colours = figures.spatial_scale(one)
    assert colours is not None
    return figures.spatial(one, 0, colours)


def test_every_title_says_which_network_and_what_it_sees() -> None:
    arrays = {"spatial": random(0.5, 1, 2, 1, 4, 4), "channel": random(0.5, 1, 2, 8, 1, 1), "strength": strength(0.5)}
    one = seen({"layer1.bn2": arrays, "pool": {"pooled": random(0, 1, 2, 8), "head": random(0, 1, 2, 8)}})
    one = replace(one, layer="layer2", maps=random(0, 1, 2, 8, 4, 4))
    colours = figures.spatial_scale(one)
    assert colours is not None
    drawn = [figures.spatial(one, 1, colours), figures.maps(one, 1), figures.channel(one), figures.pool(one)]
    for sheet in drawn:
        assert sheet is not None
        assert "cbam on resnet20, checkpoint runs/cbam/weights.safetensors" in words(sheet)
        assert "cat (90.0%)" in words(sheet)
    assert "two.png" in words(drawn[0])
    assert "dog (75.0%)" not in words(drawn[0])
    # those of all images name the first ones
    assert "2 images, predicted dog (75.0%), cat (90.0%)" in words(drawn[2])


def test_the_numbers_of_each_site_are_told() -> None:
    gate = np.full((2, 1, 4, 4), 0.75, dtype=np.float32)
    gate[0, 0, 0, 0], gate[0, 0, 3, 3] = 0.5, 1
    told = words(spatial({"layer1.bn2": gate}))
    assert "layer1.bn2  (4 × 4)" in told
    assert "min 0.500   mean 0.750   max 1.000" in told


def test_a_flat_gate_is_told_and_drawn_without_its_noise() -> None:
    flat, lively = random(0.9, 0.909, 2, 1, 12, 12), random(0.5, 1, 2, 1, 12, 12)
    white = replace(seen({"flat": {"spatial": flat}, "lively": {"spatial": lively}}))
    white.images[:] = 255
    colours = figures.spatial_scale(white)
    assert colours is not None
    sheet = figures.spatial(white, 0, colours)
    assert words(sheet).count("flat at 0.90") == 1
    _, drawn_flat, drawn_lively = panels(sheet)
    assert np.ptp(drawn_flat.reshape(-1, 3), axis=0).max() == 0
    assert np.ptp(drawn_lively.reshape(-1, 3), axis=0).max() > 0.3


def test_a_gate_lies_where_it_acts() -> None:
    # 4 x 4 positions on 12 x 12 pixels: the upper right corner only
    gate = np.full((2, 1, 4, 4), 0.5, dtype=np.float32)
    gate[:, 0, 0, 3] = 1
    one = seen({"site": {"spatial": gate}})
    one.images[:] = 255
    colours = figures.spatial_scale(one)
    assert colours is not None
    drawn = panels(figures.spatial(one, 0, colours))[1]
    changed = (drawn != drawn[-1, 0]).any(axis=-1)
    expected = np.zeros((12, 12), dtype=bool)
    expected[:3, 9:] = True
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_allclose(drawn[0, -1], colours.mappable.to_rgba(1.0)[:3])


def test_colours_are_shared_by_all_sites_and_images() -> None:
    low, high = random(0.2, 0.3, 2, 1, 8, 8), random(0.8, 0.9, 2, 1, 8, 8)
    high[1] = 0.95
    colours = figures.spatial_scale(seen({"low": {"spatial": low}, "high": {"spatial": high}}))
    assert colours is not None
    expected = np.percentile(np.concatenate([low.ravel(), high.ravel()]), (1, 99))
    assert (colours.low, colours.high) == pytest.approx(tuple(expected))
    assert figures.spatial_scale(seen({"se": {"channel": random(0, 1, 2, 8, 1, 1)}})) is None


def test_a_scale_does_not_blow_up_noise() -> None:
    same = scale([np.ones((2, 5))], 1.0, 0.02)
    assert (same.low, same.high, same.centre) == pytest.approx((0.99, 1.01, 1.0))
    noise = scale([0.7 + 0.001 * GENERATOR.standard_normal(1000)], 1.0, 0.02)
    assert noise.high - noise.low == pytest.approx(0.02)
    assert (noise.high + noise.low) / 2 == pytest.approx(0.7, abs=1e-3)


def test_a_scale_with_values_on_both_sides_is_symmetric() -> None:
    both = scale([np.linspace(0.6, 1.1, 1001)], 1.0, 0.02)
    assert (both.low, both.high, both.centre) == pytest.approx((0.605, 1.395, 1.0))
    # one far value in a thousand does not set the colours of all others
    outlier = scale([np.append(np.linspace(0.5, 0.9, 999), 50)], 1.0, 0.02)
    assert outlier.high < 0.9
    assert outlier.centre is None
    broken = scale([np.array([np.nan, np.inf])], 1.0, 0.02)
    assert (broken.low, broken.high) == pytest.approx((0.99, 1.01))


def bars(gate: np.ndarray, **more: np.ndarray) -> Any:
    sheet = figures.channel(seen({"layer1.bn2": {"channel": gate, **more}}))
    assert sheet is not None
    return plots(sheet)[0]


def test_a_bar_for_each_channel_from_identity_to_the_mean() -> None:
    gate = random(0.4, 1.3, 2, 12, 1, 1)
    axes = bars(gate, strength=strength(0.5))
    mean = gate.mean(axis=0)[:, 0, 0]
    assert [bar.get_y() + bar.get_height() for bar in axes.patches] == pytest.approx(mean)
    assert all(bar.get_y() == 1 for bar in axes.patches)
    ends = [tuple(line[:, 1]) for line in axes.collections[0].get_segments()]
    assert np.array(ends) == pytest.approx(np.stack([gate.min(axis=0), gate.max(axis=0)], axis=1)[:, :, 0, 0])
    (reference,) = axes.lines
    assert [*reference.get_ydata()] == [1, 1]


def test_bars_of_the_papers_gates_start_at_zero() -> None:
    axes = bars(random(0.4, 0.9, 2, 12, 1, 1))
    assert all(bar.get_y() == 0 for bar in axes.patches)
    assert axes.get_ylim()[0] < 0


def test_many_channels_are_drawn_as_an_area() -> None:
    gate = random(0.4, 1.3, 2, 65, 1, 1)
    axes = bars(gate, strength=strength(0.5))
    assert not axes.patches
    amplified, damped, band = (one.get_paths()[0].vertices[:, 1] for one in axes.collections)
    mean = gate.mean(axis=0)
    assert (amplified.min(), amplified.max()) == pytest.approx((1, mean.max()))
    assert (damped.min(), damped.max()) == pytest.approx((mean.min(), 1))
    assert (band.min(), band.max()) == pytest.approx((gate.min(), gate.max()))


def test_sites_share_one_axis() -> None:
    sites = {
        "small": {"channel": random(0.98, 1, 2, 4, 1, 1), "strength": strength(0.1)},
        "large": {"channel": random(0.2, 0.4, 2, 4, 1, 1), "strength": strength(0.9)},
    }
    sheet = figures.channel(seen(sites))
    assert sheet is not None
    first, second = plots(sheet)
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] > 1
    assert "small, strength +0.100" in words(sheet)


def test_the_pooling_head_shows_its_change() -> None:
    pooled, head = random(0, 1, 2, 6), random(0, 1, 2, 6)
    sheet = figures.pool(seen({"pool": {"pooled": pooled, "head": head, "strength": strength(0.25)}}))
    assert sheet is not None
    own, change = plots(sheet)
    assert [bar.get_height() for bar in own.patches] == pytest.approx(pooled.mean(axis=0))
    assert [bar.get_height() for bar in change.patches] == pytest.approx(0.25 * (head - pooled).mean(axis=0), abs=1e-6)


@pytest.mark.parametrize(
    ("channels", "shown", "says"), [(5, 5, "all 5 channels"), (70, 64, "the first 64 of 70 channels")]
)
def test_feature_maps_say_how_many_there_are(channels: int, shown: int, says: str) -> None:
    maps = random(-1, 2, 2, channels, 3, 4)
    sheet = figures.maps(seen({}, maps), 1)
    assert says in words(sheet)
    assert "4 × 3 positions" in words(sheet)
    _, *drawn = panels(sheet)
    assert len(drawn) == shown
    colours = scale([maps[1]], 0.0, 1e-6)
    np.testing.assert_array_equal(drawn[2], colours.mappable.to_rgba(maps[1, 2]))


def test_the_users_settings_stay_as_they_are() -> None:
    with matplotlib.rc_context({"font.size": 33, "text.parse_math": True}):
        with canvas.style():
            drawn_with = [matplotlib.rcParams[key] for key in ("font.size", "text.parse_math")]
        assert drawn_with == [10, False]
        assert [matplotlib.rcParams[key] for key in ("font.size", "text.parse_math")] == [33, True]


def test_long_words_lose_their_middle() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("runs/cbam/weights.safetensors", 11) == "runs/…nsors"
    assert len(shortened("x" * 50, 10)) == 10
