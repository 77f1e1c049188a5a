"""Image files of every kind, against the pixels that they were made of."""

import io
import struct
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import EpsImagePlugin, Image, ImageOps

from convattn.data import Images, Scale, decode, decoding, open_source, read_image
from convattn.data.decoding import Range
from convattn.errors import DataError, WeightsError
from convattn.showing.watching import watch
from convattn.train import Recipe, RunSpec, checkpoint, execute
from small_runs import CLASSES, decoded, write_network

SIDE = 16


def levels(bits: int, channels: int = 1, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Random values of so many bits, (side, side, channels), the largest one among them."""
    values = np.random.default_rng(seed).integers(0, 1 << bits, size=(side, side, channels)).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1
    return values


def eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """What values of so many bits are in three channels of bytes."""
    scaled = np.rint(values.astype(float) * 255 / ((1 << bits) - 1)).astype(np.uint8)
    return np.broadcast_to(scaled, (*scaled.shape[:2], 3))


def write_png(path: Path, values: np.ndarray, significant: int | None = None) -> Path:
    """A PNG of 16 bits a channel, as the specification has it; no library at hand writes its sBIT."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    chunks += [] if significant is None else [(b"sBIT", bytes([significant] * channels))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def write_tiff(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(path, values, **{"photometric": photometric, **options})
    return path


TIFF_KINDS = {
    "grey": (1, {}),
    "colour": (3, {}),
    "big-endian": (3, {"byteorder": ">"}),
    "planes": (3, {"planarconfig": "separate"}),
    "lzw": (3, {"compression": "lzw"}),
    "zlib": (1, {"compression": "zlib", "predictor": True}),
    "tiles": (1, {"tile": (16, 16)}),
}


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", TIFF_KINDS)
def test_tiff_of_16_bits_that_uses_fewer(tmp_path: Path, kind: str, bits: int) -> None:
    channels, options = TIFF_KINDS[kind]
    values = levels(bits, channels)
    stored = np.moveaxis(values, -1, 0) if kind == "planes" else values
    path = write_tiff(tmp_path / "image.tif", stored, **options)
    assert np.array_equal(read_image(path, SIDE), eight_bits(values, bits))


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_tiff_of_packed_bits_says_how_many(tmp_path: Path, bits: int) -> None:
    values = levels(bits - 3)
    path = write_tiff(tmp_path / "image.tif", values, bitspersample=bits)
    assert np.array_equal(read_image(path, SIDE), eight_bits(values, bits))


def test_tiff_that_says_its_largest_value(tmp_path: Path) -> None:
    values = levels(9)
    path = write_tiff(tmp_path / "image.tif", values, extratags=[(281, "H", 1, 4095, True)])
    assert np.array_equal(read_image(path, SIDE), eight_bits(values, 12))


def test_tiff_where_zero_is_white(tmp_path: Path) -> None:
    values = levels(12)
    path = write_tiff(tmp_path / "image.tif", values, photometric="miniswhite")
    assert np.array_equal(read_image(path, SIDE), 255 - eight_bits(values, 12))


def test_tiff_with_alpha_of_16_bits(tmp_path: Path) -> None:
    values = levels(16, 4)
    path = write_tiff(tmp_path / "image.tif", values, extrasamples=["unassalpha"])
    colours, alpha = values[..., :3] / 65535, values[..., 3:] / 65535
    # both are rounded to 8 bits before they are multiplied
    assert np.abs(read_image(path, SIDE) - 255 * (colours * alpha + 1 - alpha)).max() <= 1.5


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_tiff_of_32_bits(tmp_path: Path, dtype: type) -> None:
    values = levels(12)
    assert np.array_equal(
        read_image(write_tiff(tmp_path / "image.tif", values.astype(dtype)), SIDE), eight_bits(values, 12)
    )


def test_tiff_with_negative_values(tmp_path: Path) -> None:
    # as in computed tomography, from air to bone
    values = np.linspace(-1000, 3000, SIDE * SIDE).astype(np.int16).reshape(SIDE, SIDE, 1)
    expected = np.rint((values + 1000.0) * 255 / 4000)
    assert np.array_equal(read_image(write_tiff(tmp_path / "image.tif", values), SIDE)[..., :1], expected)


def test_tiff_of_floats_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "image.tif", levels(8).astype(np.float32))
    with pytest.raises(DataError, match="32-bit pixels of type float32 have no known range"):
        read_image(path, SIDE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiff_of_a_turned_camera(tmp_path: Path, orientation: int) -> None:
    values = levels(12)[:, :10]
    write_tiff(tmp_path / "deep.tif", values, extratags=[(274, "H", 1, orientation, True)])
    write_tiff(tmp_path / "bytes.tif", eight_bits(values, 12), extratags=[(274, "H", 1, orientation, True)])
    assert np.array_equal(read_image(tmp_path / "deep.tif", 10), read_image(tmp_path / "bytes.tif", 10))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_16_bits_that_uses_fewer(tmp_path: Path, channels: int, bits: int) -> None:
    values = levels(bits, channels)
    assert np.array_equal(read_image(write_png(tmp_path / "image.png", values), SIDE), eight_bits(values, bits))


@pytest.mark.parametrize("channels", [2, 4])
def test_png_of_16_bits_with_alpha(tmp_path: Path, channels: int) -> None:
    values = levels(16, channels)
    colours, alpha = values[..., :-1] / 65535, values[..., -1:] / 65535
    seen = read_image(write_png(tmp_path / "image.png", values), SIDE)
    # both are rounded to 8 bits before they are multiplied
    assert np.abs(seen - 255 * (colours * alpha + 1 - alpha)).max() <= 1.5


def test_png_that_says_its_bits(tmp_path: Path) -> None:
    dark = levels(9)
    assert np.array_equal(read_image(write_png(tmp_path / "dark.png", dark, 12), SIDE), eight_bits(dark, 12))
    # scaled up to the depth of the file, as the specification has it
    full = levels(16)
    assert np.array_equal(read_image(write_png(tmp_path / "full.png", full, 12), SIDE), eight_bits(full, 16))


def test_pgm_of_12_bits(tmp_path: Path) -> None:
    values = levels(11)
    (tmp_path / "image.pgm").write_bytes(b"P5 16 16 4095\n" + values.astype(">u2").tobytes())
    assert np.abs(read_image(tmp_path / "image.pgm", SIDE).astype(int) - eight_bits(values, 12)).max() <= 1


def test_one_scale_for_all_images(tmp_path: Path) -> None:
    """A dark image stays darker than a bright one, whatever it is stored in; images of 8 bits stay what they are."""
    data = tmp_path / "data"
    dark, bright, plain = levels(9), levels(12, seed=1), levels(8, 3, seed=2).astype(np.uint8)
    write_png(data / "a" / "1.png", dark)
    write_tiff(data / "a" / "2.tif", bright)
    Image.fromarray(plain).save(data / "a" / "3.png")
    write_tiff(data / "b" / "4.tif", dark, bitspersample=10)
    images = decoded(data, tmp_path / "out")
    expected = [eight_bits(dark, 12), eight_bits(bright, 12), plain, eight_bits(dark, 12)]
    assert np.array_equal(images.pixels, np.stack(expected))
    assert images.findings.deep == 3 and images.findings.scale == Scale(0, 4095)
    assert images.findings.sentences(4) == [
        "3 of 4 images have more than 8 bits a channel: in all of them 0 is black and 4,095 is white."
    ]
    # what a network saw of an image, it sees again
    assert np.array_equal(read_image(data / "a" / "1.png", SIDE, images.findings.scale), expected[0])
    assert Images.load(tmp_path / "out").findings == images.findings


def test_the_scale_of_ranges() -> None:
    assert Scale.of([Range(3, 200, 0)]) == Scale(0, 255)
    assert Scale.of([Range(0, 256, 0), Range(0, 5, 0)]) == Scale(0, 511)
    assert Scale.of([Range(0, 256, 0), Range(0, 5, 12)]) == Scale(0, 4095)
    assert Scale.of([Range(-5, 250, 0)]) == Scale(-5, 250)
    assert Scale.of([Range(0, 0, 0)]) == Scale(0, 255)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_a_drawing_in_the_alpha_channel(tmp_path: Path, suffix: str) -> None:
    """Black all over, the shape in alpha alone: it is black on white."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    shape[4:9, 3:12] = 255
    layers = np.dstack([np.zeros((SIDE, SIDE, 3), np.uint8), shape])
    Image.fromarray(layers).save(tmp_path / f"image{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(read_image(tmp_path / f"image{suffix}", SIDE)[..., 1], 255 - shape)
    if suffix != ".webp":
        Image.fromarray(layers[..., [0, 3]]).save(tmp_path / f"grey{suffix}")
        assert np.array_equal(read_image(tmp_path / f"grey{suffix}", SIDE)[..., 1], 255 - shape)


def test_half_transparent_pixels_are_laid_on_white(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    layers = random.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    Image.fromarray(layers).save(tmp_path / "image.png")
    colours, alpha = layers[..., :3].astype(float), layers[..., 3:] / 255
    expected = np.floor(colours * alpha + 255 * (1 - alpha) + 0.5)
    assert np.abs(read_image(tmp_path / "image.png", SIDE) - expected).max() == 0


def test_a_transparent_palette_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).quantize(32)
    picture.save(tmp_path / "image.png", transparency=bytes(range(0, 256, 8)))
    entries = np.array(picture.getpalette()).reshape(-1, 3)
    index = np.asarray(picture)
    alpha = (8 * index / 255)[..., None]
    expected = np.floor(entries[index] * alpha + 255 * (1 - alpha) + 0.5)
    assert np.array_equal(read_image(tmp_path / "image.png", SIDE), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (SIDE, SIDE), 0 if mode == "L" else (10, 20, 30))
    image.paste(99 if mode == "L" else (99, 98, 97), (0, 0, 8, SIDE))
    image.save(tmp_path / "image.png", transparency=0 if mode == "L" else (10, 20, 30))
    seen = read_image(tmp_path / "image.png", SIDE)
    assert (seen[:, 8:] == 255).all() and (seen[:, :8, 0] == 99).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2, "quality": 40}])
def test_jpeg_as_pillow_decodes_it(tmp_path: Path, mode: str, options: dict[str, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((61, 45)).convert(mode).save(tmp_path / "image.jpg", **options)
    with Image.open(tmp_path / "image.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decoding.decode_file(tmp_path / "image.jpg").image, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_of_a_turned_camera(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((24, 16)).save(tmp_path / "image.jpg", exif=exif)
    with Image.open(tmp_path / "image.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decoding.decode_file(tmp_path / "image.jpg").image, expected)


def test_jpeg_that_is_stored_as_red_green_and_blue(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg", quality=100, keep_rgb=True)
    assert np.abs(read_image(tmp_path / "image.jpg", SIDE).astype(int) - noise).max() <= 2


def test_jpeg_without_imagecodecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "imagecodecs", None)
        decoding._same_as_pillow.cache_clear()
        by_pillow = read_image(tmp_path / "image.jpg", SIDE)
        assert not decoding._same_as_pillow()
        with pytest.raises(DataError, match="needs the package imagecodecs: pip install"):
            read_image(write_png(tmp_path / "deep.png", levels(12)), SIDE)
    decoding._same_as_pillow.cache_clear()
    assert np.array_equal(read_image(tmp_path / "image.jpg", SIDE), by_pillow)
    assert decoding._same_as_pillow()


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".jp2", ".tif", ".bmp", ".gif", ".ppm", ".tga", ".qoi"])
def test_every_ending_that_pillow_reads(tmp_path: Path, suffix: str) -> None:
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        image = Image.new("RGB", (SIDE, SIDE), name)
        image.save(tmp_path / "data" / name / f"a{suffix}")
    images = decoded(tmp_path / "data", tmp_path / "out")
    assert len(images.paths) == len(CLASSES) and not images.left_out
    # the classes are called blue, green and red, and sorted
    assert images.pixels.reshape(3, -1, 3).mean(axis=1).argmax(axis=1).tolist() == [2, 1, 0]


def test_pages_are_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = levels(8, 3).astype(np.uint8)
    pages = [Image.fromarray(first), *(Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)) for shade in range(3))]
    (data / "a").mkdir(parents=True)
    (data / "b").mkdir()
    pages[0].save(data / "a" / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(data / "b" / "pages.gif", save_all=True, append_images=pages[1:3])
    write_tiff(
        data / "b" / "stack.tif",
        np.stack([levels(12, seed=seed)[..., 0] for seed in range(5)]),
        photometric="minisblack",
    )
    pages[1].save(data / "b" / "single.png")
    images = decoded(data, tmp_path / "out")
    assert images.findings.pages == {"a/pages.tif": 4, "b/pages.gif": 3, "b/stack.tif": 5}
    assert np.array_equal(images.pixels[0], first)
    assert np.array_equal(images.pixels[images.paths.index("b/stack.tif")], eight_bits(levels(12), 12))
    assert (
        "3 files (a/pages.tif, b/pages.gif, b/stack.tif) have more than one page, of which the first is used: 9 "
        "further pages are not."
    ) in images.findings.sentences(4)


def test_a_camera_that_adds_a_preview_has_one_page(tmp_path: Path) -> None:
    photo = Image.fromarray(levels(8, 3).astype(np.uint8))
    photo.save(tmp_path / "image.jpg", "MPO", save_all=True, append_images=[photo.resize((8, 8))])
    with Image.open(tmp_path / "image.jpg") as image:
        assert image.n_frames == 2
    assert decoding.decode_file(tmp_path / "image.jpg").pages == 1


def test_images_of_a_single_colour_and_equal_classes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("flat", "mixed"):
        (data / name).mkdir(parents=True)
    for index in range(3):
        Image.new("L", (SIDE, SIDE), 7).save(data / "flat" / f"{index}.png")
    Image.fromarray(levels(8, 3).astype(np.uint8)).save(data / "mixed" / "0.png")
    Image.new("L", (SIDE, SIDE), 9).save(data / "mixed" / "1.png")
    images = decoded(data, tmp_path / "out")
    assert images.findings.single_colour == ("flat/0.png", "flat/1.png", "flat/2.png", "mixed/1.png")
    assert images.findings.alike == ("flat",)
    assert images.findings.sentences(5) == [
        "4 of 5 images are of a single colour: flat/0.png, flat/1.png, flat/2.png and 1 more.",
        "All images of the class flat are equal.",
    ]


def test_an_enormous_image_in_a_small_file(tmp_path: Path) -> None:
    path = write_png(tmp_path / "bomb.png", levels(16))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(DataError, match="60,000 x 60,000 pixels are more than"):
        read_image(path, SIDE)


def test_broken_jpeg(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(levels(8, 3, side=64).astype(np.uint8)).save(file, "JPEG")
    for kept in (3, 20, 200, len(file.getvalue()) // 2, len(file.getvalue()) - 2):
        (tmp_path / "image.jpg").write_bytes(file.getvalue()[:kept])
        with pytest.raises(DataError, match=r"image\.jpg cannot be decoded as an image"):
            read_image(tmp_path / "image.jpg", SIDE)


def test_the_folder_keeps_no_partial_array(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a", "b"):
        write_png(data / name / "1.png", levels(12))
    (tmp_path / "out").mkdir()
    listing = open_source(data).listing(tmp_path / "unpacked")
    decode(listing, tmp_path / "out", image_size=None, wanted_size=None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images.json", "images.npy"]


def test_the_scale_is_kept_with_a_network(tmp_path: Path) -> None:
    """So that whatever is shown to it later looks as its training images did."""
    data = tmp_path / "data"
    for index, name in enumerate(CLASSES):
        for image in range(10):
            write_png(data / name / f"{image}.png", levels(12, seed=10 * index + image))
    images = decoded(data, tmp_path / "out")
    network = f"{write_network(tmp_path)}:network"
    spec = RunSpec("se", 0, network, None, "paper", Recipe(1, 8, 0.1, 0.0), False, "cpu", 1)
    execute(spec, images, tmp_path / "run", lambda progress: None)
    _, about = checkpoint.load(tmp_path / "run" / "weights.safetensors", trust=network)
    assert about["scale"] == {"low": 0, "high": 4095}
    # alone it would be taken for an image of 9 bits
    dark = write_png(tmp_path / "dark.png", levels(9))
    seen = watch(tmp_path / "run" / "weights.safetensors", [dark], None, trust=network).images
    assert np.array_equal(seen[0], eight_bits(levels(9), 12))
    assert np.array_equal(read_image(dark, SIDE), eight_bits(levels(9), 9))


@pytest.mark.parametrize(
    "scale", [3, {}, {"low": 0}, {"low": 5, "high": 5}, {"low": 0, "high": 1e3}, {"low": 0, "high": 2**40}]
)
def test_a_broken_scale_is_no_checkpoint(tmp_path: Path, scale: object) -> None:
    about = {"backbone": "resnet20", "variant": "baseline", "start": "paper", "classes": ["a", "b"], "image_size": 8}
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3, "scale": scale}
    checkpoint.save(tmp_path / "a.safetensors", checkpoint.build(about), about)
    with pytest.raises(WeightsError, match="not what they belong to"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_no_program_in_an_image_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is what its content says, whatever it is called; Pillow hands EPS to Ghostscript, which runs it."""
    ran: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *options, **more: ran.append(options))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    data = tmp_path / "data"
    for name in CLASSES:
        (data / name).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), name).save(data / name / "a.png")
    (data / "red" / "b.png").write_bytes(program)
    (data / "red" / "c.jpg").write_bytes(program)
    images = decoded(data, tmp_path / "out")
    assert [(file.path, file.reason) for file in images.left_out] == [
        ("red/b.png", "cannot identify image file"),
        ("red/c.jpg", "cannot identify image file"),
    ]
    with pytest.raises(DataError, match="cannot identify image file"):
        read_image(data / "red" / "b.png", SIDE)
    assert ran == []


