"""One image file decoded, whatever its format: three channels of bytes, or whole numbers of more than 8 bits.

JPEG is decoded by imagecodecs, which gives the same pixels as Pillow in 0.17 of its time at 32 pixels, 0.39 at 128 and
0.49 at 512, torchvision's deprecated decoder in 0.48 to 0.58 (benchmarks/results/decoding.md); TIFF with more than 8
bits a channel by tifffile and such PNG by imagecodecs, since Pillow cuts their colours off to 8; all else by Pillow.
"""

import contextlib
import io
import logging
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convattn import checks
from convattn.data.listing import image_formats
from convattn.errors import DataError

BYTE = 255
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# the box of a file, and the code stream alone
JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# of JPEG: the markers of a frame's header, which hold its size; those without content; and that of the end
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
NO_CONTENT = frozenset({0x01, *range(0xD0, 0xD8)})
END = b"\xff\xd9"
# of TIFF: kinds of an additional sample that are alpha
PREMULTIPLIED, STRAIGHT = 1, 2
# a photograph with a preview or a depth map behind it is one image, not a file of several pages
ONE_IMAGE = {"MPO", "ICO", "ICNS", "CUR", "PSD"}
# Exif orientation: how the pixels are turned to stand upright, as (transposed, rows reversed, columns reversed)
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Scale:
    """Which values of images with more than 8 bits a channel are black and white: `low` becomes 0 and `high` 255.

    It is one for all images of the data, so that their brightness can be compared.
    """

    low: int
    high: int

    @classmethod
    def of(cls, ranges: "Iterable[Range]") -> "Scale":
        """The scale of images with these ranges: as many bits as their largest value takes, or as files say, if more.

        Where there are negative values it goes from the lowest to the highest one.
        """
        ranges = list(ranges)
        low, high = min(values.low for values in ranges), max(values.high for values in ranges)
        if low < 0:
            return cls(low, max(high, low + 1))
        return cls(0, (1 << max(8, high.bit_length(), *(values.bits for values in ranges))) - 1)

    def bytes(self, values: np.ndarray) -> np.ndarray:
        """Whole numbers as bytes, rounded."""
        scaled = (values.astype(np.float64) - self.low) * (BYTE / (self.high - self.low))
        return np.rint(scaled).clip(0, BYTE).astype(np.uint8)

    def __str__(self) -> str:
        return f"{self.low:,} is black and {self.high:,} is white"


@dataclass(frozen=True)
class Range:
    """The lowest and the highest value of an image, and the bits that its file says it uses, 0 if it says none."""

    low: int
    high: int
    bits: int


@dataclass(frozen=True)
class Deep:
    """An image of more than 8 bits a channel: whole numbers (H, W, C), where C is 1 or 3, or 2 or 4 with alpha.

    `inverted` tells that 0 is white. `bits` are those that the file says it uses, 0 if it says none. `opaque` is the
    value of alpha that hides what is behind, 0 for that of the scale; `premultiplied` colours are weighted already.
    """

    values: np.ndarray
    bits: int = 0
    inverted: bool = False
    opaque: int = 0
    premultiplied: bool = False

    @property
    def range(self) -> Range:
        """The range of all channels but alpha, which says nothing of brightness."""
        channels = self.values.shape[2]
        colours = self.values[..., : channels - (channels % 2 == 0)]
        return Range(int(colours.min()), int(colours.max()), self.bits)

    def pixels(self, scale: Scale) -> np.ndarray:
        """Bytes (H, W, 3), alpha laid on white."""
        has_alpha = self.values.shape[2] % 2 == 0
        colours = scale.bytes(self.values[..., :-1] if has_alpha else self.values)
        colours = BYTE - colours if self.inverted else colours
        if has_alpha:
            alpha = Scale(0, self.opaque or scale.high).bytes(self.values[..., -1:])
            weight = np.full_like(alpha, BYTE) if self.premultiplied else alpha
            white = BYTE - alpha.astype(np.uint16) if self.premultiplied else 0
            colours = np.minimum(on_white(colours, weight) + white, BYTE).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


@dataclass(frozen=True)
class Decoded:
    """An image file: its bytes (H, W, 3), or what is to be scaled to them, and the number of its pages."""

    image: np.ndarray | Deep
    pages: int = 1


def decode_file(path: Path, name: str | None = None) -> Decoded:
    """Decode an image file, turned upright, alpha laid on white; of several pages the first.

    Args:
        path: the file.
        name: how a message calls it, `path` by default.

    Raises:
        DataError: no such file, or one that cannot be decoded.
    """
    if not path.is_file():
        raise DataError(f"No image at {name or path}.")
    try:
        return _decoded(path.read_bytes())
    # the decoders raise whatever their parts do: OSError, SyntaxError, ValueError, struct.error, RuntimeError
    except Exception as error:
        raise DataError(f"{name or path} cannot be decoded as an image: {checks.reason(error)}") from error


