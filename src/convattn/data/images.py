"""Images decoded once, to one array of bytes on disk that all runs share."""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convattn import checks
from convattn.data.listing import Found, LeftOut, Listing
from convattn.errors import DataError

ARRAY, INDEX = "images.npy", "images.json"
# up to here images are padded before they are cropped at random; above, stored with a margin to crop from
SMALL = 64
# the customary margin: 256 pixels stored for 224 used
MARGIN = 256 / 224
NO_PIXELS = np.empty((0, 0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Images:
    """Decoded images (N, S, S, 3) of bytes, with their paths, classes and parts.

    `size` is the side that networks see, at most the stored side S. `groups` has a number for each image, the same for
    those that belong together (a patient, a video); None where the data name no groups.
    """

    pixels: np.ndarray
    paths: tuple[str, ...]
    labels: np.ndarray
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    size: int
    left_out: tuple[LeftOut, ...]
    groups: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path) -> "Images":
        """The images that `decode` wrote to a folder; without pixels if the array has been removed since."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        pixels = np.load(folder / ARRAY, mmap_mode="r") if (folder / ARRAY).exists() else NO_PIXELS
        return cls(
            # files left out leave room at the end
            pixels=pixels[: len(index["paths"])],
            paths=tuple(index["paths"]),
            labels=np.array(index["labels"], dtype=np.int64),
            parts=tuple(index["parts"]),
            classes=tuple(index["classes"]),
            size=index["size"],
            left_out=tuple(LeftOut(**one) for one in index["left_out"]),
            groups=None if index.get("groups") is None else np.array(index["groups"], dtype=np.int64),
        )


def stored_size(size: int) -> int:
    """The side in pixels at which images are stored that networks see at `size`."""
    return size if size <= SMALL else round(size * MARGIN)


def read_image(path: Path, size: int) -> np.ndarray:
    """One image file as a network sees it: (size, size, 3) bytes, the shorter side scaled, the centre cut out.

    Raises:
        DataError: no such file, or one that cannot be decoded.
    """
    margin = (stored_size(size) - size) // 2
    return _read(path, stored_size(size))[margin : margin + size, margin : margin + size]


def decode(
    listing: Listing,
    folder: Path,
    *,
    image_size: int | None,
    wanted_size: int | None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Images:
    """Decode all images of a listing into a folder, and return them.

    Files that cannot be decoded are left out and named in the result.

    Args:
        listing: classes and files.
        folder: where the array goes.
        image_size: the side in pixels that networks see; None for `wanted_size`, or the images' own if that is smaller.
        wanted_size: the side that the network was made for, if any.
        progress: called with the number of images done and of all.

    Raises:
        DataError: no image of a given part can be decoded.
    """
    size = image_size or _default_size(listing, wanted_size)
    kept, left_out = _write_pixels(listing, folder, stored_size(size), progress)
    _check_parts_kept(listing, kept, left_out)
    index = {
        "paths": [one.path for one in kept],
        "labels": [one.label for one in kept],
        "parts": [one.part for one in kept],
        "classes": listing.classes,
        "size": size,
        "left_out": [asdict(one) for one in left_out],
        "groups": _numbered([one.group for one in kept]),
    }
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return Images.load(folder)


def _check_parts_kept(listing: Listing, kept: list[Found], left_out: list[LeftOut]) -> None:
    """Whether every given part has an image left: one without would be cut off another, and nobody would know."""
    part_of = {one.path: one.part for one in listing.found}
    lost = set(part_of.values()) - {one.part for one in kept} - {""}
    for one in left_out:
        if part_of[one.path] in lost:
            raise DataError(f"No {part_of[one.path]} image can be decoded: {one.path}: {one.reason}.")


def _numbered(groups: list[str | None]) -> list[int] | None:
    """A number for each name, the same for the same name; None without names."""
    if None in groups or not groups:
        return None
    return np.unique(np.array(groups), return_inverse=True)[1].tolist()  # type: ignore[no-any-return]


def _write_pixels(
    listing: Listing, folder: Path, side: int, progress: Callable[[int, int], None]
) -> tuple[list[Found], list[LeftOut]]:
    """Write what can be decoded to the array; return the images in it, and those left out."""
    kept: list[Found] = []
    left_out: list[LeftOut] = []
    count = len(listing.found)
    partial = folder / (ARRAY + ".partial")
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(max(count, 1), side, side, 3))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, image in enumerate(pool.map(lambda index: _pixels_or_reason(listing, index, side), range(count))):
            if isinstance(image, LeftOut):
                left_out.append(image)
            else:
                pixels[len(kept)] = image
                kept.append(listing.found[done])
            progress(done + 1, count)
    pixels.flush()
    del pixels
    partial.replace(folder / ARRAY)
    return kept, left_out


def _pixels_or_reason(listing: Listing, index: int, side: int) -> np.ndarray | LeftOut:
    if listing.pixels is not None:
        return _fitted(_pillow().fromarray(listing.pixels[index]), side)
    path = listing.found[index].path
    try:
        return _read((listing.root or Path()) / path, side)
    except DataError as error:
        # without the machine's own path, which the reason may repeat
        return LeftOut(path, f"{error.__cause__}".replace(f"{listing.root}/", ""))


def _read(path: Path, side: int) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"No image at {path}.")
    turn, open_image = checks.extra("PIL.ImageOps", "Reading images").exif_transpose, _pillow().open
    try:
        with open_image(path) as image:
            return _fitted(_colours(turn(image)), side)
    # the decoder raises whatever its parts do: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError
    except Exception as error:
        raise DataError(f"{path} cannot be decoded as an image: {error}") from error


def _colours(image: Any) -> Any:
    """An image of any mode in three channels of bytes."""
    if image.mode.startswith("I;16"):
        # the decoder would cut 16 bits off at 255
        image = _pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fitted(image: Any, side: int) -> np.ndarray:
    """The shorter side scaled to `side`, the centre of the longer one cut out: (side, side, 3) bytes."""
    width, height = image.size
    if min(width, height) != side:
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        image = image.resize((width, height), _pillow().Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image, dtype=np.uint8)[top : top + side, left : left + side]


def _default_size(listing: Listing, wanted: int | None) -> int:
    own = _typical_side(listing)
    # without a wish of the network, the size of customary training
    return min(own, wanted or 224)


def _typical_side(listing: Listing) -> int:
    """The median shorter side of about 200 images, from their headers."""
    if listing.pixels is not None:
        return int(listing.pixels.shape[1])
    sides = []
    for one in listing.found[:: max(1, len(listing.found) // 200)]:
        # a broken one is reported when it is decoded
        with contextlib.suppress(Exception), _pillow().open((listing.root or Path()) / one.path) as image:
            sides.append(min(image.size))
    return int(np.median(sides)) if sides else 1


def _pillow() -> Any:
    return checks.extra("PIL.Image", "Reading images")