# cases that other readers get wrong


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_the_size_of_files_that_pillow_does_not_open(tmp_path: Path, bits: int, photometric: str) -> None:
    data = tmp_path / "data"
    for index, name in enumerate(CLASSES):
        values = levels(bits, 3 if photometric == "rgb" else 1, seed=index, side=24)
        write_tiff(data / name / "a.tif", values, bitspersample=bits, photometric=photometric)
    images = decoded(data, tmp_path / "out")
    assert images.size == 24
    assert np.array_equal(images.pixels[2], eight_bits(values, bits))


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_2000_of_many_bits(tmp_path: Path, channels: int, bits: int) -> None:
    values = levels(bits, channels)
    stored = values[..., 0] if channels == 1 else values
    content = imagecodecs.jpeg2k_encode(stored, level=0, bitspersample=bits, reversible=True)
    (tmp_path / "image.jp2").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "image.jp2", SIDE), eight_bits(values, bits))


def soft(dtype: type = np.uint16) -> np.ndarray:
    """Alpha from nothing to all, (side, side, 1)."""
    return np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE, 1).astype(dtype)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_black_ink_with_soft_alpha_of_16_bits(tmp_path: Path, kind: str) -> None:
    layers = np.concatenate([np.zeros((SIDE, SIDE, 3), np.uint16), soft()], axis=2)
    if kind == "png":
        path = write_png(tmp_path / "image.png", layers)
    else:
        path = write_tiff(tmp_path / "image.tif", layers, extrasamples=["unassalpha"])
    expected = 255 - np.rint(soft() / 257.0)
    assert np.abs(read_image(path, SIDE) - expected).max() <= 1


