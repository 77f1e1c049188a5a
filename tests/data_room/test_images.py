"""Decoded images: what is stored, at which size, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convattn.data import ARRAY, Images, decode, open_source, read_image, stored_size
from convattn.errors import DataError
from small_runs import CLASSES, decoded, pixels, write_images, write_parts


def write(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def stored(path: Path) -> tuple[str, np.ndarray]:
    """The mode of an image file and its values as they are."""
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def test_stored_are_the_files(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=4)
    images = decoded(data, tmp_path / "out")
    assert images.size == 16
    assert images.classes == CLASSES
    assert images.pixels.dtype == np.uint8
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for index, path in enumerate(images.paths):
        assert np.array_equal(images.pixels[index], stored(data / path)[1])


def test_load_gives_what_decode_gave(tmp_path: Path) -> None:
    data = write_parts(tmp_path / "data", train=3, test=1)
    (data / "train" / "red" / "broken.png").write_bytes(b"")
    images = decoded(data, tmp_path / "out")
    again = Images.load(tmp_path / "out")
    assert np.array_equal(images.pixels, again.pixels)
    assert np.array_equal(images.labels, again.labels)
    for name in ("paths", "parts", "classes", "size", "left_out"):
        assert getattr(images, name) == getattr(again, name)
    assert len(again.left_out) == 1


def test_loaded_pixels_cannot_be_written(tmp_path: Path) -> None:
    images = decoded(write_images(tmp_path / "data", count=1), tmp_path / "out")
    with pytest.raises(ValueError, match="read-only"):
        images.pixels[0] = 0


def test_broken_images_are_left_out_by_path(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=3)
    whole = decoded(data, tmp_path / "whole")
    (data / "blue" / "text.jpg").write_text("this is text")
    (data / "green" / "empty.png").write_bytes(b"")
    write(data / "green" / "cut.jpg", noise(64, 64), quality=90)
    content = (data / "green" / "cut.jpg").read_bytes()
    (data / "green" / "cut.jpg").write_bytes(content[: len(content) // 2])
    images = decoded(data, tmp_path / "out")
    assert [one.path for one in images.left_out] == ["blue/text.jpg", "green/cut.jpg", "green/empty.png"]
    reasons = {one.path: one.reason for one in images.left_out}
    assert "truncated" in reasons["green/cut.jpg"]
    assert "cannot identify image file" in reasons["blue/text.jpg"]
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    assert images.paths == whole.paths
    assert np.array_equal(images.pixels, whole.pixels)
    assert np.array_equal(images.labels, whole.labels)
    assert len(Images.load(tmp_path / "out").pixels) == len(images.paths)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images.json", ARRAY]


def test_only_broken_images(tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(b"")
    images = decoded(tmp_path / "data", tmp_path / "out")
    assert len(images.left_out) == 3
    assert images.pixels.shape[0] == len(images.paths) == len(images.labels) == 0


def test_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told: list[tuple[int, int]] = []
    listing = open_source(write_images(tmp_path / "data", count=2)).listing(tmp_path / "unpacked")
    decode(listing, tmp_path / "out", image_size=None, wanted_size=None, progress=lambda *where: told.append(where))
    assert told == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("image_size", "wanted", "expected"),
    [(None, None, 20), (None, 32, 20), (None, 12, 12), (24, 12, 24), (8, None, 8)],
)
def test_size(tmp_path: Path, image_size: int | None, wanted: int | None, expected: int) -> None:
    images = decoded(
        write_images(tmp_path / "data", count=1, side=20), tmp_path / "out", image_size=image_size, wanted_size=wanted
    )
    assert images.size == images.pixels.shape[1] == images.pixels.shape[2] == expected


def test_the_default_size_is_the_median_of_the_shorter_sides(tmp_path: Path) -> None:
    for index, (height, width) in enumerate([(10, 30), (14, 14), (40, 18), (11, 11), (90, 90)]):
        write(tmp_path / "data" / CLASSES[index % 2] / f"{index}.png", noise(height, width))
    assert decoded(tmp_path / "data", tmp_path / "out").size == 14


def test_large_images_are_stored_with_a_margin(tmp_path: Path) -> None:
    assert [stored_size(size) for size in (1, 32, 64)] == [1, 32, 64]
    assert [stored_size(size) for size in (65, 112, 224)] == [74, 128, 256]
    images = decoded(write_images(tmp_path / "data", count=1, side=100), tmp_path / "out", image_size=70)
    assert images.size == 70
    assert images.pixels.shape[1:] == (80, 80, 3)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (48, 16), (16, 16), (16, 21), (19, 16)])
def test_the_centre_is_cut_out(tmp_path: Path, height: int, width: int) -> None:
    path = write(tmp_path / "image.png", noise(height, width))
    top, left = (height - 16) // 2, (width - 16) // 2
    assert np.array_equal(read_image(path, 16), noise(height, width)[top : top + 16, left : left + 16])


def test_the_shorter_side_is_scaled(tmp_path: Path) -> None:
    # three squares side by side, of which the middle one stays
    squares = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8).repeat(32, axis=0), 32, axis=1)
    path = write(tmp_path / "image.png", squares)
    for size in (8, 16, 48):
        seen = read_image(path, size)
        assert seen.shape == (size, size, 3)
        # next to its edges the neighbours shine in
        assert (seen[:, 2:-2] == (0, 255, 0)).all()


def test_halving_takes_means(tmp_path: Path) -> None:
    small = noise(8, 8)
    path = write(tmp_path / "image.png", small.repeat(2, axis=0).repeat(2, axis=1))
    # a bilinear filter of the scale's width: a quarter of the weight falls on the neighbours of each pixel
    assert np.abs(read_image(path, 8).astype(float).mean(axis=(0, 1)) - small.mean(axis=(0, 1))).max() < 6
    flat = write(tmp_path / "flat.png", np.full((30, 30, 3), 77, np.uint8))
    assert (read_image(flat, 13) == 77).all()


ORIENTATIONS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_cameras_that_were_turned(tmp_path: Path, orientation: int) -> None:
    upright = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](upright))
    path = write(tmp_path / "image.png", stored, exif=exif)
    assert np.array_equal(read_image(path, 16), upright)


def grey(level: np.ndarray) -> np.ndarray:
    return level[..., None].repeat(3, axis=2)


def test_grey_images(tmp_path: Path) -> None:
    level = noise(16, 16)[..., 0]
    assert np.array_equal(read_image(write(tmp_path / "image.png", level), 16), grey(level))


def test_black_and_white_images(tmp_path: Path) -> None:
    level = noise(16, 16)[..., 0] > 127
    Image.fromarray(level).save(tmp_path / "image.png")
    assert stored(tmp_path / "image.png")[0] == "1"
    assert np.array_equal(read_image(tmp_path / "image.png", 16), grey(255 * level.astype(np.uint8)))


def test_images_with_a_palette(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(16, 16)).quantize(32)
    picture.save(tmp_path / "image.png")
    assert stored(tmp_path / "image.png")[0] == "P"
    colours = np.array(picture.getpalette()).reshape(-1, 3)[np.asarray(picture)]
    assert np.array_equal(read_image(tmp_path / "image.png", 16), colours)


def test_print_colours(tmp_path: Path) -> None:
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    flat.save(tmp_path / "image.jpg", quality=95)
    seen = read_image(tmp_path / "image.jpg", 16).reshape(-1, 3).mean(axis=0)
    assert seen[0] > 240 and seen[1] < 15 and seen[2] < 15


@pytest.mark.parametrize("size", [16, 64, 70])
def test_read_image_is_what_networks_see(tmp_path: Path, size: int) -> None:
    random = np.random.default_rng(0)
    data = tmp_path / "data"
    for index, (height, width) in enumerate([(100, 80), (75, 120), (16, 16), (200, 90)]):
        write(data / CLASSES[index % 2] / f"{index}.jpg", pixels(index % 2, random, height=height, width=width))
    images = decoded(data, tmp_path / "out", image_size=size)
    margin = (images.pixels.shape[1] - size) // 2
    for path, stored in zip(images.paths, images.pixels, strict=True):
        assert np.array_equal(read_image(data / path, size), stored[margin : margin + size, margin : margin + size])


def test_messages_of_read_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No image at .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png", 8)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match=r"text\.png cannot be decoded as an image: cannot identify"):
        read_image(tmp_path / "text.png", 8)
