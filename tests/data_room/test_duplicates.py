"""Test images planted among training images are found, and images that are merely alike are not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from convattn.data import duplicates, find_duplicates


def scenes(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Images that have shapes of several sizes, as photographs do."""
    random = np.random.default_rng(seed)
    found = np.zeros((count, side, side, 3))
    for cells in (3, 6, 12):
        for index in range(count):
            noise = Image.fromarray(random.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
            found[index] += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 3
    return found.clip(0, 255).astype(np.uint8)


def planted(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Ten of these images, changed, behind all of them."""
    return np.concatenate([images, [np.asarray(change(Image.fromarray(image))) for image in images[:10]]])


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=60)
    return Image.open(file)


def cropped(image: Image.Image) -> Image.Image:
    margin = image.width // 32
    inside = image.crop((margin, margin, image.width - margin, image.height - margin))
    return inside.resize(image.size, Image.Resampling.BILINEAR)


CHANGES = {
    "re-encoded": jpeg,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "cropped": cropped,
    "all of it": lambda image: jpeg(ImageEnhance.Brightness(cropped(image)).enhance(1.1)),
}


@pytest.mark.parametrize("side", [32, 40, 100])
def test_exact_duplicates(side: int) -> None:
    pixels = planted(scenes(60, seed=1, side=side), lambda image: image)
    found = find_duplicates(pixels, np.arange(60, 70), np.arange(60))
    assert [(pair.image, pair.other, pair.exact) for pair in found] == [(60 + at, at, True) for at in range(10)]


@pytest.mark.slow_unless(side=32)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [32, 96])
def test_near_duplicates(change: str, side: int) -> None:
    pixels = planted(scenes(60, seed=2, side=side), CHANGES[change])
    found = find_duplicates(pixels, np.arange(60, 70), np.arange(60))
    assert {(pair.image, pair.other) for pair in found} == {(60 + at, at) for at in range(10)}
    assert not any(pair.exact for pair in found)
    similarities = [pair.similarity for pair in found]
    assert similarities == sorted(similarities, reverse=True) and similarities[-1] >= 0.8


def test_exact_ones_come_first_and_are_counted_once() -> None:
    images = planted(planted(scenes(60, seed=3), jpeg), lambda image: image)
    # 60 to 69 are re-encoded, 70 to 79 the same; both are sought among the first 60 and the re-encoded
    found = find_duplicates(images, np.arange(70, 80), np.arange(70))
    assert [(pair.image, pair.other) for pair in found] == [(70 + at, at) for at in range(10)]
    among_re_encoded = find_duplicates(images, np.concatenate([np.arange(60, 70), [70]]), np.arange(60))
    assert [pair.exact for pair in among_re_encoded] == [True, *[False] * 10]


def test_only_others_are_looked_at() -> None:
    pixels = planted(scenes(60, seed=4), jpeg)
    assert find_duplicates(pixels, np.arange(60, 65), np.arange(5, 60)) == []


def test_the_most_similar_one_is_named() -> None:
    images = scenes(60, seed=5)
    worse = planted(images, lambda image: jpeg(cropped(image)))
    better = np.concatenate([worse, [np.asarray(jpeg(Image.fromarray(image))) for image in images[:10]]])
    found = find_duplicates(better, np.arange(10), np.arange(10, 80))
    assert {(pair.image, pair.other) for pair in found} == {(at, 70 + at) for at in range(10)}


ALIKE = {
    "scenes": lambda random: scenes(1000, seed=6),
    "noise": lambda random: random.integers(0, 256, size=(1000, 16, 16, 3)),
    "tiny noise": lambda random: random.integers(0, 256, size=(1000, 8, 8, 3)),
    "one colour": lambda random: random.permutation(1 << 24)[:1000, None, None, None] >> np.array([0, 8, 16]) & 255,
    "one colour and noise": lambda random: (
        random.integers(20, 230, (1000, 1, 1, 1)) + random.integers(0, 9, (1000, 32, 32, 3))
    ),
    "a gradient": lambda random: (
        random.integers(9, 99, (1000, 1, 1, 3)) * np.linspace(1, 2, 32)[:, None, None]
        + random.integers(0, 9, (1000, 32, 32, 3))
    ),
}


@pytest.mark.slow_unless(case=["noise", "tiny noise", "one colour and noise"])
@pytest.mark.parametrize("case", ALIKE)
def test_images_that_are_merely_alike(case: str) -> None:
    pixels = np.array(ALIKE[case](np.random.default_rng(0)))
    pixels = np.broadcast_to(pixels, (1000, max(pixels.shape[1], 8), max(pixels.shape[2], 8), 3)).astype(np.uint8)
    assert find_duplicates(pixels, np.arange(200), np.arange(200, 1000)) == []


@pytest.mark.parametrize("seed", range(3))
def test_digits(seed: int) -> None:
    grey = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    order = np.random.default_rng(seed).permutation(len(grey))
    assert find_duplicates(grey, order[:360], order[360:]) == []


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = planted(scenes(60, seed=7), cropped)
    whole = find_duplicates(pixels, np.arange(50, 70), np.arange(50))
    for name, value in (("ROWS", 7), ("COLUMNS", 11), ("PIXELS", 10_000), ("MOST_CANDIDATES", 1)):
        monkeypatch.setattr(duplicates, name, value)
    again = find_duplicates(pixels, np.arange(50, 70), np.arange(50))
    assert len(whole) == 10
    assert [(pair.image, pair.other) for pair in again] == [(pair.image, pair.other) for pair in whole]
    assert [pair.similarity for pair in again] == pytest.approx([pair.similarity for pair in whole], abs=1e-5)


def test_nothing_to_look_for() -> None:
    pixels = scenes(5, seed=8)
    nothing = np.array([], dtype=np.int64)
    assert find_duplicates(pixels, nothing, np.arange(5)) == find_duplicates(pixels, np.arange(5), nothing) == []