def test_premultiplied_alpha_of_16_bits(tmp_path: Path) -> None:
    colours = levels(16, 3).astype(float)
    weighted = np.rint(colours * (soft() / 65535.0)).astype(np.uint16)
    path = write_tiff(tmp_path / "image.tif", np.concatenate([weighted, soft()], axis=2), extrasamples=["assocalpha"])
    alpha = soft() / 65535.0
    expected = colours / 257 * alpha + 255 * (1 - alpha)
    assert np.abs(read_image(path, SIDE) - expected).max() <= 1.5


def test_a_fourth_channel_that_is_no_alpha(tmp_path: Path) -> None:
    layers = np.concatenate([levels(12, 3), np.full((SIDE, SIDE, 1), 300, np.uint16)], axis=2)
    path = write_tiff(tmp_path / "image.tif", layers, extrasamples=["unspecified"])
    assert np.array_equal(read_image(path, SIDE), eight_bits(layers[..., :3], 12))
    stack = write_tiff(tmp_path / "stack.tif", layers, photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match="an image of 4 channels without colours"):
        read_image(stack, SIDE)


def test_bytes_with_a_sign(tmp_path: Path) -> None:
    values = np.linspace(-128, 127, SIDE * SIDE).astype(np.int8).reshape(SIDE, SIDE, 1)
    path = write_tiff(tmp_path / "image.tif", values)
    assert np.array_equal(read_image(path, SIDE)[..., :1], values.astype(int) + 128)


def test_the_name_of_a_chunk_in_a_comment_is_no_chunk(tmp_path: Path) -> None:
    path = write_png(tmp_path / "image.png", levels(12))
    content = path.read_bytes()
    text = b"Comment\0the sBITx chunk"
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    path.write_bytes(content[:33] + chunk + content[33:])
    assert np.array_equal(read_image(path, SIDE), eight_bits(levels(12), 12))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(tmp_path: Path, depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << depth, (SIDE, SIDE))
    bits = ((values[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(SIDE, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", 1))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    expected = np.where(values == 1, 255, values * 255 // ((1 << depth) - 1))
    assert np.array_equal(read_image(tmp_path / "image.png", SIDE)[..., 0], expected)


def test_a_turned_camera_that_says_so_in_xmp_only(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(noise).resize((24, 16)).save(tmp_path / "image.jpg", xmp=xmp)
    with Image.open(tmp_path / "image.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == (24, 16, 3)
    assert np.array_equal(decoding.decode_file(tmp_path / "image.jpg").image, expected)
