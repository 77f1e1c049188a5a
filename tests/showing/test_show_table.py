"""The rows and words of the table."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trusting import show

from convattn.errors import DataError
from convattn.showing import table
from convattn.showing.summary import relative, summarise

RISING = np.linspace(0, 1, 8, dtype=np.float32)


def channel(*images: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """One site with a channel gate for each image."""
    return {"site": {"channel": np.stack(images)[..., None, None].astype(np.float32)}}


def word(*images: np.ndarray) -> str:
    (row,) = summarise(channel(*images), len(images))
    return row.word


def test_the_numbers_of_a_row() -> None:
    arrays = channel(0.5 + 0.1 * RISING, 0.7 + 0.1 * RISING)
    arrays["site"]["strength"] = np.array([-0.25], dtype=np.float32)
    (row,) = summarise(arrays, 2)
    numbers = (row.mean, row.low, row.high, row.variation, row.strength)
    assert (row.site, row.kind, row.word) == ("site", "channel", "active")
    # means of 0.6 to 0.7; each channel is 0.1 from its mean in both images
    assert numbers == pytest.approx((0.65, 0.6, 0.7, 0.1, -0.25), abs=1e-6)


def test_a_gate_within_a_hundredth_of_one_does_nothing() -> None:
    assert word(1 + 0.009 * RISING, 1 - 0.009 * RISING) == "does nothing"
    assert word(1 - 0.009 * RISING) == "does nothing"
    # the mean over the images of |gate - 1|, not of the gate
    assert word(1 + 0.1 * RISING, 1 - 0.1 * RISING) == "active"
    # everywhere: one channel is enough
    assert word(np.where(RISING == 1, 0.5, 1), np.where(RISING == 1, 0.6, 1)) == "active"


def test_a_gate_that_is_the_same_for_all_images_is_constant() -> None:
    assert word(0.5 * RISING, 0.5 * RISING + 0.0015) == "constant"
    assert word(0.5 * RISING, 0.5 * RISING + 0.0025) == "active"
    assert word(0.5 * RISING, 0.5 * RISING + 0.01 * (RISING == 1)) == "active"


def test_one_image_tells_nothing_about_variation() -> None:
    (row,) = summarise(channel(0.5 * RISING), 1)
    assert (row.word, row.variation, row.strength) == ("active", None, None)


def test_a_gate_that_is_no_number_is_not_called_active() -> None:
    assert word(np.where(RISING == 1, np.nan, 1), RISING) == "not finite"


def test_a_pooling_head_is_measured_by_its_change() -> None:
    pooled = np.array([[3.0, 4.0], [0.6, 0.8]], dtype=np.float32)
    arrays = {"pooled": pooled, "head": pooled + np.float32(1), "strength": np.array([0.5], dtype=np.float32)}
    # 0.5 * 1 over root mean squares of 5 / sqrt(2) and 1 / sqrt(2)
    change = 0.5 * np.sqrt(2) / np.array([5, 1])
    np.testing.assert_allclose(relative(arrays), 1 + np.stack([change, change], axis=1), rtol=1e-6)
    (row,) = summarise({"pool": arrays}, 2)
    assert (row.kind, row.word) == ("pool", "active")
    assert row.mean == pytest.approx(1 + change.mean(), rel=1e-6)
    # without a strength the head replaces the pooling
    del arrays["strength"]
    np.testing.assert_allclose(relative(arrays), 1 + 2 * np.stack([change, change], axis=1), rtol=1e-6)
    # nothing pooled and nothing changed is no division by zero
    zero = np.zeros((1, 2), dtype=np.float32)
    np.testing.assert_array_equal(relative({"pooled": zero, "head": zero}), np.ones((1, 2)))


def test_the_table_of_a_folder(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    folder = show(save("cbam+dual"), images, tmp_path / "out", layer="block")
    rows = {row.kind: row for row in table(folder)}
    assert [*rows] == ["channel", "spatial", "pool"]
    assert {row.site for row in rows.values()} == {"block.bn2", "pool"}
    assert rows["channel"].strength == rows["spatial"].strength == pytest.approx(0.7)
    with np.load(folder / "gates.npz") as arrays:
        spatial = arrays["block.bn2/spatial"].astype(np.float64)
    assert rows["spatial"].mean == pytest.approx(spatial.mean())
    assert rows["spatial"].low == pytest.approx(spatial.mean(axis=0).min())
    assert rows["spatial"].variation == pytest.approx(spatial.std(axis=0).mean())
    header, first, *_, legend, pool_legend = str(table(folder)).splitlines()
    assert header.split() == ["site", "gate", "mean", "from", "to", "variation", "strength"]
    assert first.split()[:2] == ["block.bn2", "channel"]
    assert first.split()[-2:] == ["+0.700", "active"]
    assert legend.startswith("from, to")
    assert pool_legend.startswith("pool")


def test_no_gates_and_no_folder(save: Callable[..., Path], images: list[Path], tmp_path: Path) -> None:
    empty = table(show(save("baseline"), images, tmp_path / "out", layer="stem"))
    assert len(empty) == 0
    assert str(empty) == "No gates."
    with pytest.raises(DataError, match="convattn show"):
        table(tmp_path)