def side_of(path: Path) -> int:
    """The shorter side of an image file, from its header.

    Raises:
        Exception: whatever a decoder raises for a file that it cannot open.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(TIFF):
        with checks.extra("tifffile", "Reading TIFF files").TiffFile(path) as opened:
            return int(min(opened.pages[0].imagewidth, opened.pages[0].imagelength))
    with pillow().open(path, formats=image_formats()) as image:
        return int(min(image.size))


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Bytes (H, W, C) laid on white with the bytes of alpha (H, W, 1), rounded."""
    opacity = alpha.astype(np.uint32)
    weighted: np.ndarray = colours * opacity + BYTE * (BYTE - opacity)
    return ((weighted + BYTE // 2) // BYTE).astype(np.uint8)


def _decoded(content: bytes) -> Decoded:
    if content.startswith(JPEG):
        pixels = _jpeg(content)
        if pixels is not None:
            return Decoded(pixels)
    if content.startswith(PNG) and content[24:25] == b"\x10":
        return Decoded(_deep_png(content))
    if content.startswith(JPEG_2000) and _jpeg_2000_bits(content) > 8:
        values = _codecs().jpeg2k_decode(content)
        alpha = (1 << _jpeg_2000_bits(content)) - 1
        return Decoded(Deep(values if values.ndim == 3 else values[..., None], _jpeg_2000_bits(content), opaque=alpha))
    pages = 1
    if content.startswith(TIFF):
        image, pages = _tiff(content)
        if image is not None:
            return Decoded(image, pages)
    try:
        # of EPS, whatever its name, Pillow would have Ghostscript run the program that is in it
        opened_image = pillow().open(io.BytesIO(content), formats=image_formats())
    except pillow().UnidentifiedImageError as error:
        raise ValueError("cannot identify image file") from error
    with opened_image as opened:
        _correct_transparency(opened, content)
        if opened.format not in ONE_IMAGE and not content.startswith(TIFF):
            pages = int(getattr(opened, "n_frames", 1))
        # its decoder scales values of any number of bits to 16
        return Decoded(_by_pillow(opened, bits=16 if opened.format == "PPM" else 0), pages)


def _jpeg(content: bytes) -> np.ndarray | None:
    """The pixels of a JPEG of one or three channels by imagecodecs; None where Pillow has to decode it."""
    size = _jpeg_size(content)
    # what is too large for Pillow is refused there
    if size is None or size[0] * size[1] > (pillow().MAX_IMAGE_PIXELS or np.inf) or not _same_as_pillow():
        return None
    try:
        pixels = _codecs().jpeg8_decode(content)
    # of a broken file, which Pillow may read, or say more of
    except Exception:
        return None
    pixels = _upright(pixels if pixels.ndim == 3 else pixels[..., None], _orientation(content))
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _orientation(content: bytes) -> int:
    """How a camera was turned, by the Exif data of a JPEG or PNG."""
    if not any(name in content for name in (b"Exif", b"eXIf", b"tiff:Orientation")):
        return 1
    with pillow().open(io.BytesIO(content), formats=("JPEG", "PNG")) as opened:
        return int(opened.getexif().get(0x0112, 1))


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of a whole JPEG with 8 bits in one or three channels; None for any other."""
    place = 2
    while place + 9 < len(content):
        if content[place] != 0xFF:
            return None
        marker = content[place + 1]
        if marker == 0xFF:
            place += 1
        elif marker in NO_CONTENT:
            place += 2
        elif marker in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, place + 4)
            # without an end it was cut off, where imagecodecs fills in grey
            whole = content.find(END, place) > 0
            return (height, width) if whole and bits == 8 and height and channels in (1, 3) else None
        else:
            place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    return None


@cache
def _same_as_pillow() -> bool:
    """Whether imagecodecs is there and decodes a JPEG, in full and in halved colours, to the pixels that Pillow does.

    Both bring a library of their own, whose versions may differ.
    """
    with contextlib.suppress(Exception):
        random = np.random.default_rng(0)
        smooth = pillow().fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((67, 53))
        for options in ({"subsampling": 0, "quality": 90}, {"subsampling": 2, "quality": 60, "progressive": True}):
            file = io.BytesIO()
            smooth.save(file, "JPEG", **options)
            with pillow().open(file) as opened:
                if not np.array_equal(_codecs().jpeg8_decode(file.getvalue()), np.asarray(opened.convert("RGB"))):
                    return False
        return True
    return False


def _deep_png(content: bytes) -> Deep:
    """A PNG of 16 bits a channel, with the significant bits of its chunk sBIT where it has one."""
    _check_size(*struct.unpack_from(">II", content, 16))
    values = _codecs().png_decode(content)
    values = _upright(values if values.ndim == 3 else values[..., None], _orientation(content))
    bits = max((bits for bits in _chunk(content, b"sBIT") if bits <= 16), default=0)
    return Deep(values, bits, opaque=(1 << 16) - 1)


def _chunk(content: bytes, kind: bytes) -> bytes:
    """The data of a chunk of a PNG before its pixels, empty if it has none."""
    place = len(PNG)
    while place + 8 <= len(content) and content[place + 4 : place + 8] != b"IDAT":
        length = int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == kind:
            return content[place + 8 : place + 8 + length]
        place += length + 12
    return b""


def _correct_transparency(image: Any, content: bytes) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow scales its pixels, but not that grey."""
    transparent = image.info.get("transparency")
    if content.startswith(PNG) and content[25] == 0 and content[24] in (2, 4) and isinstance(transparent, int):
        image.info["transparency"] = transparent * BYTE // ((1 << content[24]) - 1)


def _jpeg_2000_bits(content: bytes) -> int:
    """The bits of the first channel of a JPEG 2000 file, by the header of its code stream."""
    place = content.find(JPEG_2000[1] + b"\xff\x51")
    # behind the markers, two lengths of 2 bytes, eight sizes of 4 and the number of channels
    return (content[place + 42] & 0x7F) + 1 if 0 <= place < len(content) - 42 else 8


def _tiff(content: bytes) -> tuple[Deep | None, int]:
    """The first page of a TIFF of more than 8 bits a channel, None for any other, and the number of pages."""
    reader = checks.extra("tifffile", "Reading TIFF files")
    # it writes what it finds odd to the log, and goes on
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with reader.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        # bytes with a sign would be read as if they had none
        is_deep = page.bitspersample > 8 or (page.dtype is not None and page.dtype.kind == "i")
        return (_deep_page(page) if is_deep else None), len(file.pages)


def _deep_page(page: Any) -> Deep:
    """The page of a TIFF, as tifffile has it, whose samples are whole numbers of more than 8 bits, or with a sign."""
    photometric, stored = page.photometric.name, (1 << page.bitspersample) - 1
    if page.dtype is None or page.dtype.kind not in "iu":
        raise ValueError(f"{page.bitspersample}-bit pixels of type {page.dtype} have no known range")
    if photometric not in ("MINISWHITE", "MINISBLACK", "RGB"):
        raise ValueError(f"{page.bitspersample}-bit pixels of {photometric} cannot be read")
    _check_size(page.imagewidth, page.imagelength)
    values = _channels_last(page.asarray(), page.axes)
    alphas = [int(sample) for sample in page.extrasamples if sample in (PREMULTIPLIED, STRAIGHT)]
    colours = 3 if photometric == "RGB" else 1
    if not alphas and colours == 1 and values.shape[2] > 1:
        raise ValueError(f"an image of {values.shape[2]} channels without colours")
    # what else there is, such as infrared, is no colour
    values = _upright(values[..., : colours + bool(alphas)], _tag(page, "Orientation", 1))
    # what a file is stored in says nothing: 16 bits hold 12 as well
    bits = page.bitspersample if page.bitspersample % 8 else 0
    highest = _tag(page, "MaxSampleValue", 0)
    bits = highest.bit_length() if 0 < highest < stored else bits
    # where 12 bits are stored in 16, alpha may use 12 as well
    uses_all = bool(alphas) and int(values[..., -1].max()).bit_length() > int(values[..., :-1].max()).bit_length()
    opaque = stored if uses_all else 0
    return Deep(values, bits, photometric == "MINISWHITE", opaque, premultiplied=PREMULTIPLIED in alphas)


def _tag(page: Any, name: str, default: int) -> int:
    """The value of a tag of a TIFF, the highest where it has several."""
    tag = page.tags.get(name)
    return default if tag is None else int(np.max(tag.value))


def _check_size(width: int, height: int) -> None:
    """Refuse what Pillow refuses: a small file that unpacks to an enormous image."""
    most = pillow().MAX_IMAGE_PIXELS
    if most is not None and width * height > 2 * most:
        raise ValueError(f"{width:,} x {height:,} pixels are more than the {2 * most:,} that are read")


def _channels_last(values: np.ndarray, axes: str) -> np.ndarray:
    """The first image (H, W, C) of an array whose axes have letters: Y, X, and S for channels."""
    for letter in axes:
        if letter not in "YXS":
            # a volume, of which this is the first slice
            values = values.take(0, axes.index(letter))
            axes = axes.replace(letter, "")
    values = np.moveaxis(values, axes.index("S"), -1) if "S" in axes else values[..., None]
    if values.ndim != 3:
        raise ValueError(f"an image with axes {axes}")
    return values


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    transposed, rows, columns = TURNS.get(orientation, (False, False, False))
    values = values.swapaxes(0, 1) if transposed else values
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


def _by_pillow(image: Any, bits: int) -> np.ndarray | Deep:
    image = checks.extra("PIL.ImageOps", "Reading images").exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        return Deep(np.asarray(image)[..., None], bits)
    if image.has_transparency_data:
        layers = np.asarray(image.convert("RGBA"))
        return on_white(layers[..., :3], layers[..., 3:])
    return np.asarray(image.convert("RGB"))


def _codecs() -> Any:
    return checks.extra("imagecodecs", "Reading images of more than 8 bits")


def pillow() -> Any:
    """The module that opens what has no faster decoder."""
    return checks.extra("PIL.Image", "Reading images")
